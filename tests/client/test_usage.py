"""The numbers of tokens that replies report, under the names of chat completions and of responses."""

from __future__ import annotations

import tracemalloc

import msgspec
import pytest

from lmbridge.client.response_accumulator import ResponseAccumulator
from lmbridge.client.usage import StreamUsage, usage_in_body, usage_in_reply
from lmbridge.transport import TokenUsage

COUNTED = TokenUsage(5, 2, 3)
CHAT = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}
RESPONSE = {"input_tokens": 5, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 3}}


@pytest.mark.parametrize("usage", [CHAT, RESPONSE], ids=["chat", "response"])
def test_cached_tokens_are_found_in_plain_replies(usage: object) -> None:
    assert usage_in_reply({"usage": usage}) == COUNTED
    assert usage_in_body(msgspec.json.encode({"usage": usage})) == COUNTED


def test_cached_tokens_are_found_in_streamed_responses() -> None:
    accumulator = ResponseAccumulator()
    accumulator.add(
        {"type": "response.completed", "response": {"status": "completed", "output": [], "usage": RESPONSE}}
    )
    assert StreamUsage(accumulator)() == COUNTED


@pytest.mark.parametrize("body", [b"[1]", b'"usage"', b"null", b"<html>", b"", b'{"usage": 1}', b"[" * 100_000])
def test_a_body_that_is_no_reply_reports_no_tokens(body: bytes) -> None:
    assert usage_in_body(body) is None


def test_tokens_are_found_in_json_that_is_not_strict() -> None:
    assert usage_in_body(b'{"logprob": NaN, "text": "\\ud83d", "usage": ' + msgspec.json.encode(CHAT) + b"}") == COUNTED


def test_a_large_reply_is_not_copied_to_find_its_tokens() -> None:
    data = [{"index": index, "embedding": [0.5] * 100} for index in range(2_000)]
    body = msgspec.json.encode({"data": data, "text": "x" * 1_000_000, "usage": CHAT})
    usage_in_body(body)
    tracemalloc.start()
    try:
        assert usage_in_body(body) == COUNTED
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
