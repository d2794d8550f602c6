"""The interface of the agent loops that are compared, and the task that all get."""

from __future__ import annotations

from typing import Any, Final

SYSTEM: Final = "You are a helpful assistant."
TASK: Final = "Add the numbers, one after the other."
MAX_ROUNDS: Final = 1000
AT_ONCE: Final = 2000
"""More runs than are ever in flight, so that no request waits."""
SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS: Final = [
    {"type": "function", "function": {"name": "add", "description": "Adds two numbers.", "parameters": SCHEMA}}
]


class AgentPeer:
    """An agent with one server, and with `add` as its only tool."""

    def __init__(self, base: str) -> None:
        raise NotImplementedError

    async def run(self, model: str) -> int:
        """Runs the task, and returns the length of the answer."""
        raise NotImplementedError


async def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b
