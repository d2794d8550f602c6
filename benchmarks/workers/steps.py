"""The longest standstill of the event loop while something huge is read, compared with decoding its JSON.

A step is what the event loop runs without a break; no other task runs meanwhile. Its CPU time is that of this thread.
The garbage collector is switched off, because a collection would count as a part of any step.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import sys
import time
from asyncio.events import Handle
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from benchmarks.workers import serve
from lmbridge import Agent, LLMClient, LLMError, collect
from lmbridge.testing import MockRequest, MockResponse, MockTransport

_BYTES_AT_ONCE = 131_072
"""The number of bytes that arrive at once, which is how much aiohttp buffers."""
_REPEATS = 3
"""How often each time is measured. The shortest one counts, because it has the least of what is not the work itself."""
_MESSAGES = [{"role": "user", "content": "Go."}]
_TEXT_CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'


class _StepTimer:
    """Measures the CPU time of the steps of the event loop."""

    def __init__(self) -> None:
        self.longest = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        run = Handle._run  # noqa: SLF001 - only there, each step begins and ends

        def measured(handle: Handle) -> None:
            began = time.thread_time()
            run(handle)
            self.longest = max(self.longest, time.thread_time() - began)

        gc.collect()
        gc.disable()
        Handle._run = measured  # type: ignore[assignment, method-assign]  # noqa: SLF001 - as above
        try:
            yield
        finally:
            Handle._run = run  # type: ignore[method-assign]  # noqa: SLF001 - as above
            gc.enable()


async def _longest_step(replies: list[MockResponse], read: Callable[[LLMClient], Awaitable[object]]) -> float:
    """Returns the CPU seconds of the longest step while a client reads replies. The last reply is repeated."""
    remaining = list(replies)

    def handler(request: MockRequest) -> MockResponse:
        if request.method == "GET":
            return MockResponse(404)
        return remaining.pop(0) if len(remaining) > 1 else remaining[0]

    timer = _StepTimer()
    async with LLMClient(model="test-model", transport=MockTransport(handler), max_retries=0) as client:
        with timer.measuring():
            # This step has begun before the timer. The next one is the first that it measures.
            await asyncio.sleep(0)
            with suppress(LLMError):
                await read(client)
            await asyncio.sleep(0)
    return timer.longest


def _decoding_seconds(data: bytes) -> float:
    began = time.thread_time()
    msgspec.json.decode(data)
    return time.thread_time() - began


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return msgspec.json.encode({"object": "chat.completion.chunk", "model": "test-model", "choices": [choice]})


def _stream(chunks: list[bytes], finish_reason: str = "stop") -> MockResponse:
    body = b"".join(b"data: %b\n\n" % each for each in (*chunks, _chunk({}, finish_reason), b"[DONE]"))
    arriving = [body[at : at + _BYTES_AT_ONCE] for at in range(0, len(body), _BYTES_AT_ONCE)]
    return MockResponse(events=arriving, done=False)


async def _add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


async def _read_plain(client: LLMClient) -> None:
    await client.chat_completion(_MESSAGES)


async def _read_stream(client: LLMClient) -> None:
    await collect(await client.chat_completion(_MESSAGES, stream=True))


async def _run_agent(client: LLMClient) -> None:
    await Agent(client, tools=[_add], max_rounds=2).run("Go.")


async def _read_events(client: LLMClient) -> None:
    async for _ in Agent(client, tools=[_add], max_rounds=2).stream("Go."):
        pass


_READERS = {"plain": _read_plain, "stream": _read_stream, "run": _run_agent, "events": _read_events}
_TEXTS = {
    "x": "x",
    "think": "<think>",
    "space": " ",
    "tags": "<tool_call>",
    "calls": _TEXT_CALL,
    "tokens": "<|im_end|>",
}


class StepWorkloads:
    """The workloads of one column.

    Args:
        peer: "decoding" to decode the JSON of what is read, or "lmbridge".
    """

    def __init__(self, peer: str) -> None:
        self._decodes = peer == "decoding"

    async def renew(self) -> None:
        """Does nothing, because each measurement makes a new client."""

    async def text(self, reader: str, piece: str, size: int) -> float:
        """Returns the milliseconds of the longest step for a text of `size` bytes in one reply or one event."""
        text = _TEXTS[piece] * (size // len(_TEXTS[piece]))
        if self._decodes:
            return await self._milliseconds(json.dumps(text).encode(), [], _read_plain)
        if reader == "plain":
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            replies = [MockResponse(body=json.dumps({"model": "test-model", "choices": [choice]}))]
        else:
            replies = [_stream([_chunk({"content": text})])]
        return await self._milliseconds(b"", replies, _READERS[reader])

    async def error(self, size: int) -> float:
        """Returns the milliseconds of the longest step for an error whose message has `size` bytes."""
        body = json.dumps({"error": {"message": "x" * size}})
        return await self._milliseconds(body.encode(), [MockResponse(400, body=body)], _read_plain)

    async def calls(self, reader: str, calls: int, each: int) -> float:
        """Returns the milliseconds of the longest step for a reply with tool calls, `each` of them in an event."""
        listed = [
            {
                "index": number,
                "id": f"call_{number}",
                "type": "function",
                "function": {"name": "_add", "arguments": f'{{"a": {number}, "b": 2}}'},
            }
            for number in range(calls)
        ]
        chunks = [_chunk({"tool_calls": listed[at : at + each]}) for at in range(0, calls, each)]
        replies = [_stream(chunks, "tool_calls"), _stream([_chunk({"content": "Done."})])]
        return await self._milliseconds(b"[%b]" % b",".join(chunks), replies, _READERS[reader])

    async def _milliseconds(
        self, decoded: bytes, replies: list[MockResponse], read: Callable[[LLMClient], Awaitable[object]]
    ) -> float:
        if self._decodes:
            return min(_decoding_seconds(decoded) for _ in range(_REPEATS)) * 1e3
        return min([await _longest_step(replies, read) for _ in range(_REPEATS)]) * 1e3


if __name__ == "__main__":
    # lmbridge logs a warning each time that a model writes nothing but tags.
    logging.getLogger("lmbridge").setLevel(logging.ERROR)
    serve(StepWorkloads(sys.argv[1]))
