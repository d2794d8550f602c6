"""Decides which request may generate next, as a state machine without an event loop, a clock or a lock.

Why requests are scheduled by model, and in the client: a small server holds one or two models. When requests for
different models arrive at the same time, many servers kill a running generation, or load a model several times. A
client cannot rely on the server to prevent that, so it must not send such requests together. The alternatives were:

- *A semaphore* bounds how many requests are in flight, but not for how many models.
- *A lock per model* serializes the requests for one model, which is the opposite of what is needed: requests for the
  same model should run together, and those for different models should not. A readers-writer lock, whose readers are
  the requests for the loaded model, is closer. But it allows only one model, and one side can starve the other.
- *A priority queue* sorted by model and age keeps the number of swaps small. But new requests for the loaded model keep
  overtaking those for other models, so how long these wait depends on how the priorities are tuned.
- *Batching on the server* (llama-swap, llama.cpp's router) helps with that server only, and does not bound the wait.

So there is a queue per model, with two rules that give a proven bound on waiting. A model that becomes active gets a
*closed batch*, which consists of the requests that wait for it at that moment. And as soon as a request for another
model has waited for `max_wait`, the model that has been active longest is *drained*: its requests in flight finish, and
it gets no new ones. No generation is ever killed. Without runs and priorities, a request waits for at most `max_wait`,
plus the time that the following requests take: those in flight when `max_wait` has passed, the rest of the current
batch, one batch for each other model that becomes active before its own, and the earlier requests for its own model.
With priorities, another `max_wait` is added for each level by which another request is above it. Older runs go first
for as long as they last, so the wait for them has no bound. `test_scheduler.py` states the bound exactly and checks it.

The rules in full:

- At most `max_concurrency` requests are in flight. Among those that may go, the one with the highest *level* goes
  first. The level is the priority, plus one for each `max_wait` seconds of waiting, but not more than the highest
  priority among the waiting requests. So a request that has waited long enough goes before urgent ones that arrive
  later. If all requests have the same priority, the levels do not disturb the order of runs.
- Within a level, requests of the run that is oldest go first, and those of a run in the order of their arrival. A
  request that belongs to no run counts as a run with one request. With `order="request"`, runs do not count.
- A run *begins* when its first request is admitted. While as many begun runs count as `begun_runs` allows, the first
  request of another run waits. A begun run counts until it ends, or until it has had no request for as long as the
  server took to begin the answer to its first one. While most of the latest tool calls have taken longer than that, a
  begun run counts only while it has a request. The first request of another run also waits while the server would give
  it the slot of a begun run whose tool is running, or whose next request is on the way
  (`lmbridge.transport.begun_runs` has the reasons). Begun runs whose priority is lower than the level of the request do
  not count. While a request is overdue (see below), no request waits for runs, because the drain would have to wait for
  them, too.
- Slots are kept only for servers that forget a conversation which has lost its slot. As long as it is not known whether
  the server does, one run at a time may lose its slot, and its next reply decides (`lmbridge.transport.slot_use` has
  the reasons). While the server is known to remember conversations, no request waits for the slot of another run, and
  with `max_begun_runs="auto"` there is no limit on begun runs.
- With `max_loaded_models`, at most that many models are *active*, and only requests for active models are in flight. A
  model becomes active if there is room for it, or by taking the slot of a model that has nothing in flight and no
  request that may go. The slot of a model is its place among the active models. It has nothing to do with the slots of
  the server in the two rules above, each of which holds a conversation.
- A request whose model is not active is *overdue* after `max_wait`. Then the model that has been active longest is
  drained, and its slot goes to the first of the requests that wait for an inactive model and may go.
- The requests that wait for a model when it becomes active are its *batch*. A drain never holds back a batch, and no
  drain begins before every batch has been admitted. As soon as a request is overdue, no other request for the model
  goes before the members of its batch, so that the drain can begin.
- A model that has just become active is not known to be loaded. Its first request is sent alone, because a server that
  gets several may load the model several times. The others follow when the first event of the reply has arrived; if the
  first request fails, the next one is sent alone.
- If the limits are lowered below the number of models in flight, no generation is killed. The models beyond the new
  limit are *surplus*: their requests in flight finish, they get no new ones, and they lose their slots when they are
  idle.

The state is kept by `BegunRuns`, `SlotUse`, `Levels`, and `ActiveModels` with a `ModelQueue` for each model; the rules
are here. The state machine never waits and never reads a clock: the caller passes the time, and
`lmbridge.transport.admission` does the waiting. So a test can drive it through thousands of random histories, and check
the bound in each of them.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, OrderedDict, deque
from typing import Final

from lmbridge._scheduled_run import ScheduledRun, next_order_number
from lmbridge.config import Limits
from lmbridge.transport.begun_runs import BegunRuns
from lmbridge.transport.levels import Levels
from lmbridge.transport.model_queue import ActiveModels, ModelQueue
from lmbridge.transport.permits import Permit, PermitHeap
from lmbridge.transport.schedule_view import ScheduledModelState, Swap
from lmbridge.transport.slot_use import SlotUse

logger: logging.Logger = logging.getLogger("lmbridge.transport")

_RECENT_SWAPS: Final = 200
"""The number of swaps that a scheduler remembers."""


class Scheduler:
    """A state machine that implements the rules in the docstring of the module.

    A request that arrives is passed to `admit_now` and, if it cannot be admitted at once, to `arrive`. `admit` admits
    waiting requests, and `leave` removes a request from the schedule.

    Args:
        limits: How many requests and models may be in flight, and after how many seconds a request is overdue.
        swaps: A counter to which the swaps to each model are added. Pass one to go on counting when the scheduler is
            replaced. By default a new counter is created.
    """

    def __init__(self, limits: Limits, swaps: Counter[str | None] | None = None) -> None:
        self.limits: Limits = limits
        """The limits that are in force."""
        self.in_flight: Final[dict[Permit, None]] = {}
        """The permits in flight, in the order of their admission."""
        self.waiting: Final[OrderedDict[Permit, None]] = OrderedDict()
        """All waiting requests, in the order of their arrival."""
        self.swaps: Final[Counter[str | None]] = Counter() if swaps is None else swaps
        """How often each model became active in place of another one."""
        self.recent_swaps: Final[deque[Swap]] = deque(maxlen=_RECENT_SWAPS)
        """The latest swaps, in order."""
        self.revision: int = 0
        """A number that increases whenever a waiting request may have become deadlocked (see `is_deadlocked`)."""
        self._runs = BegunRuns(limits.begun_runs)
        self._levels = Levels(limits.max_wait)
        self._slots: SlotUse | None = None
        # What was known about the server (`SlotUse.remembers`) when the limits were replaced.
        self._remembers: bool | None = None
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        """Replaces the limits. Requests in flight go on, even if they exceed the new limits."""
        was_limited = self.limits.max_loaded_models is not None
        self.limits = limits
        self._runs.limit = limits.begun_runs
        if self._slots is not None:
            self._remembers = self._slots.remembers
        # It is None until a run has begun. Programs without runs do not pay for it.
        self._slots = None
        self._levels.max_wait = limits.max_wait
        self._models = ActiveModels(limits.max_loaded_models, self.waiting)
        self._has_overdue = False
        # All waiting requests, by the time at which their level rises next.
        self._rising = PermitHeap(
            self.waiting, lambda permit: (permit.rises_at, permit.arrival_number) if permit.state == "waiting" else None
        )
        self.revision += 1
        if not was_limited:
            self._find_first_requests()
        for permit in self.in_flight:
            self._models.take_over(permit)
        # For each run, the requests that wait until it may begin. Those that belong to no run have the key None.
        self._newcomers: dict[ScheduledRun | None, dict[Permit, None]] = {}
        for permit in self.waiting:
            permit.in_batch = False
            self._enqueue(permit)

    @property
    def active_models(self) -> frozenset[str | None]:
        """The models for which requests may be in flight. The value has a meaning only if their number is limited."""
        return frozenset(queue.model for queue in self._models.active)

    def _find_first_requests(self) -> None:
        """Finds, for each model that has not answered yet, the request whose answer will show that it is loaded.

        As long as the number of models was not limited, this was not recorded.
        """
        known = {permit.model for permit in self.in_flight if permit.has_answered}
        for permit in self.in_flight:
            permit.is_first_request = permit.model not in known
            known.add(permit.model)

    # Events

    def admit_now(self, permit: Permit, now: float) -> bool:
        """Admits a request that has just arrived, if it need not wait and its model is active and loaded.

        Returns:
            Whether the request was admitted. If it was not, pass it to `arrive`.
        """
        if self.waiting or len(self.in_flight) >= self.limits.max_concurrency:
            return False
        if self._is_newcomer(permit) and not self._may_begin(permit.priority, now):
            return False
        permit.queue = queue = self._models.queue_for(permit.model)
        if not (queue.is_active and queue.is_loaded) or queue.is_surplus:
            self._models.discard_if_unused(queue)
            return False
        if permit.run is not None:
            self._runs.add_request(permit.run, permit.priority, permit.arrived_at)
        self._grant(permit, queue, now)
        return True

    def arrive(self, permit: Permit) -> None:
        """Adds a request to the queue of its model. A later call of `admit` admits it."""
        permit.arrival_number, permit.state = next_order_number(), "waiting"
        self.waiting[permit] = None
        if self._levels.add(permit):
            self._sort_by_new_highest_priority()
        if permit.run is not None:
            self._runs.add_request(permit.run, permit.priority, permit.arrived_at)
        self._enqueue(permit)

    def admit(self, now: float) -> list[Permit]:
        """Admits every waiting request that may go now, and returns these requests in the order of their admission."""
        admitted: list[Permit] = []
        self._raise_levels(now)
        self._runs.drop_idle(now)
        while len(self.in_flight) < self.limits.max_concurrency and self.waiting:
            self._update_drain(now)
            permit = self._next_admissible(now)
            if permit is None or permit.queue is None:
                break
            self._dequeue(permit, permit.queue)
            self._grant(permit, permit.queue, now)
            admitted.append(permit)
        self._update_drain(now)
        return admitted

    def leave(self, permit: Permit, now: float) -> bool:
        """Removes a request that has ended or no longer waits.

        Returns:
            Whether the request was removed. It is False if the request has left before.
        """
        queue = permit.queue
        if queue is None or permit not in (self.waiting if permit.state == "waiting" else self.in_flight):
            return False
        if permit.state == "waiting":
            self._dequeue(permit, queue)
        else:
            del self.in_flight[permit]
            if self._slots is not None:
                self._slots.end(permit)
            queue.in_flight -= 1
            queue.idle_since = now
            if queue.first_request is permit:
                queue.first_request = None
            if queue.is_surplus and not queue.in_flight:
                self._models.deactivate(queue)
            if permit.run is None:
                self._runs.remove_single(permit.priority)
        permit.state, permit.is_first_request, permit.queue = "over", False, None
        self._models.discard_if_unused(queue)
        if permit.run is not None:
            self._runs.remove_request(permit.run, now)
        return True

    def end_run(self, run: ScheduledRun) -> None:
        """Records that a run has ended, so that the first request of another run may be admitted."""
        self._runs.end(run)
        if self._slots is not None:
            self._slots.forget_run(run)

    def pause_run(self, run: ScheduledRun) -> None:
        """Records that a run waits for something other than its tools, so that another run may begin in its place."""
        self._runs.pause(run)

    def mark_loaded(self, permit: Permit, now: float) -> None:
        """Records that the first event of a reply has arrived, which shows that the model is loaded."""
        permit.is_first_request = False
        if self._slots is not None and permit in self.in_flight:
            self._slots.answer(permit)
        if permit.run is not None:
            self._runs.answer(permit.run)
            if permit.begins_run:
                permit.begins_run = False
                self._runs.set_patience(permit.run, now - permit.admitted_at)
        queue = permit.queue
        if queue is not None and queue.first_request is permit:
            queue.is_loaded, queue.first_request = True, None
            seconds = now - permit.admitted_at
            logger.info("model %r is loaded: it answered %.1f s after its first request was sent", queue.model, seconds)

    def note_reply(self, permit: Permit, usage: tuple[int, int | None] | None, *, is_first_attempt: bool) -> None:
        """Records how much of a prompt came from a cache of the server. It has to be called before `leave`.

        Args:
            permit: The permit of the request, which has had its whole reply.
            usage: Two numbers: how many tokens the prompt has, and how many of them came from a cache (None if the
                server does not report that). None in place of both if the reply has no token usage.
            is_first_attempt: Whether the request was sent only once.
        """
        if self._slots is None:
            return
        before = self._slots.remembers
        self._slots.note_reply(permit, usage, is_first_attempt=is_first_attempt)
        if self._slots.remembers != before:
            logger.info(
                "the conversation of a run had lost its slot, and the server %s: slots are %s while tools are running",
                "still had it in a cache" if self._slots.remembers else "did not report that it had it in a cache",
                "not kept" if self._slots.remembers else "kept",
            )

    def mark_unloaded(self, model: str | None) -> None:
        """Records that the server has unloaded a model, so that the next request for it is sent alone."""
        queue = self._models.queues.get(model)
        if queue is not None:
            queue.is_loaded = False

    # Queries

    def is_deadlocked(self, permit: Permit, task: asyncio.Task[object] | None) -> bool:
        """Returns whether a waiting request can be admitted only after its own task has returned a permit."""
        own = [each for each in self.in_flight if each.is_held_by(task)]
        queue = permit.queue
        if not own or permit.state != "waiting" or queue is None:
            return False
        if len(own) >= self.limits.max_concurrency:
            return True
        own_queues = {each.queue for each in own}
        if queue.is_active:
            if not self._models.is_held_back(queue):
                return False
            # The model has to become idle, lose its slot, and become active again.
            if queue in own_queues:
                return True
        # All other models can become idle, but those of the task's own permits cannot.
        limit = self.limits.max_loaded_models
        return limit is not None and len(own_queues) >= limit

    def waits_for_runs(self, permit: Permit, now: float) -> bool:
        """Returns whether a permit is free for a waiting request, but its run may not begin yet."""
        if not permit.is_newcomer or len(self.in_flight) >= self.limits.max_concurrency:
            return False
        return not self._newcomer_may_go(permit, now)

    def next_change(self, now: float) -> float:
        """Returns when `admit` has to be called because time has passed, or infinity if it need not be.

        At that time, a request becomes overdue, or rises to a level at which fewer runs hold it back, or a run stops
        counting, or a slot is no longer kept.
        """
        moments = []
        first = self._first(self._models.next_overdue, now)
        limit = self.limits.max_wait
        if first is not None and self._models.draining is None and limit is not None:
            moments.append(first.arrived_at + limit)
        if (
            self._newcomers
            and len(self.in_flight) < self.limits.max_concurrency
            and not self._may_begin(-math.inf, now)
        ):
            if limit is not None and (rising := self._first(self._rising, now)) is not None:
                moments.append(rising.rises_at)
            moments += [self._runs.next_drop(), self._slot_kept_until(-math.inf)]
        # If a request is overdue already, no timer is needed: the drain begins when the current batch is admitted.
        return min((when for when in moments if when > now), default=math.inf)

    # The order of requests

    def _next_admissible(self, now: float) -> Permit | None:
        """Makes the model of the next request active, and returns the request. Returns None if no request may go."""
        heads = [head for queue in self._models.active if (head := self._first_admissible(queue, now)) is not None]
        active_candidate = min(heads, key=lambda permit: permit.rank, default=None)
        inactive_candidate = self._first_of(self._models.ready, self._models.newcomers, now)
        if inactive_candidate is None or inactive_candidate.queue is None:
            return active_candidate
        if active_candidate is not None and active_candidate.rank < inactive_candidate.rank:
            return active_candidate
        if not self._make_room_for(inactive_candidate.queue, now):
            return active_candidate
        self._models.activate(inactive_candidate.queue)
        self.revision += 1
        return inactive_candidate

    def _first_admissible(self, queue: ModelQueue, now: float) -> Permit | None:
        """Returns the first request that waits for an active model, or None if none may go now."""
        if self._models.is_held_back(queue) or (not queue.is_loaded and queue.first_request is not None):
            return None
        if self._has_overdue:
            # The batch has to be admitted before the drain can begin, so from now on nothing overtakes it.
            member = self._first_of(queue.ready_in_batch, queue.newcomers_in_batch, now)
            if member is not None:
                return member
        return self._first_of(queue.ready, queue.newcomers, now)

    def _first_of(self, ready: PermitHeap, newcomers: PermitHeap, now: float) -> Permit | None:
        """Returns the first request of two heaps that may go."""
        first, newcomer = self._first(ready, now), self._first(newcomers, now)
        # The first newcomer has the highest level of all newcomers. If its run may not begin, no other may.
        if newcomer is None or not self._newcomer_may_go(newcomer, now):
            return first
        return newcomer if first is None or newcomer.rank < first.rank else first

    def _first(self, heap: PermitHeap, now: float) -> Permit | None:
        """Returns the first request of a heap, after removing those whose wait was given up."""
        while (permit := heap.first()) is not None and permit.is_abandoned:
            self.leave(permit, now)
        return permit

    def _raise_levels(self, now: float) -> None:
        """Raises the level of the requests that have waited for another `max_wait` seconds."""
        while (permit := self._first(self._rising, now)) is not None and permit.rises_at <= now:
            self._levels.update(permit, now)
            self._rising.push(permit)
            self._models.push(permit)

    def _sort_by_new_highest_priority(self) -> None:
        for permit in self.waiting:
            # A request that is just arriving has no queue yet.
            if permit.level > permit.priority and permit.queue is not None:
                self._levels.update_rank(permit)
                self._models.push(permit)

    # Admission

    def _is_newcomer(self, permit: Permit) -> bool:
        """Returns whether a request has to wait until its run may begin."""
        if self._runs.limit is None or permit.is_nested:
            return False
        return not self._runs.has_begun(permit.run)

    def _newcomer_may_go(self, permit: Permit, now: float) -> bool:
        """Returns whether a waiting request that begins a run, or belongs to no run, need not wait for other runs."""
        return self._has_overdue or self._may_begin(self._levels.capped_level(permit), now)

    def _may_begin(self, level: float, now: float) -> bool:
        """Returns whether a request of this level may be the first one of a run, or one that belongs to no run."""
        remembers = self._remembers if self._slots is None else self._slots.remembers
        if remembers and self.limits.max_begun_runs == "auto":
            return True
        return self._runs.have_room(level) and now >= self._slot_kept_until(level)

    def _slot_kept_until(self, level: float) -> float:
        """Returns the time until which a slot is kept from requests of this level, or minus infinity if it is not kept.

        It is the slot that the server would give to a new conversation.
        """
        if self._slots is None or not self._slots.is_worth_keeping:
            return -math.inf
        return self._runs.keeps_slot_until(self._slots.next_displaced(), level)

    def _stop_waiting_for_runs(self, permit: Permit) -> None:
        """Records that a waiting request need not wait any longer until its run may begin."""
        if permit.is_newcomer:
            permit.is_newcomer = False
            newcomers = self._newcomers[permit.run]
            del newcomers[permit]
            if not newcomers:
                del self._newcomers[permit.run]

    def _grant(self, permit: Permit, queue: ModelQueue, now: float) -> None:
        permit.state, permit.admitted_at, permit.last_read_at = "in flight", now, now
        self.in_flight[permit] = None
        queue.in_flight += 1
        if not queue.is_loaded:
            queue.first_request = permit
            permit.is_first_request = True
        if self._slots is not None:
            self._slots.begin(permit)
        elif permit.run is not None:
            self._slots = SlotUse(self.limits.max_concurrency, remembers=self._remembers)
            for each in self.in_flight:
                self._slots.begin(each)
        if permit.run is None:
            self._runs.add_single(permit.priority)
            return
        permit.begins_run = self._runs.begin(permit.run, permit.priority, now)
        # The other requests of the run need not wait any longer.
        for each in list(self._newcomers.get(permit.run, ())):
            self._stop_waiting_for_runs(each)
            self._models.push(each)

    def _enqueue(self, permit: Permit) -> None:
        permit.queue = queue = self._models.queue_for(permit.model)
        queue.waiting[permit] = None
        is_by_run = self.limits.order == "run"
        permit.order_number = permit.run.number if permit.run is not None and is_by_run else permit.arrival_number
        self._levels.update(permit, permit.arrived_at)
        permit.is_newcomer = self._is_newcomer(permit)
        if permit.is_newcomer:
            self._newcomers.setdefault(permit.run, {})[permit] = None
        if permit.rises_at < math.inf:
            self._rising.push(permit)
        self._models.push(permit)
        if not queue.is_active:
            self._models.next_overdue.push(permit)

    def _dequeue(self, permit: Permit, queue: ModelQueue) -> None:
        self._stop_waiting_for_runs(permit)
        del self.waiting[permit]
        if self._levels.remove(permit):
            self._sort_by_new_highest_priority()
        self._models.remove_waiting(permit, queue)

    def model_states(self) -> dict[str | None, ScheduledModelState] | None:
        """Returns the state of each model that is active, or None if the number of models is not limited."""
        if self._models.limit is None:
            return None
        return {
            queue.model: "draining"
            if self._models.is_held_back(queue)
            else "loading"
            if not queue.is_loaded
            else "loaded"
            for queue in self._models.active
        }

    # Drains and swaps

    def _update_drain(self, now: float) -> None:
        """Begins a drain if a request is overdue, and ends the current one if no request is."""
        models = self._models
        first = self._first(models.next_overdue, now)
        limit = self.limits.max_wait
        # `next_change` computes the same sum. Another formula could differ in the last bit, and then the timer for the
        # drain would fire a moment too early.
        self._has_overdue = first is not None and limit is not None and now >= first.arrived_at + limit
        if first is None or not self._has_overdue:
            models.draining = None
        elif models.draining is None and not models.batch_members and not models.has_room():
            models.draining = next(iter(models.active))
            self.revision += 1
            logger.info(
                "draining model %r: a request for %r has waited for %.0f s",
                models.draining.model,
                first.model,
                now - first.arrived_at,
            )

    def _make_room_for(self, queue: ModelQueue, now: float) -> bool:
        """Frees a slot for one more model, by taking it from the model that has been idle longest if necessary.

        Returns:
            Whether there is a slot. If there is not, nothing has changed.
        """
        models, limit = self._models, self.limits.max_loaded_models
        if limit is None or models.has_room():
            return True
        # If the limit was lowered, more than one model has to give way.
        excess = len(models.active) - limit + 1
        unneeded = [each for each in models.active if not each.in_flight and self._first_admissible(each, now) is None]
        if len(unneeded) < excess:
            return False
        for gone in sorted(unneeded, key=lambda each: each.idle_since)[:excess]:
            models.deactivate(gone)
            self.recent_swaps.append(Swap(at=now, before=gone.model, after=queue.model))
            logger.info("model swap: %r gives way to %r (%d waiting)", gone.model, queue.model, len(queue.waiting))
        self.swaps[queue.model] += 1
        return True
