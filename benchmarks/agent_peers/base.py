"""What each agent loop has to do."""

from __future__ import annotations

from typing import Any, Final

SYSTEM: Final = "You are a helpful assistant."
TASK: Final = "Add the numbers, one after the other."
MOST_ROUNDS: Final = 1000
AT_ONCE: Final = 2000
"""More runs than are ever under way, so that none queues."""
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
    """A loop over one server, with `add` as its only tool."""

    def __init__(self, base: str) -> None:
        raise NotImplementedError

    async def run(self, model: str) -> int:
        """A run, up to its answer; returns the length of that."""
        raise NotImplementedError


async def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b
