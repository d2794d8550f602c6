"""Streams: chunks are handed out as they arrive, an incomplete stream raises, and leaving one frees its connection."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest

from lmbridge import (
    ChatStream,
    LLMClient,
    LLMStreamError,
    LLMTimeoutError,
    ModelChangedDuringExecutionError,
    TaskCancelledError,
    Timeouts,
    collect,
)
from lmbridge.testing import Exchange, ScriptedServer, answer, raw, sse, stall
from lmbridge.testing.exchange import encode_event
from lmbridge.transport.sse import Event, SSEDecoder
from tests.support import HALF, MESSAGES, in_flight, opened, piece, read_text, replaced, text_of


def partial_text(error: BaseException) -> str:
    partial = getattr(error, "partial", None)
    assert partial is not None
    text = partial["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


# Complete streams


async def test_chunks_are_handed_out_while_the_server_is_still_writing(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("one two", chunks=["one ", "two"], gate=gate))
    stream = await opened(client)
    seen = [text_of(await anext(stream)), text_of(await anext(stream))]
    assert seen == ["", "one "]
    assert not scripted_server.requests[0].finished
    gate.set()
    assert await read_text(stream) == "two"


@pytest.mark.parametrize("comments", [0, 500])
async def test_events_that_arrive_together_are_parsed_together_whatever_comments_precede_them(
    scripted_server: ScriptedServer, client: LLMClient, monkeypatch: pytest.MonkeyPatch, comments: int
) -> None:
    event_counts: list[int] = []
    original_feed = SSEDecoder.feed

    def counting_feed(decoder: SSEDecoder, data: bytes) -> list[Event]:
        events = original_feed(decoder, data)
        event_counts.append(len(events))
        return events

    monkeypatch.setattr(SSEDecoder, "feed", counting_feed)
    sent: list[dict[str, Any] | str] = [piece("a"), piece("b"), piece("c", finish_reason="stop"), "[DONE]"]
    body = b": wait\n\n" * comments + b"".join(map(encode_event, sent))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body)
    scripted_server.script(raw(head + body))
    assert await read_text(await opened(client)) == "abc"
    assert event_counts == [4]


async def test_chunks_are_the_dicts_that_the_server_sent(scripted_server: ScriptedServer, client: LLMClient) -> None:
    sent = [
        piece("a", strange={"deep": [1, 2.5, None]}),
        piece("b", finish_reason="stop", timings={"n": 1}),
        {"choices": [], "usage": {"prompt_tokens": 3}},
    ]
    scripted_server.script(sse(*sent, done=True))
    assert [chunk async for chunk in await opened(client)] == sent


async def test_a_finish_reason_completes_a_stream_without_done(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sse(*HALF, piece(finish_reason="stop")))
    assert await read_text(await opened(client)) == "Hello"


async def test_done_completes_a_stream_without_a_finish_reason(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sse(*HALF, done=True))
    reply = await collect(await opened(client))
    assert reply["choices"][0]["finish_reason"] is None


async def test_a_connection_may_break_after_the_finish_reason(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sse(*HALF, piece(finish_reason="stop"), end=False))
    assert await read_text(await opened(client)) == "Hello"


async def test_a_stream_is_incomplete_if_one_of_two_answers_has_no_finish_reason(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    second = {"index": 1, "delta": {"content": "x"}, "finish_reason": None}
    scripted_server.script(sse(piece("a"), piece("b", choices=[second]), piece(finish_reason="stop")))
    with pytest.raises(LLMStreamError):
        await read_text(await opened(client))


async def test_a_stream_is_incomplete_if_one_of_two_answers_never_began(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.default = sse(piece("a"), piece(finish_reason="stop"))
    assert await read_text(await opened(client)) == "a"
    with pytest.raises(LLMStreamError, match="cut off"):
        await read_text(await client.chat_completion(MESSAGES, stream=True, n=2))


@pytest.mark.parametrize("data", ["data:\n\n", 'data: {"message": "cu'])
async def test_an_error_event_raises_even_if_it_is_empty_or_cut_off(
    scripted_server: ScriptedServer, client: LLMClient, data: str
) -> None:
    scripted_server.script(sse(*HALF, "event: error\n" + data))
    with pytest.raises(LLMStreamError, match="the server ended the stream"):
        await read_text(await opened(client))


async def test_collect_joins_the_older_function_call(scripted_server: ScriptedServer, client: LLMClient) -> None:
    pieces: list[dict[str, str]] = [{"name": "f", "arguments": ""}, {"arguments": '{"a"'}, {"arguments": ": 1}"}]
    deltas = [piece(choices=[{"index": 0, "delta": {"function_call": each}, "finish_reason": None}]) for each in pieces]
    scripted_server.script(sse(*deltas, piece(finish_reason="function_call"), done=True))
    message = (await collect(await opened(client)))["choices"][0]["message"]
    assert message["function_call"] == {"name": "f", "arguments": '{"a": 1}'}


async def test_a_complete_stream_stays_complete(client: LLMClient) -> None:
    stream = await opened(client)
    await read_text(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await stream.aclose()
    assert await read_text(stream) == ""


async def test_an_event_may_have_megabytes(scripted_server: ScriptedServer, client: LLMClient) -> None:
    long = "x" * 3_000_000
    scripted_server.script(sse(piece(long), piece(finish_reason="stop"), done=True))
    assert await read_text(await opened(client)) == long


async def test_an_invalid_byte_is_replaced_and_does_not_end_the_stream(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    bad = replaced(msgspec.json.encode(piece("a?b")), b"a?b", b"a\xffb")
    scripted_server.script(sse(b"data: " + bad + b"\n\n", piece(finish_reason="stop"), done=True))
    assert await read_text(await opened(client)) == "a\ufffdb"


async def test_infinity_in_a_chunk_is_read(scripted_server: ScriptedServer, client: LLMClient) -> None:
    odd = replaced(msgspec.json.encode(piece("a", score=0)), b'"score":0', b'"score":-Infinity')
    scripted_server.script(sse(b"data: " + odd + b"\n\n", piece(finish_reason="stop"), done=True))
    assert await read_text(await opened(client)) == "a"


async def test_empty_events_and_pings_are_skipped_and_named_events_are_read(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    named = b"event: message\ndata: " + msgspec.json.encode(piece("!")) + b"\n\n"
    scripted_server.script(
        sse(": ping\n\n", "retry: 5\n\n", "data:\n\n", "data:  \n\n", piece("Hi"), named, piece(finish_reason="stop"))
    )
    assert await read_text(await opened(client)) == "Hi!"


async def test_a_stream_is_an_async_generator(scripted_server: ScriptedServer, client: LLMClient) -> None:
    stream = await opened(client)
    assert isinstance(stream, AsyncGenerator)
    await stream.asend(None)
    with pytest.raises(TypeError, match="no values"):
        await stream.asend("x")  # type: ignore[arg-type]  # what the test is about
    with pytest.raises(KeyError):
        await stream.athrow(KeyError("thrown in"))
    await scripted_server.wait_until(lambda: scripted_server.aborts or scripted_server.requests[0].finished)
    assert in_flight(client) == 0


async def test_a_stream_that_was_read_to_its_end_is_freed_without_the_garbage_collector(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer("one two"))
    stream = await opened(client)
    freed = weakref.ref(stream._events)
    gc.disable()
    try:
        async for _ in stream:
            pass
        del stream
        assert freed() is None
    finally:
        gc.enable()


# Incomplete streams


@pytest.mark.parametrize("ends_properly", [True, False])
async def test_a_stream_that_is_cut_at_any_byte_raises(
    scripted_server: ScriptedServer, client: LLMClient, ends_properly: bool
) -> None:
    events = [b"data: " + msgspec.json.encode(chunk) for chunk in (*HALF, piece(finish_reason="stop"))]
    body = b"".join(event + b"\n\n" for event in events)
    # The number of bytes after which the JSON of an event is complete.
    needed = [len(events[0]), len(events[0]) + 2 + len(events[1])]
    if not ends_properly:
        # Of a broken connection, only events that are followed by a blank line count.
        needed = [bytes_ + 2 for bytes_ in needed]
    for cut in range(0, len(body) - 2, 3):
        scripted_server.script(sse(body[:cut], end=ends_properly))
        stream = await opened(client)
        with pytest.raises(LLMStreamError) as caught:
            await read_text(stream)
        arrived = sum(cut >= bytes_ for bytes_ in needed)
        if arrived:
            assert partial_text(caught.value) == ("Hel", "Hello")[arrived - 1]
        else:
            assert caught.value.partial is None
    assert in_flight(client) == 0


async def test_a_stream_without_a_delta_raises(scripted_server: ScriptedServer, client: LLMClient) -> None:
    for events in ((), (piece(finish_reason="stop"),), ({"choices": [], "usage": {"prompt_tokens": 9000}},)):
        scripted_server.script(sse(*events, done=True))
        with pytest.raises(LLMStreamError, match="without any part of an answer"):
            await read_text(await opened(client))


async def test_a_chunk_of_an_unknown_shape_raises(scripted_server: ScriptedServer, client: LLMClient) -> None:
    odd: list[Any] = ["text", 1, {"delta": {}}, [{"delta": "text"}], [{"delta": {"content": 7}}]]
    for choices in odd:
        scripted_server.script(sse(*HALF, piece(choices=choices), piece(finish_reason="stop"), done=True))
        with pytest.raises(LLMStreamError, match="unknown shape") as caught:
            await read_text(await opened(client))
        assert partial_text(caught.value).startswith("Hello")
    assert in_flight(client) == 0


async def test_an_error_is_raised_after_the_chunks_before_it_and_raised_again(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sse(*HALF, {"error": {"message": "Compute error."}}))
    stream = await opened(client)
    assert [text_of(await anext(stream)), text_of(await anext(stream))] == ["Hel", "lo"]
    with pytest.raises(LLMStreamError, match=r"Compute error\.") as first:
        await anext(stream)
    with pytest.raises(LLMStreamError) as second:
        await anext(stream)
    assert second.value is first.value
    assert partial_text(first.value) == "Hello"
    assert first.value.status == 200


async def test_an_error_says_what_was_attempted(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse(*HALF))
    with pytest.raises(LLMStreamError) as caught:
        await read_text(await opened(client))
    text = str(caught.value)
    assert f"chat completion with model 'test-model' at {scripted_server.api_base}/chat/completions" in text
    assert "without [DONE] or a finish reason (after 1 attempt, " in text


async def test_another_model_that_continues_an_answer_is_an_error(scripted_server: ScriptedServer) -> None:
    scripted_server.script(sse(piece("a"), piece("b", model="other"), piece(finish_reason="stop"), done=True))
    async with LLMClient(scripted_server.api_base, "test-model", model_mismatch="raise") as client:
        with pytest.raises(ModelChangedDuringExecutionError) as caught:
            await read_text(await opened(client))
    assert (caught.value.old_model, caught.value.new_model) == ("test-model", "other")
    assert partial_text(caught.value) == "a"


async def test_another_model_may_continue_an_answer_if_model_mismatch_is_ignore(
    scripted_server: ScriptedServer,
) -> None:
    events = (piece("a"), piece("b", model="other"), piece("c", model="other"), piece("d", finish_reason="stop"))
    scripted_server.script(sse(*events, done=True))
    async with LLMClient(scripted_server.api_base, "test-model", model_mismatch="ignore") as client:
        assert await read_text(await opened(client)) == "abcd"


@pytest.mark.parametrize(
    "announcement",
    [
        piece(model="proxy"),
        piece("", model="proxy"),
        piece(model="proxy", choices=[]),
        piece(model="proxy", choices=[{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]),
        piece("", model="proxy", id="proxy-1", object="proxy.status"),
    ],
)
@pytest.mark.parametrize("mismatch", ["warn", "ignore"])
async def test_a_proxy_may_announce_a_load_under_another_name_before_the_answer(
    scripted_server: ScriptedServer, announcement: dict[str, Any], mismatch: Any
) -> None:
    events = (announcement, announcement, piece("Hel"), piece("lo"), piece(finish_reason="stop"))
    scripted_server.default = sse(*events, done=True)
    async with LLMClient(scripted_server.api_base, "test-model", model_mismatch=mismatch) as client:
        stream = await opened(client)
        assert await read_text(stream) == "Hello"
        assert (await collect(stream))["model"] == "test-model"


@pytest.mark.parametrize("mismatch", ["warn", "raise"])
async def test_the_name_in_an_announcement_without_a_delta_is_not_that_of_the_model_that_answers(
    scripted_server: ScriptedServer, mismatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    announcement = piece(model="proxy", choices=[])
    scripted_server.default = sse(announcement, announcement, piece("Hello", finish_reason="stop"), done=True)
    async with LLMClient(scripted_server.api_base, "test-model", model_mismatch=mismatch) as client:
        assert await read_text(await opened(client)) == "Hello"
    assert not caplog.records


@pytest.mark.parametrize("ids", [({"id": "proxy-1"}, {"id": "chatcmpl-1"}), ({}, {"id": "chatcmpl-1"}), ({}, {})])
async def test_a_proxy_may_report_its_progress_as_reasoning_of_another_reply(
    scripted_server: ScriptedServer, client: LLMClient, ids: tuple[dict[str, str], dict[str, str]]
) -> None:
    delta = {"reasoning_content": "Loading..."}
    progress = {"model": "proxy", "choices": [{"index": 0, "delta": delta, "finish_reason": None}], **ids[0]}
    answer_ = (piece("Hel", **ids[1]), piece("lo", **ids[1], finish_reason="stop"))
    scripted_server.script(sse(progress, progress, *answer_, done=True))
    stream = await opened(client)
    assert await read_text(stream) == "Hello"
    assert (await collect(stream))["model"] == "test-model"


async def test_another_model_must_not_continue_the_reasoning_of_a_reply(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    choices = [{"index": 0, "delta": {"reasoning_content": "Hm."}, "finish_reason": None}]
    events = (piece(choices=choices, id="a"), piece("b", id="a", model="other", finish_reason="stop"))
    scripted_server.script(sse(*events, done=True))
    with pytest.raises(ModelChangedDuringExecutionError) as caught:
        await read_text(await opened(client))
    assert partial_text(caught.value) == ""


async def test_a_model_that_only_the_first_chunk_names_is_compared_with_the_next_name(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    nameless = piece("a")
    del nameless["model"]
    scripted_server.script(sse(piece(""), nameless, piece("b", model="other", finish_reason="stop"), done=True))
    with pytest.raises(ModelChangedDuringExecutionError) as caught:
        await read_text(await opened(client))
    assert (caught.value.old_model, caught.value.new_model) == ("test-model", "other")


async def test_a_name_that_only_gains_or_loses_a_suffix_is_no_change(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    names = ("test-model", "test-model:2", "test-model", "test-model@q4_k_m")
    scripted_server.script(sse(*(piece("a", model=name) for name in names), piece(finish_reason="stop"), done=True))
    assert await read_text(await opened(client)) == "aaaa"


async def test_json_that_is_nested_too_deeply_raises(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse(*HALF, "data: " + "[" * 100_000 + "\n\n", done=True))
    with pytest.raises(LLMStreamError) as caught:
        await read_text(await opened(client))
    assert partial_text(caught.value) == "Hello"
    assert in_flight(client) == 0


async def test_bare_text_raises_even_if_done_follows(scripted_server: ScriptedServer, client: LLMClient) -> None:
    for last in ("proxy error: it is gone\n\n", "data: it is gone"):
        scripted_server.script(sse(*HALF, last, done=last.endswith("\n")))
        with pytest.raises(LLMStreamError, match="it is gone"):
            await read_text(await opened(client))


async def test_a_mislabelled_stream_is_recognized_by_its_first_bytes_however_they_are_split(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    body = b"\xef\xbb\xbf\ndata: " + msgspec.json.encode(piece("Hi", finish_reason="stop")) + b"\n\n"
    pieces = [body[place : place + 1] for place in range(12)] + [body[12:]]
    scripted_server.script(sse(*pieces, content_type="application/json"))
    assert await read_text(await opened(client)) == "Hi"


# Leaving a stream early


async def test_dropping_a_stream_closes_its_connection_at_once(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))

    async def take_one() -> None:
        async for _ in await opened(client):
            break

    with pytest.warns(ResourceWarning, match="unclosed stream of chat completion with model 'test-model'"):
        await take_one()
    # The slot is free at once, before the event loop has run again.
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_a_stream_in_a_reference_cycle_is_closed_by_the_garbage_collector(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))
    stream = await opened(client)
    await anext(stream)
    cycle: list[object] = [stream]
    cycle.append(cycle)
    del stream, cycle
    with pytest.warns(ResourceWarning, match="unclosed stream"):
        # The garbage collector may run in any thread.
        await asyncio.to_thread(gc.collect)
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    assert in_flight(client) == 0


async def test_leaving_the_async_with_closes_the_connection(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(stall(after=HALF), stall(after=HALF))
    async with await opened(client) as stream:
        await anext(stream)
    await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 1)
    with pytest.raises(KeyError):
        async with await opened(client) as stream:
            raise KeyError
    await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 2)
    assert in_flight(client) == 0


async def test_a_stream_that_was_closed_early_never_looks_complete(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))
    stream = await opened(client)
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    with pytest.raises(TaskCancelledError, match="closed before its end") as caught:
        await collect(stream)
    assert partial_text(caught.value) == "Hel"


async def test_aclose_from_another_task_wakes_the_reader(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(stall(after=HALF))
    stream = await opened(client)
    waiting = asyncio.Event()

    async def read() -> None:
        await anext(stream)
        await anext(stream)
        waiting.set()
        await anext(stream)

    reader = asyncio.create_task(read())
    await waiting.wait()
    # The reader now waits for the next event.
    await asyncio.sleep(0)
    await stream.aclose()
    with pytest.raises(TaskCancelledError) as caught:
        await reader
    assert partial_text(caught.value) == "Hello"
    assert not reader.cancelled()
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_cancelling_the_reader_closes_the_connection_and_raises_cancelled_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))
    stream = await opened(client)
    reader = asyncio.create_task(read_text(stream))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    with pytest.raises(TaskCancelledError):
        await anext(stream)


async def test_a_timeout_of_the_caller_closes_the_connection(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))
    stream = await opened(client)
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.05):
            await read_text(stream)
    assert not isinstance(caught.value, LLMTimeoutError)
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_a_second_reader_is_refused(scripted_server: ScriptedServer, client: LLMClient) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("one two", chunks=["one ", "two"], gate=gate))
    stream = await opened(client)
    await anext(stream)
    await anext(stream)
    reader = asyncio.create_task(read_text(stream))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="another task is reading"):
        await anext(stream)
    gate.set()
    # The task that was reading first is not disturbed.
    assert await reader == "two"


async def test_a_cancelled_collect_closes_the_stream(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(stall(after=HALF))
    stream = await opened(client)
    collecting = asyncio.create_task(collect(stream))
    await asyncio.sleep(0)
    collecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await collecting
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    assert in_flight(client) == 0


async def test_collect_returns_the_dict_of_the_plain_call(scripted_server: ScriptedServer, client: LLMClient) -> None:
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    scripted_server.default = answer("Hi there", tool_calls=calls, reasoning="think of it")
    plain = await client.chat_completion(MESSAGES)
    collected = await collect(
        await client.chat_completion(MESSAGES, stream=True, stream_options={"include_usage": True})
    )
    assert {**collected, "id": None} == {**plain, "id": None}


async def test_collect_returns_the_whole_reply_of_a_stream_that_was_read_before(client: LLMClient) -> None:
    stream = await opened(client)
    await anext(stream)
    await anext(stream)
    for _ in range(2):
        reply = await collect(stream)
        assert reply["choices"][0]["message"]["content"] == "Hello from the scripted server."


async def test_collect_after_the_end_repeats_no_check(client: LLMClient, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = await opened(client)
    async for _ in stream:
        pass

    async def check(_stream: object) -> None:
        raise AssertionError("the whole reply is checked again")

    monkeypatch.setattr(ChatStream, "_check_whole_reply", check)
    reply = await stream.collect()
    assert reply["choices"][0]["message"]["content"] == "Hello from the scripted server."


async def test_collect_raises_if_there_is_no_chunk() -> None:
    async def nothing() -> AsyncGenerator[dict[str, object], None]:
        return
        yield {}

    with pytest.raises(LLMStreamError, match="no chunk to collect"):
        await collect(nothing())


# Connections


async def test_consecutive_streams_share_a_connection(scripted_server: ScriptedServer, client: LLMClient) -> None:
    for _ in range(5):
        await read_text(await opened(client))
    assert scripted_server.connections == 1


async def test_the_wait_for_the_end_of_the_body_is_bounded(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(stall(after=[*HALF, piece(finish_reason="stop"), "data: [DONE]\n\n"]))
    assert await read_text(await opened(client)) == "Hello"
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_cancelling_while_the_body_is_drained_closes_the_connection(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=[*HALF, piece(finish_reason="stop"), "data: [DONE]\n\n"]))
    stream = await opened(client)
    for _ in range(3):
        await anext(stream)
    reader = asyncio.create_task(read_text(stream))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_aclose_while_another_task_drains_the_body_closes_the_connection(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    last = b"data: " + msgspec.json.encode(piece(finish_reason="stop")) + b"\n\ndata: [DONE]\n\n"
    scripted_server.script(stall(after=[*HALF, last]))
    stream = await opened(client)
    for _ in range(3):
        await anext(stream)
    reader = asyncio.create_task(read_text(stream))
    await asyncio.sleep(0)
    await stream.aclose()
    assert in_flight(client) == 0
    assert await reader == ""
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_partial_is_the_reply_so_far(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse(*HALF, piece("!", finish_reason="stop")))
    contents: list[str | None] = []
    async with await opened(client) as stream:
        assert stream.partial is None
        async for _ in stream:
            assert stream.partial is not None
            contents.append(stream.partial["choices"][0]["message"]["content"])
            stream.partial["choices"].clear()
    assert contents == ["Hel", "Hello", "Hello!"]
    assert stream.partial == await collect(stream)


# Time limits


@pytest.mark.parametrize("ping", ["", ": ping\n\n"])
async def test_the_limit_for_the_first_event_is_not_extended_by_pings(
    scripted_server: ScriptedServer, ping: str
) -> None:
    async def pings(exchange: Exchange) -> None:
        await exchange.start()
        while True:
            await exchange.send(ping.encode())
            await asyncio.sleep(0.01)

    scripted_server.script(pings)
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=0.1)) as client:
        with pytest.raises(LLMTimeoutError, match=r"the server did not answer within 0\.1 s") as caught:
            await read_text(await opened(client))
    assert caught.value.phase == "first_byte"
    assert caught.value.partial is None
    assert isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("ping", ["", ": ping\n\n"])
async def test_the_limit_for_the_gap_between_events_is_not_extended_by_pings(
    scripted_server: ScriptedServer, ping: str
) -> None:
    async def pings(exchange: Exchange) -> None:
        await exchange.chunk(piece("a"))
        while True:
            await exchange.send(ping.encode())
            await asyncio.sleep(0.01)

    scripted_server.script(pings)
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(idle=0.1)) as client:
        with pytest.raises(LLMTimeoutError, match=r"no further event arrived within 0\.1 s") as caught:
            await read_text(await opened(client))
    assert caught.value.phase == "idle"
    assert partial_text(caught.value) == "a"
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_the_limit_for_the_gap_starts_anew_with_each_event(scripted_server: ScriptedServer) -> None:
    async def steady(exchange: Exchange) -> None:
        for _ in range(6):
            await exchange.chunk(piece("a"))
            await asyncio.sleep(0.25)
        await exchange.chunk(piece(finish_reason="stop"))

    scripted_server.script(steady)
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=5, idle=1)) as client:
        assert await read_text(await opened(client)) == "aaaaaa"


async def test_a_slow_reader_does_not_exceed_the_limit_for_the_gap(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("one two", chunks=["one ", "two"], gate=gate))
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=5, idle=0.6)) as client:
        stream = await opened(client)
        await anext(stream)
        await anext(stream)
        reader = asyncio.create_task(read_text(stream))
        await asyncio.sleep(0)
        gate.set()
        assert await reader == "two"
        scripted_server.script(answer("three"))
        stream = await opened(client)
        await anext(stream)
        # The reader pauses for longer than the limit, while everything that it has not read has already arrived.
        await asyncio.sleep(0.8)
        assert await read_text(stream) == "three"


async def test_the_whole_request_has_a_limit(scripted_server: ScriptedServer) -> None:
    async def endless(exchange: Exchange) -> None:
        while True:
            await exchange.chunk(piece("a"))
            await asyncio.sleep(0.01)

    scripted_server.script(endless)
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(idle=None, total=0.6)) as client:
        with pytest.raises(LLMTimeoutError, match=r"the reply did not end within 0\.6 s") as caught:
            await read_text(await opened(client))
    assert caught.value.phase == "total"
    assert set(partial_text(caught.value)) == {"a"}


async def test_every_limit_can_be_switched_off(scripted_server: ScriptedServer) -> None:
    off = Timeouts(connect=None, load=None, first_byte=None, idle=None, total=None)
    async with LLMClient(scripted_server.api_base, timeout=off) as client:
        assert await read_text(await opened(client)) == "Hello from the scripted server."
