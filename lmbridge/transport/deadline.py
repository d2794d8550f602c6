"""Deadlines of many waits behind a single timer of the event loop.

`asyncio.timeout` would do for one wait. It sets a timer of the loop for each wait, though, and a stream has a wait for
every chunk: that costs microseconds a chunk, and leaves the loop's heap full of cancelled timers. Here a deadline is an
attribute that its owner changes at no cost, and one timer a loop looks at all of them when the earliest may have
passed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Protocol, Self


class HasDeadline(Protocol):
    """An object that a `DeadlineTimer` calls when its deadline has passed."""

    when: float
    """The time of the deadline, by the clock of the event loop; infinity for none. It may change at any time."""

    def on_deadline(self) -> None:
        """Is called once when the deadline has passed."""


class DeadlineTimer:
    """Watches the deadlines of one event loop with one timer.

    The timer moves when an earlier deadline is added, and otherwise only when it rings. So a deadline that moves to a
    later time costs nothing, and one that moves to an earlier time has to be announced with `wake_at`.

    Args:
        loop: The running event loop.
        others: Further objects that are watched without being added, for an owner that keeps a collection of them
            anyway. The collection may change at any time; call `wake_at` when one of its deadlines is set.
    """

    __slots__ = ("_deadlines", "_others", "_rings_at", "_timer", "loop", "time")

    def __init__(self, loop: asyncio.AbstractEventLoop, others: Iterable[HasDeadline] = ()) -> None:
        self.loop: Final = loop
        self.time: Final = loop.time
        """The clock of the event loop, looked up once."""
        self._others = others
        self._deadlines: dict[HasDeadline, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = math.inf

    def add(self, deadline: HasDeadline) -> None:
        """Watches a deadline until it has passed or is discarded."""
        self._deadlines[deadline] = None
        if deadline.when < self._rings_at:
            self._set_timer(deadline.when)

    def discard(self, deadline: HasDeadline) -> None:
        """Stops watching a deadline. Does nothing if it is not watched."""
        self._deadlines.pop(deadline, None)

    def wake_at(self, when: float) -> None:
        """Makes sure that all deadlines are looked at by a certain time."""
        if when < self._rings_at:
            self._set_timer(when)

    def close(self) -> None:
        """Stops the timer."""
        self._set_timer(math.inf)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = when
        self._timer = None if when == math.inf else self.loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        now = self.time()
        self._timer, self._rings_at = None, math.inf
        passed = []
        earliest = math.inf
        for each in (*self._deadlines, *self._others):
            if each.when <= now:
                passed.append(each)
            else:
                earliest = min(earliest, each.when)
        self._set_timer(earliest)
        for each in passed:
            self.discard(each)
            each.on_deadline()


class Deadline:
    """A context manager that cancels the task inside its block at a deadline, and raises `TimeoutError` instead.

    It follows the protocol of `asyncio.timeout` (`Task.cancelling`, `Task.uncancel`): if anyone else cancels the task,
    even at the same moment, the cancellation goes on as a cancellation.

        with Deadline(deadline_timer, loop.time() + 5):
            await something()

    Args:
        deadline_timer: The timer of the running event loop.
        when: The time of the deadline, by the clock of the event loop; infinity for none.
    """

    __slots__ = ("_cancels_before", "_reached", "_task", "deadline_timer", "when")

    def __init__(self, deadline_timer: DeadlineTimer, when: float) -> None:
        self.deadline_timer: DeadlineTimer = deadline_timer
        self.when: float = when
        self._reached = False

    def __enter__(self) -> Self:
        task = asyncio.current_task(self.deadline_timer.loop)
        if task is None:
            raise RuntimeError("a Deadline can only be used inside a task, because it cancels the task")
        self._task = task
        self._cancels_before = task.cancelling()
        if self.when != math.inf:
            self.deadline_timer.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.deadline_timer.discard(self)
        if self._reached and self._task.uncancel() <= self._cancels_before and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def on_deadline(self) -> None:
        """Cancels the task inside the block."""
        self._reached = True
        self._task.cancel()
