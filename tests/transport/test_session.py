"""The session over sockets: what it does about aiohttp's habits, with whatever version of aiohttp is installed.

`nox -s oldest` runs these tests with the oldest aiohttp that is supported.
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import inspect
import ssl
import weakref
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from lmbridge.testing import ScriptedServer, answer, hang_up, raw, reply, stall
from lmbridge.transport import faults, session
from lmbridge.transport.http_interface import ConnectionFailed, HttpRequest, HttpResponse, StaleConnection
from lmbridge.transport.retry import Verdict
from lmbridge.transport.session import AIOHTTP_FAULTS, AiohttpSession
from tests.support import turns

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest_asyncio.fixture
async def http_session() -> AsyncIterator[AiohttpSession]:
    http_session = AiohttpSession(max_concurrency=None)
    yield http_session
    await http_session.close()


def get(server: ScriptedServer, **fields: Any) -> HttpRequest:
    return HttpRequest(method="GET", url=f"{server.api_base}/models", headers={}, **fields)


def post(server: ScriptedServer, **fields: Any) -> HttpRequest:
    return HttpRequest(method="POST", url=f"{server.api_base}/chat/completions", headers={}, body=b"{}", **fields)


async def read_body(response: HttpResponse) -> bytes:
    body = b""
    while part := await response.read_some():
        body += part
    return body


async def test_a_body_is_read_in_parts(scripted_server: ScriptedServer, http_session: AiohttpSession) -> None:
    scripted_server.default = reply(200, {"text": "Hello"})
    response = await http_session.send(post(scripted_server))
    assert (response.status, response.headers["content-type"]) == (200, "application/json")
    assert await read_body(response) == b'{"text":"Hello"}'
    response = await http_session.send(post(scripted_server))
    assert await read_body(response) == b'{"text":"Hello"}'
    assert scripted_server.connections == 1


@pytest.mark.parametrize("coding", ["gzip, chunked", 'chunk{"choices": []}', ""])
async def test_a_body_that_is_divided_in_an_unknown_way_is_refused(
    scripted_server: ScriptedServer, http_session: AiohttpSession, coding: str
) -> None:
    head = f"HTTP/1.1 200 OK\r\nTransfer-Encoding: {coding}\r\n\r\n"
    scripted_server.script(raw(head.encode(), b"2\r\n{}\r\n0\r\n\r\n"))
    with pytest.raises(ConnectionFailed) as caught:
        await http_session.send(post(scripted_server))
    assert "not valid HTTP" in str(caught.value.error)
    await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


# aiohttp repeats a GET by itself


async def test_a_get_on_a_lost_connection_is_not_repeated(
    scripted_server: ScriptedServer, http_session: AiohttpSession
) -> None:
    scripted_server.on_path("/v1/models", hang_up())
    with pytest.raises(ConnectionFailed) as caught:
        await http_session.send(get(scripted_server))
    assert not isinstance(caught.value, StaleConnection)
    assert len(scripted_server.requests) == 1


async def test_aiohttp_would_repeat_it_with_its_own_response_class(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_ResponseOnConnection", aiohttp.ClientResponse)
    scripted_server.on_path("/v1/models", hang_up())
    http_session = AiohttpSession(max_concurrency=None)
    with pytest.raises(ConnectionFailed):
        await http_session.send(get(scripted_server))
    await http_session.close()
    assert len(scripted_server.requests) == 2


# aiohttp does not say on which connection a request failed


@pytest.mark.parametrize("build", [get, post])
async def test_only_a_kept_connection_can_be_stale(
    scripted_server: ScriptedServer, http_session: AiohttpSession, build: Any
) -> None:
    await read_body(await http_session.send(build(scripted_server)))
    scripted_server.hang_up_reused = 1
    with pytest.raises(StaleConnection) as caught:
        await http_session.send(build(scripted_server))
    assert caught.value.verdict is Verdict.RETRY
    await read_body(await http_session.send(build(scripted_server)))
    assert len(scripted_server.requests) == 3


async def test_a_connection_that_dies_in_the_head_of_a_response_is_not_stale(
    scripted_server: ScriptedServer, http_session: AiohttpSession
) -> None:
    await read_body(await http_session.send(post(scripted_server)))
    scripted_server.script(raw(b"HTTP/1.1 200 OK\r\nContent-Le"))
    with pytest.raises(ConnectionFailed) as caught:
        await http_session.send(post(scripted_server))
    assert not isinstance(caught.value, StaleConnection)


async def test_a_fresh_connection_is_used_where_a_request_must_not_be_sent_twice(
    scripted_server: ScriptedServer, http_session: AiohttpSession
) -> None:
    for _ in range(2):
        await read_body(await http_session.send(post(scripted_server, fresh_connection=True)))
    assert scripted_server.connections == 2


# aiohttp forgets the reader of a body with broken framing


async def read_body_with_broken_framing(server: ScriptedServer, http_session: AiohttpSession) -> None:
    gate = asyncio.Event()

    async def behave(exchange: Any) -> None:
        await exchange.raw(CHUNKED + b"2\r\n{}\r\n")
        await gate.wait()
        await exchange.raw(b"zz\r\nnot a chunk\r\n")

    server.script(behave)
    response = await http_session.send(post(server))
    try:
        assert await response.read_some() == b"{}"
        gate.set()
        await response.read_some()
    finally:
        response.close()


async def test_the_reader_of_a_body_with_broken_framing_is_woken(
    scripted_server: ScriptedServer, http_session: AiohttpSession
) -> None:
    with pytest.raises(ConnectionFailed, match="broke in the middle of the answer") as caught:
        async with asyncio.timeout(10):
            await read_body_with_broken_framing(scripted_server, http_session)
    assert caught.value.verdict is Verdict.FAIL
    assert caught.value.error.status == 200


async def test_a_broken_connection_is_a_failure_at_any_moment_of_its_end(
    scripted_server: ScriptedServer, http_session: AiohttpSession
) -> None:
    for turns_before_read in range(12):
        gate = asyncio.Event()

        async def behave(exchange: Any, gate: asyncio.Event = gate) -> None:
            await exchange.raw(CHUNKED + b"2\r\n{}\r\n")
            await gate.wait()
            exchange._connection._transport.write(b"zz\r\nnot a chunk\r\n")
            await exchange.client_left()

        scripted_server.script(behave)
        response = await http_session.send(post(scripted_server))
        assert await response.read_some() == b"{}"
        gate.set()
        await turns(turns_before_read)
        with pytest.raises(ConnectionFailed):
            await response.read_some()
        response.close()


async def test_aiohttp_would_not_wake_it(
    scripted_server: ScriptedServer, http_session: AiohttpSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this test fails, aiohttp wakes the reader, and lmbridge need not watch the connection any longer."""
    parsers: Any = aiohttp.http_parser
    if parsers.HttpResponseParser is parsers.HttpResponseParserPy:
        pytest.skip("aiohttp's parser in Python wakes the reader")
    monkeypatch.setattr(session._AiohttpResponse, "on_connection_lost", lambda _: None)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await read_body_with_broken_framing(scripted_server, http_session)


async def test_a_kept_connection_forgets_the_responses_that_were_read(
    scripted_server: ScriptedServer, http_session: AiohttpSession
) -> None:
    guards = set()
    for _ in range(5):
        gate = asyncio.Event()
        scripted_server.script(answer("one two three", gate=gate))
        request = post(scripted_server)
        request.body = b'{"stream": true}'
        response = await http_session.send(request)
        assert isinstance(response, session._AiohttpResponse)
        guard = response._guard
        guards.add(guard)
        assert guard._watcher is response
        gate.set()
        while await response.read_some():
            pass
        assert guard._watcher is None
        assert guard._body is None
    assert len(guards) == 1


async def test_a_kept_connection_that_is_reset_logs_nothing(
    scripted_server: ScriptedServer, http_session: AiohttpSession, caplog: pytest.LogCaptureFixture
) -> None:
    gate = asyncio.Event()

    async def reply_and_reset(exchange: Any) -> None:
        await exchange.start()
        await gate.wait()
        await exchange.send(b"data: a\n\n")
        await exchange.end()
        exchange.reset()

    scripted_server.script(reply_and_reset)
    response = await http_session.send(post(scripted_server))
    assert isinstance(response, session._AiohttpResponse)
    guard = response._guard
    gate.set()
    while await response.read_some():
        pass
    while guard._transport is not None:
        await asyncio.sleep(0)
    del guard, response
    gc.collect()
    assert not caplog.records


# aiohttp forgets what has arrived when a connection breaks


@pytest.mark.parametrize("end", ["hang_up", "reset"])
async def test_what_had_arrived_is_read_before_the_failure(
    scripted_server: ScriptedServer, http_session: AiohttpSession, end: str
) -> None:
    async def behave(exchange: Any) -> None:
        await exchange.start()
        for part in (b"one ", b"two ", b"three"):
            await exchange.send(part)
        await turns(5)
        getattr(exchange, end)()

    scripted_server.script(behave)
    response = await http_session.send(post(scripted_server))
    assert isinstance(response, session._AiohttpResponse)
    body = await response.read_some()
    while response._content.exception() is None:
        await asyncio.sleep(0)
    while len(body) < len(b"one two three"):
        body += await response.read_some()
    assert body == b"one two three"
    with pytest.raises(ConnectionFailed):
        await response.read_some()
    assert response.take_arrived() == b""


async def test_what_has_arrived_is_taken_without_waiting(
    scripted_server: ScriptedServer, http_session: AiohttpSession
) -> None:
    scripted_server.script(stall(after=["one ", "two"]), reply(200, b""))
    response = await http_session.send(post(scripted_server))
    await turns(20)
    assert response.take_arrived() == b"one two"
    assert response.take_arrived() == b""
    response.close()
    response = await http_session.send(post(scripted_server))
    assert response.take_arrived() == b""


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
async def test_cancelling_a_read_loses_nothing(
    scripted_server: ScriptedServer, http_session: AiohttpSession, encoding: str
) -> None:
    body = gzip.compress(b"one two three") if encoding == "gzip" else b"one two three"
    for turns_before_cancel in range(6):

        async def behave(exchange: Any) -> None:
            await exchange.start(headers={"Content-Encoding": encoding})
            await exchange.send(body)
            await exchange.client_left()

        scripted_server.script(behave)
        response = await http_session.send(post(scripted_server))
        await turns(20)
        reading = asyncio.create_task(response.read_some())
        await turns(turns_before_cancel)
        reading.cancel()
        await asyncio.wait([reading])
        read = b"" if reading.cancelled() else reading.result()
        assert read + response.take_arrived() == b"one two three"
        response.close()


# Closing


async def test_close_wakes_what_waits_for_a_response_or_a_body(
    scripted_server: ScriptedServer, http_session: AiohttpSession
) -> None:
    scripted_server.script(stall(after=["a"]), stall())
    response = await http_session.send(post(scripted_server))
    await response.read_some()
    reading = asyncio.create_task(response.read_some())
    sending = asyncio.create_task(http_session.send(post(scripted_server)))
    await scripted_server.wait_until(lambda: len(scripted_server.requests) == 2)
    await http_session.close()
    for task in (reading, sending):
        with pytest.raises(ConnectionFailed):
            await task
    await http_session.close()


async def test_closing_a_response_wakes_its_reader(
    scripted_server: ScriptedServer, http_session: AiohttpSession
) -> None:
    scripted_server.script(stall(after=["a"]))
    response = await http_session.send(post(scripted_server))
    await response.read_some()
    reading = asyncio.create_task(response.read_some())
    await asyncio.sleep(0)
    response.close()
    with pytest.raises(ConnectionFailed):
        await reading
    await scripted_server.wait_until(lambda: scripted_server.aborts)


# The table of errors


def test_a_class_stands_before_the_classes_that_it_inherits_from() -> None:
    for table in (AIOHTTP_FAULTS, faults.PYTHON_FAULTS):
        classes = [kind for kind, _ in table]
        for index, kind in enumerate(classes):
            assert not any(issubclass(later, kind) for later in classes[index + 1 :]), kind


def test_every_error_of_aiohttp_has_a_meaning_of_its_own() -> None:
    errors = [
        error
        for _, error in inspect.getmembers(aiohttp, inspect.isclass)
        if issubclass(error, aiohttp.ClientError) and error is not aiohttp.ClientError
    ]
    assert len(errors) > 15
    without = {
        error.__name__
        for error in errors
        if next(fault for kind, fault in AIOHTTP_FAULTS if issubclass(error, kind)) is faults.NOT_SENT
    }
    # Mistakes in a URL are found when a client is made, redirects are not followed, and nothing is uploaded.
    assert without <= {
        "InvalidURL",
        "InvalidUrlClientError",
        "InvalidUrlRedirectClientError",
        "NonHttpUrlClientError",
        "NonHttpUrlRedirectClientError",
        "RedirectClientError",
        "UploadAbortedError",
    }


@pytest.mark.parametrize(
    ("exc", "fault"),
    [
        (ConnectionRefusedError(111, "x"), faults.NOT_CONNECTED),
        (ConnectionResetError(104, "x"), faults.BROKEN_BEFORE_RESPONSE),
        (ssl.SSLCertVerificationError(1, "x"), faults.UNTRUSTED_CERTIFICATE),
        (ssl.SSLError(1, "x"), faults.TLS_FAILED),
        (KeyError("x"), faults.NOT_SENT),
    ],
)
def test_errors_of_python_have_a_meaning_too(exc: Exception, fault: faults.Fault) -> None:
    assert faults.look_up_fault(exc, faults.PYTHON_FAULTS) is fault


async def test_a_response_that_is_closed_while_it_is_read_keeps_nothing_alive(
    scripted_server: ScriptedServer, http_session: AiohttpSession
) -> None:
    async def close_while_reading() -> weakref.ref[object]:
        marker = set[object]()

        async def read(response: HttpResponse, _kept: object) -> bytes:
            return await response.read_some()

        scripted_server.script(stall(after=[{}]))
        response = await http_session.send(post(scripted_server))
        await response.read_some()
        reader = asyncio.create_task(read(response, marker))
        await turns(3)
        response.close()
        with pytest.raises(ConnectionFailed):
            await reader
        return weakref.ref(marker)

    # A frame of `read` that a traceback keeps also keeps the marker.
    markers = [await close_while_reading() for _ in range(3)]
    # Until its next step, asyncio keeps the exception that it has raised in this task.
    await asyncio.sleep(0)
    gc.collect()
    assert [marker() for marker in markers] == [None] * 3
