"""`Transport.forward`: responses are passed on as they are, and requests are treated like any others."""

from __future__ import annotations

import asyncio
import gc
import gzip
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
import pytest_asyncio

from lmbridge import Limits, LLMConnectionError, LLMStreamError, LLMTimeoutError, TaskCancelledError, Timeouts
from lmbridge.client import failures
from lmbridge.client.usage import usage_in_body
from lmbridge.observe import FirstEventArrived, ObservedEvent
from lmbridge.observe.observer import Observers
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, hang_up, raw, reply, reset, sse, stall
from lmbridge.transport import ForwardedResponse, Interpreter, Reply, Request, Transport
from tests.support import HALF, piece, turns
from tests.transport.test_attempts import LOADING

SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 18\r\n\r\n"


def request(body: bytes = b'{"model": "test-model"}', **fields: Any) -> Request:
    """Returns a request to forward."""
    defaults: dict[str, Any] = {
        "operation": "chat completion",
        "method": "POST",
        "path": "/chat/completions",
        "interpreter": Interpreter(classify=failures.classify),
        "timeouts": Timeouts(),
        "max_retries": 2,
        "model": "test-model",
    }
    return Request(body=body, **{**defaults, **fields})


@pytest_asyncio.fixture
async def transport(scripted_server: ScriptedServer) -> AsyncIterator[Transport]:
    """A transport to the scripted server with one permit for one model."""
    limits = Limits(max_concurrency=1, max_loaded_models=1)
    async with Transport(scripted_server.api_base, limits=limits) as transport:
        yield transport


async def read_all(response: ForwardedResponse) -> bytes:
    """Reads a body to its end."""
    parts = []
    while part := await response.read():
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": 1, "a": 2,  "z":\t12345678901234567890, "b": "\\u00e9"}\r\n',
        b"\xff\xfe not JSON",
        b"",
        gzip.compress(b'{"choices": []}'),
        b'{"x": "' + b"y" * 2_000_000 + b'"}',
    ],
    ids=["odd JSON", "not JSON", "empty", "compressed", "large"],
)
@pytest.mark.parametrize("status", [200, 201, 302, 400, 404])
async def test_status_headers_and_body_are_those_of_the_server(
    scripted_server: ScriptedServer, transport: Transport, status: int, body: bytes
) -> None:
    headers = b"Content-Type: application/json\r\nX-Odd: a\r\nX-Odd: b\r\n"
    if body.startswith(b"\x1f\x8b"):
        headers += b"Content-Encoding: gzip\r\n"
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    scripted_server.script(raw(b"HTTP/1.1 %d Odd\r\n" % status, headers, length, body))
    response = await transport.forward(request())
    assert response.status == status
    assert [value for name, value in response.headers.items() if name == "X-Odd"] == ["a", "b"]
    assert await read_all(response) == body
    assert transport.in_flight == 0


async def test_the_body_of_the_request_is_sent_as_it_is(scripted_server: ScriptedServer, transport: Transport) -> None:
    body = b'{"model":  "test-model", "b": 1, "a": 12345678901234567890, "a": [ ]}\n'
    await transport.forward(request(body, headers={"X-Own": "yes", "Content-Type": "application/json; x=1"}))
    [received] = scripted_server.requests
    assert received.body == body
    assert received.headers["X-Own"] == "yes"
    assert received.headers["Content-Type"] == "application/json; x=1"


async def test_parts_are_handed_out_as_they_arrive_and_the_permit_is_held_until_the_end(
    scripted_server: ScriptedServer, transport: Transport
) -> None:
    more = asyncio.Event()

    async def behaviour(exchange: Exchange) -> None:
        await exchange.raw(SSE_HEAD + b"data: 1\n\n")
        await more.wait()
        await exchange.raw(b"data: 2\n\n")

    scripted_server.script(behaviour)
    response = await transport.forward(request())
    assert response.whole_body is None
    assert await response.read() == b"data: 1\n\n"
    assert transport.in_flight == 1
    more.set()
    assert await read_all(response) == b"data: 2\n\n"
    assert transport.in_flight == 0


async def test_the_first_part_of_a_body_shows_that_the_model_is_loaded(
    scripted_server: ScriptedServer,
) -> None:
    limits = Limits(max_concurrency=2, max_loaded_models=1)
    async with Transport(scripted_server.api_base, limits=limits) as transport:
        begin = asyncio.Event()

        async def behaviour(exchange: Exchange) -> None:
            await begin.wait()
            await stall(after=HALF)(exchange)

        scripted_server.script(behaviour, sse(piece("x", finish_reason="stop")))
        first = asyncio.create_task(transport.forward(request()))
        second = asyncio.create_task(transport.forward(request()))
        await scripted_server.wait_until(lambda: len(scripted_server.requests) == 1)
        assert transport.queued == 1
        begin.set()
        async with await first, await second as response:
            assert b"data:" in await read_all(response)


PING = b": ping\n\n"
ENDLESS_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def pings_until(go_on: asyncio.Event, rest: bytes) -> Behaviour:
    """Returns a behaviour that sends a comment, and the rest of the body later."""

    async def behaviour(exchange: Exchange) -> None:
        await exchange.raw(ENDLESS_HEAD + PING)
        await go_on.wait()
        await exchange.raw(rest)
        exchange.hang_up()

    return behaviour


async def test_a_comment_does_not_show_that_the_model_is_loaded_and_is_passed_on_with_the_answer(
    scripted_server: ScriptedServer,
) -> None:
    limits = Limits(max_concurrency=4, max_loaded_models=1)
    async with Transport(scripted_server.api_base, limits=limits) as transport:
        go_on = asyncio.Event()
        scripted_server.default = pings_until(go_on, b"data: 1\n\n")
        tasks = [asyncio.create_task(transport.forward(request())) for _ in range(4)]
        await scripted_server.wait_until(lambda: scripted_server.requests)
        done, _ = await asyncio.wait(tasks, timeout=0.1)
        assert (len(done), len(scripted_server.requests), transport.queued) == (0, 1, 3)
        go_on.set()
        assert {await read_all(response) for response in await asyncio.gather(*tasks)} == {PING + b"data: 1\n\n"}


async def test_a_stream_of_nothing_but_comments_is_passed_on_and_the_next_request_goes_alone(
    scripted_server: ScriptedServer,
) -> None:
    async with Transport(scripted_server.api_base, limits=Limits(max_concurrency=4, max_loaded_models=1)) as transport:
        body = PING * 2
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body)
        scripted_server.script(raw(head + body), stall(), stall())
        response = await transport.forward(request())
        assert (response.whole_body, transport.in_flight) == (body, 0)
        tasks = [asyncio.create_task(transport.forward(request())) for _ in range(2)]
        await scripted_server.wait_until(lambda: len(scripted_server.requests) == 2)
        assert (transport.in_flight, transport.queued) == (1, 1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_comments_are_not_kept_without_a_bound(scripted_server: ScriptedServer, transport: Transport) -> None:
    async def behaviour(exchange: Exchange) -> None:
        await exchange.raw(ENDLESS_HEAD + PING * 10_000)
        await asyncio.Event().wait()

    scripted_server.script(behaviour)
    async with await transport.forward(request()) as response:
        assert len(await response.read()) >= 64 * 1024


@pytest.mark.parametrize("timeouts", [Timeouts(first_byte=0.05), Timeouts(total=0.05)])
async def test_comments_do_not_extend_the_time_limits(
    scripted_server: ScriptedServer, transport: Transport, timeouts: Timeouts
) -> None:
    scripted_server.script(pings_until(asyncio.Event(), b""))
    with pytest.raises(LLMTimeoutError):
        await transport.forward(request(timeouts=timeouts))
    assert transport.in_flight == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


@pytest.mark.parametrize("by_close", [False, True])
async def test_ending_a_request_after_a_comment_closes_the_connection(
    scripted_server: ScriptedServer, transport: Transport, by_close: bool
) -> None:
    scripted_server.script(pings_until(asyncio.Event(), b""))
    task = asyncio.create_task(transport.forward(request()))
    await scripted_server.wait_until(lambda: scripted_server.requests)
    await asyncio.wait((task,), timeout=0.05)
    if by_close:
        await transport.close()
    else:
        task.cancel()
    with pytest.raises(TaskCancelledError if by_close else asyncio.CancelledError):
        await task
    assert transport.in_flight == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


@pytest.mark.parametrize("failure", [reply(503, {"error": "busy"}), reply(429), hang_up(), reset(), LOADING])
async def test_failures_before_the_first_byte_are_repeated(
    scripted_server: ScriptedServer, transport: Transport, no_waits: list[float], failure: Behaviour
) -> None:
    scripted_server.script(failure, failure, sse(piece("x")))
    response = await transport.forward(request())
    assert response.status == 200
    assert b"data:" in await read_all(response)
    assert len(scripted_server.requests) == 3


async def test_a_compressed_error_is_classified(
    scripted_server: ScriptedServer, transport: Transport, no_waits: list[float]
) -> None:
    loading = gzip.compress(b'{"error": {"message": "Loading model", "code": 503}}')
    head = b"HTTP/1.1 503 X\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(loading)
    scripted_server.script(*[raw(head, loading)] * 5, reply(200, {"ok": True}))
    response = await transport.forward(request(max_retries=0))
    assert response.status == 200
    assert transport.stats().retries == 0


async def test_the_tokens_of_a_compressed_reply_are_logged(
    scripted_server: ScriptedServer, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lmbridge.transport")
    body = gzip.compress(b'{"usage": {"prompt_tokens": 7, "completion_tokens": 5}}')
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    scripted_server.script(raw(head % len(body) + body))
    interpreter = Interpreter(classify=failures.classify, read_usage=usage_in_body)
    async with await transport.forward(request(interpreter=interpreter)) as response:
        assert await read_all(response) == body
    assert "7 + 5 tokens" in caplog.text


async def test_a_final_error_is_handed_out_whole(
    scripted_server: ScriptedServer, transport: Transport, no_waits: list[float]
) -> None:
    scripted_server.script(*[reply(503, {"error": "busy"})] * 3)
    response = await transport.forward(request())
    assert (response.status, response.whole_body) == (503, b'{"error":"busy"}')
    assert transport.in_flight == 0


async def test_json_that_breaks_off_is_never_handed_out(scripted_server: ScriptedServer, transport: Transport) -> None:
    scripted_server.script(
        raw(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"a":')
    )
    with pytest.raises(LLMConnectionError, match="broke in the middle"):
        await transport.forward(request())
    assert transport.in_flight == 0


async def test_a_stream_that_breaks_off_is_an_error(scripted_server: ScriptedServer, transport: Transport) -> None:
    scripted_server.script(
        raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 100\r\n\r\ndata: 1\n\n")
    )
    response = await transport.forward(request())
    assert await response.read() == b"data: 1\n\n"
    with pytest.raises(LLMStreamError, match="broke in the middle"):
        await response.read()
    assert transport.in_flight == 0


async def test_leaving_a_response_closes_the_connection(scripted_server: ScriptedServer, transport: Transport) -> None:
    scripted_server.script(stall(after=HALF))
    async with await transport.forward(request()) as response:
        await response.read()
    assert transport.in_flight == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    with pytest.raises(LLMStreamError, match="closed before its end"):
        await response.read()


async def test_cancelling_a_read_closes_the_connection(scripted_server: ScriptedServer, transport: Transport) -> None:
    scripted_server.script(stall(after=HALF))
    response = await transport.forward(request())
    await response.read()
    task = asyncio.create_task(read_all(response))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert transport.in_flight == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_a_response_that_was_dropped_is_closed(scripted_server: ScriptedServer, transport: Transport) -> None:
    scripted_server.script(stall(after=HALF))
    response = await transport.forward(request())
    references = [response]
    del response
    with pytest.warns(ResourceWarning, match="unclosed response to chat completion"):
        references.clear()
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    assert transport.in_flight == 0


@pytest.mark.parametrize("is_forwarded", [True, False], ids=["forwarded", "stream"])
async def test_a_response_keeps_its_transport_alive(scripted_server: ScriptedServer, is_forwarded: bool) -> None:
    go_on = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(b'data: {"choices": [{"delta": {"content": "1"}}]}\n\n')
        await go_on.wait()
        await exchange.send(b"data: [DONE]\n\n")
        await exchange.client_left()

    scripted_server.script(behave)
    transport = Transport(scripted_server.api_base)
    response = await (transport.forward(request()) if is_forwarded else transport.stream(request()))
    assert not isinstance(response, Reply)
    assert "choices" in str(await response.read())
    del transport
    gc.collect()
    # What is called when a transport is dropped has run after one turn of the event loop.
    await turns()
    go_on.set()
    assert "[DONE]" in str(await response.read())
    response.abort()
    references = [response]
    del response
    # There is no reference cycle, so the transport goes with its last response.
    gc.disable()
    try:
        with pytest.warns(ResourceWarning, match="unclosed <Transport"):
            references.clear()
    finally:
        gc.enable()
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_closing_the_transport_ends_a_response(scripted_server: ScriptedServer, transport: Transport) -> None:
    scripted_server.script(stall(after=HALF))
    response = await transport.forward(request())
    await response.read()
    reading = asyncio.create_task(response.read())
    await asyncio.sleep(0)
    await transport.close()
    with pytest.raises(TaskCancelledError, match="the client was closed"):
        await reading


@pytest.mark.parametrize(
    ("behaviour", "timeouts", "phase"),
    [
        (stall(), Timeouts(first_byte=0.05), "first_byte"),
        (stall(), Timeouts(total=0.05), "total"),
        (stall(after=HALF), Timeouts(idle=0.05), "idle"),
        (stall(after=HALF), Timeouts(total=0.2), "total"),
    ],
)
async def test_each_wait_has_its_limit(
    scripted_server: ScriptedServer, transport: Transport, behaviour: Behaviour, timeouts: Timeouts, phase: str
) -> None:
    scripted_server.script(behaviour)
    with pytest.raises(LLMTimeoutError) as caught:
        await read_all(await transport.forward(request(timeouts=timeouts)))
    assert caught.value.phase == phase
    assert transport.in_flight == 0


async def test_a_server_that_cannot_be_reached_is_an_error(no_waits: list[float]) -> None:
    async with Transport("http://127.0.0.1:9") as transport:
        with pytest.raises(LLMConnectionError):
            await transport.forward(request())


async def test_the_admission_is_reported(scripted_server: ScriptedServer, transport: Transport) -> None:
    admitted: list[str] = []
    scripted_server.script(stall(after=HALF), reply(200, {}))
    async with await transport.forward(request(on_admitted=lambda _: admitted.append("first"))):
        second = asyncio.create_task(transport.forward(request(on_admitted=lambda _: admitted.append("second"))))
        await asyncio.sleep(0)
        assert admitted == ["first"]
    await second
    assert admitted == ["first", "second"]


@pytest.mark.parametrize(("behaviour", "is_stream"), [(reply(200, {"x": 1}), False), (sse("x", "[DONE]"), True)])
async def test_observers_learn_whether_a_response_is_a_stream(
    scripted_server: ScriptedServer, transport: Transport, behaviour: Behaviour, is_stream: bool
) -> None:
    class Recorder:
        seen: ClassVar[list[bool]] = []

        def on_event(self, event: ObservedEvent) -> None:
            if isinstance(event, FirstEventArrived):
                self.seen.append(event.is_stream)

    scripted_server.script(behaviour)
    async with await transport.forward(request(observers=Observers([Recorder()]))) as response:
        await read_all(response)
    assert Recorder.seen == [is_stream]
