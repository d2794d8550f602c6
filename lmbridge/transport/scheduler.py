"""Who may generate now, and who waits: the rules, as a state machine without a loop, a clock or a lock.

Requests arrive, are admitted by `admit`, and leave; the caller says what time it is. The rules:

- At most `max_concurrency` requests are in flight. Of those that may go, the one that came first goes first.
- With `max_loaded_models` at most that many models are *active*; only requests for active models are in flight. A model
  becomes active where there is room, or in the place of one that has nothing in flight and nobody waiting.
- A request whose model is not active is *overdue* after `max_wait`. Then the model that has been active longest is
  *drained*: what comes for it now waits, what is in flight ends in peace, and its slot goes to the first that waits.
- All that wait for a model when it becomes active are its *batch*. No drain holds back a batch, and none begins before
  every batch has been admitted: so nobody waits longer than `max_wait` and one batch for each other model ahead.
- A model that has just become active is *cold*: its first request goes alone, lest the server load it several times
  over, and the others follow when that one has its first answer. If it fails, the next one goes alone.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
import weakref
from collections import Counter, OrderedDict
from typing import Final, Literal

import attrs

from lmbridge.config import Limits

logger = logging.getLogger("lmbridge.transport")


@attrs.define(eq=False)
class Permit:
    """One request's right to be in flight, from its arrival to its end."""

    model: str | None
    arrived: float
    """When it came, by the loop's clock."""
    task: weakref.ref[asyncio.Task[object]] | None = None
    """Who holds it: the task that last read the stream, or the one that asked if nobody has.

    Weak: a task's result, or its traceback, may hold the very stream whose dropping gives the permit back.
    """
    admitted_at: float = math.inf
    """When it was admitted."""
    last_read: float = math.inf
    state: Literal["new", "waiting", "in flight", "over"] = "new"
    is_first_request: bool = False
    """Whether others wait for its first answer."""
    future: asyncio.Future[None] | None = None
    """What its task waits for."""
    queue: ModelQueue | None = None
    in_batch: bool = False
    number: int = 0

    def note_read(self, now: float, task: asyncio.Task[object] | None) -> None:
        """Notes that a task is reading."""
        if self.task is None or self.task() is not task:
            self.task = None if task is None else weakref.ref(task)
        self.last_read = now

    def is_held_by(self, task: asyncio.Task[object] | None) -> bool:
        """Whether that is the task."""
        return task is not None and self.task is not None and self.task() is task

    @property
    def is_abandoned(self) -> bool:
        """Whether its wait has ended without it: it was cancelled a moment ago, or timed out."""
        return self.future is not None and self.future.done()


@attrs.define(eq=False)
class ModelQueue:
    """The requests that need the same model; all requests, where models are not limited."""

    model: str | None
    is_active: bool = False
    is_loaded: bool = False
    in_flight: int = 0
    first_request: Permit | None = None
    waiting: OrderedDict[Permit, None] = attrs.field(factory=OrderedDict)  # a queue that anyone can leave
    batch: int = 0
    """How many of those that wait were there when it became active."""
    idle_since: float = -math.inf
    is_surplus: bool = False
    """Whether it is one too many, since the limits were lowered: what is in flight ends, and nothing follows."""


class Scheduler:
    """The state machine.

    Args:
        limits: See the rules.
        swaps: Where to count how often each model became active in the place of another.
    """

    def __init__(self, limits: Limits, swaps: Counter[str | None] | None = None) -> None:
        self.limits = limits
        self.in_flight: Final[dict[Permit, None]] = {}
        self.waiting: Final[OrderedDict[Permit, None]] = OrderedDict()
        """In the order in which they came."""
        self.swaps: Final[Counter[str | None]] = Counter() if swaps is None else swaps
        self.revision = 0
        """Counts activations, drains and other limits: what may have made a wait deadlocked."""
        self._count = 0
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        """Other limits, from now on; nothing in flight is touched."""
        self.limits = limits
        self._queues: dict[str | None, ModelQueue] = {}
        self._active: dict[ModelQueue, None] = {}  # the one that has been active longest comes first
        self._draining: ModelQueue | None = None
        self._batches = 0  # members, of all batches, that still wait
        self._outside: list[tuple[int, Permit]] = []  # heap of those whose queue is not active, and of some stale ones
        self.revision += 1
        if limits.max_loaded_models is None:
            self._everything = ModelQueue(None, is_active=True, is_loaded=True)
            self._active[self._everything] = None
        for permit in self.in_flight:
            queue = self._join(permit)
            queue.in_flight += 1
            queue.is_active = True
            permit.is_first_request = permit.is_first_request and limits.max_loaded_models is not None
            if permit.is_first_request:
                queue.first_request = permit
            queue.is_loaded = queue.first_request is None
            queue.is_surplus = not (queue in self._active or self._has_room())
            self._active[queue] = None
        for permit in self.waiting:
            permit.in_batch = False
            self._enqueue(permit)

    # What happens

    def admit_now(self, permit: Permit, now: float) -> bool:
        """Admits a request that comes now, if that changes nothing else; tells whether it did."""
        if self.waiting or len(self.in_flight) >= self.limits.max_concurrency:
            return False
        queue = self._join(permit)
        if not (queue.is_active and queue.is_loaded) or queue.is_surplus:
            self._forget_if_unused(queue)
            return False
        self._give(permit, queue, now)
        return True

    def arrive(self, permit: Permit) -> None:
        """A request comes; `admit` tells when it goes."""
        self._count += 1
        permit.number, permit.state = self._count, "waiting"
        self.waiting[permit] = None
        self._enqueue(permit)

    def admit(self, now: float) -> list[Permit]:
        """Those who may go now, in order; they are in flight from here on."""
        admitted: list[Permit] = []
        while len(self.in_flight) < self.limits.max_concurrency and self.waiting:
            self._choose_drain(now)
            permit = self._next()
            if permit is None or permit.queue is None:
                break
            self._dequeue(permit, permit.queue)
            self._give(permit, permit.queue, now)
            admitted.append(permit)
        self._choose_drain(now)
        return admitted

    def leave(self, permit: Permit, now: float) -> bool:
        """A request waits no longer, or is over; tells whether it had not left before."""
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
        permit.state, permit.is_first_request, permit.queue = "over", False, None
        self._forget_if_unused(queue)
        return True

    def mark_loaded(self, permit: Permit, now: float) -> None:
        """The first answer to a request is there: its model is loaded."""
        permit.is_first_request = False
        queue = permit.queue
        if queue is not None and queue.first_request is permit:
            queue.is_loaded, queue.first_request = True, None
            logger.info("model %r is there, %.1f s after its first request went", queue.model, now - permit.admitted_at)

    def mark_unloaded(self, model: str | None) -> None:
        """The server has dropped a model, or never had it: the next request for it goes alone."""
        queue = self._queues.get(model)
        if queue is not None:
            queue.is_loaded = False

    # What is asked

    def is_deadlocked(self, permit: Permit, task: asyncio.Task[object] | None) -> bool:
        """Whether a waiting request can go only when its own task gives permits back."""
        own = [each for each in self.in_flight if each.is_held_by(task)]
        queue = permit.queue
        if not own or permit.state != "waiting" or queue is None:
            return False
        if len(own) >= self.limits.max_concurrency:
            return True
        own_queues = {each.queue for each in own}
        if queue.is_active:
            held_back = queue.is_surplus or (queue is self._draining and not permit.in_batch)
            return held_back and queue in own_queues
        limit = self.limits.max_loaded_models
        return limit is not None and len(own_queues) >= limit  # all others may become idle, but not these

    def next_overdue(self, now: float) -> float:
        """When somebody becomes overdue who is not yet, and that matters; else infinity."""
        first = self._first_outside()
        if first is None or self._draining is not None or self.limits.max_wait is None:
            return math.inf
        when = first.arrived + self.limits.max_wait
        return when if when > now else math.inf  # the drain waits for a batch, and begins when that has been admitted

    # The rules

    def _next(self) -> Permit | None:
        """Who goes next, if anyone may; its queue is active then."""
        heads = [head for queue in self._active if (head := self._head(queue)) is not None]
        inside = min(heads, key=lambda permit: permit.number, default=None)
        outside = self._first_outside()
        if outside is None or outside.queue is None or (inside is not None and inside.number < outside.number):
            return inside
        if not self._make_room_for(outside.queue):
            return inside
        self._activate(outside.queue)
        return outside

    def _head(self, queue: ModelQueue) -> Permit | None:
        """The first that waits for an active model, if it may go."""
        held_back = queue.is_surplus or (queue is self._draining and not queue.batch)
        if held_back or (not queue.is_loaded and queue.first_request is not None):
            return None
        while queue.waiting:
            permit = next(iter(queue.waiting))
            if not permit.is_abandoned:
                return permit
            self.leave(permit, -math.inf)
        return None

    def _first_outside(self) -> Permit | None:
        """The first that waits for a model that is not active."""
        while self._outside:
            permit = self._outside[0][1]
            if permit.state == "waiting" and permit.is_abandoned:
                self.leave(permit, -math.inf)
            if permit.state == "waiting" and permit.queue is not None and not permit.queue.is_active:
                return permit
            heapq.heappop(self._outside)
        return None

    def _choose_drain(self, now: float) -> None:
        first = self._first_outside()
        limit = self.limits.max_wait
        if first is None or limit is None or now < first.arrived + limit:  # to the bit what `next_overdue` says
            self._draining = None  # whoever was overdue has left
        elif self._draining is None and not self._batches and not self._has_room():
            self._draining = next(iter(self._active))
            self.revision += 1
            logger.info("model %r is drained: %r has waited %.0f s", self._draining.model, first.model, limit)

    def _give(self, permit: Permit, queue: ModelQueue, now: float) -> None:
        permit.state, permit.admitted_at, permit.last_read = "in flight", now, now
        self.in_flight[permit] = None
        queue.in_flight += 1
        if not queue.is_loaded:
            queue.first_request = permit
            permit.is_first_request = True

    # Queues

    def _join(self, permit: Permit) -> ModelQueue:
        if self.limits.max_loaded_models is None:
            queue = self._everything
        else:
            found = self._queues.get(permit.model)
            queue = found or self._queues.setdefault(permit.model, ModelQueue(permit.model))
        permit.queue = queue
        return queue

    def _enqueue(self, permit: Permit) -> None:
        queue = self._join(permit)
        queue.waiting[permit] = None
        if not queue.is_active:
            self._put_outside(permit)

    def _dequeue(self, permit: Permit, queue: ModelQueue) -> None:
        del self.waiting[permit], queue.waiting[permit]
        if permit.in_batch:
            permit.in_batch = False
            queue.batch -= 1
            self._batches -= 1

    def _has_room(self) -> bool:
        limit = self.limits.max_loaded_models
        return limit is None or len(self._active) < limit

    def _make_room_for(self, queue: ModelQueue) -> bool:
        """Sees that one more model can be active, in the place of one that nobody needs if it must be."""
        while not self._has_room():
            unneeded = [each for each in self._active if not each.in_flight and self._head(each) is None]
            if not unneeded:
                return False
            gone = min(unneeded, key=lambda each: each.idle_since)
            self._deactivate(gone)
            if self._has_room():
                self.swaps[queue.model] += 1
                logger.info("swap: %r gives way to %r, for which %d wait", gone.model, queue.model, len(queue.waiting))
        return True

    def _activate(self, queue: ModelQueue) -> None:
        queue.is_active = True
        self._active[queue] = None
        self.revision += 1
        queue.batch = len(queue.waiting)
        self._batches += queue.batch
        for permit in queue.waiting:
            permit.in_batch = True

    def _deactivate(self, queue: ModelQueue) -> None:
        if queue is self._draining:
            self._draining = None
        del self._active[queue]
        queue.is_active = queue.is_loaded = queue.is_surplus = False
        for permit in queue.waiting:
            self._put_outside(permit)
        self._forget_if_unused(queue)

    def _put_outside(self, permit: Permit) -> None:
        heapq.heappush(self._outside, (permit.number, permit))
        if len(self._outside) > 2 * len(self.waiting) + 8:  # most are stale, and one that waits long is before them
            fresh = [each for each in self.waiting if each.queue is not None and not each.queue.is_active]
            self._outside = [(each.number, each) for each in fresh]

    def _forget_if_unused(self, queue: ModelQueue) -> None:
        if not (queue.is_active or queue.in_flight or queue.waiting):
            self._queues.pop(queue.model, None)
