"""Requests of all programs are admitted by one schedule, and a client that leaves frees its place at once."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import aiohttp
import pytest

from lmbridge import Limits
from lmbridge.gateway import Gateway
from lmbridge.testing import Behaviour, Exchange, OneModelServer, ScriptedServer, hang_up, raw, reply, reset, sse, stall
from tests.gateway.support import BODY, CHAT, PATHS, SSE_HEAD, STREAM, Client, chunk, fetch
from tests.support import HALF, piece, turns

ONE = Limits(max_concurrency=1, max_loaded_models=1)


def body_for(model: str, *, stream: bool = False, name: str = "") -> bytes:
    """Returns the body of a request for a model."""
    return json.dumps({"model": model, "stream": stream, "user": name, "messages": []}).encode()


async def test_no_generation_is_killed_by_another_program(http: aiohttp.ClientSession) -> None:
    async with (
        OneModelServer(["a", "b"], load_seconds=0.01, token_seconds=0) as server,
        Gateway(server.api_base, limits=Limits(max_concurrency=4, max_loaded_models=1)) as gateway,
    ):
        bodies = [body_for("ab"[number % 2], stream=number % 3 == 0) for number in range(40)]
        answers = await asyncio.gather(*(fetch(http, gateway, CHAT, body) for body in bodies))
        assert Counter(status for status, _, _ in answers) == {200: 40}
        assert not server.kills
        assert server.double_loads == 0
        assert server.swaps <= 2
        assert gateway.stats().swaps == server.swaps


async def test_without_a_schedule_they_are_killed(http: aiohttp.ClientSession) -> None:
    async with (
        OneModelServer(["a", "b"], load_seconds=0.01, token_seconds=0.001, endings=["error"]) as server,
        Gateway(server.api_base, limits=Limits()) as gateway,
    ):
        await asyncio.gather(*(fetch(http, gateway, CHAT, body_for("ab"[number % 2])) for number in range(8)))
        assert server.kills


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_every_endpoint_is_admitted_by_model(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession, path: str, stream: bool
) -> None:
    async with Gateway(scripted_server.api_base, limits=ONE) as gateway:
        finish = asyncio.Event()

        async def slow(exchange: Exchange) -> None:
            await finish.wait()
            await reply(200, {})(exchange)

        scripted_server.script(slow, reply(200, {}))
        first = asyncio.create_task(fetch(http, gateway, CHAT, body_for("a")))
        await scripted_server.wait_until(lambda: scripted_server.requests)
        second = asyncio.create_task(fetch(http, gateway, path, body_for("b", stream=stream)))
        while gateway.stats().queued == 0:
            await turns()
        assert len(scripted_server.requests) == 1
        finish.set()
        assert [status for status, _, _ in await asyncio.gather(first, second)] == [200, 200]


async def test_priorities_decide_who_goes_first(scripted_server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    async with Gateway(scripted_server.api_base, limits=ONE) as gateway:
        finish = asyncio.Event()

        async def slow(exchange: Exchange) -> None:
            await finish.wait()
            await reply(200, {})(exchange)

        scripted_server.script(slow)
        tasks = [asyncio.create_task(fetch(http, gateway, CHAT, body_for("a", name="first")))]
        await scripted_server.wait_until(lambda: scripted_server.requests)
        for number, priority in enumerate(["batch", "-5", None, "interactive", "7", " normal "], start=1):
            headers = {} if priority is None else {"X-Lmbridge-Priority": priority}
            body = body_for("a", name=str(priority))
            tasks.append(asyncio.create_task(fetch(http, gateway, CHAT, body, headers=headers)))
            while gateway.stats().queued < number:
                await turns()
        finish.set()
        await asyncio.gather(*tasks)
        order = [request.fields["user"] for request in scripted_server.requests]
        assert order == ["first", "7", "interactive", "None", " normal ", "batch", "-5"]


@pytest.mark.parametrize("value", ["urgent", "", "1.5", "Interactive", "1e3"])
async def test_a_priority_that_is_none_is_refused(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession, value: str
) -> None:
    status, _, body = await fetch(http, gateway, headers={"X-Lmbridge-Priority": value})
    error = json.loads(body)["error"]
    assert (status, error["code"], error["type"]) == (400, "invalid_priority", "invalid_request_error")
    assert not scripted_server.requests


async def test_clients_have_their_turns(scripted_server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    async with Gateway(scripted_server.api_base, limits=ONE) as gateway:
        finish = asyncio.Event()

        async def slow(exchange: Exchange) -> None:
            await finish.wait()
            await reply(200, {})(exchange)

        scripted_server.script(slow)
        tasks: list[asyncio.Task[Any]] = []
        for client in ["a", "a", "a", "a", "b", "b", "c"]:
            name = f"{client}{len(tasks)}"
            headers = {"Authorization": f"Bearer key of {client}"}
            tasks.append(asyncio.create_task(fetch(http, gateway, CHAT, body_for("m", name=name), headers=headers)))
            while gateway.stats().queued + gateway.stats().in_flight < len(tasks):
                await turns()
        await scripted_server.wait_until(lambda: scripted_server.requests)
        finish.set()
        await asyncio.gather(*tasks)
        order = [request.fields["user"] for request in scripted_server.requests]
        assert order == ["a0", "a1", "b4", "c6", "a2", "b5", "a3"]


@pytest.mark.parametrize(
    ("limits", "model", "priority"),
    [
        (ONE, "m", "interactive"),
        (Limits(max_concurrency=1), "m", "interactive"),
        (Limits(max_concurrency=1), "other", "interactive"),
        (ONE, "active", "normal"),
    ],
)
async def test_clients_have_their_turns_whatever_else_was_served_meanwhile(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession, limits: Limits, model: str, priority: str
) -> None:
    gates = {"first": asyncio.Event(), "y3": asyncio.Event()}

    async def behave(exchange: Exchange) -> None:
        if (gate := gates.get(exchange.request.json["user"])) is not None:
            await gate.wait()
        await reply(200, {})(exchange)

    scripted_server.default = behave
    async with Gateway(scripted_server.api_base, limits=limits) as gateway:
        tasks: list[asyncio.Task[Any]] = []

        async def ask(name: str, model: str = "m", priority: str = "normal") -> None:
            headers = {"Authorization": f"Bearer key of {name[0]}", "X-Lmbridge-Priority": priority}
            queued = gateway.stats().queued
            tasks.append(asyncio.create_task(fetch(http, gateway, CHAT, body_for(model, name=name), headers=headers)))
            while scripted_server.requests and gateway.stats().queued == queued:
                await turns()

        await ask("first", model)
        await scripted_server.wait_until(lambda: scripted_server.requests)
        for number in range(4):
            await ask(f"x{number}")
        for number in range(4):
            await ask(f"y{number}", model, priority)
        gates["first"].set()
        await scripted_server.wait_until(lambda: len(scripted_server.requests) == 5)
        await ask("z")
        gates["y3"].set()
        await asyncio.gather(*tasks)
    order = [request.fields["user"] for request in scripted_server.requests]
    assert order == ["first", "y0", "y1", "y2", "y3", "x0", "z", "x1", "x2", "x3"]


# Leaving


async def until_aborted(server: ScriptedServer, gateway: Gateway) -> None:
    """Waits until a connection to the server was closed early, and the gateway has nothing in flight."""
    await server.wait_until(lambda: server.aborts)
    while gateway.stats().in_flight:
        await turns()


async def test_a_client_that_leaves_a_stream_closes_the_one_behind_it(
    scripted_server: ScriptedServer, gateway: Gateway
) -> None:
    scripted_server.script(stall(after=HALF))
    client = await Client.connect(gateway)
    client.post(STREAM)
    await client.reader.readuntil(b"data:")
    client.leave()
    await until_aborted(scripted_server, gateway)


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])
async def test_a_client_that_leaves_before_the_answer_closes_the_connection_to_the_server(
    scripted_server: ScriptedServer, gateway: Gateway, body: bytes
) -> None:
    scripted_server.script(stall())
    client = await Client.connect(gateway)
    client.post(body)
    await scripted_server.wait_until(lambda: scripted_server.requests)
    client.leave()
    await until_aborted(scripted_server, gateway)


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])
async def test_a_client_that_leaves_the_queue_is_never_sent_to_the_server(
    scripted_server: ScriptedServer, gateway: Gateway, body: bytes
) -> None:
    scripted_server.script(stall(after=HALF))
    first, second = await Client.connect(gateway), await Client.connect(gateway)
    first.post(STREAM)
    await first.reader.readuntil(b"data:")
    second.post(body.replace(b"test-model", b"other"))
    while gateway.stats().queued == 0:
        await turns()
    second.leave()
    while gateway.stats().queued:
        await turns()
    first.leave()
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    assert len(scripted_server.requests) == 1


async def test_a_client_that_leaves_between_two_attempts_is_not_sent_again(
    scripted_server: ScriptedServer, gateway: Gateway
) -> None:
    scripted_server.default = reply(503, {"error": {"message": "Loading model"}})
    client = await Client.connect(gateway)
    client.post(BODY)
    await scripted_server.wait_until(lambda: any(request.finished for request in scripted_server.requests))
    client.leave()
    while gateway.stats().in_flight:
        await turns()
    assert len(scripted_server.requests) == 1


async def test_a_client_that_leaves_while_it_sends_is_forgotten(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    client = await Client.connect(gateway)
    client.send(f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Length: 1000", b'{"model":')
    await client.writer.drain()
    client.leave()
    status, _, _ = await fetch(http, gateway)
    assert status == 200
    assert len(scripted_server.requests) == 1


# Failures


@pytest.mark.parametrize("failure", [hang_up(), reset(), reply(503, {"error": "busy"}), reply(502)])
@pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])
async def test_failures_before_the_first_byte_are_repeated(
    scripted_server: ScriptedServer,
    gateway: Gateway,
    http: aiohttp.ClientSession,
    no_waits: list[float],
    failure: Behaviour,
    body: bytes,
) -> None:
    scripted_server.script(failure, failure, sse(piece("x")))
    status, _, _ = await fetch(http, gateway, CHAT, body)
    assert status == 200
    assert gateway.stats().retries == 2


@pytest.mark.parametrize("fields", [{}, {"store": True}, {"store": None}, {"stream": True}])
@pytest.mark.parametrize("failure", [hang_up(), reset(), reply(502)])
async def test_a_response_that_the_server_keeps_is_not_created_twice(
    scripted_server: ScriptedServer,
    gateway: Gateway,
    http: aiohttp.ClientSession,
    no_waits: list[float],
    failure: Behaviour,
    fields: dict[str, bool | None],
) -> None:
    scripted_server.script(failure)
    body = json.dumps({"model": "test-model", "input": "Hi", **fields}).encode()
    status, _, _ = await fetch(http, gateway, "/v1/responses", body)
    assert (status, len(scripted_server.requests)) == (502, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_that_the_server_does_not_keep_is_asked_for_again(
    scripted_server: ScriptedServer,
    gateway: Gateway,
    http: aiohttp.ClientSession,
    no_waits: list[float],
    stream: bool,
) -> None:
    scripted_server.script(hang_up(), reply(200, {"output": []}))
    body = json.dumps({"model": "test-model", "input": "Hi", "store": False, "stream": stream}).encode()
    status, _, _ = await fetch(http, gateway, "/v1/responses", body)
    assert (status, len(scripted_server.requests)) == (200, 2)


EVICTED = {"error": {"message": "Model unloaded.", "type": "server_error"}}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_eviction_is_noticed(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession, stream: bool
) -> None:
    async with Gateway(scripted_server.api_base, limits=Limits(max_concurrency=4, max_loaded_models=1)) as gateway:
        scripted_server.script(reply(200, {}))
        await fetch(http, gateway, CHAT, body_for("a"))
        killed = sse(piece("x"), EVICTED) if stream else reply(400, EVICTED)
        scripted_server.script(killed)
        status, _, body = await fetch(http, gateway, CHAT, body_for("a", stream=stream))
        assert (status, b"Model unloaded." in body) == (200 if stream else 400, True)
        # The model has to be loaded again, so the next request for it goes alone.
        scripted_server.script(stall(), stall())
        tasks = [asyncio.create_task(fetch(http, gateway, CHAT, body_for("a", stream=True))) for _ in range(2)]
        while gateway.stats().queued == 0:
            await turns()
        assert (gateway.stats().in_flight, gateway.stats().queued) == (1, 1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


ERROR_EVENTS = {
    "plain": b'data: {"error": {"message": "Model unloaded."}}\n\n',
    "named": b'event: error\ndata: {"type": "error", "error": {"message": "Model unloaded."}}\n\n',
    "in two parts": b'data: {"error": {"message": \ndata: "Model unloaded."}}\n\n',
}


def begins_with(*parts: bytes) -> Behaviour:
    """Returns a behaviour that sends the parts of an event stream, and then falls silent."""

    async def behaviour(exchange: Exchange) -> None:
        await exchange.raw(SSE_HEAD)
        for part in parts:
            await exchange.raw(chunk(part))
            await turns()
        await asyncio.Event().wait()

    return behaviour


@pytest.mark.parametrize("before", [[], [b": ping\n\n"]], ids=["at once", "after a comment"])
@pytest.mark.parametrize("event", ERROR_EVENTS.values(), ids=ERROR_EVENTS)
async def test_a_stream_that_begins_with_the_loss_of_the_model_is_asked_for_at_another_server(
    http: aiohttp.ClientSession, before: list[bytes], event: bytes
) -> None:
    async with (
        ScriptedServer(["test-model"]) as one,
        ScriptedServer(["test-model"]) as two,
        Gateway([one.api_base, two.api_base], limits=Limits()) as gateway,
    ):
        one.on_path(CHAT, begins_with(*before, event[:20], event[20:]))
        two.on_path(CHAT, sse(piece("x")))
        status, _, body = await fetch(http, gateway, CHAT, STREAM)
        assert (status, b"Model unloaded." in body, b'"x"' in body) == (200, False, True)
        assert [sum(request.path == CHAT for request in server.requests) for server in (one, two)] == [1, 1]
        assert gateway.stats().by_server[one.api_base].evictions == 1
        await one.wait_until(lambda: one.aborts)


async def test_a_stream_that_breaks_after_a_comment_is_asked_for_at_another_server(http: aiohttp.ClientSession) -> None:
    async def breaks(exchange: Exchange) -> None:
        await exchange.raw(SSE_HEAD + chunk(b": ping\n\n"))
        exchange.hang_up()

    async with (
        ScriptedServer(["test-model"]) as one,
        ScriptedServer(["test-model"]) as two,
        Gateway([one.api_base, two.api_base], limits=Limits()) as gateway,
    ):
        one.on_path(CHAT, breaks)
        two.on_path(CHAT, sse(piece("x")))
        status, _, body = await fetch(http, gateway, CHAT, STREAM)
        assert (status, b'"x"' in body) == (200, True)


async def test_if_every_server_has_lost_the_model_the_last_stream_is_passed_on_as_it_is(
    http: aiohttp.ClientSession,
) -> None:
    body = b": ping\n\n" + ERROR_EVENTS["plain"]
    async with (
        ScriptedServer(["test-model"]) as one,
        ScriptedServer(["test-model"]) as two,
        Gateway([one.api_base, two.api_base], limits=Limits()) as gateway,
    ):
        for server in (one, two):
            server.on_path(CHAT, raw(SSE_HEAD, chunk(body), b"0\r\n\r\n"))
        status, _, received = await fetch(http, gateway, CHAT, STREAM)
        assert (status, received) == (200, body)


@pytest.mark.parametrize("stream", [False, True])
async def test_after_an_eviction_requests_are_scheduled_by_model(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession, stream: bool
) -> None:
    async with Gateway(scripted_server.api_base, limits=Limits(max_concurrency=4)) as gateway:
        scripted_server.script(sse(piece("x"), EVICTED) if stream else reply(400, EVICTED))
        await fetch(http, gateway, CHAT, body_for("a", stream=stream))
        stats = gateway.stats()
        (server,) = stats.by_server.values()
        assert (stats.evictions, server.limits.max_loaded_models) == (1, 1)


async def test_many_streams_at_a_time(scripted_server: ScriptedServer) -> None:
    go_on = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        await exchange.chunk(piece("x"))
        await go_on.wait()
        await exchange.chunk(piece("y", finish_reason="stop"))

    scripted_server.default = slow
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        Gateway(scripted_server.api_base, limits=Limits(max_concurrency=150)) as gateway,
        aiohttp.ClientSession(connector=connector) as http,
    ):
        tasks = [asyncio.create_task(fetch(http, gateway, CHAT, STREAM)) for _ in range(150)]
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 150, timeout=30)
        go_on.set()
        answers = await asyncio.gather(*tasks)
        assert all(b'"y"' in body for _, _, body in answers)
        while gateway.stats().in_flight:
            await turns()


@pytest.mark.parametrize("stream", [False, True])
async def test_the_turns_of_a_conversation_go_to_the_server_that_has_the_earlier_ones(
    http: aiohttp.ClientSession, stream: bool
) -> None:
    async with (
        ScriptedServer(["test-model"]) as one,
        ScriptedServer(["test-model"]) as two,
        Gateway(upstreams=[one.api_base, two.api_base], limits=Limits(max_concurrency=4)) as gateway,
    ):
        talks = [[{"role": "user", "content": f"Talk {number}"}] for number in range(3)]
        for turn in range(3):
            # Every second turn is in another order, so that taking the servers in turn would mix them up.
            for talk in talks[:: -1 if turn % 2 else 1]:
                body = {"model": "test-model", "stream": stream, "messages": talk}
                status, _, _ = await fetch(http, gateway, CHAT, json.dumps(body).encode())
                assert status == 200
                talk += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Go on."}]
        homes = [
            [request.json["messages"][0]["content"] for request in server.requests if request.path == CHAT]
            for server in (one, two)
        ]
        # Each server has all three turns of its conversations, and neither has all conversations.
        assert sorted(Counter(homes[0] + homes[1]).values()) == [3, 3, 3]
        assert set(homes[0]).isdisjoint(homes[1])
        assert all(homes)
