"""How much work a single step of the event loop does while a server sends very much, or something hostile.

See `tests.step_meter` for how it is measured. The same for MCP servers is in `tests/mcp/test_step_lengths.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import msgspec
import pytest

from lmbridge import Agent, LLMClient, LLMError, collect
from lmbridge.testing import MockRequest, MockResponse, MockTransport
from tests.agent.support import asks_raw
from tests.step_meter import StepMeter, assert_work_stays_equal, divide_into_short_slices
from tests.support import MESSAGES, piece

Replies: TypeAlias = list[MockResponse]
"""The replies of the server to the requests for a generation, in order. The last one is repeated."""
Reader: TypeAlias = Callable[[LLMClient], Awaitable[object]]

_BYTES_AT_ONCE = 2_000
"""The number of bytes that arrive at once. It is small, so that no other step is hidden behind those that read them."""


short_slices = pytest.fixture(autouse=True)(divide_into_short_slices)


def largest_step(replies: Replies, read: Reader) -> int:
    """Returns the number of lines that are executed in the largest step while a client reads replies."""

    async def measure() -> int:
        remaining = list(replies)

        def handler(request: MockRequest) -> MockResponse:
            if request.method == "GET":
                return MockResponse(404)
            return remaining.pop(0) if len(remaining) > 1 else remaining[0]

        meter = StepMeter()
        async with LLMClient(model="test-model", transport=MockTransport(handler), max_retries=0) as client:
            with meter.measuring():
                # This step has begun before the meter. The next one is the first that it counts.
                await asyncio.sleep(0)
                with suppress(LLMError):
                    await read(client)
                await asyncio.sleep(0)
        return meter.most_lines

    return asyncio.run(measure())


def assert_steps_stay_short(replies: Callable[[int], Replies], read: Reader, size: int) -> None:
    """Checks that the largest step does not do more work if four times as much arrives."""
    assert_work_stays_equal(lambda size: largest_step(replies(size), read), size)


# What the server sends


def stream(chunks: Iterable[dict[str, Any]], *, finish_reason: str = "stop") -> MockResponse:
    events = [b"data: " + msgspec.json.encode(chunk) for chunk in (*chunks, piece(finish_reason=finish_reason))]
    body = b"\n\n".join([*events, b"data: [DONE]\n\n"])
    arriving = (body[at : at + _BYTES_AT_ONCE] for at in range(0, len(body), _BYTES_AT_ONCE))
    return MockResponse(events=list(arriving), done=False)


def texts(text: str, count: int, field: str = "content") -> Replies:
    return [stream([_delta({field: text})] * count)]


def whole(message: dict[str, Any]) -> Replies:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
    return [MockResponse(body=json.dumps({"model": "test-model", "choices": [choice]}))]


def error(body: Any) -> Replies:
    return [MockResponse(400, body=body if isinstance(body, str) else json.dumps(body))]


def _delta(delta: dict[str, Any]) -> dict[str, Any]:
    return {"model": "test-model", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def calls(count: int, arguments: Callable[[int], str], *, has_ids: bool = True, size: int = 1) -> Replies:
    """Returns a stream of tool calls, and an answer for the request after it."""
    listed: list[dict[str, Any]] = [
        {"index": number, **asks_raw("add", arguments(number), f"call_{number}" if has_ids else "")}
        for number in range(count)
    ]
    chunks = [_delta({"tool_calls": listed[at : at + size]}) for at in range(0, count, size)]
    return [stream(chunks, finish_reason="tool_calls"), stream([piece("Done.")])]


same_calls = partial(calls, arguments=lambda _: '{"a": 1, "b": 2}')
different_calls = partial(calls, arguments=lambda number: f'{{"a": {number}, "b": 2}}')
unusable_calls = partial(calls, arguments=lambda _: "{")
calls_without_ids = partial(different_calls, has_ids=False)


# How it is read


async def read_plain(client: LLMClient) -> None:
    await client.chat_completion(MESSAGES)


async def read_stream(client: LLMClient) -> None:
    await collect(await client.chat_completion(MESSAGES, stream=True))


async def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


async def run_agent(client: LLMClient, **options: Any) -> None:
    await Agent(client, tools=[add], max_rounds=2, **options).run("Go.")


async def read_events(client: LLMClient) -> None:
    async for _ in Agent(client, tools=[add], max_rounds=2).stream("Go."):
        pass


# Many pieces


@pytest.mark.parametrize(
    "replies",
    [
        partial(texts, "<think>"),
        partial(texts, " "),
        partial(texts, "\n", field="reasoning_content"),
        different_calls,
        calls_without_ids,
    ],
    ids=["think", "white space", "reasoning", "calls", "calls without ids"],
)
def test_the_steps_of_a_stream_do_not_grow_with_its_length(replies: Callable[[int], Replies]) -> None:
    assert_steps_stay_short(replies, read_stream, 300)


@pytest.mark.parametrize(
    "replies",
    [
        lambda size: error("1" * size),
        lambda size: error({"error": {"message": "n_ctx " + "1" * size}}),
        lambda size: error("(e.g. " * size),
        lambda size: error({"error": f"model 'm' not found ({', '.join(f'qwen{each}' for each in range(size))})"}),
        lambda size: error({"detail": [{"loc": ["body"], "msg": "x"}] * size}),
    ],
    ids=["digits", "digits in a message", "for example", "models", "validation errors"],
)
def test_the_steps_for_an_error_do_not_grow_with_its_length(replies: Callable[[int], Replies]) -> None:
    assert_steps_stay_short(replies, read_plain, 4_000)


@pytest.mark.parametrize(
    ("replies", "read"),
    [
        (same_calls, run_agent),
        (same_calls, partial(run_agent, deduplicate_calls=False)),
        (different_calls, read_events),
        (unusable_calls, run_agent),
        (calls_without_ids, run_agent),
        (different_calls, partial(run_agent, approve=lambda _: False)),
        (different_calls, partial(run_agent, tool_choice="none")),
    ],
    ids=["same", "same one by one", "different", "unusable", "without ids", "refused", "forbidden"],
)
def test_the_steps_of_a_run_do_not_grow_with_the_number_of_calls(
    replies: Callable[[int], Replies], read: Reader
) -> None:
    assert_steps_stay_short(replies, read, 300)


@pytest.mark.parametrize("read", [run_agent, read_events])
@pytest.mark.parametrize(
    "replies", [partial(texts, "<think>"), partial(texts, " "), partial(texts, "\n", field="reasoning_content")]
)
def test_the_steps_of_a_run_do_not_grow_with_the_number_of_pieces(
    replies: Callable[[int], Replies], read: Reader
) -> None:
    assert_steps_stay_short(replies, read, 300)


# One huge text

CALL_AS_TEXT = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize(
    ("replies", "read"),
    [
        (lambda size: whole({"content": "x" * size}), read_plain),
        (lambda size: whole({"content": "<think>" * (size // 7)}), read_plain),
        (lambda size: texts("x" * (size // 100), 100), read_stream),
        (lambda size: texts("x" * (size // 100), 100), run_agent),
        (lambda size: texts("x" * (size // 100), 100), read_events),
        (lambda size: texts("<think>" * (size // 7), 1), run_agent),
        (lambda size: texts(" " * size, 1), run_agent),
        (lambda size: texts("<tool_call>" * (size // 11), 1), run_agent),
        (lambda size: texts(CALL_AS_TEXT * (size // len(CALL_AS_TEXT)), 1), run_agent),
        (lambda size: texts("<|im_end|>" * (size // 10), 1), run_agent),
        (lambda size: calls(1, lambda _: json.dumps({"a": "x" * size})), run_agent),
        (lambda size: error({"error": {"message": "x" * size}}), read_plain),
        (lambda size: error("x " * (size // 2)), read_plain),
        (lambda size: error({"detail": [{"loc": ["body"], "msg": "x"}] * (size // 31)}), read_plain),
        (lambda size: [stream([{"error": {"message": "x" * size}}])], read_stream),
    ],
    ids=[
        "plain", "plain think", "stream", "run", "events", "think", "white space", "tags", "calls as text", "tokens",
        "arguments", "error", "error text", "validation errors", "error event",
    ],
)  # fmt: skip
def test_the_steps_for_a_huge_text_do_not_grow_with_it(replies: Callable[[int], Replies], read: Reader) -> None:
    assert_steps_stay_short(replies, read, 25_000)


# One huge event


@pytest.mark.parametrize("read", [read_stream, run_agent, read_events])
def test_the_steps_for_an_event_with_many_calls_do_not_grow_with_their_number(read: Reader) -> None:
    assert_steps_stay_short(lambda size: different_calls(size, size=size), read, 300)


def one_event(chunk: dict[str, Any]) -> Replies:
    return [stream([chunk])]


def parts_in(field: str, part: Any) -> Callable[[int], Replies]:
    return lambda size: one_event(_delta({field: [part] * size}))


def many_choices(size: int, **fields: Any) -> Replies:
    choices = [{"index": number, "delta": {"content": "x"}, "finish_reason": "stop"} for number in range(size)]
    return one_event({"model": "test-model", "choices": choices, **fields})


def half_of_a_character(size: int, *, beside: bool) -> Replies:
    chunk = _delta({"content": "HALF"})
    chunk["unknown" if beside else "choices"] = [{"a": [1, "x"]}] * size
    if not beside:
        chunk["choices"] = [{"index": 0, "delta": {"content": "HALF", "unknown": [{"a": ["x"]}] * size}}]
    event = json.dumps(chunk).replace("HALF", "\\ud83d").encode()
    end = msgspec.json.encode(piece(finish_reason="stop"))
    body = b"data: " + event + b"\n\ndata: " + end + b"\n\ndata: [DONE]\n\n"
    arriving = (body[at : at + _BYTES_AT_ONCE] for at in range(0, len(body), _BYTES_AT_ONCE))
    return [MockResponse(events=list(arriving), done=False)]


@pytest.mark.parametrize("read", [read_stream, run_agent, read_events])
@pytest.mark.parametrize(
    "replies",
    [
        parts_in("content", {"type": "text", "text": "x"}),
        parts_in("content", {"type": "text", "text": [["x"]]}),
        parts_in("content", {"type": "thinking", "thinking": [{"text": "x"}]}),
        parts_in("content", {"type": "image_url"}),
        parts_in("content", None),
        many_choices,
        partial(half_of_a_character, beside=True),
        partial(half_of_a_character, beside=False),
    ],
    ids=["texts", "nested", "thinking", "images", "nulls", "choices", "half beside", "half within"],
)
def test_the_steps_for_an_event_with_many_parts_do_not_grow_with_their_number(
    replies: Callable[[int], Replies], read: Reader
) -> None:
    assert_steps_stay_short(replies, read, 1_500)


@pytest.mark.parametrize("read", [read_stream, run_agent])
def test_the_steps_for_reasoning_in_many_parts_do_not_grow_with_their_number(read: Reader) -> None:
    assert_steps_stay_short(parts_in("reasoning_content", {"text": "x"}), read, 1_500)


async def read_text(client: LLMClient) -> None:
    await client.text_completion("Once")


def plain_choices(size: int, choice: dict[str, Any]) -> Replies:
    """Returns a plain reply with many choices."""
    listed = [{"index": number, "finish_reason": "stop", **choice} for number in range(size)]
    return [MockResponse(body=json.dumps({"model": "test-model", "choices": listed}))]


@pytest.mark.parametrize(
    ("replies", "read"),
    [
        (lambda size: whole({"content": [{"type": "text", "text": "x"}] * size}), read_plain),
        (lambda size: plain_choices(size, {"message": {"role": "assistant", "content": "x"}}), read_plain),
        (lambda size: plain_choices(size, {"text": "x"}), read_text),
    ],
    ids=["parts", "choices", "texts"],
)
def test_the_steps_for_a_plain_reply_with_many_parts_do_not_grow_with_their_number(
    replies: Callable[[int], Replies], read: Reader
) -> None:
    assert_steps_stay_short(replies, read, 1_500)
