"""Decides which request may generate next, as a state machine without an event loop, a clock or a lock.

Why requests are scheduled by model, and in the client: a small server holds one or two models, and many servers kill a
running generation, or load a model several times, when requests for different models arrive side by side. A client
cannot rely on the server to prevent that, so it must not send such requests together. The alternatives were:

- *A semaphore* bounds how many requests are in flight, but not for how many models.
- *A lock per model* serializes the requests for one model, which is the opposite of what is needed: requests for the
  same model should run together, and those for different models should not. A readers-writer lock, whose readers are
  the requests for the loaded model, is closer. But it allows only one model, and one side can starve the other.
- *A priority queue* sorted by model and age keeps the number of swaps small. But new requests for the loaded model keep
  overtaking those for other models, so how long these wait depends on how the priorities are tuned.
- *Batching on the server* (llama-swap, llama.cpp's router) helps with that server only, and without a bound on waiting.

So there is a queue per model, with two rules that give a proven bound on waiting. A model that becomes active gets a
*closed batch*, which consists of the requests that wait for it at that moment. And as soon as a request for another
model has waited for `max_wait`, the model that has been active longest is *drained*: its requests in flight finish, and
it gets no new ones. No generation is ever killed, and a request waits for at most `max_wait` plus one batch for each
other model that is ahead of it.

The rules in full:

- At most `max_concurrency` requests are in flight. Among those that may go, the one with the highest *level* goes
  first. The level is the priority, plus one for each `max_wait` seconds of waiting, but not more than the highest
  priority that waits. So a patient request goes at last before urgent ones that arrive later, and the levels do not
  disturb the order of runs where all have the same priority.
- Within a level, requests of the run that is oldest go first, and those of a run in the order of their arrival. A
  request that belongs to no run counts as a run with one request. With `order="request"`, runs do not count.
- A run *begins* when its first request is admitted. While as many runs as `begun_runs` have begun, the first request of
  another run waits for its *turn*: until one of them ends, or has had no request for `RUN_PATIENCE` seconds because its
  tools take long. Begun runs of a lower priority do not count, and after `max_wait` a request needs no turn. So the
  server has fewer prompts in its cache than runs in the queue.
- With `max_loaded_models`, at most that many models are *active*, and only requests for active models are in flight. A
  model becomes active if there is room for it, or by taking the slot of a model that has nothing in flight and no
  request that may go.
- A request whose model is not active is *overdue* after `max_wait`. Then the model that has been active longest is
  drained, and its slot goes to the first of the requests that wait for an inactive model and may go.
- The requests that wait for a model when it becomes active are its *batch*. A drain never holds back a batch, and no
  drain begins before every batch has been admitted. As soon as a request is overdue, no other request for the model
  goes before the members of its batch, so that the drain can begin.
- A model that has just become active is not known to be loaded. Its first request goes alone, because a server that
  gets several may load the model several times. The others follow when the first event of the reply has arrived; if the
  first request fails, the next one goes alone.
- If the limits are lowered below the number of models in flight, no generation is killed. The models beyond the new
  limit are *surplus*: their requests in flight finish, they get no new ones, and they lose their slots when they are
  idle.

The state machine never waits and never reads a clock: the caller passes the time, and `lmbridge.transport.admission`
does the waiting. So a test can drive it through thousands of random histories, and check the bound in each of them.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sized
from typing import Final, Literal, TypeAlias

import attrs

from lmbridge._scheduled_run import ScheduledRun, next_order_number
from lmbridge.config import Limits

logger: logging.Logger = logging.getLogger("lmbridge.transport")


RUN_PATIENCE: Final = 3.0
"""The seconds for which a run that has begun keeps its turn without a request: as long as most tools take."""

Rank: TypeAlias = tuple[float, ...]
"""What waiting requests are sorted by; the lowest goes first."""


@attrs.define(eq=False)
class Permit:
    """One request in the schedule: it waits for its admission, then holds the permit to generate, then returns it."""

    model: str | None
    """The model that the request names. If it leaves the choice to the server, this is None, which is scheduled like
    one more model."""
    arrived_at: float
    """The time at which the request arrived, by the clock of the event loop."""
    holder: weakref.ref[asyncio.Task[object]] | None = None
    """The task that last read the stream, or the task that opened it if the stream has not been read yet.

    The reference is weak because a task's result, or the traceback of its exception, may hold the very stream whose
    garbage collection returns the permit.
    """
    admitted_at: float = math.inf
    """The time at which the request was admitted; infinity while it waits."""
    last_read_at: float = math.inf
    """The time at which the stream was last read, or at which the request was admitted if it never was."""
    state: Literal["new", "waiting", "in flight", "over"] = "new"
    """Where the request is: not in the schedule yet, waiting for admission, in flight, or no longer in the schedule."""
    priority: int = 0
    """How urgent the request is; a higher number goes first."""
    run: ScheduledRun | None = None
    """The place of the request's run in the order of runs, or None if the request does not belong to a run."""
    level: int = 0
    """The priority, plus one for each `max_wait` seconds of waiting."""
    is_nested: bool = False
    """Whether the task that asks for the permit holds another one, so that waiting for a turn could be a deadlock."""
    needs_turn: bool = False
    """Whether the request waits until its run may begin."""
    is_first_request: bool = False
    """Whether other requests for the same model wait for the first event of this one."""
    future: asyncio.Future[None] | None = None
    """The future that the waiting task awaits."""
    queue: ModelQueue | None = None
    """The queue of the request's model; None unless the request waits or is in flight."""
    in_batch: bool = False
    """Whether the request is waiting as a member of its model's batch."""
    rises_at: float = math.inf
    """The time at which the level of the waiting request rises next."""
    order_number: int = 0
    """The number by which requests of the same level are ordered: that of the run, or the request's own."""
    rank: Rank = (0, 0, 0)
    """The place of the waiting request among all others: its level, its order number and its arrival number."""
    arrival_number: int = 0
    """A number that increases with each request that has to wait."""

    def note_read(self, now: float, task: asyncio.Task[object] | None) -> None:
        """Records that a task is reading the stream, which makes it the holder of the permit."""
        if self.holder is None or self.holder() is not task:
            self.holder = None if task is None else weakref.ref(task)
        self.last_read_at = now

    def is_held_by(self, task: asyncio.Task[object] | None) -> bool:
        """Returns whether a task is the holder of the permit."""
        return task is not None and self.holder is not None and self.holder() is task

    @property
    def is_abandoned(self) -> bool:
        """Whether the wait was ended by a cancellation or a timeout while the request is still in the queue."""
        return self.future is not None and self.future.done()


@attrs.define(eq=False)
class ModelQueue:
    """The requests that need the same model, or all requests if models are not limited."""

    model: str | None
    """The model, or None for requests that name no model, and if the number of models is not limited."""
    is_active: bool = False
    """Whether requests for the model may be in flight."""
    is_loaded: bool = False
    """Whether the server is known to have loaded the model."""
    in_flight: int = 0
    """The number of requests for the model that are in flight."""
    first_request: Permit | None = None
    """The request that went alone because the model was not known to be loaded, until its first event arrives."""
    waiting: OrderedDict[Permit, None] = attrs.field(factory=OrderedDict)
    """The waiting requests in the order of their arrival. In an OrderedDict, any of them can be removed quickly."""
    ready: PermitHeap = attrs.field(init=False)
    """The waiting requests that need no turn; the one that goes first comes first."""
    without_turn: PermitHeap = attrs.field(init=False)
    """The waiting requests that wait for their turn."""
    ready_in_batch: PermitHeap = attrs.field(init=False)
    """The members of the batch that need no turn."""
    batch_without_turn: PermitHeap = attrs.field(init=False)
    """The members of the batch that wait for their turn."""
    idle_since: float = -math.inf
    """The time at which a request for the model last ended."""
    is_surplus: bool = False
    """Whether the model exceeds limits that were lowered while it had requests in flight."""

    def __attrs_post_init__(self) -> None:
        self.ready = self._heap_of(lambda permit: not permit.needs_turn)
        self.without_turn = self._heap_of(lambda permit: permit.needs_turn)
        self.ready_in_batch = self._heap_of(lambda permit: permit.in_batch and not permit.needs_turn)
        self.batch_without_turn = self._heap_of(lambda permit: permit.in_batch and permit.needs_turn)

    def _heap_of(self, belongs: Callable[[Permit], bool]) -> PermitHeap:
        waiting = self.waiting
        return PermitHeap(waiting, lambda permit: permit.rank if permit in waiting and belongs(permit) else None)

    def push(self, permit: Permit) -> None:
        """Adds a waiting request to the heaps that it belongs to. Call it again when its rank or its state changes."""
        (self.without_turn if permit.needs_turn else self.ready).push(permit)
        if permit.in_batch:
            (self.batch_without_turn if permit.needs_turn else self.ready_in_batch).push(permit)


class PermitHeap:
    """Waiting requests in an order that changes, sorted by a key.

    A request whose key has changed is pushed again. Entries whose key is no longer that of their request are skipped,
    and removed when they outnumber the requests that wait.

    Args:
        waiting: All requests that may have to be sorted.
        key: Returns the present key of a request, or None if the request does not belong here any more. Two requests
            never have the same key.
    """

    def __init__(self, waiting: Sized, key: Callable[[Permit], Rank | None]) -> None:
        self._waiting = waiting
        self._key = key
        self._entries: list[tuple[Rank, Permit]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, permit: Permit) -> None:
        """Adds a request, which must have a key."""
        key = self._key(permit)
        if key is not None:
            heapq.heappush(self._entries, (key, permit))
        # Stale entries stay in the heap as long as a request with a lower key waits.
        if len(self._entries) > 2 * len(self._waiting) + 8:
            fresh = {each: key for key, each in self._entries if key == self._key(each)}
            # A sorted list is a heap.
            self._entries = sorted((key, each) for each, key in fresh.items())

    def first(self) -> Permit | None:
        """Returns the request with the lowest key."""
        while self._entries:
            key, permit = self._entries[0]
            if key == self._key(permit):
                return permit
            heapq.heappop(self._entries)
        return None


def _waits_for_inactive_model(permit: Permit) -> bool:
    return permit.state == "waiting" and permit.queue is not None and not permit.queue.is_active


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
        self.revision: int = 0
        """A number that increases whenever a waiting request may have become deadlocked (see `is_deadlocked`)."""
        # The runs that have begun and keep their turn, with the priority of the request with which they began.
        self._begun: dict[ScheduledRun, int] = {}
        # Those of them that have no request, and since when. The one that has been idle longest comes first.
        self._idle_runs: dict[ScheduledRun, float] = {}
        # All runs that have begun, even if they have lost their turn.
        self._known_runs: weakref.WeakSet[ScheduledRun] = weakref.WeakSet()
        # The priorities of the waiting requests, with the number of these, and the highest of them.
        self._waiting_priorities: Counter[int] = Counter()
        self._highest_priority = 0
        # The number of requests of each run that wait or are in flight.
        self._requests_of: Counter[ScheduledRun] = Counter()
        # The number of turns that are taken, for each priority. A request outside of a run has one while it is in
        # flight.
        self._turns_taken: dict[int, int] = {}
        self._turn_count = 0
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        """Replaces the limits. Requests in flight go on, even if they exceed the new limits."""
        self.limits = limits
        self._begun_limit = limits.begun_runs
        self._queues: dict[str | None, ModelQueue] = {}
        # The model that has been active longest comes first.
        self._active: dict[ModelQueue, None] = {}
        self._draining: ModelQueue | None = None
        self._has_overdue = False
        # The number of batch members of all models that are still waiting.
        self._batch_members = 0
        # The waiting requests whose model is not active: the first of those that need no turn, the first of those that
        # do, and the first that becomes overdue.
        self._ready_inactive = PermitHeap(
            self.waiting,
            lambda permit: permit.rank if _waits_for_inactive_model(permit) and not permit.needs_turn else None,
        )
        self._without_turn_inactive = PermitHeap(
            self.waiting,
            lambda permit: permit.rank if _waits_for_inactive_model(permit) and permit.needs_turn else None,
        )
        self._next_overdue = PermitHeap(
            self.waiting,
            lambda permit: (permit.arrived_at, permit.arrival_number) if _waits_for_inactive_model(permit) else None,
        )
        # All waiting requests, by the time at which their level rises next.
        self._rising = PermitHeap(
            self.waiting, lambda permit: (permit.rises_at, permit.arrival_number) if permit.state == "waiting" else None
        )
        self.revision += 1
        if limits.max_loaded_models is None:
            self._unlimited_queue = ModelQueue(None, is_active=True, is_loaded=True)
            self._active[self._unlimited_queue] = None
        for permit in self.in_flight:
            queue = self._assign_queue(permit)
            queue.in_flight += 1
            queue.is_active = True
            permit.is_first_request = permit.is_first_request and limits.max_loaded_models is not None
            if permit.is_first_request:
                queue.first_request = permit
            queue.is_loaded = queue.first_request is None
            if queue not in self._active:
                queue.is_surplus = not self._has_room()
                self._active[queue] = None
        # The waiting requests that need a turn, for each run. Those that belong to no run have the key None.
        self._newcomers: dict[ScheduledRun | None, dict[Permit, None]] = {}
        for permit in self.waiting:
            permit.in_batch = False
            self._enqueue(permit)

    # Events

    def admit_now(self, permit: Permit, now: float) -> bool:
        """Admits a request that has just arrived, if it need not wait and its model is active and loaded.

        Returns:
            Whether the request was admitted. If it was not, pass it to `arrive`.
        """
        if self.waiting or len(self.in_flight) >= self.limits.max_concurrency:
            return False
        if not self._may_begin(permit) and self._has_to_begin(permit):
            return False
        queue = self._assign_queue(permit)
        if not (queue.is_active and queue.is_loaded) or queue.is_surplus:
            self._discard_if_unused(queue)
            return False
        if permit.run is not None:
            self._add_to_run(permit.run, permit)
        self._grant(permit, queue, now)
        return True

    def arrive(self, permit: Permit) -> None:
        """Adds a request to the queue of its model. A later call of `admit` admits it."""
        permit.arrival_number, permit.state = next_order_number(), "waiting"
        self.waiting[permit] = None
        self._waiting_priorities[permit.priority] += 1
        self._update_highest_priority()
        if permit.run is not None:
            self._add_to_run(permit.run, permit)
        self._enqueue(permit)

    def admit(self, now: float) -> list[Permit]:
        """Admits every waiting request that may go now, and returns these requests in the order of their admission."""
        admitted: list[Permit] = []
        self._raise_levels(now)
        self._take_turns_from_idle_runs(now)
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
            queue.in_flight -= 1
            queue.idle_since = now
            if queue.first_request is permit:
                queue.first_request = None
            if queue.is_surplus and not queue.in_flight:
                self._deactivate(queue)
            if permit.run is None:
                self._give_back_turn(permit.priority)
        permit.state, permit.is_first_request, permit.queue = "over", False, None
        self._discard_if_unused(queue)
        if permit.run is not None:
            self._remove_from_run(permit.run, now)
        return True

    def end_run(self, run: ScheduledRun) -> None:
        """Records that a run has ended, so that the first request of another run may be admitted."""
        self._idle_runs.pop(run, None)
        self._remove_begun(run)

    def mark_loaded(self, permit: Permit, now: float) -> None:
        """Records that the first event of a reply has arrived, which shows that the model is loaded."""
        permit.is_first_request = False
        queue = permit.queue
        if queue is not None and queue.first_request is permit:
            queue.is_loaded, queue.first_request = True, None
            seconds = now - permit.admitted_at
            logger.info("model %r is loaded: it answered %.1f s after its first request was sent", queue.model, seconds)

    def mark_unloaded(self, model: str | None) -> None:
        """Records that the server has unloaded a model, so the next request for it goes alone."""
        queue = self._queues.get(model)
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
            if not self._is_held_back(queue):
                return False
            # The model has to become idle, lose its slot, and become active again.
            if queue in own_queues:
                return True
        # All other models can become idle, but those of the task's own permits cannot.
        limit = self.limits.max_loaded_models
        return limit is not None and len(own_queues) >= limit

    def next_change(self, now: float) -> float:
        """Returns when `admit` has to be called because time has passed, or infinity if it need not be.

        A request becomes overdue, needs no turn any more, or gets the turn of a run that has been idle for long.
        """
        moments = []
        first = self._first(self._next_overdue, now)
        limit = self.limits.max_wait
        if first is not None and self._draining is None and limit is not None:
            moments.append(first.arrived_at + limit)
        if (
            self._newcomers
            and len(self.in_flight) < self.limits.max_concurrency
            and self._turn_count >= (self._begun_limit or math.inf)
        ):
            if limit is not None and (rising := self._first(self._rising, now)) is not None:
                moments.append(rising.rises_at)
            moments += [since + RUN_PATIENCE for since in list(self._idle_runs.values())[:1]]
        # If a request is overdue already, no timer is needed: the drain begins when the current batch is admitted.
        return min((when for when in moments if when > now), default=math.inf)

    # Rules

    def _next_admissible(self, now: float) -> Permit | None:
        """Makes the model of the next request active, and returns the request. Returns None if no request may go."""
        heads = [head for queue in self._active if (head := self._first_admissible(queue, now)) is not None]
        active_candidate = min(heads, key=lambda permit: permit.rank, default=None)
        inactive_candidate = self._first_of(self._ready_inactive, self._without_turn_inactive, now)
        if inactive_candidate is None or inactive_candidate.queue is None:
            return active_candidate
        if active_candidate is not None and active_candidate.rank < inactive_candidate.rank:
            return active_candidate
        if not self._make_room_for(inactive_candidate.queue, now):
            return active_candidate
        self._activate(inactive_candidate.queue)
        return inactive_candidate

    def _first_admissible(self, queue: ModelQueue, now: float) -> Permit | None:
        """Returns the first request that waits for an active model, or None if none may go now."""
        if self._is_held_back(queue) or (not queue.is_loaded and queue.first_request is not None):
            return None
        if self._has_overdue:
            # The batch has to be admitted before the drain can begin, so nothing overtakes it any longer.
            member = self._first_of(queue.ready_in_batch, queue.batch_without_turn, now)
            if member is not None:
                return member
        return self._first_of(queue.ready, queue.without_turn, now)

    def _first_of(self, ready: PermitHeap, without_turn: PermitHeap, now: float) -> Permit | None:
        """Returns the first request of two heaps that may begin."""
        first, newcomer = self._first(ready, now), self._first(without_turn, now)
        # The first newcomer has the highest priority of all newcomers. If it may not begin, none of them may.
        if newcomer is None or not self._may_begin(newcomer):
            return first
        return newcomer if first is None or newcomer.rank < first.rank else first

    def _first(self, heap: PermitHeap, now: float) -> Permit | None:
        """Returns the first request of a heap, after removing those whose wait was given up."""
        while (permit := heap.first()) is not None and permit.is_abandoned:
            self.leave(permit, now)
        return permit

    def _is_held_back(self, queue: ModelQueue) -> bool:
        """Returns whether an active model gets no new requests. Its batch has been admitted before a drain begins."""
        return queue.is_surplus or queue is self._draining

    def _update_drain(self, now: float) -> None:
        """Begins a drain if a request is overdue, and ends the current one if no request is."""
        first = self._first(self._next_overdue, now)
        limit = self.limits.max_wait
        # `next_change` computes the same sum. Another formula could differ in the last bit, and then the timer for the
        # drain would fire a moment too early.
        self._has_overdue = first is not None and limit is not None and now >= first.arrived_at + limit
        if first is None or not self._has_overdue:
            self._draining = None
        elif self._draining is None and not self._batch_members and not self._has_room():
            self._draining = next(iter(self._active))
            self.revision += 1
            logger.info(
                "draining model %r: a request for %r has waited for %.0f s",
                self._draining.model,
                first.model,
                now - first.arrived_at,
            )

    def _grant(self, permit: Permit, queue: ModelQueue, now: float) -> None:
        permit.state, permit.admitted_at, permit.last_read_at = "in flight", now, now
        self.in_flight[permit] = None
        queue.in_flight += 1
        if not queue.is_loaded:
            queue.first_request = permit
            permit.is_first_request = True
        if permit.run is None:
            self._take_turn(permit.priority)
        else:
            self._begin_run(permit.run, permit.priority)

    # Levels and turns

    def _raise_levels(self, now: float) -> None:
        """Raises the requests that have waited for another `max_wait` seconds."""
        while (permit := self._first(self._rising, now)) is not None and permit.rises_at <= now:
            self._update_level(permit, now)
            self._update_rank(permit)
            self._let_in(permit)
            self._rising.push(permit)
            self._push(permit)

    def _update_level(self, permit: Permit, now: float) -> None:
        """Computes the level of a waiting request, and when it rises next."""
        limit = self.limits.max_wait
        if not limit:
            permit.level, permit.rises_at = permit.priority, math.inf
            return
        periods = max(0, int((now - permit.arrived_at) / limit))
        # The division may be wrong in the last bit; these two sums decide.
        while permit.arrived_at + (periods + 1) * limit <= now:
            periods += 1
        while periods and permit.arrived_at + periods * limit > now:
            periods -= 1
        permit.level, permit.rises_at = permit.priority + periods, permit.arrived_at + (periods + 1) * limit

    def _update_rank(self, permit: Permit) -> None:
        # A level above the highest priority that waits would change nothing but the order of runs.
        level = min(permit.level, self._highest_priority)
        permit.rank = -level, permit.order_number, permit.arrival_number

    def _update_highest_priority(self) -> None:
        """Sorts the waiting requests anew if the highest of their priorities has changed."""
        highest = max(self._waiting_priorities, default=0)
        if highest != self._highest_priority:
            self._highest_priority = highest
            for permit in self.waiting:
                # A request that is just arriving has no queue yet.
                if permit.level > permit.priority and permit.queue is not None:
                    self._update_rank(permit)
                    self._push(permit)

    def _has_to_begin(self, permit: Permit) -> bool:
        """Returns whether a request needs a turn, because its run has not begun yet."""
        if self._begun_limit is None or permit.is_nested:
            return False
        return permit.run is None or permit.run not in self._known_runs

    def _may_begin(self, permit: Permit) -> bool:
        """Returns whether a turn is free for a request. Runs that began with a lower priority do not count."""
        limit = self._begun_limit
        if limit is None or self._turn_count < limit:
            return True
        taken = sum(count for priority, count in self._turns_taken.items() if priority >= permit.priority)
        return taken < limit

    def _add_to_run(self, run: ScheduledRun, permit: Permit) -> None:
        """Counts a new request among those of its run. A run that has lost its turn gets it back."""
        self._take_turns_from_idle_runs(permit.arrived_at)
        self._requests_of[run] += 1
        self._idle_runs.pop(run, None)
        if run in self._known_runs:
            self._add_begun(run, permit.priority)

    def _remove_from_run(self, run: ScheduledRun, now: float) -> None:
        self._requests_of[run] -= 1
        if not self._requests_of[run]:
            del self._requests_of[run]
            if run in self._begun:
                self._idle_runs[run] = now

    def _begin_run(self, run: ScheduledRun, priority: int) -> None:
        """Takes a turn for a run whose request was admitted. Its other requests do not need one any more."""
        self._known_runs.add(run)
        self._add_begun(run, priority)
        for each in list(self._newcomers.get(run, ())):
            self._let_in(each)
            self._push(each)

    def _add_begun(self, run: ScheduledRun, priority: int) -> None:
        # A task that a tool has started may go on after the end of the run.
        if run not in self._begun and not run.is_over:
            self._begun[run] = priority
            self._take_turn(priority)

    def _remove_begun(self, run: ScheduledRun) -> None:
        priority = self._begun.pop(run, None)
        if priority is not None:
            self._give_back_turn(priority)

    def _take_turn(self, priority: int) -> None:
        self._turn_count += 1
        self._turns_taken[priority] = self._turns_taken.get(priority, 0) + 1

    def _give_back_turn(self, priority: int) -> None:
        self._turn_count -= 1
        self._turns_taken[priority] -= 1
        if not self._turns_taken[priority]:
            del self._turns_taken[priority]

    def _take_turns_from_idle_runs(self, now: float) -> None:
        while self._idle_runs:
            run, idle_since = next(iter(self._idle_runs.items()))
            if now < idle_since + RUN_PATIENCE:
                break
            del self._idle_runs[run]
            self._remove_begun(run)

    def _let_in(self, permit: Permit) -> None:
        """Records that a waiting request needs no turn any more."""
        if permit.needs_turn:
            permit.needs_turn = False
            newcomers = self._newcomers[permit.run]
            del newcomers[permit]
            if not newcomers:
                del self._newcomers[permit.run]

    # Queues and slots

    def _assign_queue(self, permit: Permit) -> ModelQueue:
        if self.limits.max_loaded_models is None:
            queue = self._unlimited_queue
        else:
            found = self._queues.get(permit.model)
            queue = found or self._queues.setdefault(permit.model, ModelQueue(permit.model))
        permit.queue = queue
        return queue

    def _enqueue(self, permit: Permit) -> None:
        queue = self._assign_queue(permit)
        queue.waiting[permit] = None
        is_by_run = permit.run is not None and self.limits.order == "run"
        permit.order_number = permit.run.number if permit.run is not None and is_by_run else permit.arrival_number
        self._update_level(permit, permit.arrived_at)
        self._update_rank(permit)
        permit.needs_turn = self._has_to_begin(permit)
        if permit.needs_turn:
            self._newcomers.setdefault(permit.run, {})[permit] = None
        if permit.rises_at < math.inf:
            self._rising.push(permit)
        self._push(permit)
        if not queue.is_active:
            self._next_overdue.push(permit)

    def _push(self, permit: Permit) -> None:
        """Sorts a waiting request in where it belongs now."""
        if permit.queue is not None:
            permit.queue.push(permit)
            if not permit.queue.is_active:
                (self._without_turn_inactive if permit.needs_turn else self._ready_inactive).push(permit)

    def _dequeue(self, permit: Permit, queue: ModelQueue) -> None:
        self._let_in(permit)
        del self.waiting[permit], queue.waiting[permit]
        self._waiting_priorities[permit.priority] -= 1
        if not self._waiting_priorities[permit.priority]:
            del self._waiting_priorities[permit.priority]
            self._update_highest_priority()
        if permit.in_batch:
            permit.in_batch = False
            self._batch_members -= 1

    def _has_room(self) -> bool:
        limit = self.limits.max_loaded_models
        return limit is None or len(self._active) < limit

    def _make_room_for(self, queue: ModelQueue, now: float) -> bool:
        """Frees a slot for one more model, by taking it from the model that has been idle longest if necessary.

        Returns:
            Whether there is a slot. If there is not, nothing has changed.
        """
        limit = self.limits.max_loaded_models
        if limit is None or self._has_room():
            return True
        # If the limit was lowered, more than one model has to give way.
        excess = len(self._active) - limit + 1
        unneeded = [each for each in self._active if not each.in_flight and self._first_admissible(each, now) is None]
        if len(unneeded) < excess:
            return False
        for gone in sorted(unneeded, key=lambda each: each.idle_since)[:excess]:
            self._deactivate(gone)
            logger.info("model swap: %r gives way to %r (%d waiting)", gone.model, queue.model, len(queue.waiting))
        self.swaps[queue.model] += 1
        return True

    def _activate(self, queue: ModelQueue) -> None:
        queue.is_active = True
        self._active[queue] = None
        self.revision += 1
        self._batch_members += len(queue.waiting)
        for permit in queue.waiting:
            permit.in_batch = True
            queue.push(permit)

    def _deactivate(self, queue: ModelQueue) -> None:
        if queue is self._draining:
            self._draining = None
        del self._active[queue]
        queue.is_active = queue.is_loaded = queue.is_surplus = False
        for permit in queue.waiting:
            # Its members that wait for their turn are still there.
            self._batch_members -= permit.in_batch
            permit.in_batch = False
            self._push(permit)
            self._next_overdue.push(permit)
        self._discard_if_unused(queue)

    def _discard_if_unused(self, queue: ModelQueue) -> None:
        if not (queue.is_active or queue.in_flight or queue.waiting):
            self._queues.pop(queue.model, None)
