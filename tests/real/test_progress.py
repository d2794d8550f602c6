"""The progress of a prompt on a real llama.cpp server."""

from __future__ import annotations

import pytest

from lmbridge import Agent, LLMClient, PromptProgress

pytestmark = pytest.mark.real


async def test_a_listener_gets_the_progress_and_what_comes_from_the_prompt_cache(client: LLMClient) -> None:
    agent = Agent(client, max_tokens=1)
    first, second = [
        [event async for event in agent.stream(task) if isinstance(event, PromptProgress)]
        for task in ("Count the words of this sentence.", "Count the words of this sentence, please.")
    ]
    assert first
    assert all(0 <= each.cached <= each.processed <= each.total for each in first + second)
    assert second[-1].cached > 10, "the system prompt and the beginning of the sentence are in the cache"
