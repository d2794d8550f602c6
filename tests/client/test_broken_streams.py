"""Streams that end early, or not at all: what had arrived is handed out first, or it is in the error's `.partial`.

The readers of these tests are slower than the network, so that most of a reply is still unread when the end comes.
"""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from typing import Any

import pytest

from lmbridge import (
    Agent,
    Limits,
    LLMClient,
    LLMStreamError,
    LLMTimeoutError,
    RunHandle,
    TaskCancelledError,
    TextDelta,
    Timeouts,
    collect,
)
from lmbridge.testing import Behaviour, Exchange, MockTransport, ScriptedServer, raw
from lmbridge.testing.exchange import encode_event
from lmbridge.transport.session import _AiohttpResponse
from lmbridge.transport.sse import MAX_EVENT_SIZE, SSEDecoder
from tests.support import MESSAGES, in_flight, opened, piece, replaced, turns

WORDS = [f"{number} " for number in range(20)]
TEXT = "".join(WORDS)
USAGE = {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}

CHAT = [piece(word) for word in WORDS]
COMPLETION = [
    {"object": "text_completion", "model": "test-model", "choices": [{"text": word, "index": 0, "finish_reason": None}]}
    for word in WORDS
]
RESPONSE: list[dict[str, Any]] = [
    {"type": "response.created", "response": {"id": "resp_1", "model": "test-model"}},
    *({"type": "response.output_text.delta", "item_id": "msg_1", "delta": word} for word in WORDS),
]
CHUNKS = {"chat": CHAT, "completion": COMPLETION, "response": RESPONSE}
ENDS: dict[str, list[dict[str, Any]]] = {
    "chat": [piece(finish_reason="stop"), {"choices": [], "usage": USAGE}],
    "completion": [{"choices": [{"text": "", "index": 0, "finish_reason": "stop"}]}, {"choices": [], "usage": USAGE}],
    "response": [{"type": "response.completed", "response": {"id": "resp_1", "usage": USAGE, "status": "completed"}}],
}


async def open_stream(client: LLMClient, endpoint: str) -> Any:
    if endpoint == "chat":
        return await client.chat_completion(MESSAGES, stream=True)
    if endpoint == "completion":
        return await client.text_completion("Count:", stream=True)
    return await client.create_response("Count.", stream=True)


def text_in(reply: Any) -> str:
    if reply is None:
        return ""
    if "output" in reply:
        return "".join(item["content"][0]["text"] for item in reply["output"])
    (choice,) = reply["choices"]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


async def hang_up(exchange: Exchange) -> None:
    exchange.hang_up()


async def reset(exchange: Exchange) -> None:
    await turns(5)
    exchange.reset()


async def break_the_framing(exchange: Exchange) -> None:
    await exchange.raw(b"zz\r\nnot a chunk\r\n")
    await exchange.client_left()


BREAKS = [hang_up, reset, break_the_framing]


def sends(events: Sequence[dict[str, Any]], then: Callable[[Exchange], Awaitable[None]]) -> Behaviour:
    """Sends the events, so that they arrive separately, and ends the body in the given way."""

    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        for event in events:
            await exchange.send(encode_event(event))
        await then(exchange)

    return behave


async def broken(stream: Any) -> None:
    """Waits until the client has noticed that the connection is broken."""
    response = stream._events._response
    assert isinstance(response, _AiohttpResponse)
    async with asyncio.timeout(10):
        while response._content.exception() is None:
            await asyncio.sleep(0)


async def all_arrived(server: ScriptedServer) -> None:
    """Waits until the server has sent everything, and the client has received it."""
    await server.wait_until(lambda: server.requests[-1].finished)
    await turns(20)


async def for_each(stream: AsyncIterable[Any], do: Callable[[Any], object]) -> None:
    async for item in stream:
        do(item)


async def stay(exchange: Exchange) -> None:
    """Marks everything as sent, and leaves the connection open without ending the body."""
    exchange.request.finished = True
    await exchange.client_left()


@pytest.fixture(params=["chat", "completion", "response"])
def endpoint(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# The server ends the stream


@pytest.mark.parametrize("limits", [None, Limits(max_loaded_models=1)], ids=["", "read ahead"])
@pytest.mark.parametrize("end", BREAKS)
async def test_events_that_arrived_before_a_break_are_handed_out_before_the_error(
    scripted_server: ScriptedServer, endpoint: str, end: Callable[[Exchange], Awaitable[None]], limits: Limits | None
) -> None:
    scripted_server.default = sends(CHUNKS[endpoint], end)
    async with LLMClient(scripted_server.api_base, "test-model", limits=limits) as client:
        stream = await open_stream(client, endpoint)
        items = [await anext(stream)]
        await broken(stream)
        with pytest.raises(LLMStreamError, match="broke mid-stream") as caught:
            await for_each(stream, items.append)
    assert len(items) == len(CHUNKS[endpoint])
    assert text_in(caught.value.partial) == TEXT


async def test_a_body_that_is_shorter_than_announced_is_handed_out_before_the_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.start(headers={"Content-Length": "999999"}, chunked=False)
        for chunk in CHAT:
            await exchange.send(encode_event(chunk))
        exchange.hang_up()

    scripted_server.script(behave)
    stream = await opened(client)
    await anext(stream)
    await broken(stream)
    with pytest.raises(LLMStreamError) as caught:
        await collect(stream)
    assert text_in(caught.value.partial) == TEXT


@pytest.mark.parametrize("end", BREAKS)
async def test_a_whole_answer_keeps_its_usage_however_its_body_ends(
    scripted_server: ScriptedServer, client: LLMClient, endpoint: str, end: Callable[[Exchange], Awaitable[None]]
) -> None:
    scripted_server.script(sends([*CHUNKS[endpoint], *ENDS[endpoint]], end))
    stream = await open_stream(client, endpoint)
    await anext(stream)
    await broken(stream)
    reply = await collect(stream)
    assert text_in(reply) == TEXT
    assert reply["usage"] == USAGE


async def test_events_before_one_that_is_too_large_are_handed_out_before_the_error(
    scripted_server: ScriptedServer, client: LLMClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SSEDecoder.__init__, "__defaults__", (1000,))

    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(b"".join(map(encode_event, [*CHAT, piece("x" * 1000), piece("never")])))

    scripted_server.script(behave)
    with pytest.raises(LLMStreamError, match="an event of more than 1000 bytes") as caught:
        await collect(await opened(client))
    assert text_in(caught.value.partial) == TEXT
    assert MAX_EVENT_SIZE > 1000


@pytest.mark.parametrize("end", BREAKS)
async def test_a_run_has_everything_that_arrived_before_a_break(
    scripted_server: ScriptedServer, client: LLMClient, end: Callable[[Exchange], Awaitable[None]]
) -> None:
    # More events than the channel of the run holds, so that the run waits for its listener.
    scripted_server.script(sends(CHAT * 5, end))
    events = Agent(client).stream("Count.")
    texts: list[str] = []
    while not texts:
        if isinstance(event := await anext(events), TextDelta):
            texts.append(event.text)
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)
    await turns(20)
    with pytest.raises(LLMStreamError) as caught:
        await for_each(events, lambda event: texts.append(event.text) if isinstance(event, TextDelta) else None)
    assert "".join(texts) == TEXT * 5
    assert caught.value.partial.text == TEXT * 5


# A time limit ends the stream


async def test_events_that_arrived_before_the_limit_for_the_whole_request_are_handed_out_before_the_error(
    scripted_server: ScriptedServer, endpoint: str
) -> None:
    scripted_server.script(sends(CHUNKS[endpoint], stay))
    async with LLMClient(scripted_server.api_base, "test-model", timeout=Timeouts(total=60)) as client:
        stream = await open_stream(client, endpoint)
        items = [await anext(stream)]
        await all_arrived(scripted_server)
        stream._events.call.total_deadline = 0.0
        with pytest.raises(LLMTimeoutError) as caught:
            await for_each(stream, items.append)
    assert caught.value.phase == "total"
    assert len(items) == len(CHUNKS[endpoint])
    assert text_in(caught.value.partial) == TEXT


async def test_an_answer_that_is_whole_at_the_limit_for_the_whole_request_is_no_error(
    scripted_server: ScriptedServer, endpoint: str
) -> None:
    scripted_server.script(sends([*CHUNKS[endpoint], *ENDS[endpoint]], stay))
    async with LLMClient(scripted_server.api_base, "test-model", timeout=Timeouts(total=60)) as client:
        stream = await open_stream(client, endpoint)
        await anext(stream)
        await all_arrived(scripted_server)
        stream._events.call.total_deadline = 0.0
        reply = await collect(stream)
    assert text_in(reply) == TEXT
    assert reply["usage"] == USAGE


async def test_events_that_arrived_before_the_limit_for_gaps_are_in_partial(
    scripted_server: ScriptedServer, endpoint: str
) -> None:
    scripted_server.script(sends(CHUNKS[endpoint], stay))
    async with LLMClient(scripted_server.api_base, "test-model", timeout=Timeouts(idle=0.05)) as client:
        stream = await open_stream(client, endpoint)
        await anext(stream)
        await all_arrived(scripted_server)
        with pytest.raises(LLMTimeoutError) as caught:
            await collect(stream)
    assert caught.value.phase == "idle"
    assert text_in(caught.value.partial) == TEXT


# Nothing ends the stream


@pytest.mark.parametrize("heartbeat", [b": ping\n\n", b'data: {"choices": []}\n\n', b""])
async def test_a_whole_answer_ends_although_the_server_keeps_the_connection_open(
    scripted_server: ScriptedServer,
    client: LLMClient,
    endpoint: str,
    heartbeat: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def beat(exchange: Exchange) -> None:
        while heartbeat:
            await exchange.send(heartbeat)
            await asyncio.sleep(0.01)
        await exchange.client_left()

    end = ENDS[endpoint][0]
    scripted_server.script(sends([*CHUNKS[endpoint], end], beat))
    caplog.set_level("INFO", "lmbridge")
    async with asyncio.timeout(10):
        reply = await collect(await open_stream(client, endpoint))
    assert text_in(reply) == TEXT
    assert in_flight(client) == 0
    assert "test-model 200 in" in caplog.text
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_the_usage_that_follows_a_whole_answer_is_kept(
    scripted_server: ScriptedServer, client: LLMClient, endpoint: str
) -> None:
    async def send_usage(exchange: Exchange) -> None:
        await asyncio.sleep(0.05)
        for event in ENDS[endpoint][1:]:
            await exchange.chunk(event)
        await exchange.client_left()

    scripted_server.script(sends([*CHUNKS[endpoint], ENDS[endpoint][0]], send_usage))
    async with asyncio.timeout(10):
        reply = await collect(await open_stream(client, endpoint))
    assert (text_in(reply), reply["usage"]) == (TEXT, USAGE)


async def test_an_answer_is_not_whole_before_each_of_its_choices_is(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    async def finish_late(exchange: Exchange) -> None:
        await asyncio.sleep(0.4)
        second = {"index": 1, "delta": {"content": "x"}, "finish_reason": "stop"}
        await exchange.chunk(piece(choices=[second]))
        await exchange.client_left()

    scripted_server.script(sends([*CHAT, ENDS["chat"][0]], finish_late))
    async with asyncio.timeout(10):
        reply = await collect(await client.chat_completion(MESSAGES, stream=True, n=2))
    assert len(reply["choices"]) == 2


async def test_a_finish_reason_in_every_chunk_does_not_end_an_answer(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    async def go_on(exchange: Exchange) -> None:
        await exchange.chunk(piece("two ", finish_reason="stop"))
        await asyncio.sleep(0.4)
        await exchange.chunk(piece("three", finish_reason="stop"))
        await exchange.send(b"data: [DONE]\n\n")
        await exchange.end()

    scripted_server.script(sends([piece("one ", finish_reason="stop")], go_on))
    assert text_in(await collect(await opened(client))) == "one two three"


def finished(endpoint: str, text: str) -> dict[str, Any]:
    """Returns a chunk that has a finish reason together with a piece of the answer."""
    if endpoint == "chat":
        return piece(text, finish_reason="stop")
    return {"choices": [{"text": text, "index": 0, "finish_reason": "stop"}]}


def with_a_call(finish_reason: str) -> dict[str, Any]:
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return piece(choices=[{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": finish_reason}])


@pytest.mark.parametrize("then", [*BREAKS, Exchange.end])
@pytest.mark.parametrize("endpoint", ["chat", "completion"])
async def test_an_answer_with_a_finish_reason_in_every_chunk_is_cut_off_without_done(
    scripted_server: ScriptedServer, client: LLMClient, endpoint: str, then: Callable[[Exchange], Awaitable[None]]
) -> None:
    scripted_server.script(sends([finished(endpoint, word) for word in WORDS[:3]], then))
    with pytest.raises(LLMStreamError) as caught:
        await collect(await open_stream(client, endpoint))
    assert text_in(caught.value.partial) == "".join(WORDS[:3])


@pytest.mark.parametrize(
    "events",
    [
        [piece("one ", finish_reason="stop"), piece("two")],
        [piece(finish_reason="stop"), piece("two")],
        [with_a_call("tool_calls"), piece("two")],
        [piece("one", finish_reason="stop"), with_a_call("tool_calls")],
        [piece("one", finish_reason="stop"), piece(choices=[{"index": 0, "delta": {"reasoning_content": "Hm"}}])],
    ],
)
async def test_whatever_follows_a_finish_reason_shows_that_it_was_not_the_end(
    scripted_server: ScriptedServer, client: LLMClient, events: list[dict[str, Any]]
) -> None:
    scripted_server.script(sends(events, reset))
    with pytest.raises(LLMStreamError):
        await collect(await opened(client))


@pytest.mark.parametrize("last", [piece(""), piece(finish_reason="stop"), {"choices": [], "usage": USAGE}])
async def test_an_empty_chunk_after_the_finish_reason_does_not_continue_the_answer(
    scripted_server: ScriptedServer, client: LLMClient, last: dict[str, Any]
) -> None:
    scripted_server.script(sends([piece("one", finish_reason="stop"), last], reset))
    assert text_in(await collect(await opened(client))) == "one"


@pytest.mark.parametrize("endpoint", ["chat", "completion"])
async def test_a_slow_answer_with_a_finish_reason_in_every_chunk_does_not_end_after_the_first(
    scripted_server: ScriptedServer, client: LLMClient, endpoint: str
) -> None:
    async def go_on(exchange: Exchange) -> None:
        await asyncio.sleep(0.3)
        await exchange.chunk(finished(endpoint, "two"))
        await exchange.send(b"data: [DONE]\n\n")
        await exchange.end()

    scripted_server.script(sends([finished(endpoint, "one ")], go_on))
    assert text_in(await collect(await open_stream(client, endpoint))) == "one two"


@pytest.mark.parametrize("endpoint", ["chat", "completion"])
async def test_an_end_that_is_not_certain_is_logged_as_a_warning(
    scripted_server: ScriptedServer,
    client: LLMClient,
    endpoint: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lmbridge.client.reply_stream._GRACE_AFTER_TEXT", 0.01)
    scripted_server.script(
        sends([finished(endpoint, "one")], stay),
        sends([finished(endpoint, "one"), {"choices": [], "usage": USAGE}], stay),
        sends([*CHUNKS[endpoint], ENDS[endpoint][0]], stay),
    )
    for _ in range(3):
        await collect(await open_stream(client, endpoint))
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage().startswith(
        "an answer may be incomplete, because neither [DONE] nor the end of the body"
    )


async def test_a_run_ends_although_the_server_keeps_the_connection_open(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sends([*CHAT, *ENDS["chat"]], stay))
    async with asyncio.timeout(10):
        result = await Agent(client).run("Count.")
    assert (result.text, result.usage) == (TEXT, USAGE)


# The program ends the stream


@pytest.mark.parametrize("end", [*BREAKS, stay])
async def test_closing_a_stream_keeps_everything_that_has_arrived(
    scripted_server: ScriptedServer, client: LLMClient, endpoint: str, end: Callable[[Exchange], Awaitable[None]]
) -> None:
    scripted_server.script(sends(CHUNKS[endpoint], end))
    stream = await open_stream(client, endpoint)
    await anext(stream)
    await (all_arrived(scripted_server) if end is stay else broken(stream))
    await stream.aclose()
    assert text_in(stream.partial) == TEXT
    with pytest.raises(TaskCancelledError, match="closed before its end") as caught:
        await anext(stream)
    assert text_in(caught.value.partial) == TEXT


async def test_closing_a_stream_keeps_the_events_that_arrived_together(client: LLMClient) -> None:
    def handler(_: object) -> Any:
        return [b"".join(map(encode_event, [*CHAT, {"error": "gone"}, piece("never")]))]

    async with LLMClient(model="test-model", transport=MockTransport(handler)) as mocked:
        stream = await opened(mocked)
        await anext(stream)
        await stream.aclose()
    # What follows an error is not part of the answer, and the error does not replace that of the close.
    assert text_in(stream.partial) == TEXT
    with pytest.raises(TaskCancelledError, match="closed before its end"):
        await anext(stream)


async def test_closing_a_stream_that_was_never_read_keeps_what_was_read_ahead(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.default = sends(CHAT, stay)
    async with LLMClient(scripted_server.api_base, "test-model", limits=Limits(max_loaded_models=1)) as client:
        stream = await opened(client)
        await all_arrived(scripted_server)
        await stream.aclose()
        assert text_in(stream.partial) == TEXT


async def test_cancelling_the_reader_keeps_everything_that_has_arrived(
    scripted_server: ScriptedServer, client: LLMClient, endpoint: str
) -> None:
    scripted_server.script(sends(CHUNKS[endpoint], stay))
    stream = await open_stream(client, endpoint)
    busy = asyncio.Event()

    async def read_slowly() -> None:
        async with stream:
            async for _ in stream:
                busy.set()
                await asyncio.Event().wait()

    reader = asyncio.create_task(read_slowly())
    await busy.wait()
    await all_arrived(scripted_server)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert text_in(stream.partial) == TEXT


async def test_cancelling_a_reader_that_events_are_on_their_way_to_keeps_them(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    """The events arrive while the reader waits, and it is stopped, or the stream is closed, before it goes on."""
    for order in ("cancel", "close"):
        gate = asyncio.Event()

        async def behave(exchange: Exchange, gate: asyncio.Event = gate) -> None:
            await exchange.chunk(CHAT[0])
            await gate.wait()
            await exchange.send(b"".join(map(encode_event, CHAT[1:])))
            await exchange.client_left()

        scripted_server.script(behave)
        stream = await opened(client)
        reader = asyncio.create_task(collect(stream))
        await turns(20)
        gate.set()
        content = stream._events._response._content  # type: ignore[attr-defined]  # the tests know the session
        while content.total_bytes < 1000:
            await asyncio.sleep(0)
        if order == "cancel":
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
        else:
            await stream.aclose()
            with pytest.raises(TaskCancelledError) as caught:
                await reader
            assert text_in(caught.value.partial) == TEXT
        assert text_in(stream.partial) == TEXT


async def test_closing_the_client_hands_out_what_has_arrived_before_the_error(
    scripted_server: ScriptedServer, client: LLMClient, endpoint: str
) -> None:
    scripted_server.script(sends(CHUNKS[endpoint], stay))
    stream = await open_stream(client, endpoint)
    await anext(stream)
    await all_arrived(scripted_server)
    await client.close()
    with pytest.raises(TaskCancelledError, match="client was closed") as caught:
        await collect(stream)
    assert text_in(caught.value.partial) == TEXT


async def test_a_cancelled_run_keeps_everything_that_has_arrived(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sends(CHAT * 5, stay))
    handle: RunHandle = Agent(client).start("Count.")
    async for event in handle.events():
        if isinstance(event, TextDelta):
            await all_arrived(scripted_server)
            handle.cancel()
            break
    with pytest.raises(TaskCancelledError) as caught:
        await handle.result()
    assert caught.value.partial.text == TEXT * 5


# Lines that were damaged on their way


@pytest.mark.parametrize("endpoint", CHUNKS)
@pytest.mark.parametrize("damage", [(b"data", b"eata"), (b"data", b"\x0bdata"), (b'data: {"', b"")])
@pytest.mark.parametrize("has_done", [True, False])
async def test_an_event_whose_field_name_is_damaged_is_missed(
    scripted_server: ScriptedServer, endpoint: str, damage: tuple[bytes, bytes], has_done: bool
) -> None:
    events = [encode_event(event) for event in (*CHUNKS[endpoint], *ENDS[endpoint])]
    events[5] = replaced(events[5], *damage)

    body = b"".join([*events, *([b"data: [DONE]\n\n"] if has_done else [])])
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    scripted_server.script(raw(head, body))
    async with LLMClient(scripted_server.api_base, "test-model") as client:
        with pytest.raises(LLMStreamError, match="a line of the stream is damaged") as caught:
            await collect(await open_stream(client, endpoint))
    assert caught.value.partial is not None


async def test_plain_words_after_a_whole_answer_do_not_matter(scripted_server: ScriptedServer) -> None:
    events = b"".join([encode_event(event) for event in (*CHAT, *ENDS["chat"])])
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    scripted_server.script(raw(head, events, b"proxy error: Failed to read connection\n"))
    async with LLMClient(scripted_server.api_base, "test-model") as client:
        assert (await collect(await open_stream(client, "chat")))["choices"][0]["message"]["content"] == TEXT
