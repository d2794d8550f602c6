"""The interface of the agents whose solved tasks are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

MODEL: Final = "scripted"
SYSTEM: Final = "You work on the task with the tools that you have."


class Task(Protocol):
    """A task whose end state can be checked."""

    @property
    def prompt(self) -> str:
        """The text for the model."""

    @property
    def max_rounds(self) -> int:
        """How many times the model may be asked."""

    @property
    def context_length(self) -> int | None:
        """The tokens of the model's context, for agents that have to be told; None if the task fits into any."""

    def tools(self) -> list[Callable[..., Any]]:
        """Returns the tools for this task."""

    def is_solved(self, answer: str) -> bool:
        """Returns whether everything was done, and the answer is right."""


class Solver:
    """An agent that works on one task at a time."""

    def __init__(self, base: str) -> None:
        raise NotImplementedError

    async def solve(self, task: Task) -> str:
        """Works on a task, and returns the final answer. Any exception counts as a task that was not solved."""
        raise NotImplementedError
