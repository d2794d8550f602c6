"""The progress of a prompt on a real llama.cpp server."""

from __future__ import annotations

import pytest

from lmbridge import Agent, LLMClient, PromptProgress
from lmbridge.observe import FirstEventArrived, PromptProgressed, RequestQueued
from tests.observe.test_requests import Recorder
from tests.real.conftest import API_KEY

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


async def test_an_observer_gets_the_progress_before_the_reply_begins(client: LLMClient) -> None:
    recorder = Recorder()
    async with LLMClient(client.api_base, None, API_KEY, timeout=200, observers=[recorder]) as observed:
        await Agent(observed, max_tokens=1, observers=[recorder]).run("Count the letters of this sentence.")
    [queued] = [each for each in recorder.of(RequestQueued) if each.operation == "chat completion"]
    [first] = [each for each in recorder.of(FirstEventArrived) if each.request_id == queued.request_id]
    progress = recorder.of(PromptProgressed)
    assert progress
    assert progress[-1].processed == progress[-1].total
    assert progress[0].at <= first.at
