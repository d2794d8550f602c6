"""`ScriptedServer`: the choice of a behaviour, the records, the connections, and the end."""

from __future__ import annotations

import asyncio
import gc

import aiohttp
import pytest

from lmbridge.testing import Exchange, ScriptedServer, answer, hang_up, reply, stall
from tests.testing.support import Client, Dial, Post


async def say(http: aiohttp.ClientSession, server: ScriptedServer, model: str = "m") -> str:
    """Sends a chat request, and returns the content of the completion, or the status of an error."""
    async with http.post(f"{server.api_base}/chat/completions", json={"model": model}) as response:
        if response.status != 200:
            return str(response.status)
        body = await response.json()
        return str(body["choices"][0]["message"]["content"])


async def read_reply(client: Client) -> bytes:
    """Reads one reply with a Content-Length, including its head."""
    head = await client[0].readuntil(b"\r\n\r\n")
    size = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
    return head + await client[0].readexactly(size)


async def fail(exchange: Exchange) -> None:
    raise ValueError("no such thing")


# Which behaviour answers.


async def test_the_script_is_followed_in_order(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.script(reply(503, {"error": "busy"}))
    server.script(answer("one"), answer("two"))
    said = [await say(http, server) for _ in range(4)]
    assert said == ["503", "one", "two", "Hello from the scripted server."]


async def test_a_get_takes_nothing_from_the_script(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.script(answer("one"))
    async with http.get(f"{server.api_base}/models") as response:
        assert response.status == 200
    assert await say(http, server) == "one"


async def test_the_behaviour_of_a_model_is_used_after_the_script(
    server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    server.on_model("a", answer("I am a"))
    server.script(answer("scripted"))
    said = [await say(http, server, model) for model in ("a", "a", "b", "a")]
    assert said == ["scripted", "I am a", "Hello from the scripted server.", "I am a"]


async def test_the_behaviour_of_a_path_is_used_before_the_script_and_for_all_methods(
    server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    server.on_path("/v1/models", reply(200, b"mine"))
    server.script(answer("scripted"))
    for method in ("GET", "POST"):
        async with http.request(method, f"{server.api_base}/models?x=1") as response:
            assert await response.read() == b"mine"
    assert await say(http, server) == "scripted"


async def test_the_default_can_be_set(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.default = answer("another")
    assert await say(http, server) == "another"


async def test_the_models_are_listed(http: aiohttp.ClientSession) -> None:
    async with ScriptedServer(models=("a", "b")) as server:
        server.models.append("c")
        async with http.get(f"{server.api_base}/models") as response:
            listed = await response.json()
    assert listed["object"] == "list"
    assert [(model["id"], model["object"]) for model in listed["data"]] == [
        ("a", "model"),
        ("b", "model"),
        ("c", "model"),
    ]
    assert all(model["owned_by"] for model in listed["data"])


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/v1/nope"), ("POST", "/chat/completions")])
async def test_an_unknown_path_is_not_found(
    server: ScriptedServer, http: aiohttp.ClientSession, method: str, path: str
) -> None:
    async with http.request(method, server.origin + path) as response:
        assert response.status == 404
        error = (await response.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert f"{method} {path}" in error["message"]


# What the server has seen.


async def test_requests_are_recorded(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    async with http.post(f"{server.api_base}/chat/completions?x=1", json={"model": "m"}) as response:
        await response.read()
    (request,) = server.requests
    assert (request.method, request.path, request.query) == ("POST", "/v1/chat/completions", "x=1")
    assert request.headers["content-TYPE"] == "application/json"
    assert request.body == b'{"model": "m"}'
    assert request.json == {"model": "m"}
    assert (request.connection, request.finished, request.aborted, request.refused) == (1, True, False, False)


async def test_a_chunked_body_is_read(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    async def pieces() -> object:
        yield b'{"model"'
        yield b': "m"}'

    async with http.post(f"{server.api_base}/chat/completions", data=pieces()) as response:
        assert response.status == 200
    assert server.requests[0].json == {"model": "m"}


async def test_connections_are_counted(server: ScriptedServer, post: Post) -> None:
    assert (server.connections, server.open_connections) == (0, 0)
    first = await post(server)
    await read_reply(first)
    await read_reply(await post(server))
    assert (server.connections, server.open_connections) == (2, 2)
    first[1].close()
    await server.wait_until(lambda: server.open_connections == 1)
    assert server.connections == 2
    assert [request.connection for request in server.requests] == [1, 2]


async def test_requests_in_flight_are_counted_without_gets(server: ScriptedServer, post: Post) -> None:
    gate = asyncio.Event()
    server.default = answer("Hi", gate=gate)
    clients = [await post(server) for _ in range(3)]
    await server.wait_until(lambda: server.in_flight == 3)
    gate.set()
    for client in clients:
        await read_reply(client)
    assert (server.in_flight, server.max_in_flight) == (0, 3)


async def test_a_get_is_not_in_flight(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    async with http.get(f"{server.api_base}/models") as response:
        await response.read()
    assert (server.in_flight, server.max_in_flight) == (0, 0)


async def test_waiting_returns_at_once_if_the_condition_holds(server: ScriptedServer) -> None:
    await server.wait_until(lambda: True, timeout=0)


async def test_the_error_of_waiting_in_vain_lists_what_happened(
    server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    server.script(hang_up(), answer("unused"))
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await say(http, server)
    with pytest.raises(TimeoutError) as caught:
        await server.wait_until(lambda: server.aborts, timeout=0.01)
    text = str(caught.value)
    assert "0 of 1 connections open; 0 in flight; 1 scripted behaviours left" in text
    assert "POST /v1/chat/completions on connection 1 (finished)" in text


# How it keeps and closes its connections.


async def test_a_connection_is_kept_open(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    for _ in range(3):
        await say(http, server)
    assert server.connections == 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_connection_is_closed_if_the_request_asks_for_it(
    server: ScriptedServer, dial: Dial, streamed: bool
) -> None:
    body = b'{"stream": true}' if streamed else b"{}"
    reader, writer = await dial(server)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nConnection: close\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    assert b"\r\nConnection: close\r\n" in await reader.read()


async def test_a_connection_is_closed_on_request_after_raw_bytes_as_well(server: ScriptedServer, dial: Dial) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.raw(b"HTTP/1.1 204 \r\n\r\n")

    server.script(behave)
    reader, writer = await dial(server)
    writer.write(b"POST / HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert await reader.read() == b"HTTP/1.1 204 \r\n\r\n"


async def test_close_after_stream_closes_a_stream_unannounced(post: Post) -> None:
    async with ScriptedServer(close_after_stream=True) as server:
        reader, _ = await post(server, stream=True)
        data = await reader.read()
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"Keep-Alive: timeout=5, max=100" in head
    assert b"Connection:" not in head
    assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_close_after_stream_keeps_the_connection_of_a_plain_reply(post: Post) -> None:
    async with ScriptedServer(close_after_stream=True) as server:
        client = await post(server)
        assert b"Keep-Alive: timeout=5, max=100" in await read_reply(client)
        await post(server, client)
        await read_reply(client)
        assert server.connections == 1


async def test_without_keep_alive_each_reply_ends_its_connection_unannounced(post: Post) -> None:
    async with ScriptedServer(keep_alive=False) as server:
        reader, _ = await post(server)
        assert b"Connection:" not in await reader.read()


async def test_a_connection_is_closed_after_max_requests_per_connection(post: Post) -> None:
    async with ScriptedServer(max_requests_per_connection=2) as server:
        client = await post(server)
        await read_reply(client)
        await post(server, client)
        await read_reply(client)
        assert await client[0].read() == b""


async def test_idle_connections_can_be_dropped(server: ScriptedServer, dial: Dial, post: Post) -> None:
    idle = await post(server)
    await read_reply(idle)
    fresh = await dial(server)
    gate = asyncio.Event()
    server.script(answer("held", gate=gate))
    busy = await post(server)
    await server.wait_until(lambda: server.in_flight)
    server.drop_connections()
    assert await idle[0].read() == b""
    assert server.open_connections == 2
    gate.set()
    assert b"held" in await read_reply(busy)
    await post(server, fresh)
    await read_reply(fresh)


async def test_a_reused_connection_can_turn_out_to_be_dead(server: ScriptedServer, post: Post) -> None:
    server.hang_up_reused = 1
    server.script(answer("one"), answer("two"), answer("three"))
    client = await post(server)
    assert b"one" in await read_reply(client)
    await post(server, client)
    assert await client[0].read() == b""
    client = await post(server)
    assert b"two" in await read_reply(client)
    await post(server, client)
    assert b"three" in await read_reply(client)
    assert [request.refused for request in server.requests] == [False, True, False, False]
    assert not server.requests[1].finished
    assert server.hang_up_reused == 0
    assert not server.aborts


async def test_bytes_that_are_not_a_request_get_status_400(server: ScriptedServer, dial: Dial) -> None:
    reader, writer = await dial(server)
    writer.write(b"hello\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert not server.requests


async def test_a_client_that_leaves_without_a_request_is_not_an_error(server: ScriptedServer, dial: Dial) -> None:
    _, writer = await dial(server)
    writer.write(b"hello\r\n\r\n")
    writer.close()
    await server.wait_until(lambda: server.connections and not server.open_connections)
    await server.close()
    assert not server.errors


# Errors, and closing


async def test_the_exception_of_a_behaviour_is_raised_by_close(http: aiohttp.ClientSession) -> None:
    server = await ScriptedServer().__aenter__()
    server.script(fail)
    assert await say(http, server) == "500"
    with pytest.raises(ExceptionGroup) as caught:
        await server.close()
    (error,) = caught.value.exceptions
    assert isinstance(error, ValueError)
    assert server.errors == [error]
    await server.close()


async def test_the_exception_of_a_behaviour_is_the_reply_if_there_is_none_yet(
    server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    server.script(fail)
    async with http.post(f"{server.api_base}/chat/completions") as response:
        assert "no such thing" in (await response.json())["error"]["message"]
    server.errors.clear()


async def test_a_reply_that_began_is_broken_off_if_its_behaviour_raises(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        raise ValueError

    server.script(behave)
    reader, _ = await post(server)
    assert (await reader.read()).endswith(b"\r\n\r\n")
    assert not server.requests[0].finished
    server.errors.clear()


async def test_an_exception_of_the_test_itself_takes_precedence(http: aiohttp.ClientSession) -> None:
    async def test() -> None:
        async with ScriptedServer() as server:
            server.script(fail)
            await say(http, server)
            raise KeyError

    with pytest.raises(KeyError) as caught:
        await test()
    assert "no such thing" in caught.value.__notes__[0]


async def test_a_pytest_failure_in_a_behaviour_is_kept(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    async def behave(exchange: Exchange) -> None:
        pytest.fail("not so")

    server.script(behave)
    assert await say(http, server) == "500"
    assert isinstance(server.errors.pop(), pytest.fail.Exception)


async def test_a_behaviour_that_awaits_a_cancelled_future_is_an_error(
    server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    async def behave(exchange: Exchange) -> None:
        broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        broken.cancel()
        await broken

    server.script(behave)
    assert await say(http, server) == "500"
    assert isinstance(server.errors.pop(), asyncio.CancelledError)


async def test_the_exception_of_a_behaviour_that_is_cancelled_is_kept(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError

    server.script(behave)
    _, writer = await post(server)
    await server.wait_until(lambda: server.in_flight)
    writer.close()
    await server.wait_until(lambda: server.aborts)
    assert isinstance(server.errors.pop(), ValueError)


async def test_close_cancels_and_awaits_the_running_behaviours(post: Post) -> None:
    ends = []

    async def behave(exchange: Exchange) -> None:
        try:
            await exchange.client_left()
        finally:
            await asyncio.sleep(0)
            ends.append("end")

    before = asyncio.all_tasks()
    async with ScriptedServer() as server:
        server.script(behave, stall(), answer("Hi", gate=asyncio.Event()))
        clients = [await post(server) for _ in range(4)]
        await read_reply(clients[3])
        await server.wait_until(lambda: server.in_flight == 3)
    assert ends == ["end"]
    assert asyncio.all_tasks() == before
    assert (server.open_connections, server.in_flight) == (0, 0)
    assert not server.aborts
    assert not any(request.finished for request in server.requests[:3])


async def test_close_closes_the_connections_of_the_clients(post: Post) -> None:
    async with ScriptedServer() as server:
        client = await post(server)
        await read_reply(client)
    assert await client[0].read() == b""
    with pytest.raises(ConnectionRefusedError):
        await post(server)


@pytest.mark.parametrize("turns", range(8))
async def test_close_leaves_no_connection_that_was_just_accepted(dial: Dial, turns: int) -> None:
    before = asyncio.all_tasks()
    async with ScriptedServer() as server:
        dialling = asyncio.ensure_future(dial(server))
        for _ in range(turns):
            await asyncio.sleep(0)
    await asyncio.wait([dialling])
    dialling.exception()
    # A socket that was left open would warn here.
    gc.collect()
    assert asyncio.all_tasks() - before <= {dialling}


async def test_close_can_be_called_twice() -> None:
    async with ScriptedServer() as server:
        await server.close()
    await server.close()


async def test_a_server_can_be_opened_only_once() -> None:
    server = ScriptedServer()
    with pytest.raises(RuntimeError, match="not open"):
        _ = server.origin
    async with server:
        assert server.origin.startswith("http://127.0.0.1:")
        assert server.api_base == f"{server.origin}/v1"
    with pytest.raises(RuntimeError, match="once"):
        await server.__aenter__()


async def test_many_clients_are_served_at_the_same_time(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.default = answer("one two three four")
    said = await asyncio.gather(*(say(http, server) for _ in range(100)))
    assert said == ["one two three four"] * 100
    assert len(server.requests) == 100
