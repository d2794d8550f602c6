"""The numbers of tokens that replies report, under the names of chat completions and of responses."""

from __future__ import annotations

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
