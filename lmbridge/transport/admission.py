"""Makes tasks wait until the scheduler admits their requests: its rules, put into an event loop.

The scheduler decides and never waits; this module waits and never decides. The alternative was one class built on
`asyncio.Condition`, where every change wakes all waiting tasks and each checks whether it is its turn. That costs a
wake-up of ten thousand tasks a change, and its rules can be tested only through an event loop. Here each waiting task
has its own future, and exactly the tasks that are admitted wake up.

All state belongs to one event loop and changes only between awaits, so no lock is needed.
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
    """Hands out permits in the order that the scheduler decides. A cancelled waiter costs nothing, and nothing polls.

    Create it in the event loop in which it is used:

        admission = Admission(Limits(max_concurrency=4, max_loaded_models=1))
        permit = admission.acquire_now("qwen3-4b") or await admission.acquire("qwen3-4b")
        try:
            ...  # send the request, and call admission.mark_loaded(permit) at the first event of its reply
        finally:
            admission.release(permit)

    Args:
        limits: How many requests, and how many models, may be in flight.
        swaps: A counter of the swaps to each model, to keep counting across several admissions. By default a new one
            is made.
    """

    def __init__(self, limits: Limits, swaps: Counter[str | None] | None = None) -> None:
        self.scheduler: Scheduler = Scheduler(limits, swaps)
        # Kept, because each call of get_running_loop() is a system call (getpid) before Python 3.12.
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[asyncio.Task[object], Permit] = {}
        # The timer for the next request that becomes overdue.
        self._overdue_timer: asyncio.TimerHandle | None = None
        # The revision of the scheduler at which deadlocks were last looked for.
        self._checked_revision = 0

    @property
    def in_flight(self) -> int:
        """The number of permits that are handed out."""
        return len(self.scheduler.in_flight)

    @property
    def queued(self) -> int:
        """The number of requests that wait for a permit."""
        return len(self.scheduler.waiting)

    def acquire_now(self, model: str | None, *, plain: bool = False) -> Permit | None:
        """Returns a permit if one is free and no other request has a claim to it; None otherwise. See `acquire`."""
        now = self._loop.time()
        permit = Permit(model, now, None if plain else _weak_reference(asyncio.current_task(self._loop)))
        return permit if self.scheduler.admit_now(permit, now) else None

    async def acquire(self, model: str | None, *, plain: bool = False) -> Permit:
        """Waits for a permit.

        Args:
            model: The model that the request asks for; None lets the server choose.
            plain: Whether the calling task keeps the permit only until its own await returns, as for a plain request.
                Such a task cannot ask for another permit meanwhile, so it is not recorded as the holder.

        Raises:
            LLMTimeoutError: With phase "queue", if `Limits.max_queue` has run out, or if the request could be admitted
                only after the calling task has returned permits that it holds itself.
        """
        loop, task = self._loop, asyncio.current_task(self._loop)
        permit = Permit(model, loop.time(), None if plain else _weak_reference(task))
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
            # The permit may have been granted in the same moment as the cancel: then it goes to the next request.
            self.release(permit)
            raise
        finally:
            permit.future = None
            if task is not None:
                self._waiters.pop(task, None)
            if timer is not None:
                timer.cancel()
        return permit

    def release(self, permit: Permit) -> None:
        """Returns a permit, or leaves the queue. Calling it again does nothing."""
        if self.scheduler.leave(permit, self._loop.time()) and self.scheduler.waiting:
            self._admit()

    def mark_loaded(self, permit: Permit) -> None:
        """Records that the first event of a reply has arrived, and admits the requests that waited for it."""
        self.scheduler.mark_loaded(permit, self._loop.time())
        self._admit()

    def mark_unloaded(self, model: str | None) -> None:
        """Records that the server does not have a model loaded. The next request for it goes alone."""
        self.scheduler.mark_unloaded(model)

    def set_limits(self, limits: Limits) -> None:
        """Replaces the limits from now on. Nothing in flight is touched, even if it exceeds the new limits."""
        self.scheduler.set_limits(limits)
        self._admit()

    def fail_waiters(self, make_error: Callable[[], LLMError]) -> None:
        """Ends every wait with an error. `make_error` is called once for each waiting request."""
        waiting = list(self.scheduler.waiting)
        # All waits fail before the first request leaves the queue, because its leaving could admit another one.
        for permit in waiting:
            _fail_wait(permit, make_error())
        for permit in waiting:
            self.release(permit)

    def _admit(self) -> None:
        now = self._loop.time()
        for permit in self.scheduler.admit(now):
            if permit.future is not None and not permit.future.done():
                permit.future.set_result(None)
        if self._checked_revision != self.scheduler.revision:
            self._checked_revision = self.scheduler.revision
            self._fail_deadlocked_waiters()
        when = self.scheduler.next_overdue(now)
        if self._overdue_timer is not None:
            # A timer that rings too early does no harm, and is cheaper than a new one.
            if self._overdue_timer.when() <= when:
                return
            self._overdue_timer.cancel()
        self._overdue_timer = None if when == math.inf else self._loop.call_at(when, self._on_overdue)

    def _on_overdue(self) -> None:
        self._overdue_timer = None
        self._admit()

    def _fail_deadlocked_waiters(self) -> None:
        """Ends the waits that a drain, a change of the active models or new limits have turned into a deadlock."""
        for held in list(self.scheduler.in_flight):
            task = held.holder() if held.holder is not None else None
            waiter = None if task is None else self._waiters.get(task)
            if waiter is not None and not waiter.is_abandoned and self.scheduler.is_deadlocked(waiter, task):
                _fail_wait(waiter, self._deadlock_error())
                self.release(waiter)

    def _expire(self, permit: Permit, limit: float) -> None:
        if not permit.is_abandoned:
            _fail_wait(permit, self._queue_error(f"not admitted within {limit:g} s"))
            self.release(permit)

    def _deadlock_error(self) -> LLMTimeoutError:
        return self._queue_error("this request would wait forever, for streams that its own task holds open")

    def _queue_error(self, reason: str) -> LLMTimeoutError:
        now = self._loop.time()
        limits = self.scheduler.limits
        holders = [
            f"{permit.model or 'no model named'} for {now - permit.admitted_at:.0f} s"
            f" (unread for {now - permit.last_read_at:.0f} s)"
            for permit in self.scheduler.in_flight
        ]
        return LLMTimeoutError(
            f"{reason}; {len(holders)} of {limits.max_concurrency} permits are held by: {', '.join(holders)}",
            phase="queue",
            hint="close streams that are no longer read, or raise Limits.max_concurrency or Limits.max_queue",
            context={"holders": holders},
        )


def _weak_reference(task: asyncio.Task[object] | None) -> weakref.ref[asyncio.Task[object]] | None:
    return None if task is None else weakref.ref(task)


def _fail_wait(permit: Permit, error: LLMError) -> None:
    if permit.future is not None and not permit.future.done():
        permit.future.set_exception(error)
