"""Makes tasks wait until the scheduler admits their requests.

The scheduler decides and never waits; this module waits and never decides. The alternative was a single class built on
`asyncio.Condition`, where every change wakes all waiting tasks, and each of them checks whether it is its turn. With
ten thousand waiting tasks, that is ten thousand wake-ups for every change, and the rules could be tested only in an
event loop. Here each waiting task has its own future, and only the tasks that are admitted wake up.

Only generations are admitted. Health checks and lists of models are sent at once (`Request.queued` is False).

All state belongs to one event loop, and no method awaits while it changes the state, so no lock is needed.
"""

from __future__ import annotations

import asyncio
import math
import weakref
from collections import Counter
from collections.abc import Callable

from lmbridge._scheduled_run import ScheduledRun, current_run
from lmbridge.config import Limits
from lmbridge.errors import LLMError, LLMTimeoutError
from lmbridge.transport.evictions import Evictions
from lmbridge.transport.permits import Permit
from lmbridge.transport.schedule_view import Swap
from lmbridge.transport.scheduler import Scheduler


class Admission:
    """Hands out permits in the order that the scheduler decides.

    Create it in the event loop in which it is used::

        admission = Admission(Limits(max_concurrency=4, max_loaded_models=1))
        permit = admission.acquire_now("qwen3-4b") or await admission.acquire("qwen3-4b")
        try:
            ...  # send the request, and call admission.mark_loaded(permit) at the first event of its reply
        finally:
            admission.release(permit)

    Args:
        limits: How many requests and models may be in flight at the same time.
        swaps: A counter to which the swaps to each model are added. Pass the same one to several admissions to count
            their swaps together. By default a new counter is created.
        evictions: What is known about generations that the server has killed. Several admissions can share it as well.
    """

    def __init__(
        self, limits: Limits, swaps: Counter[str | None] | None = None, evictions: Evictions | None = None
    ) -> None:
        self._evictions = Evictions() if evictions is None else evictions
        self.scheduler: Scheduler = Scheduler(self._evictions.lowered(limits), swaps)
        """The scheduler that decides which requests are admitted."""
        # Before Python 3.12, each call of get_running_loop() makes a system call (getpid).
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[asyncio.Task[object], Permit] = {}
        # The timer for the next moment at which a request may be admitted because time has passed.
        self._timer: asyncio.TimerHandle | None = None
        self._runs: weakref.WeakSet[ScheduledRun] = weakref.WeakSet()
        # The revision of the scheduler at the time of the last search for deadlocks.
        self._checked_revision = 0

    @property
    def in_flight(self) -> int:
        """The number of requests that hold a permit."""
        return len(self.scheduler.in_flight)

    @property
    def queued(self) -> int:
        """The number of requests that are waiting for a permit."""
        return len(self.scheduler.waiting)

    def acquire_now(self, model: str | None, *, plain: bool = False, priority: int = 0) -> Permit | None:
        """Returns a permit if a quick check shows that the request need not wait. If it returns None, use `acquire`."""
        permit = self._new_permit(model, plain=plain, priority=priority)
        return permit if self.scheduler.admit_now(permit, permit.arrived_at) else None

    async def acquire(self, model: str | None, *, plain: bool = False, priority: int = 0) -> Permit:
        """Waits for a permit.

        Args:
            model: The model that the request names, or None if it leaves the choice to the server.
            plain: Whether the request is not streamed. The calling task then awaits the whole reply, and cannot ask for
                another permit before it returns this one. So the task is not recorded as the holder of the permit. The
                holder is only needed to find deadlocks.
            priority: How urgent the request is; a higher number goes first. The priority of an agent's run takes
                precedence.

        Raises:
            LLMTimeoutError: With phase "queue", if `Limits.max_queue` has run out, or if the request could be admitted
                only after the calling task has returned permits that it holds itself.
            LLMError: The wait was ended by `fail_waiters`; it is the error that `make_error` returned.
        """
        loop, task = self._loop, asyncio.current_task(self._loop)
        permit = self._new_permit(model, plain=plain, priority=priority)
        permit.is_nested = any(each.is_held_by(task) for each in self.scheduler.in_flight)
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
            # The request may have been admitted at the same moment as the task was cancelled. Then its permit is
            # returned.
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
        """Takes a permit back, or removes its request from the queue. Calling it again does nothing."""
        if self.scheduler.leave(permit, self._loop.time()) and self.scheduler.waiting:
            self._admit()

    def mark_loaded(self, permit: Permit) -> None:
        """Records that the first event of a reply has arrived, and admits the requests that waited for that event."""
        self.scheduler.mark_loaded(permit, self._loop.time())
        if self.scheduler.waiting:
            self._admit()

    def note_reply(self, permit: Permit, usage: tuple[int, int | None] | None, *, is_first_attempt: bool) -> None:
        """Records how much of a prompt came from a cache of the server, as `Scheduler.note_reply` describes.

        Call it before `release`, because it may allow `release` to admit more requests.
        """
        self.scheduler.note_reply(permit, usage, is_first_attempt=is_first_attempt)

    def mark_unloaded(self, model: str | None) -> None:
        """Records that the server has unloaded a model, so that the next request for it is sent alone."""
        self.scheduler.mark_unloaded(model)

    def set_limits(self, limits: Limits) -> None:
        """Replaces the limits. Requests in flight go on, even if they exceed the new limits."""
        self.scheduler.set_limits(self._evictions.lowered(limits))
        self._admit()

    def note_eviction(self, permit: Permit, *, is_certain: bool) -> None:
        """Records that the server has killed a generation to load another model, and schedules by model from now on.

        Args:
            permit: The permit of the generation, even if it was returned already.
            is_certain: Whether the server has reported it. Otherwise the call has an effect only if other models are in
                use.
        """
        others = [each for each in self.scheduler.in_flight if each.model != permit.model]
        if not is_certain and not others:
            return
        # A model that has not answered yet may be the one that is being loaded.
        loaded = len({each.model for each in others if each.has_answered}) + 1
        limits = self.scheduler.limits
        if self._evictions.add(permit.model, loaded, limits):
            self.set_limits(limits)

    def swaps_for(self, permit: Permit) -> list[Swap]:
        """Returns the swaps that were made to admit a request, which has just been admitted."""
        if not permit.is_first_request:
            return []
        recent = self.scheduler.recent_swaps
        return [each for each in recent if each.after == permit.model and each.at == permit.admitted_at]

    def fail_waiters(self, make_error: Callable[[], LLMError]) -> None:
        """Ends every wait with an error. `make_error` is called once for each waiting request."""
        waiting = list(self.scheduler.waiting)
        # All waits fail before any request leaves the queue, because a request that leaves may admit another one.
        for permit in waiting:
            _fail_wait(permit, make_error())
        for permit in waiting:
            self.release(permit)

    def _new_permit(self, model: str | None, *, plain: bool, priority: int) -> Permit:
        task = None if plain else asyncio.current_task(self._loop)
        run = self._current_run()
        if run is not None and run.priority is not None:
            priority = run.priority
        return Permit(model, self._loop.time(), None if task is None else weakref.ref(task), priority, run)

    def _current_run(self) -> ScheduledRun | None:
        """Returns the run to which the current task belongs, and makes sure that its end is noticed."""
        run = current_run.get()
        # A task that a tool has started may go on after the end of the run.
        if run is None or run.is_over or run.loop not in {None, self._loop}:
            return None
        if run not in self._runs:
            self._runs.add(run)
            run.add_callbacks(on_end=self._on_run_end, on_pause=self._on_run_pause)
        return run

    def _on_run_end(self, run: ScheduledRun) -> None:
        self.scheduler.end_run(run)
        if self.scheduler.waiting:
            self._admit()

    def _on_run_pause(self, run: ScheduledRun) -> None:
        self.scheduler.pause_run(run)
        if self.scheduler.waiting:
            self._admit()

    def _admit(self) -> None:
        now = self._loop.time()
        for permit in self.scheduler.admit(now):
            if permit.future is not None and not permit.future.done():
                permit.future.set_result(None)
        if self._checked_revision != self.scheduler.revision:
            self._checked_revision = self.scheduler.revision
            self._fail_deadlocked_waiters()
        when = self.scheduler.next_change(now)
        if self._timer is not None:
            # A timer that fires too early does no harm, and is cheaper than a new one.
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = None if when == math.inf else self._loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._admit()

    def _fail_deadlocked_waiters(self) -> None:
        """Ends the waits that have become deadlocks because of a drain, a newly active model or new limits."""
        for held in list(self.scheduler.in_flight):
            task = held.holder() if held.holder is not None else None
            waiter = None if task is None else self._waiters.get(task)
            if waiter is not None and not waiter.is_abandoned and self.scheduler.is_deadlocked(waiter, task):
                _fail_wait(waiter, self._deadlock_error())
                self.release(waiter)

    def _expire(self, permit: Permit, limit: float) -> None:
        if not permit.is_abandoned:
            reason = f"the request was not admitted within {limit:g} s"
            hint = "close streams that are no longer read, or raise Limits.max_concurrency or Limits.max_queue"
            if self.scheduler.waits_for_runs(permit, self._loop.time()):
                reason += " because its run may only begin when another one has ended or no longer counts"
                hint = "raise Limits.max_begun_runs or set it to None, or raise Limits.max_queue"
            _fail_wait(permit, self._queue_error(reason, hint))
            self.release(permit)

    def _deadlock_error(self) -> LLMTimeoutError:
        return self._queue_error(
            "the request would wait forever for streams that its own task holds open",
            "close streams that are no longer read, or raise Limits.max_concurrency",
        )

    def _queue_error(self, reason: str, hint: str) -> LLMTimeoutError:
        now = self._loop.time()
        holders = [
            f"{permit.model or 'unnamed model'} for {now - permit.admitted_at:.0f} s"
            f" (unread for {now - permit.last_read_at:.0f} s)"
            for permit in self.scheduler.in_flight
        ]
        held = f"{len(holders)} of {self.scheduler.limits.max_concurrency} permits are held"
        return LLMTimeoutError(
            f"{reason}; {held} by: {', '.join(holders)}" if holders else f"{reason}; {held}",
            phase="queue",
            hint=hint,
            context={"holders": holders},
        )


def _fail_wait(permit: Permit, error: LLMError) -> None:
    if permit.future is not None and not permit.future.done():
        permit.future.set_exception(error)
