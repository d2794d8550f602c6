"""Deadlines of many waits that share a single timer of the event loop.

`asyncio.timeout` would set a timer of the loop for each wait, and a stream waits for every chunk. That costs
microseconds for each chunk, and fills the loop's heap with cancelled timers. Here a deadline is an attribute, which its
owner can change at no cost, and one timer for each event loop checks all deadlines when the earliest of them may have
passed.

What each limit measures, and from when, is listed in `time_limits`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Protocol, Self


class HasDeadline(Protocol):
    """An object that a `DeadlineTimer` calls when its deadline has passed."""

    deadline: float
    """The time of the deadline, by the clock of the event loop, or infinity for none. It may change at any time."""

    def on_deadline(self) -> None:
        """Handles the deadline. The timer calls this method when the deadline has passed.

        It calls it once for an object that was passed to `add`. For a member of the timer's `collection`, it may call
        it again as long as the deadline is not changed.
        """


class DeadlineTimer:
    """Watches the deadlines of one event loop with one timer.

    The timer is set again when an earlier deadline is added, and otherwise only when it fires. So it costs nothing to
    move a deadline to a later time. After moving one to an earlier time, call `wake_at`.

    Args:
        loop: The running event loop.
        collection: Objects that are watched without `add`, because their owner keeps a collection of them anyway. The
            collection may change at any time. Call `wake_at` after setting the deadline of a member.
    """

    __slots__ = ("_added", "_collection", "_fires_at", "_timer", "loop", "time")

    def __init__(self, loop: asyncio.AbstractEventLoop, collection: Iterable[HasDeadline] = ()) -> None:
        self.loop: Final = loop
        """The event loop whose deadlines are watched."""
        self.time: Final = loop.time
        """The clock of the event loop. It is a bound method that is looked up only once, because it is called often."""
        self._collection = collection
        self._added: dict[HasDeadline, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = math.inf

    def add(self, watched: HasDeadline) -> None:
        """Watches an object until its deadline has passed or it is discarded."""
        self._added[watched] = None
        if watched.deadline < self._fires_at:
            self._set_timer(watched.deadline)

    def discard(self, watched: HasDeadline) -> None:
        """Stops watching an object that was added. Does nothing if it is not watched."""
        self._added.pop(watched, None)

    def wake_at(self, when: float) -> None:
        """Makes sure that all deadlines are checked at the given time or before."""
        if when < self._fires_at:
            self._set_timer(when)

    def close(self) -> None:
        """Stops the timer."""
        self._set_timer(math.inf)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._fires_at = when
        self._timer = None if when == math.inf else self.loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        now = self.time()
        self._timer, self._fires_at = None, math.inf
        overdue = []
        earliest = math.inf
        for watched in (*self._added, *self._collection):
            if watched.deadline <= now:
                overdue.append(watched)
            else:
                earliest = min(earliest, watched.deadline)
        self._set_timer(earliest)
        # The stack calls all of them, in order, even if one of them raises an exception.
        with ExitStack() as calls:
            for watched in reversed(overdue):
                self.discard(watched)
                calls.callback(watched.on_deadline)


class Deadline:
    """A context manager that ends its block with a `TimeoutError` when a deadline has passed.

    It cancels the task that runs the block, and turns this cancellation into a `TimeoutError`. Like `asyncio.timeout`,
    it counts cancellations (`Task.cancelling`, `Task.uncancel`). So if the task is also cancelled by someone else, even
    at the same moment, the block ends with that `CancelledError`::

        with Deadline(deadline_timer, loop.time() + 5):
            await response.read_some()

    Args:
        deadline_timer: The timer of the running event loop.
        deadline: The time of the deadline, by the clock of the event loop, or infinity for none.
    """

    __slots__ = ("_cancels_before", "_has_passed", "_task", "deadline", "deadline_timer")

    def __init__(self, deadline_timer: DeadlineTimer, deadline: float) -> None:
        self.deadline_timer: DeadlineTimer = deadline_timer
        self.deadline: float = deadline
        self._has_passed = False

    def __enter__(self) -> Self:
        task = asyncio.current_task(self.deadline_timer.loop)
        if task is None:
            raise RuntimeError("a Deadline can only be used inside a task, because it cancels the task")
        self._task = task
        self._cancels_before = task.cancelling()
        if self.deadline != math.inf:
            self.deadline_timer.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.deadline_timer.discard(self)
        if self._has_passed and self._task.uncancel() <= self._cancels_before and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def on_deadline(self) -> None:
        """Cancels the task that runs the block."""
        self._has_passed = True
        self._task.cancel()
