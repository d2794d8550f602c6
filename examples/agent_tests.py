"""Tests of an agent, without a server: a scripted model, a double below the client, and a cassette.

    pip install pytest pytest-asyncio
    python -m pytest examples/agent_tests.py --lmbridge-record
    python -m pytest examples/agent_tests.py

The first run records the cassette of the last test, and needs a server for it (LMBRIDGE_API_BASE). Later runs need
none, on every machine that has the file.
"""

from __future__ import annotations

import pytest

from lmbridge import Agent, LLMClient, LLMRateLimitError, ToolCall
from lmbridge.testing import FakeChatClient, MockResponse, MockTransport, retry_without_waiting


def weather(city: str) -> str:
    """Returns the weather in a city."""
    return f"It rains in {city}."


@pytest.mark.asyncio
async def test_the_agent_uses_what_its_tool_says() -> None:
    model = FakeChatClient([ToolCall("1", "weather", {"city": "Oslo"}), "Take an umbrella."])
    result = await Agent(model, tools=[weather]).run("What do I need in Oslo?")
    assert result.text == "Take an umbrella."
    assert model.requests[1].messages[-1]["content"] == "It rains in Oslo."


@pytest.mark.asyncio
async def test_a_busy_server_is_reported() -> None:
    transport = MockTransport(lambda _: MockResponse(429, json={"error": "busy"}))
    with retry_without_waiting(), pytest.raises(LLMRateLimitError):
        await LLMClient(model="qwen3-4b", transport=transport).ask("Hello?")
    assert len(transport.requests) == 3


@pytest.mark.asyncio
@pytest.mark.usefixtures("lmbridge_cassette")
async def test_what_a_real_model_once_said() -> None:
    async with LLMClient() as client:
        assert await client.ask("What is the capital of Norway?", temperature=0)
