"""The interface of the agents whose solved tasks are counted."""

from __future__ import annotations

from typing import Final

from benchmarks.solving.tasks import Task

MODEL: Final = "scripted"
SYSTEM: Final = "You work on the task with the tools that you have."
MAX_ROUNDS: Final = 25


class Solver:
    """An agent that works on one task at a time."""

    def __init__(self, base: str) -> None:
        raise NotImplementedError

    async def solve(self, task: Task) -> str:
        """Works on a task, and returns the final answer. Any exception counts as a task that was not solved."""
        raise NotImplementedError
