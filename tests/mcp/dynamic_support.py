"""Helpers for the tests of `DynamicAutonomousAgent`."""

from __future__ import annotations

from typing import Any

from lmbridge import DynamicAutonomousAgent
from lmbridge.testing import Exchange, ScriptedServer, answer
from tests.agent.support import asks, calls, sent

METHODS = ["one", "several", "all"]
"""The methods that run a task, for `start_run`."""
ONLY_ECHO = {"tools": ["echo"]}


async def start_run(agent: DynamicAutonomousAgent, method: str, task: Any = "Go.", **options: Any) -> Any:
    """Runs a task with the server "a", through one of the three methods."""
    if method == "one":
        return await agent.autonomous_with_mcp("a", task, **options)
    if method == "several":
        return await agent.autonomous_with_multiple_mcps(["a"], task, **options)
    return await agent.autonomous_discover_and_execute(task, **options)


async def echo_the_task(exchange: Exchange) -> None:
    """Behaves as a model that calls the tool `echo` with its task, and then answers with the tool's result."""
    last = exchange.request.json["messages"][-1]
    done = last["role"] == "tool"
    await (answer(last["content"]) if done else calls(asks("echo", text=last["content"])))(exchange)


def sent_tool_names(server: ScriptedServer, number: int = -1) -> list[str]:
    """Returns the names of the tools in a request to the model server, by default the last one."""
    return [each["function"]["name"] for each in sent(server, number).get("tools", [])]


def sent_system_message(server: ScriptedServer) -> str | None:
    """Returns the system message of the last request, or None if it had none."""
    first = sent(server)["messages"][0]
    return first["content"] if first["role"] == "system" else None
