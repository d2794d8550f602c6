"""`ScheduledRun`: an agent's run as the scheduler of the transport knows it.

The agent layer creates a `ScheduledRun` for each run and ends it with the run; the transport reads it when a request
asks for a permit. The two layers share nothing else, so this module belongs to the ground floor below both of them.

A `ScheduledRun` reaches the transport in a context variable, and not as an argument, for two reasons. An agent works
with any object that has `chat_completion`, which need not accept such an argument. And the tasks that a tool starts
inherit the variable, so the requests that a tool sends belong to the run that called the tool.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

_numbers: Final = itertools.count(1)


def next_order_number() -> int:
    """Returns the next number of the sequence that runs share with the requests that belong to no run."""
    return next(_numbers)


class ScheduledRun:
    """A run, with its position in the order of all runs.

    It is small, because sockets and timers keep the context that refers to it.
    """

    __slots__ = ("__weakref__", "_on_end", "_on_pause", "is_over", "loop", "number", "priority")

    def __init__(
        self,
        priority: int | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
        number: int | None = None,
    ) -> None:
        self.priority: Final = priority
        """The priority of all requests of the run. With None, each has the priority of the client that sends it."""
        self.loop: Final = loop
        """The event loop of the run, or None for any loop. A request that a tool sends from another loop does not
        belong to the run, because that loop would have to learn about the end of the run from another thread."""
        self.number: Final = next_order_number() if number is None else number
        """The position of the run in the order of all runs and requests; the lowest goes first. By default runs and
        requests are in the order of their arrival. Passing a number makes sense only if all runs have one."""
        self.is_over: bool = False
        """Whether the run has ended. A request that asks for a permit after that does not belong to the run."""
        self._on_end: list[Callable[[ScheduledRun], None]] = []
        self._on_pause: list[Callable[[ScheduledRun], None]] = []

    def add_callbacks(
        self, *, on_end: Callable[[ScheduledRun], None], on_pause: Callable[[ScheduledRun], None]
    ) -> None:
        """Registers functions that `end` and `pause` call with the run. The functions must not raise."""
        self._on_end.append(on_end)
        self._on_pause.append(on_pause)

    def pause(self) -> None:
        """Records that the run waits for something other than its tools, so that another run may begin in its place.

        The pause lasts until the next request of the run. Without it, two runs could block each other: this run would
        wait for something that the other run holds, and the other run would wait until it may begin.
        """
        for callback in self._on_pause:
            callback(self)

    def end(self) -> None:
        """Records that the run has ended. Calling it again does nothing."""
        if not self.is_over:
            self.is_over = True
            callbacks, self._on_end, self._on_pause = self._on_end, [], []
            for callback in callbacks:
                callback(self)


current_run: Final[ContextVar[ScheduledRun | None]] = ContextVar("lmbridge_scheduled_run", default=None)
"""The run to which the current task belongs, or None outside of a run."""
