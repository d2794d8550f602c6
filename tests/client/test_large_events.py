"""Events that are so large that other tasks run while they are read."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest

from lmbridge import ChatStream, LLMClient, LLMError, LLMStreamError, TaskCancelledError, collect
from lmbridge._tasks import SIZE_PER_STEP
from lmbridge.testing import MockResponse, MockTransport
from lmbridge.testing.exchange import encode_event
from tests.support import Steps, cancel_at_each_step, opened, piece

COUNT = 450


def tool_calls(count: int = COUNT) -> list[dict[str, Any]]:
    """Returns calls with arguments that are long enough to make an event large."""
    arguments = f'{{"a": "{"x" * (SIZE_PER_STEP // COUNT)}"}}'
    return [
        {"index": number, "id": f"call_{number}", "type": "function", "function": {"name": "f", "arguments": arguments}}
        for number in range(count)
    ]


def with_calls(**fields: Any) -> dict[str, Any]:
    return {
        **piece(),
        "choices": [{"index": 0, "delta": {"tool_calls": tool_calls()}, "finish_reason": None, **fields}],
    }


CHUNKS = [piece("Hello"), with_calls(), piece(" and bye"), piece(finish_reason="tool_calls")]
WHOLE = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "Hi", "tool_calls": tool_calls()}}]}
MANY_ANSWERS = {
    "choices": [{"index": number, "delta": {"content": "x" * 300}, "finish_reason": "stop"} for number in range(COUNT)]
}


def client_for(*events: Mapping[str, Any]) -> LLMClient:
    """Returns a client whose server sends these events, all of which arrive together."""
    body = b"".join(map(encode_event, events))
    return LLMClient(model="test-model", transport=MockTransport(lambda _: MockResponse(events=[body])))


def calls_in(reply: Any) -> list[Any]:
    return [] if reply is None else reply["choices"][0]["message"].get("tool_calls", [])


def expected_calls() -> list[dict[str, Any]]:
    return [{key: value for key, value in call.items() if key != "index"} for call in tool_calls()]


async def read_in_steps(stream: ChatStream, at_wait: Callable[[int], object]) -> list[Any]:
    async def read() -> list[Any]:
        return [chunk async for chunk in stream]

    read_chunks: list[Any] = await Steps(read(), at_wait)
    return read_chunks


async def test_other_tasks_run_while_the_calls_of_one_event_are_merged() -> None:
    numbers = []
    async with client_for(*CHUNKS) as client, await opened(client) as stream:
        chunks = await read_in_steps(stream, lambda _: numbers.append(len(calls_in(stream.partial))))
    assert [number for number in numbers if 0 < number < COUNT] == [100, 200, 300, 400]
    assert chunks == CHUNKS


@pytest.mark.parametrize(
    "chunk",
    [with_calls(), with_calls(finish_reason="tool_calls"), WHOLE, MANY_ANSWERS],
    ids=["calls", "with finish reason", "whole reply", "answers"],
)
async def test_a_large_event_gives_the_same_reply_in_slices_and_at_once(chunk: dict[str, Any]) -> None:
    async with client_for(chunk, piece(finish_reason="stop")) as client:
        in_slices = await collect(await opened(client))

    async def foreign_stream() -> AsyncIterator[Any]:
        yield chunk
        yield piece(finish_reason="stop")

    assert in_slices == await collect(foreign_stream())


async def test_a_reader_that_is_cancelled_between_two_slices_leaves_everything_in_partial() -> None:
    streams: list[ChatStream] = []
    received: list[list[Any]] = []

    async def read() -> None:
        received.append([])
        async with client_for(*CHUNKS) as client:
            streams.append(await opened(client))
            async for chunk in streams[-1]:
                received[-1].append(chunk)

    async def after() -> None:
        stream = streams[-1]
        assert received[-1] == CHUNKS[: len(received[-1])]
        if calls := calls_in(stream.partial):
            assert calls == expected_calls()
            assert stream.partial is not None
            assert stream.partial["choices"][0]["message"]["content"] == "Hello and bye"

    await cancel_at_each_step(read, after, at_least=6)
    assert received[-1] == CHUNKS


@pytest.mark.parametrize("number", range(1, 6))
async def test_a_stream_that_is_closed_between_two_slices_has_everything_in_partial(number: int) -> None:
    async with client_for(*CHUNKS) as client:
        stream = await opened(client)
        received = [await anext(stream)]
        reader = asyncio.ensure_future(anext(stream))
        for _ in range(number):
            await asyncio.sleep(0)
        assert not reader.done()
        await stream.aclose()
        with pytest.raises(TaskCancelledError, match="closed before its end") as caught:
            await reader
        with pytest.raises(TaskCancelledError):
            await anext(stream)
    assert received == CHUNKS[:1]
    for partial in (caught.value.partial, stream.partial):
        assert partial is not None
        assert calls_in(partial) == expected_calls()
        assert partial["choices"][0]["message"]["content"] == "Hello and bye"


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (with_calls(finish_reason="error"), "aborted the answer"),
        (with_calls(error={"message": "out of memory"}), "out of memory"),
        ({**with_calls(), "error": {"message": "crashed"}}, "crashed"),
        ({**piece(), "choices": [{"index": 0, "delta": {"tool_calls": [*tool_calls(), "f()"]}}]}, "unknown shape"),
    ],
)
async def test_an_error_in_a_large_event_ends_the_stream_once(chunk: dict[str, Any], message: str) -> None:
    async with client_for(piece("Hello"), chunk, piece("never")) as client:
        stream = await opened(client)
        await anext(stream)
        with pytest.raises(LLMError, match=message) as caught:
            await anext(stream)
        with pytest.raises(LLMError) as again:
            await anext(stream)
    assert again.value is caught.value
    assert caught.value.partial["choices"][0]["message"]["content"] == "Hello"
    assert calls_in(caught.value.partial) in ([], expected_calls())


async def test_a_large_event_that_the_end_of_the_body_cuts_off_is_no_chunk() -> None:
    transport = MockTransport(
        lambda _: MockResponse(events=[b'data: {"choices": [' + b" " * SIZE_PER_STEP], done=False)
    )
    async with LLMClient(model="test-model", transport=transport) as client:
        with pytest.raises(LLMStreamError, match="cut off"):
            await collect(await opened(client))
