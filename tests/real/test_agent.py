"""Agents on a real llama.cpp server: its model calls tools, and stops when the run is cancelled."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydantic import BaseModel

from lmbridge import (
    Agent,
    LLMClient,
    LLMClientPool,
    LocalServer,
    RunHandle,
    RunResult,
    TaskCancelledError,
    TextDelta,
    image_part,
)
from lmbridge.agent.result_images import NOT_SHOWN
from tests.agent.support import check_valid, tool_texts
from tests.real.conftest import API_KEY
from tests.real.support import GreedyClient, busy_slots, until_idle

pytestmark = [pytest.mark.real, pytest.mark.slow]


PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")


class GreedyPool:
    """A pool that lends `GreedyClient`s."""

    def __init__(self, pool: LLMClientPool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def client(self, model: str | None = None) -> AsyncGenerator[GreedyClient]:
        async with self._pool.client(model) as client:
            yield GreedyClient(client)


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


async def get_weather(city: str) -> str:
    """Returns the current weather in a city.

    Args:
        city: The name of the city.
    """
    return f"21 degrees and sunny in {city}"


def check_calls(result: RunResult[Any]) -> None:
    """Checks that there were calls, and that each got its own result. What a small model calls cannot be predicted."""
    assert result.tool_calls
    for call, text in zip(result.tool_calls, tool_texts(result.messages), strict=True):
        assert call.arguments is not None
        if call.name == "add":
            assert json.loads(text) == call.arguments["a"] + call.arguments["b"]
        else:
            assert (call.name, text) == ("get_weather", f"21 degrees and sunny in {call.arguments['city']}")
    check_valid(result.messages)


async def test_the_model_calls_a_tool_and_answers_with_its_result(client: LLMClient) -> None:
    agent = Agent(GreedyClient(client), tools=[add, get_weather], max_tokens=80, tool_choice="required")
    result = await agent.run("What is 317 plus 225?")
    check_calls(result)
    assert result.rounds >= 2
    assert result.stop_reason in ("stop", "length", "max_rounds")


@pytest.mark.parametrize("says_so", [True, False])
async def test_a_model_without_eyes_reads_that_it_cannot_see_an_image(client: LLMClient, says_so: bool) -> None:
    def take_picture() -> Any:
        """Takes a picture."""
        return image_part(PNG)

    # The greedy client does not say what its server can do, so the server has to refuse the image first.
    agent = Agent(
        client if says_so else GreedyClient(client),
        tools=[take_picture],
        max_tokens=60,
        temperature=0,
        tool_choice="required",
    )
    result = await agent.run("Take a picture.")
    assert tool_texts(result.messages)[0].endswith(NOT_SHOWN)
    check_valid(result.messages)


class Sum(BaseModel):
    total: int


async def test_a_run_with_tools_returns_its_typed_output(client: LLMClient) -> None:
    agent = Agent(GreedyClient(client), tools=[add, get_weather], max_tokens=80, tool_choice="required")
    result = await agent.run("What is 317 plus 225?", output_type=Sum)
    # The model is so small that it may repeat one of the numbers.
    assert isinstance(result.output, Sum)
    check_calls(result)
    assert result.usage["total_tokens"] > 100
    assert result.model == client.model


async def test_a_run_continues_the_messages_of_another(client: LLMClient) -> None:
    agent = Agent(GreedyClient(client), tools=[add, get_weather], max_tokens=80, tool_choice="required")
    first = await agent.run("What is 317 plus 225?")
    second = await agent.run("What is the weather in Paris?", messages=first.messages)
    assert second.tool_calls
    assert second.messages[: len(first.messages)] == first.messages
    check_valid(second.messages)


async def test_the_context_length_of_the_server_is_known(client: LLMClient) -> None:
    agent = Agent(client)
    context = await agent._source.context_length(client.model)
    assert context is not None
    assert 1024 <= context <= 8192


# Each of the 24 runs takes two generations, which two cores need minutes for.
@pytest.mark.timeout(240)
async def test_twenty_four_concurrent_runs_each_get_their_own_result(local_server: LocalServer) -> None:
    async with LLMClientPool(
        8, api_base=local_server.api_base, model=local_server.model, api_key=API_KEY, model_mismatch="raise"
    ) as pool:
        agent = Agent(GreedyPool(pool), tools=[add], max_tokens=40, tool_choice="required")
        numbers = range(101, 125)
        results = await asyncio.gather(*(agent.run(f"What is {number} plus 225?") for number in numbers))
        assert pool.stats().in_use == 0
    exact = 0
    for number, result in zip(numbers, results, strict=True):
        check_calls(result)
        assert f"What is {number} plus 225?" in [message["content"] for message in result.messages]
        exact += {"a": number, "b": 225} in [call.arguments for call in result.tool_calls]
    assert exact >= 12, "a model this small gets some numbers wrong, but most of them would be if replies were mixed up"


async def start_generating(agent: Agent) -> RunHandle:
    """Starts a run, and returns when its model has begun to write."""
    handle = agent.start("Tell a long story about a lighthouse.")
    async for event in handle.events():
        if isinstance(event, TextDelta) and re.search(r"\w", event.text):
            break
    return handle


@pytest.mark.parametrize("way", ["handle", "caller", "stream"])
async def test_a_cancelled_run_frees_its_slot(local_server: LocalServer, client: LLMClient, way: str) -> None:
    agent = Agent(GreedyClient(client, ignore_eos=True), max_tokens=3000)
    if way == "stream":
        async with agent.stream("Tell a long story about a lighthouse.") as stream:
            async for event in stream:
                if isinstance(event, TextDelta):
                    assert await busy_slots(local_server) == 1
                    break
        partial = stream.handle.partial
    else:
        handle = await start_generating(agent)
        assert await busy_slots(local_server) == 1
        caller = asyncio.create_task(handle.result())
        await asyncio.sleep(0)
        if way == "caller":
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
        else:
            handle.cancel()
            with pytest.raises(TaskCancelledError) as caught:
                await caller
            assert caught.value.partial.text
        partial = handle.partial
    assert partial.stop_reason == "cancelled"
    assert partial.text
    check_valid(partial.messages)
    await until_idle(local_server)


async def test_a_run_out_of_time_frees_its_slot(local_server: LocalServer, client: LLMClient) -> None:
    agent = Agent(GreedyClient(client, ignore_eos=True), max_tokens=3000, max_seconds=1)
    result = await agent.run("Tell a long story about a lighthouse.")
    assert result.stop_reason == "budget"
    await until_idle(local_server)


async def test_a_conversation_longer_than_the_context_is_trimmed(client: LLMClient) -> None:
    agent = Agent(GreedyClient(client), max_tokens=16)
    before: list[dict[str, Any]] = [
        message
        for page in range(40)
        for message in (
            {"role": "user", "content": f"Page {page}? " + "word " * 300},
            {"role": "assistant", "content": "Yes."},
        )
    ]
    result = await agent.run("Hello.", messages=before)
    assert result.text
    assert len(result.messages) == 82
    assert result.log[0].usage is not None
    assert result.log[0].usage["prompt_tokens"] < 8192


class FirstReplyClient(GreedyClient):
    """A client whose first reply is scripted; the others come from the model."""

    def __init__(self, client: LLMClient, first: dict[str, Any]) -> None:
        super().__init__(client)
        self._first: dict[str, Any] | None = first

    async def chat_completion(self, messages: Any, *, model: str | None, stream: Any, **params: Any) -> Any:
        first, self._first = self._first, None
        if first is None:
            return await super().chat_completion(messages, model=model, stream=stream, **params)

        async def chunks() -> AsyncGenerator[dict[str, Any]]:
            yield {"choices": [{"index": 0, "delta": first, "finish_reason": "tool_calls"}]}

        return chunks()


async def test_a_constrained_retry_corrects_a_call(client: LLMClient) -> None:
    function = {"name": "get_weather", "arguments": '{"town": "Paris"}'}
    first = {"tool_calls": [{"index": 0, "id": "1", "type": "function", "function": function}]}
    agent = Agent(FirstReplyClient(client, first), tools=[add, get_weather], max_rounds=2, on_limit="answer")
    result = await agent.run("What is the weather in Paris?")
    wrong, corrected = (record for entry in result.log for record in entry.tool_calls)
    assert wrong.is_error
    assert corrected.constrained
    assert corrected.call.arguments == {"city": "Paris"}
    check_valid(result.messages)
