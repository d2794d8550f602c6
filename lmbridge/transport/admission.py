"""Waiting to be admitted: the scheduler's rules in an event loop.

Everything here runs in one loop and changes state only between awaits, so it needs no lock.
"""

from __future__ import annotations

import asyncio
import math
import weakref
from collections import Counter
from collections.abc import Callable

from lmbridge.config import Limits
from lmbridge.errors import LLMError, LLMTimeoutError
from lmbridge.transport.scheduler import Permit, Scheduler


class Admission:
    """Gives permits to those who ask, as the scheduler says. A cancelled waiter costs nothing, and nothing polls.

    It is made in the loop that it is used in.

    Args:
        limits: How much may be going on.
        swaps: Where to count the swaps to each model.
    """

    def __init__(self, limits: Limits, swaps: Counter[str | None] | None = None) -> None:
        self.scheduler = Scheduler(limits, swaps)
        self._loop = asyncio.get_running_loop()  # kept, because each look for it is a system call before Python 3.12
        self._waiters: dict[asyncio.Task[object], Permit] = {}
        self._timer: asyncio.TimerHandle | None = None  # for the next that will be overdue
        self._revision = 0

    @property
    def in_flight(self) -> int:
        """Permits given."""
        return len(self.scheduler.in_flight)

    @property
    def queued(self) -> int:
        """Requests that wait for one."""
        return len(self.scheduler.waiting)

    def acquire_now(self, model: str | None, *, plain: bool = False) -> Permit | None:
        """A permit, if there is one that nobody else has to be asked for; see `acquire`."""
        now = self._loop.time()
        permit = Permit(model, now, None if plain else _holder(asyncio.current_task(self._loop)))
        return permit if self.scheduler.admit_now(permit, now) else None

    async def acquire(self, model: str | None, *, plain: bool = False) -> Permit:
        """Waits for a permit.

        Args:
            model: The model that is asked for.
            plain: Whether its task waits until it gives the permit back: so it will never ask for another meanwhile.

        Raises:
            LLMTimeoutError: phase "queue": `max_queue` ran out, or it would have to wait for permits of its own task.
        """
        loop, task = self._loop, asyncio.current_task(self._loop)
        permit = Permit(model, loop.time(), None if plain else _holder(task))
        self.scheduler.arrive(permit)
        self._admit()
        if permit.state == "in flight":
            return permit
        if self.scheduler.is_deadlocked(permit, task):
            self.release(permit)
            raise self._deadlock_error()
        permit.future = loop.create_future()
        if task is not None:
            self._waiters[task] = permit
        limit = self.scheduler.limits.max_queue
        timer = None if limit is None else loop.call_later(limit, self._expire, permit, limit)
        try:
            await permit.future
        except BaseException:
            self.release(permit)  # it may have been given in the same moment: pass it on
            raise
        finally:
            permit.future = None
            if task is not None:
                self._waiters.pop(task, None)
            if timer is not None:
                timer.cancel()
        return permit

    def release(self, permit: Permit) -> None:
        """Gives a permit back, or waits for it no longer; a second time does nothing."""
        if self.scheduler.leave(permit, self._loop.time()) and self.scheduler.waiting:
            self._admit()

    def mark_loaded(self, permit: Permit) -> None:
        """The first answer to a request is there."""
        self.scheduler.mark_loaded(permit, self._loop.time())
        self._admit()

    def mark_unloaded(self, model: str | None) -> None:
        """The server has dropped a model, or never had it."""
        self.scheduler.mark_unloaded(model)

    def set_limits(self, limits: Limits) -> None:
        """Other limits, from now on; nothing in flight is touched."""
        self.scheduler.set_limits(limits)
        self._admit()

    def fail_waiters(self, error: Callable[[], LLMError]) -> None:
        """Ends every wait with an error of its own."""
        waiting = list(self.scheduler.waiting)
        for permit in waiting:  # all of them, before the leaving of one lets another go
            _fail(permit, error())
        for permit in waiting:
            self.release(permit)

    def _admit(self) -> None:
        now = self._loop.time()
        for permit in self.scheduler.admit(now):
            if permit.future is not None and not permit.future.done():
                permit.future.set_result(None)
        if self._revision != self.scheduler.revision:
            self._revision = self.scheduler.revision
            self._fail_deadlocked_waiters()
        when = self.scheduler.next_overdue(now)
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = None if when == math.inf else self._loop.call_at(when, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._admit()

    def _fail_deadlocked_waiters(self) -> None:
        """Ends the waits that a drain, or a change of models, has made to wait for themselves."""
        for held in list(self.scheduler.in_flight):
            task = held.task() if held.task is not None else None
            waiter = None if task is None else self._waiters.get(task)
            if waiter is not None and not waiter.is_abandoned and self.scheduler.is_deadlocked(waiter, task):
                _fail(waiter, self._deadlock_error())
                self.release(waiter)

    def _expire(self, permit: Permit, limit: float) -> None:
        if not permit.is_abandoned:
            _fail(permit, self._timed_out(f"not admitted within {limit:g} s"))
            self.release(permit)

    def _deadlock_error(self) -> LLMTimeoutError:
        return self._timed_out("it would wait for ever, for streams of its own task")

    def _timed_out(self, what: str) -> LLMTimeoutError:
        now = self._loop.time()
        limits = self.scheduler.limits
        holders = [
            f"{permit.model or 'no model named'} for {now - permit.admitted_at:.0f} s"
            f" (unread for {now - permit.last_read:.0f} s)"
            for permit in self.scheduler.in_flight
        ]
        return LLMTimeoutError(
            f"{what}; {len(holders)} of {limits.max_concurrency} permits are held by: {', '.join(holders)}",
            phase="queue",
            hint="close streams that are no longer read, or raise Limits.max_concurrency or Limits.max_queue",
            context={"holders": holders},
        )


def _holder(task: asyncio.Task[object] | None) -> weakref.ref[asyncio.Task[object]] | None:
    return None if task is None else weakref.ref(task)


def _fail(permit: Permit, error: LLMError) -> None:
    if permit.future is not None and not permit.future.done():
        permit.future.set_exception(error)
