"""Connections, retries and limits in their details."""

from __future__ import annotations

import asyncio
import gzip
import socket
import time

import aiohttp
import msgspec
import pytest

from lmbridge import (
    Limits,
    LLMClient,
    LLMConnectionError,
    LLMResponseError,
    LLMTimeoutError,
    ModelLoadError,
    Timeouts,
)
from lmbridge.client import llm, server_api
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, hang_up, raw, reply, reset, sse, stall
from lmbridge.transport import session
from lmbridge.transport.sse import MAX_EVENT_SIZE
from tests.support import MESSAGES, piece, read_text, replaced, turns


async def no_such_host(*_: object, **__: object) -> object:
    raise socket.gaierror(-2, "Name or service not known")


# Connections


async def test_two_more_connections_than_generations_are_for_what_does_not_queue(
    scripted_server: ScriptedServer,
) -> None:
    gate = asyncio.Event()

    async def held(exchange: Exchange) -> None:
        await gate.wait()
        await reply(200, {"data": []})(exchange)

    scripted_server.script(stall(after=[piece("a")]))
    scripted_server.on_path("/v1/models", held)
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:  # noqa: SIM117 - it reads better apart
        async with await client.chat_completion(MESSAGES, stream=True):
            lists = [asyncio.create_task(client.list_models()) for _ in range(3)]
            await scripted_server.wait_until(lambda: len(scripted_server.requests) == 3)
            gate.set()
            assert await asyncio.gather(*lists) == [[]] * 3
            assert scripted_server.connections == 3  # the third list waited for a connection of the other two


@pytest.mark.parametrize(("idle", "connections"), [(3.5, 1), (4.5, 2)])
async def test_a_connection_that_was_idle_for_nearly_five_seconds_is_not_used_again(
    scripted_server: ScriptedServer, client: LLMClient, monkeypatch: pytest.MonkeyPatch, idle: float, connections: int
) -> None:
    await client.chat_completion(MESSAGES)
    now = time.monotonic
    monkeypatch.setattr("aiohttp.connector.monotonic", lambda: now() + idle)
    await client.chat_completion(MESSAGES)
    assert scripted_server.connections == connections


async def test_of_several_dead_connections_one_is_replaced_silently(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()
    scripted_server.default = answer("Hi", gate=gate)
    async with LLMClient(scripted_server.api_base, max_retries=0) as client:
        asked = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(3)]
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 3)
        gate.set()
        await asyncio.gather(*asked)
        scripted_server.hang_up_reused = 3
        with pytest.raises(LLMConnectionError, match="closed the connection without an answer"):
            await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 5


@pytest.mark.parametrize("encoding", [b"identity", b"gzip"])
async def test_a_stream_that_waited_for_its_reader_comes_whole(
    scripted_server: ScriptedServer, client: LLMClient, encoding: bytes
) -> None:
    text = "word " * 1_000_000  # more than the sockets and aiohttp hold
    events = b"".join(
        b"data: %s\n\n" % msgspec.json.encode(piece(text[at : at + 20_000])) for at in range(0, len(text), 20_000)
    )
    body = events + b"data: [DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: %s\r\nConnection: close\r\n\r\n"
    scripted_server.script(raw(head % encoding + (gzip.compress(body) if encoding == b"gzip" else body)))
    async with await client.chat_completion(MESSAGES, stream=True) as stream:
        first = await anext(stream)
        await turns(100)
        rest = [chunk["choices"][0]["delta"]["content"] or "" async for chunk in stream]
    assert (first["choices"][0]["delta"]["content"] or "") + "".join(rest) == text


async def test_a_refused_connection_is_no_dead_one_and_not_tried_again_silently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connects = 0
    connect = aiohttp.TCPConnector._create_connection

    async def counted(*arguments: object) -> object:
        nonlocal connects
        connects += 1
        return await connect(*arguments)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr("aiohttp.TCPConnector._create_connection", counted)
    async with ScriptedServer() as server:
        client = LLMClient(server.api_base, max_retries=0)
        await client.chat_completion(MESSAGES)
        await client.chat_completion(MESSAGES)  # on a kept connection
    assert connects == 1
    with pytest.raises(LLMConnectionError, match=r"could not connect|without an answer"):
        await client.chat_completion(MESSAGES)
    with pytest.raises(LLMConnectionError, match="could not connect"):
        await client.chat_completion(MESSAGES)
    assert connects <= 3
    await client.close()


async def test_the_environment_is_not_trusted_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.origin)
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", no_such_host)
        async with LLMClient("http://lm.example") as client:
            with pytest.raises(LLMConnectionError, match="cannot be resolved"):
                await client.chat_completion(MESSAGES)
        assert not proxy.requests


async def test_loopback_by_name_is_never_proxied(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = replaced(scripted_server.origin, "127.0.0.1", "localhost")
    async with ScriptedServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.origin)
        async with LLMClient(origin, trust_env=True) as client:
            assert (await client.chat_completion(MESSAGES))["choices"]
        assert not proxy.requests


async def test_a_proxy_that_is_not_there_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedServer() as gone:
        pass
    monkeypatch.setenv("HTTP_PROXY", gone.origin)
    async with LLMClient("http://lm.example", trust_env=True, max_retries=0) as client:
        with pytest.raises(LLMConnectionError, match=r"the proxy cannot be reached: .*check HTTP\(S\)_PROXY"):
            await client.chat_completion(MESSAGES)


async def test_cookies_are_not_kept(scripted_server: ScriptedServer) -> None:
    scripted_server.default = reply(200, {"choices": [{"message": {}}]}, {"Set-Cookie": "session=1; Path=/"})
    async with LLMClient(replaced(scripted_server.origin, "127.0.0.1", "localhost")) as client:
        for _ in range(2):
            await client.chat_completion(MESSAGES)
    assert "cookie" not in scripted_server.requests[1].headers


async def test_a_request_says_who_asks(scripted_server: ScriptedServer, client: LLMClient) -> None:
    await client.chat_completion(MESSAGES)
    assert scripted_server.requests[0].headers["user-agent"].startswith("lmbridge/")


# Retries


async def test_a_name_that_cannot_be_resolved_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", no_such_host)
    async with LLMClient("http://no-such-host.invalid") as client:
        with pytest.raises(LLMConnectionError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.context["attempts"] == 1


async def test_a_connect_timeout_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, no_waits: list[float]) -> None:
    async def slow(*_: object, **__: object) -> object:
        raise aiohttp.ConnectionTimeoutError("Connection timeout to host")

    monkeypatch.setattr("aiohttp.TCPConnector._create_connection", slow)
    async with LLMClient("http://127.0.0.1:1") as client:
        with pytest.raises(LLMTimeoutError, match="no connection within 5 s") as caught:
            await client.chat_completion(MESSAGES)
    assert (caught.value.phase, caught.value.context["attempts"]) == ("connect", 1)
    assert not no_waits


async def test_a_reply_that_broke_has_the_status_that_it_began_with(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(raw(b"HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\n{"))
    with pytest.raises(LLMConnectionError) as caught:
        await client.chat_completion(MESSAGES)
    assert caught.value.status == 201


@pytest.mark.parametrize("first", [reply(503, {"error": "busy"}), reply(503, {"error": "Loading model"}), hang_up()])
async def test_a_place_is_held_through_back_off_and_polls(
    scripted_server: ScriptedServer, no_waits: list[float], first: Behaviour
) -> None:
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:
        for stream in (True, False):
            scripted_server.requests.clear()
            scripted_server._script.clear()
            scripted_server.script(first)
            asked = asyncio.create_task(client.chat_completion(MESSAGES, model="a", stream=stream))
            await asyncio.sleep(0)
            queued = asyncio.create_task(client.chat_completion(MESSAGES, model="b"))
            reply_or_stream = await asked
            if stream:
                await read_text(reply_or_stream)  # type: ignore[arg-type]  # a stream, here
            await queued
            assert [request.json["model"] for request in scripted_server.requests] == ["a", "a", "b"]


async def test_a_key_in_the_answer_of_a_server_that_loads_is_not_shown(
    scripted_server: ScriptedServer, no_waits: list[float]
) -> None:
    scripted_server.default = reply(503, {"error": "Loading model for sk-secret-1"})
    timeouts = Timeouts(load=0.05)
    async with LLMClient(scripted_server.api_base, api_key="sk-secret-1", timeout=timeouts) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.body == '{"error":"Loading model for [api_key]"}'


# Time


def test_no_limit_of_aiohttps_own_is_left() -> None:
    limits = session._client_timeout(5)
    assert (limits.total, limits.connect, limits.sock_read, limits.sock_connect) == (None, None, None, 5)


def test_lists_and_health_have_the_limits_that_were_promised() -> None:
    assert (server_api.PROBE_SECONDS, llm.HEALTH_CHECK_SECONDS) == (10, 5)


async def test_a_list_and_a_health_check_do_not_take_as_long_as_a_generation_may(
    scripted_server: ScriptedServer, client: LLMClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_server.on_path("/v1/models", stall())
    monkeypatch.setattr(server_api, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(llm, "HEALTH_CHECK_SECONDS", 0.05)
    assert await client.health_check() is False
    with pytest.raises(LLMTimeoutError) as caught:
        await client.list_models()
    assert caught.value.phase == "first_byte"


# Secrets


async def test_a_key_too_short_to_be_secret_does_not_eat_the_words_of_errors(scripted_server: ScriptedServer) -> None:
    scripted_server.script(reply(400, {"error": "no such thing"}))
    async with LLMClient(scripted_server.api_base, api_key="no") as client:
        with pytest.raises(LLMResponseError, match="no such thing"):
            await client.chat_completion(MESSAGES)


# Something else in place of a stream


async def test_an_error_status_with_an_event_stream_is_an_error_of_the_await(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sse({"error": {"message": "no such thing"}}, status=400))
    with pytest.raises(LLMResponseError, match=r"the server answered 400: .*no such thing") as caught:
        await client.chat_completion(MESSAGES, stream=True)
    assert caught.value.status == 400


async def test_an_error_in_place_of_a_stream_is_whole_however_it_arrives(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sse('{"error":', '"No models loaded."}', content_type="application/json"))
    with pytest.raises(ModelLoadError) as caught:
        await client.chat_completion(MESSAGES, stream=True)
    assert caught.value.body == '{"error":"No models loaded."}'


async def test_a_stream_under_another_name_may_begin_with_a_bom(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(
        sse("\ufeffdata: {", '"choices":[{"delta":{"content":"Hi"}}]}\n\n', done=True, content_type="text/plain")
    )
    assert await read_text(await client.chat_completion(MESSAGES, stream=True)) == "Hi"


# Limits


async def test_who_reads_a_stream_holds_its_place_whoever_opened_it(scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall(after=[piece("a")]))
    limits = Limits(max_concurrency=1, max_queue=0.05)
    async with LLMClient(scripted_server.api_base, limits=limits) as client:  # noqa: SIM117 - it reads better apart
        async with await asyncio.create_task(client.chat_completion(MESSAGES, stream=True)) as stream:
            with pytest.raises(LLMTimeoutError, match="not admitted within"):  # it is another task's
                await client.chat_completion(MESSAGES)
            await anext(stream)
            with pytest.raises(LLMTimeoutError, match="forever, for streams that its own task holds open"):
                await client.chat_completion(MESSAGES)


def test_an_event_may_have_100_mib() -> None:
    assert MAX_EVENT_SIZE == 100 * 2**20


async def test_a_limit_of_the_callers_that_is_shorter_goes_for_lists_too(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", stall())
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=0.05)) as client:
        with pytest.raises(LLMTimeoutError, match=r"no answer within 0\.05 s"):
            await client.list_models()


async def test_a_health_check_is_not_retried_where_the_connection_breaks(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float]
) -> None:
    scripted_server.on_path("/v1/models", reset())
    assert await client.health_check() is False
    assert not no_waits
