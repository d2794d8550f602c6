"""Helpers that the tests of agents share: scripted calls, requests that arrived, and a tool that can be held."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

from lmbridge import Agent
from lmbridge.agent.continued_messages import check_pairs
from lmbridge.agent.history import History, Turn, resendable_call
from lmbridge.agent.model_reply import ModelReply
from lmbridge.testing import Behaviour, RecordedRequest, ScriptedServer, answer


def asks(name: str, call_id: str = "call_1", /, **arguments: Any) -> dict[str, Any]:
    """Returns a tool call as a model writes it."""
    return asks_raw(name, json.dumps(arguments), call_id)


def asks_raw(name: str, arguments: str, call_id: str = "call_1") -> dict[str, Any]:
    """Returns a tool call whose arguments need not be valid JSON."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*tool_calls: Mapping[str, Any], text: str = "", **options: Any) -> Behaviour:
    """Returns a reply that requests tool calls."""
    return answer(text, tool_calls=tool_calls, **options)


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def generations(server: ScriptedServer) -> list[RecordedRequest]:
    """Returns the requests for a generation that the server received."""
    return [request for request in server.requests if request.path == "/v1/chat/completions"]


def sent(server: ScriptedServer, number: int = -1) -> dict[str, Any]:
    """Returns the body of a request for a generation; by default that of the last one."""
    fields: dict[str, Any] = generations(server)[number].json
    return fields


def tool_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the results of tool calls in a conversation, in order."""
    return [message["content"] for message in messages if message["role"] == "tool"]


def check_valid(messages: Sequence[Mapping[str, Any]]) -> None:
    """Checks that every server accepts a conversation.

    That means one leading system message, a result for every call, arguments that parse, and no content that is null.
    """
    assert [number for number, message in enumerate(messages) if message["role"] == "system"] in ([], [0])
    check_pairs(messages)
    for message in messages:
        assert isinstance(message["content"], str | list)
        for call in message.get("tool_calls", ()):
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
            assert call["function"]["name"]
            assert call["id"]


def read_reply(completion: Mapping[str, Any]) -> ModelReply:
    """Returns what a run reads from a reply with few calls, for which it does not wait."""
    reading = ModelReply.from_completion(completion)
    with pytest.raises(StopIteration) as stop:
        reading.send(None)
    read: ModelReply = stop.value.value
    return read


def begin_turn(history: History, text: str, tool_calls: Iterable[Mapping[str, Any]], **options: Any) -> Turn:
    """Begins a turn with calls as a model writes them."""
    return history.begin_turn(text, list(map(resendable_call, tool_calls)), **options)


class Gate:
    """A tool that waits until it is opened, and counts how its calls ended."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.open = asyncio.Event()
        self.running = 0
        self.cancelled = 0

    async def wait(self, name: str = "") -> str:
        """Waits until the gate is open."""
        self.running += 1
        self.begun.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            # The clean-up takes a turn of the loop.
            await asyncio.sleep(0)
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return f"done {name}".strip()


def our_tasks() -> list[asyncio.Task[Any]]:
    """Returns the tasks of runs that have not ended."""
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("lmbridge-run")]


async def collect_events(agent: Agent, task: str = "Go.", **options: Any) -> list[Any]:
    """Runs an agent, and returns all events of the run."""
    return [event async for event in agent.stream(task, **options)]
