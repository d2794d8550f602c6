"""What the tests of agents share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lmbridge import Agent
from lmbridge.agent.history import check_pairs
from lmbridge.testing import Behaviour, RecordedRequest, ScriptedServer, answer


def asks(name: str, call_id: str = "call_1", /, **arguments: Any) -> dict[str, Any]:
    """A call as a model makes it."""
    return asks_raw(name, json.dumps(arguments), call_id)


def asks_raw(name: str, arguments: str, call_id: str = "call_1") -> dict[str, Any]:
    """A call with arguments that may be no JSON."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*tool_calls: Mapping[str, Any], text: str = "", **options: Any) -> Behaviour:
    """A reply that asks for calls."""
    return answer(text, tool_calls=tool_calls, **options)


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def generations(server: ScriptedServer) -> list[RecordedRequest]:
    """The requests for a generation."""
    return [request for request in server.requests if request.path == "/v1/chat/completions"]


def sent(server: ScriptedServer, number: int = -1) -> dict[str, Any]:
    """What a generation was asked for."""
    fields: dict[str, Any] = generations(server)[number].json
    return fields


def tool_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the model was told of its calls."""
    return [message["content"] for message in messages if message["role"] == "tool"]


def check_valid(messages: Sequence[Mapping[str, Any]]) -> None:
    """What every server takes: one leading system message, calls answered, arguments that parse, no null."""
    assert [number for number, message in enumerate(messages) if message["role"] == "system"] in ([], [0])
    check_pairs(messages)
    for message in messages:
        assert isinstance(message["content"], str | list)
        for call in message.get("tool_calls", ()):
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
            assert call["function"]["name"]
            assert call["id"]


class Gate:
    """A tool that waits until it is let go, and says what became of it."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.open = asyncio.Event()
        self.running = 0
        self.cancelled = 0

    async def wait(self, name: str = "") -> str:
        """Waits."""
        self.running += 1
        self.begun.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # clean-up takes its time
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return f"done {name}".strip()


def our_tasks() -> list[asyncio.Task[Any]]:
    """The tasks of runs that are there."""
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("lmbridge-run")]


async def told(agent: Agent, task: str = "Go.", **options: Any) -> list[Any]:
    """All events of a run."""
    return [event async for event in agent.stream(task, **options)]
