"""The tests of that user, as docs/testing.md describes them: no server, no network."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from summaries import ModelIsOffError, first_words, summarize

from lmbridge import LLMClient
from lmbridge.testing import MockRequest, MockTransport


def completion(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


async def test_a_short_summary_is_returned() -> None:
    transport = MockTransport(lambda _: completion("A cat sleeps."))
    assert await summarize(LLMClient(transport=transport), "...") == "A cat sleeps."
    assert [request.json["temperature"] for request in transport.requests] == [0]


async def test_a_long_summary_is_asked_for_again() -> None:
    answers = iter(["one two three four five six seven eight nine ten eleven", "Short."])
    transport = MockTransport(lambda _: completion(next(answers)))
    assert await summarize(LLMClient(transport=transport), "...") == "Short."
    assert transport.requests[1].json["messages"][-1] == {"role": "user", "content": "Shorter, please."}


async def test_a_server_that_is_off_is_an_error_of_its_own() -> None:
    def refuse(_: MockRequest) -> dict[str, Any]:
        raise ConnectionRefusedError

    with pytest.raises(ModelIsOffError, match="start the model server first"):
        await summarize(LLMClient(transport=MockTransport(refuse), max_retries=0), "...")


async def test_only_the_first_word_of_each_story_is_generated() -> None:
    left: asyncio.Queue[str] = asyncio.Queue()

    def tell(request: MockRequest) -> Iterator[dict[str, Any]]:
        try:
            while True:
                yield {"choices": [{"index": 0, "delta": {"content": "Once "}}]}
        finally:
            left.put_nowait(request.json["messages"][0]["content"])

    client = LLMClient(transport=MockTransport(tell))
    assert await first_words(client, ["cat", "dog"]) == ["Once", "Once"]
    assert [await left.get(), await left.get()] == ["cat", "dog"]
