"""Limits the work of checking values against a schema, because a hostile or broken schema could make it endless.

The work is counted in steps instead of seconds, so that the same call always ends in the same way, even on a busy
machine. A step takes about a microsecond.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Final

STEPS_AT_ONCE: Final = 20_000
"""The number of steps that a check may take in the event loop, which it blocks for about 20 ms."""
STEPS_IN_THREAD: Final = 3_000_000
"""The number of steps that a check may take in a thread, where they take about three seconds."""
STEPS_FOR_SCHEMA: Final = 1_000_000
"""The number of steps that the check of the schema itself may take in a thread, where they take about a second."""


class StepLimitError(Exception):
    """The work takes more steps than are allowed."""


class _Counter:
    def __init__(self, steps: int) -> None:
        self.left: int = steps


_counter: Final[ContextVar[_Counter | None]] = ContextVar("lmbridge_step_counter", default=None)


class StepLimit:
    """A context manager that limits the steps that are made within its block.

    Args:
        steps: The number of steps that are allowed.
    """

    __slots__ = ("_steps", "_token")

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def __enter__(self) -> None:
        self._token: Token[_Counter | None] = _counter.set(_Counter(self._steps))

    def __exit__(self, *_: object) -> None:
        _counter.reset(self._token)


def spend_steps(steps: int) -> None:
    """Counts steps. Outside of `StepLimit`, any number is allowed.

    Raises:
        StepLimitError: There are no steps left.
    """
    counter = _counter.get()
    if counter is not None:
        counter.left -= steps
        if counter.left < 0:
            raise StepLimitError
