"""A real llama.cpp model answers with the tools of real MCP servers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import DynamicAutonomousAgent, LLMClient, MCPConnectionError, RunFinished, TextDelta, ToolCallFinished
from tests.agent.support import check_valid, tool_texts
from tests.real.support import GreedyClient
from tests.real.test_mcp import npm_server, python_server

pytestmark = [pytest.mark.real, pytest.mark.slow]

MakeAgent = Callable[[Any], DynamicAutonomousAgent]


@pytest_asyncio.fixture
async def make_agent(client: LLMClient, tmp_path: Path) -> AsyncIterator[MakeAgent]:
    """Returns a function that makes agents from MCP server entries, and closes them after the test."""
    agents: list[DynamicAutonomousAgent] = []

    def make(servers: Any) -> DynamicAutonomousAgent:
        path = tmp_path / "mcp.json"
        path.write_text(json.dumps({"mcpServers": servers}))
        agents.append(
            DynamicAutonomousAgent(
                GreedyClient(client), config_path=path, max_tokens=80, max_rounds=4, tool_choice="required"
            )
        )
        return agents[-1]

    yield make
    for agent in agents:
        await agent.close()


def only(entry: dict[str, Any], *names: str) -> dict[str, Any]:
    """Restricts a server entry to some tools, because a small model chooses better among few."""
    return {**entry, "lmbridge": {"allow": list(names)}}


async def test_the_model_answers_with_a_sum_from_a_server(make_agent: MakeAgent) -> None:
    agent = make_agent({"everything": only(npm_server("everything", "stdio"), "get-sum")})
    result = await agent.autonomous_with_mcp("everything", "What is 317 plus 225?", full=True)
    # Which numbers a small model adds, and how it goes on, differs between processors.
    call, *_ = result.tool_calls
    assert call.name == "get-sum"
    assert call.arguments is not None
    assert tool_texts(result.messages)[0].startswith(f"The sum of {call.arguments['a']} and {call.arguments['b']} is ")
    assert result.rounds >= 2
    assert result.errors == {}
    check_valid(result.messages)


async def test_the_model_answers_with_the_time_from_a_server(make_agent: MakeAgent) -> None:
    agent = make_agent({"time": only(python_server("mcp_server_time"), "get_current_time")})
    task = "What is the current time in the timezone Asia/Tokyo?"
    async with await agent.autonomous_with_mcp("time", task, stream=True) as stream:
        events = [event async for event in stream]
    finished, *_ = [event for event in events if isinstance(event, ToolCallFinished)]
    assert finished.call.name == "get_current_time"
    assert finished.call.arguments is not None
    zone = finished.call.arguments["timezone"]
    # The server refuses a time zone that the model has made up.
    assert "timezone" in finished.text.lower() if finished.is_error else json.loads(finished.text)["timezone"] == zone
    assert isinstance(events[-1], RunFinished)
    result = events[-1].result
    assert "".join(event.text for event in events if isinstance(event, TextDelta)).endswith(result.text)
    assert result.rounds >= 2


async def test_the_model_uses_the_servers_that_started(make_agent: MakeAgent) -> None:
    agent = make_agent(
        {
            "missing": {"command": "/nowhere/server"},
            "everything": only(npm_server("everything", "stdio"), "get-sum"),
            "time": only(python_server("mcp_server_time"), "get_current_time"),
        }
    )
    result = await agent.autonomous_discover_and_execute("What is 317 plus 225?", full=True)
    assert list(result.errors) == ["missing"]
    assert isinstance(result.errors["missing"], MCPConnectionError)
    assert "missing" in result.messages[0]["content"]
    assert {call.name for call in result.tool_calls} <= {"get-sum", "get_current_time"}
    assert all(isinstance(call.arguments, dict) for call in result.tool_calls)
    assert len(tool_texts(result.messages)) == len(result.tool_calls) > 0
    check_valid(result.messages)
