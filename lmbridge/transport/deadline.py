"""Deadlines behind one timer of the loop: a timer each is microseconds a request, and a heap of cancelled ones."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Protocol, Self


class Timed(Protocol):
    """What may be late."""

    when: float
    """The loop's time at which it is; infinity for never."""

    def on_deadline(self) -> None:
        """It is."""


class DeadlineTimer:
    """The deadlines of one loop. Its timer is moved for an earlier one, and otherwise only when it fires.

    Args:
        loop: The running loop.
        others: Looked at beside the deadlines; they tell it by `wake_at` when they have something to wait for.
    """

    __slots__ = ("_at", "_deadlines", "_others", "_timer", "loop", "time")

    def __init__(self, loop: asyncio.AbstractEventLoop, others: Iterable[Timed] = ()) -> None:
        self.loop: Final = loop
        self.time: Final = loop.time
        """The loop's clock, looked up once."""
        self._others = others
        self._deadlines: dict[Timed, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._at = math.inf

    def add(self, deadline: Timed) -> None:
        """Watches it until it is late or discarded."""
        self._deadlines[deadline] = None
        if deadline.when < self._at:
            self._set(deadline.when)

    def discard(self, deadline: Timed) -> None:
        """Watches it no longer."""
        self._deadlines.pop(deadline, None)

    def wake_at(self, when: float) -> None:
        """Looks at all of them at that time, or before."""
        if when < self._at:
            self._set(when)

    def close(self) -> None:
        """Stops its timer."""
        self._set(math.inf)

    def _set(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._at = when
        self._timer = None if when == math.inf else self.loop.call_at(when, self._look)

    def _look(self) -> None:
        now = self.time()
        self._timer, self._at = None, math.inf
        late = []
        next_one = math.inf
        for each in (*self._deadlines, *self._others):
            if each.when <= now:
                late.append(each)
            else:
                next_one = min(next_one, each.when)
        self._set(next_one)
        for each in late:
            self.discard(each)
            each.on_deadline()


class Deadline:
    """Cancels the task that is in its block when the loop's clock says so, and makes a `TimeoutError` of that.

    It keeps asyncio's bookkeeping (`Task.cancelling`, `Task.uncancel`): a cancel by anyone else goes on as a cancel,
    also one that comes at the same moment.

    Args:
        deadline_timer: The timer of the running loop.
        when: Its time; infinity for no deadline.
    """

    __slots__ = ("_before", "_reached", "_task", "deadline_timer", "when")

    def __init__(self, deadline_timer: DeadlineTimer, when: float) -> None:
        self.deadline_timer = deadline_timer
        self.when = when
        self._reached = False

    def __enter__(self) -> Self:
        task = asyncio.current_task(self.deadline_timer.loop)
        if task is None:
            raise RuntimeError("a deadline needs a task to cancel")
        self._task = task
        self._before = task.cancelling()
        if self.when != math.inf:
            self.deadline_timer.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.deadline_timer.discard(self)
        if self._reached and self._task.uncancel() <= self._before and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def on_deadline(self) -> None:
        """Cancels the task."""
        self._reached = True
        self._task.cancel()
