"""The status and headers of responses."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from lmbridge import LLMClient, LLMValidationError, collect
from lmbridge.testing import MockRequest, MockResponse, MockTransport
from tests.client.test_call_options import GENERATIONS, REPLIES
from tests.support import MESSAGES, piece

FIRST_ARGUMENT: dict[str, Any] = {"chat_completion": MESSAGES}


def handler(request: MockRequest) -> MockResponse:
    if (request.json or {}).get("stream"):
        return MockResponse(events=[piece("Hello", finish_reason="stop")], headers={"X-Id": "7"})
    return MockResponse(status=201, json=REPLIES[request.path], headers={"X-Id": "7"})


@pytest.mark.parametrize("method", GENERATIONS)
async def test_a_raw_response_has_the_reply_the_status_and_the_headers(method: str) -> None:
    transport = MockTransport(handler)
    call = getattr(LLMClient(transport=transport).with_raw_response, method)
    raw = await call(FIRST_ARGUMENT.get(method, "Hello"), extra_headers={"X-Trace": "abc1"})
    assert raw.parsed == REPLIES[transport.requests[0].path]
    assert (raw.status, raw.headers["x-id"]) == (201, "7")
    assert transport.requests[0].headers["x-trace"] == "abc1"


@pytest.mark.parametrize("method", GENERATIONS)
def test_a_raw_call_shows_the_parameters_of_the_plain_one(method: str) -> None:
    raw, plain = (
        inspect.signature(getattr(each, method)).parameters
        for each in (LLMClient(transport=MockTransport(handler)).with_raw_response, LLMClient)
    )
    assert set(plain) - set(raw) <= {"self", "stream"}


async def test_a_raw_response_is_no_stream() -> None:
    raw = LLMClient(transport=MockTransport(handler)).with_raw_response
    with pytest.raises(LLMValidationError, match="with_raw_response does not return streams"):
        await raw.chat_completion(MESSAGES, stream=True)


async def test_a_stream_has_status_and_headers() -> None:
    client = LLMClient(transport=MockTransport(handler))
    stream = await client.chat_completion(MESSAGES, stream=True)
    assert (stream.status, stream.headers["x-id"]) == (200, "7")
    await collect(stream)
