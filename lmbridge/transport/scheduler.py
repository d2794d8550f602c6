"""Admission: who may generate now, and who waits.

Everything here runs in one event loop and changes state only between awaits, so it needs no lock.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable

import attrs

from lmbridge.config import Limits
from lmbridge.errors import LLMError, LLMTimeoutError


@attrs.define(eq=False)
class Place:
    """The right to have one generation in flight."""

    model: str | None
    since: float
    """The loop's time at which it was given."""
    task: weakref.ref[asyncio.Task[object]] | None
    """Who holds it: the task that last read the stream, or the one that asked if nobody has.

    Weak: a task's result, or its traceback, may hold the very stream whose dropping gives the place back.
    """
    last_read: float

    def touch(self, now: float) -> None:
        """Notes that the running task is reading."""
        task = asyncio.current_task()
        if not self.is_held_by(task):
            self.task = None if task is None else weakref.ref(task)
        self.last_read = now

    def is_held_by(self, task: asyncio.Task[object] | None) -> bool:
        """Whether that is the task."""
        return task is not None and self.task is not None and self.task() is task


@attrs.define(eq=False)
class _Waiter:
    model: str | None
    task: asyncio.Task[object] | None
    future: asyncio.Future[Place]


class Scheduler:
    """First come, first served, `max_concurrency` at a time.

    A waiter costs O(1), a cancelled one nothing, and nothing polls.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places: set[Place] = set()
        self._waiters: dict[_Waiter, None] = {}  # a queue from which any one can leave

    @property
    def in_flight(self) -> int:
        """Places given."""
        return len(self._places)

    @property
    def queued(self) -> int:
        """Requests that wait for one."""
        return len(self._waiters)

    def acquire_now(self, model: str | None) -> Place | None:
        """A place, if one is free and nobody waits for it."""
        if self._waiters or len(self._places) >= self._limits.max_concurrency:
            return None
        return self._give(model, asyncio.current_task())

    async def acquire(self, model: str | None) -> Place:
        """Waits for a place.

        Raises:
            LLMTimeoutError: phase "queue": `max_queue` ran out, or all places are held by the task that asks.
        """
        place = self.acquire_now(model)
        if place is not None:
            return place
        task = asyncio.current_task()
        self._refuse_waiting_for_oneself(task)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(model, task, loop.create_future())
        self._waiters[waiter] = None
        limit = self._limits.max_queue
        timer = None if limit is None else loop.call_later(limit, self._expire, waiter, limit)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled() and not waiter.future.exception():
                self.release(waiter.future.result())  # given in the same moment: pass it on
            raise
        finally:
            self._waiters.pop(waiter, None)
            if timer is not None:
                timer.cancel()

    def release(self, place: Place) -> None:
        """Gives a place back; a second time does nothing."""
        if place in self._places:
            self._places.remove(place)
            self._admit()

    def fail_waiters(self, error: Callable[[], LLMError]) -> None:
        """Ends every wait with an error of its own."""
        waiters = list(self._waiters)
        self._waiters.clear()
        for waiter in waiters:
            if not waiter.future.done():
                waiter.future.set_exception(error())

    def _give(self, model: str | None, task: asyncio.Task[object] | None) -> Place:
        now = asyncio.get_running_loop().time()
        place = Place(model, now, None if task is None else weakref.ref(task), now)
        self._places.add(place)
        return place

    def _admit(self) -> None:
        while self._waiters and len(self._places) < self._limits.max_concurrency:
            waiter = next(iter(self._waiters))
            del self._waiters[waiter]
            if not waiter.future.done():
                waiter.future.set_result(self._give(waiter.model, waiter.task))

    def _expire(self, waiter: _Waiter, limit: float) -> None:
        if not waiter.future.done():
            waiter.future.set_exception(self._timed_out(f"not admitted within {limit:g} s"))

    def _refuse_waiting_for_oneself(self, task: asyncio.Task[object] | None) -> None:
        if all(place.is_held_by(task) for place in self._places):
            raise self._timed_out("it would wait for ever, for streams of its own task")

    def _timed_out(self, what: str) -> LLMTimeoutError:
        now = asyncio.get_running_loop().time()
        holders = [
            f"{place.model or 'no model named'} for {now - place.since:.0f} s"
            f" (unread for {now - place.last_read:.0f} s)"
            for place in sorted(self._places, key=lambda place: place.since)
        ]
        return LLMTimeoutError(
            f"{what}; {len(holders)} of {self._limits.max_concurrency} places are held by: {', '.join(holders)}",
            phase="queue",
            hint="close streams that are no longer read, or raise Limits.max_concurrency or Limits.max_queue",
            context={"holders": holders},
        )
