"""Streams that wait get comments, and what goes wrong later is an event that the official clients raise."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable

import aiohttp
import openai
import pytest
import pytest_asyncio

from lmbridge import Limits, LLMClient, LLMError, Timeouts, collect
from lmbridge.gateway import Gateway
from lmbridge.gateway import gateway as gateway_module
from lmbridge.gateway.http_server import IncomingRequest
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, hang_up, raw, reply, reset, sse, stall
from tests.gateway.support import CHAT, PATHS, SSE_HEAD, STREAM, Client, chunk, fetch, fetch_json
from tests.support import HALF, MESSAGES, turns

STREAMED_PATHS = [path for path in PATHS if path != "/v1/embeddings"]
COMMENT = b": waiting for the model\n\n"


@pytest_asyncio.fixture
async def hasty(scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    """A gateway that sends a comment as soon as a stream waits."""
    monkeypatch.setattr(gateway_module, "FIRST_COMMENT_SECONDS", 0.01)
    async with Gateway(scripted_server.api_base, limits=Limits(), timeout=Timeouts(idle=0.2), max_retries=0) as gateway:
        yield gateway


def after_comments(exchange_may_go_on: asyncio.Event, behaviour: Behaviour) -> Behaviour:
    """Returns a behaviour that waits before it answers."""

    async def wait(exchange: Exchange) -> None:
        await exchange_may_go_on.wait()
        await behaviour(exchange)

    return wait


async def fetch_late(
    server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession, behaviour: Behaviour, path: str = CHAT
) -> bytes:
    """Returns the body of a stream whose server answers only after comments have been sent, without these."""
    go_on = asyncio.Event()
    server.script(after_comments(go_on, behaviour))
    async with http.post(gateway.origin + path, data=STREAM) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        for _ in range(2):
            assert await response.content.readexactly(len(COMMENT)) == COMMENT
        go_on.set()
        return (await response.read()).replace(COMMENT, b"")


def error_in(event: bytes, path: str = CHAT) -> dict[str, object]:
    """Returns the error in an event, after checking its form."""
    lines = event.decode().strip().split("\n")
    assert event.endswith(b"\n\n")
    if path.startswith(("/v1/messages", "/v1/responses")):
        assert lines.pop(0) == "event: error"
    [line] = lines
    value = json.loads(line.removeprefix("data: "))
    if path.startswith(("/v1/messages", "/v1/responses")):
        assert value["type"] == "error"
    error: dict[str, object] = value["error"]
    assert error.keys() == {"message", "type", "param", "code", "hint"}
    return error


@pytest.mark.parametrize("path", STREAMED_PATHS)
async def test_a_stream_that_waits_gets_comments_and_then_its_events(
    scripted_server: ScriptedServer, hasty: Gateway, http: aiohttp.ClientSession, path: str
) -> None:
    body = await fetch_late(scripted_server, hasty, http, sse("data: 1\n\n", "data: [DONE]\n\n"), path)
    assert body == b"data: 1\n\ndata: [DONE]\n\n"


async def test_a_client_gets_comments_while_the_server_sends_nothing_but_comments(
    scripted_server: ScriptedServer, hasty: Gateway, http: aiohttp.ClientSession
) -> None:
    go_on = asyncio.Event()

    async def behaviour(exchange: Exchange) -> None:
        await exchange.raw(SSE_HEAD + chunk(b": loading\n\n"))
        await go_on.wait()
        await exchange.raw(chunk(b"data: 1\n\n") + b"0\r\n\r\n")

    scripted_server.script(behaviour)
    async with http.post(hasty.origin + CHAT, data=STREAM) as response:
        for _ in range(2):
            assert await response.content.readexactly(len(COMMENT)) == COMMENT
        go_on.set()
        assert (await response.read()).replace(COMMENT, b"") == b": loading\n\ndata: 1\n\n"


@pytest.mark.parametrize("path", sorted({*PATHS} - {*STREAMED_PATHS}))
async def test_an_answer_that_is_never_a_stream_gets_none_however_late_it_is(
    scripted_server: ScriptedServer, hasty: Gateway, http: aiohttp.ClientSession, path: str
) -> None:
    go_on = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    scripted_server.script(after_comments(go_on, reply(200, {"data": []})))
    status, headers, body = await fetch(http, hasty, path, STREAM)
    assert (status, headers["Content-Type"], json.loads(body)) == (200, "application/json", {"data": []})


async def test_a_stream_that_begins_soon_gets_none(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    _, headers, body = await fetch(http, gateway, CHAT, STREAM)
    assert b": waiting" not in body
    assert "X-Accel-Buffering" not in headers


async def test_a_late_failure_does_not_quote_the_key_of_the_gateway(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "FIRST_COMMENT_SECONDS", 0.01)
    async with Gateway(scripted_server.api_base, upstream_api_key="sk-secret", limits=Limits()) as gateway:
        refusal = reply(401, {"error": {"message": "Incorrect key: sk-secret", "code": "sk-secret"}})
        event = await fetch_late(scripted_server, gateway, http, refusal)
    error = error_in(event)
    assert (error["code"], "sk-secret" in str(error["message"])) == ("[api_key]", False)


@pytest.mark.parametrize("path", STREAMED_PATHS)
@pytest.mark.parametrize(
    ("behaviour", "code", "message"),
    [
        (reply(400, {"error": {"message": "no such thing", "code": "bad"}}), "bad", "answered 400: no such thing"),
        (reply(200, {"choices": []}), "upstream_error", "answered 200, but not with an event stream"),
        (hang_up(), "upstream_error", "without an answer"),
    ],
    ids=["error", "no stream", "hang up"],
)
async def test_a_late_failure_is_an_event(
    scripted_server: ScriptedServer,
    hasty: Gateway,
    http: aiohttp.ClientSession,
    path: str,
    behaviour: Behaviour,
    code: str,
    message: str,
) -> None:
    error = error_in(await fetch_late(scripted_server, hasty, http, behaviour, path), path)
    assert error["code"] == code
    assert message in str(error["message"])


@pytest.mark.parametrize(
    ("behaviour", "status"),
    [
        (reply(400, {"error": "x"}), 400),
        (reply(200, {"choices": []}), 502),
        (raw(SSE_HEAD.replace(b"Content-Type", b"Content-Encoding: br\r\nContent-Type"), b"0\r\n\r\n"), 502),
    ],
    ids=["error", "no stream", "unknown compression"],
)
async def test_a_late_failure_is_not_counted_as_a_success(
    scripted_server: ScriptedServer, hasty: Gateway, http: aiohttp.ClientSession, behaviour: Behaviour, status: int
) -> None:
    error_in(await fetch_late(scripted_server, hasty, http, behaviour))
    [finished] = (await fetch_json(http, hasty, "/status.json"))["finished"]
    assert finished["status"] == status


async def test_a_part_that_becomes_very_large_is_decompressed_in_steps(
    scripted_server: ScriptedServer, hasty: Gateway, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    write = IncomingRequest.write

    def note_and_write(incoming: IncomingRequest, data: bytes) -> Awaitable[None]:
        steps.append(len(data))
        return write(incoming, data)

    monkeypatch.setattr(IncomingRequest, "write", note_and_write)
    text = (b"data: " + b"x" * 1000 + b"\n\n") * 10_000
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n\r\n"
    body = await fetch_late(scripted_server, hasty, http, raw(head, gzip.compress(text)))
    assert body == text
    assert max(steps) < 500_000


async def test_a_compressed_stream_after_comments_is_decompressed(
    scripted_server: ScriptedServer, hasty: Gateway, http: aiohttp.ClientSession
) -> None:
    text = b"data: 1\n\ndata: 2\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n\r\n"
    body = await fetch_late(scripted_server, hasty, http, raw(head, gzip.compress(text)))
    assert body == text


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_that_breaks_off_ends_with_an_event(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession, path: str
) -> None:
    async def cut(exchange: Exchange) -> None:
        await exchange.raw(SSE_HEAD)
        await exchange.raw(chunk(b'data: 1\n\ndata: {"choices"'))
        exchange.hang_up()

    scripted_server.script(cut)
    _, _, body = await fetch(http, gateway, path, STREAM)
    whole, separator, rest = body.partition(b"data: 1\n\n")
    assert (whole, bool(separator)) == (b"", True)
    # The half of an event is not passed on, so that the error cannot be taken for its other half.
    error = error_in(rest, path)
    assert (error["code"], error["type"]) == ("upstream_error", "api_error")
    assert "broke in the middle" in str(error["message"])


@pytest.mark.parametrize(
    ("sent", "passed_on"),
    [
        ([b'data: {"a": 1}\n'], b'data: {"a": 1}\n\n'),
        ([b'event: x\ndata: {"a": 1}\n'], b'event: x\ndata: {"a": 1}\n\n'),
        ([b'data: 1\r\n\r\ndata: {"a": 1}\r\n'], b'data: 1\r\n\r\ndata: {"a": 1}\r\n\n'),
        ([b"data: 1\n", b"\n"], b"data: 1\n\n"),
        ([b"data: 1\n\n: ping\n"], b"data: 1\n\n: ping\n"),
        ([b"event: x\n"], b"event: x\n"),
        ([b"data: " + b"x" * 100_000], b"data: " + b"x" * 100_000 + b"\n\n"),
    ],
    ids=["data", "name and data", "CRLF", "whole", "comment", "name", "very long line"],
)
async def test_the_event_of_an_error_is_never_a_part_of_the_one_before(
    scripted_server: ScriptedServer,
    gateway: Gateway,
    http: aiohttp.ClientSession,
    sent: list[bytes],
    passed_on: bytes,
) -> None:
    go_on = asyncio.Event()

    async def cut(exchange: Exchange) -> None:
        await exchange.raw(SSE_HEAD)
        for part in sent:
            await exchange.raw(chunk(part))
        await go_on.wait()
        exchange.hang_up()

    scripted_server.script(cut)
    async with http.post(gateway.origin + CHAT, data=STREAM) as response:
        received = await response.content.readexactly(len(b"".join(sent)))
        go_on.set()
        received += await response.read()
    assert received.startswith(passed_on)
    assert error_in(received.removeprefix(passed_on))["code"] == "upstream_error"


async def test_a_compressed_stream_that_breaks_off_is_cut_off(
    scripted_server: ScriptedServer, gateway: Gateway
) -> None:
    async def cut(exchange: Exchange) -> None:
        await exchange.raw(SSE_HEAD.replace(b"Content-Type", b"Content-Encoding: gzip\r\nContent-Type"))
        await exchange.raw(chunk(gzip.compress(b"data: 1\n\n")[:15]))
        exchange.hang_up()

    scripted_server.script(cut)
    client = await Client.connect(gateway)
    client.post(STREAM)
    received = await client.rest()
    assert b"gzip" in received
    assert b"error" not in received
    assert not received.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("encoding", "body"),
    [(b"br", b"\x0b\x02\x80data"), (b"gzip", gzip.compress(b"data: 1\n\n")[:-8])],
    ids=["unknown", "cut off"],
)
async def test_a_late_stream_that_cannot_be_decompressed_is_an_error(
    scripted_server: ScriptedServer, hasty: Gateway, http: aiohttp.ClientSession, encoding: bytes, body: bytes
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: %b\r\nContent-Length: %d\r\n\r\n"
    received = await fetch_late(scripted_server, hasty, http, raw(head % (encoding, len(body)), body))
    assert error_in(received.removeprefix(b"data: 1\n\n"))["code"] == "upstream_error"


async def test_a_stream_that_falls_silent_ends_with_an_event(
    scripted_server: ScriptedServer, hasty: Gateway, http: aiohttp.ClientSession
) -> None:
    scripted_server.script(stall(after=HALF))
    _, _, body = await fetch(http, hasty, CHAT, STREAM)
    assert error_in(body.split(b"\n\n")[-2] + b"\n\n")["code"] == "upstream_idle_timeout"


async def test_a_body_that_is_no_stream_and_breaks_off_is_cut_off(
    scripted_server: ScriptedServer, gateway: Gateway
) -> None:
    scripted_server.script(raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\nhalf"))
    client = await Client.connect(gateway)
    client.post(STREAM)
    received = await client.rest()
    # The connection was closed before the length that the head has announced.
    assert b"Content-Length: 100" in received
    assert len(received.partition(b"\r\n\r\n")[2]) < 100


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("behaviour", [reply(400, {"error": {"message": "no"}}), hang_up(), reset()])
async def test_openai_raises_what_has_gone_wrong(
    scripted_server: ScriptedServer, hasty: Gateway, late: bool, behaviour: Behaviour
) -> None:
    go_on = asyncio.Event()
    scripted_server.script(after_comments(go_on, behaviour))
    async with openai.AsyncOpenAI(base_url=hasty.api_base, api_key="x", max_retries=0) as client:
        if not late:
            go_on.set()

        async def ask() -> None:
            async for _ in await client.chat.completions.create(model="test-model", messages=[], stream=True):
                pass

        asking = asyncio.create_task(ask())
        if late:
            await scripted_server.wait_until(lambda: scripted_server.requests)
            await asyncio.sleep(0.05)
            go_on.set()
        with pytest.raises(openai.APIError):
            await asking


async def test_openai_skips_the_comments(scripted_server: ScriptedServer, hasty: Gateway) -> None:
    go_on = asyncio.Event()
    scripted_server.script(after_comments(go_on, answer("Hello")))
    # The read timeout is shorter than the wait.
    async with openai.AsyncOpenAI(base_url=hasty.api_base, api_key="x", timeout=1.5, max_retries=0) as client:
        asyncio.get_running_loop().call_later(2.5, go_on.set)
        stream = await client.chat.completions.create(model="test-model", messages=[], stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "Hello"


async def test_lmbridge_itself_works_through_the_gateway(scripted_server: ScriptedServer, hasty: Gateway) -> None:
    go_on = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    scripted_server.script(after_comments(go_on, answer("Hello")), after_comments(asyncio.Event(), hang_up()))
    async with LLMClient(hasty.api_base, "test-model", max_retries=0) as client:
        stream = await client.chat_completion(MESSAGES, stream=True)
        reply = await collect(stream)
        assert reply["choices"][0]["message"]["content"] == "Hello"
        scripted_server.default = hang_up()
        scripted_server._script.clear()
        with pytest.raises(LLMError, match="without an answer"):
            await client.chat_completion(MESSAGES)


async def test_a_client_that_leaves_while_it_gets_comments_leaves_nothing_behind(
    scripted_server: ScriptedServer, hasty: Gateway
) -> None:
    scripted_server.script(stall())
    client = await Client.connect(hasty)
    client.post(STREAM)
    await client.reader.readuntil(COMMENT.strip())
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    client.leave()
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    while hasty.stats().in_flight:
        await turns()
