"""Who may generate now, and who waits: the rules, as a state machine without a loop, a clock or a lock.

Requests arrive, are admitted by `admit`, and leave; the caller says what time it is. The rules:

- At most `max_concurrency` requests are in flight. Of those that may go, the one that came first goes first.
- With `max_loaded_models` at most that many models are *active*; only requests for active models are in flight. A model
  becomes active where there is room, or in the place of one that has nothing in flight and nobody waiting.
- A request whose model is not active is *overdue* after `max_wait`. Then the model that has been active longest is
  *drained*: what comes for it now waits, what is in flight ends in peace, and its place goes to the first that waits.
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
class Place:
    """One request's right to be in flight, from its arrival to its end."""

    model: str | None
    arrived: float
    """When it came, by the loop's clock."""
    task: weakref.ref[asyncio.Task[object]] | None = None
    """Who holds it: the task that last read the stream, or the one that asked if nobody has.

    Weak: a task's result, or its traceback, may hold the very stream whose dropping gives the place back.
    """
    since: float = math.inf
    """When it was admitted."""
    last_read: float = math.inf
    state: Literal["new", "waiting", "in flight", "over"] = "new"
    is_loader: bool = False
    """Whether others wait for its first answer."""
    future: asyncio.Future[None] | None = None
    """What its task waits for."""
    group: Group | None = None
    in_batch: bool = False
    number: int = 0

    def touch(self, now: float, task: asyncio.Task[object] | None) -> None:
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
class Group:
    """The requests that need the same model; all requests, where models are not limited."""

    model: str | None
    is_active: bool = False
    is_warm: bool = False
    in_flight: int = 0
    loader: Place | None = None
    waiting: OrderedDict[Place, None] = attrs.field(factory=OrderedDict)  # a queue that anyone can leave
    batch: int = 0
    """How many of those that wait were there when it became active."""
    idle_since: float = -math.inf
    is_leaving: bool = False
    """Whether it is one too many, since the limits were lowered: what is in flight ends, and nothing follows."""


class Scheduler:
    """The state machine.

    Args:
        limits: See the rules.
        swaps: Where to count how often each model became active in the place of another.
    """

    def __init__(self, limits: Limits, swaps: Counter[str | None] | None = None) -> None:
        self.limits = limits
        self.in_flight: Final[dict[Place, None]] = {}
        self.waiting: Final[OrderedDict[Place, None]] = OrderedDict()
        """In the order in which they came."""
        self.swaps: Final[Counter[str | None]] = Counter() if swaps is None else swaps
        self.turns = 0
        """Counts activations, drains and other limits: what may have made a wait hopeless."""
        self._count = 0
        self.limit(limits)

    def limit(self, limits: Limits) -> None:
        """Other limits, from now on; nothing in flight is touched."""
        self.limits = limits
        self._groups: dict[str | None, Group] = {}
        self._active: dict[Group, None] = {}  # the one that has been active longest comes first
        self._draining: Group | None = None
        self._batches = 0  # members, of all batches, that still wait
        self._outside: list[tuple[int, Place]] = []  # heap of those whose group is not active, and of some stale ones
        self.turns += 1
        if limits.max_loaded_models is None:
            self._everything = Group(None, is_active=True, is_warm=True)
            self._active[self._everything] = None
        for place in self.in_flight:
            group = self._join(place)
            group.in_flight += 1
            group.is_active = True
            place.is_loader = place.is_loader and limits.max_loaded_models is not None
            if place.is_loader:
                group.loader = place
            group.is_warm = group.loader is None
            group.is_leaving = not (group in self._active or self._has_room())
            self._active[group] = None
        for place in self.waiting:
            place.in_batch = False
            self._queue(place)

    # What happens

    def take(self, place: Place, now: float) -> bool:
        """Admits a request that comes now, if that changes nothing else; tells whether it did."""
        if self.waiting or len(self.in_flight) >= self.limits.max_concurrency:
            return False
        group = self._join(place)
        if not (group.is_active and group.is_warm) or group.is_leaving:
            self._forget_if_unused(group)
            return False
        self._give(place, group, now)
        return True

    def arrive(self, place: Place) -> None:
        """A request comes; `admit` tells when it goes."""
        self._count += 1
        place.number, place.state = self._count, "waiting"
        self.waiting[place] = None
        self._queue(place)

    def admit(self, now: float) -> list[Place]:
        """Those who may go now, in order; they are in flight from here on."""
        admitted: list[Place] = []
        while len(self.in_flight) < self.limits.max_concurrency and self.waiting:
            self._choose_drain(now)
            place = self._next()
            if place is None or place.group is None:
                break
            self._unqueue(place, place.group)
            self._give(place, place.group, now)
            admitted.append(place)
        self._choose_drain(now)
        return admitted

    def leave(self, place: Place, now: float) -> bool:
        """A request waits no longer, or is over; tells whether it had not left before."""
        group = place.group
        if group is None or place not in (self.waiting if place.state == "waiting" else self.in_flight):
            return False
        if place.state == "waiting":
            self._unqueue(place, group)
        else:
            del self.in_flight[place]
            group.in_flight -= 1
            group.idle_since = now
            if group.loader is place:
                group.loader = None
            if group.is_leaving and not group.in_flight:
                self._deactivate(group)
        place.state, place.is_loader, place.group = "over", False, None
        self._forget_if_unused(group)
        return True

    def answered(self, place: Place, now: float) -> None:
        """The first answer to a request is there: its model is loaded."""
        place.is_loader = False
        group = place.group
        if group is not None and group.loader is place:
            group.is_warm, group.loader = True, None
            logger.info("model %r is there, %.1f s after its first request went", group.model, now - place.since)

    def cool(self, model: str | None) -> None:
        """The server has dropped a model, or never had it: the next request for it goes alone."""
        group = self._groups.get(model)
        if group is not None:
            group.is_warm = False

    # What is asked

    def is_hopeless(self, place: Place, task: asyncio.Task[object] | None) -> bool:
        """Whether a waiting request can go only when its own task gives places back."""
        own = [each for each in self.in_flight if each.is_held_by(task)]
        group = place.group
        if not own or place.state != "waiting" or group is None:
            return False
        if len(own) >= self.limits.max_concurrency:
            return True
        own_groups = {each.group for each in own}
        if group.is_active:
            held_back = group.is_leaving or (group is self._draining and not place.in_batch)
            return held_back and group in own_groups
        limit = self.limits.max_loaded_models
        return limit is not None and len(own_groups) >= limit  # all others may become idle, but not these

    def next_overdue(self, now: float) -> float:
        """When somebody becomes overdue who is not yet, and that matters; else infinity."""
        first = self._first_outside()
        if first is None or self._draining is not None or self.limits.max_wait is None:
            return math.inf
        when = first.arrived + self.limits.max_wait
        return when if when > now else math.inf  # the drain waits for a batch, and begins when that has been admitted

    # The rules

    def _next(self) -> Place | None:
        """Who goes next, if anyone may; its group is active then."""
        heads = [head for group in self._active if (head := self._head(group)) is not None]
        inside = min(heads, key=lambda place: place.number, default=None)
        outside = self._first_outside()
        if outside is None or outside.group is None or (inside is not None and inside.number < outside.number):
            return inside
        if not self._make_room_for(outside.group):
            return inside
        self._activate(outside.group)
        return outside

    def _head(self, group: Group) -> Place | None:
        """The first that waits for an active model, if it may go."""
        held_back = group.is_leaving or (group is self._draining and not group.batch)
        if held_back or (not group.is_warm and group.loader is not None):
            return None
        while group.waiting:
            place = next(iter(group.waiting))
            if not place.is_abandoned:
                return place
            self.leave(place, -math.inf)
        return None

    def _first_outside(self) -> Place | None:
        """The first that waits for a model that is not active."""
        while self._outside:
            place = self._outside[0][1]
            if place.state == "waiting" and place.is_abandoned:
                self.leave(place, -math.inf)
            if place.state == "waiting" and place.group is not None and not place.group.is_active:
                return place
            heapq.heappop(self._outside)
        return None

    def _choose_drain(self, now: float) -> None:
        first = self._first_outside()
        limit = self.limits.max_wait
        if first is None or limit is None or now < first.arrived + limit:  # to the bit what `next_overdue` says
            self._draining = None  # whoever was overdue has left
        elif self._draining is None and not self._batches and not self._has_room():
            self._draining = next(iter(self._active))
            self.turns += 1
            logger.info("model %r is drained: %r has waited %.0f s", self._draining.model, first.model, limit)

    def _give(self, place: Place, group: Group, now: float) -> None:
        place.state, place.since, place.last_read = "in flight", now, now
        self.in_flight[place] = None
        group.in_flight += 1
        if not group.is_warm:
            group.loader = place
            place.is_loader = True

    # Queues and groups

    def _join(self, place: Place) -> Group:
        if self.limits.max_loaded_models is None:
            group = self._everything
        else:
            found = self._groups.get(place.model)
            group = found or self._groups.setdefault(place.model, Group(place.model))
        place.group = group
        return group

    def _queue(self, place: Place) -> None:
        group = self._join(place)
        group.waiting[place] = None
        if not group.is_active:
            self._put_outside(place)

    def _unqueue(self, place: Place, group: Group) -> None:
        del self.waiting[place], group.waiting[place]
        if place.in_batch:
            place.in_batch = False
            group.batch -= 1
            self._batches -= 1

    def _has_room(self) -> bool:
        limit = self.limits.max_loaded_models
        return limit is None or len(self._active) < limit

    def _make_room_for(self, group: Group) -> bool:
        """Sees that one more model can be active, in the place of one that nobody needs if it must be."""
        while not self._has_room():
            unneeded = [each for each in self._active if not each.in_flight and self._head(each) is None]
            if not unneeded:
                return False
            gone = min(unneeded, key=lambda each: each.idle_since)
            self._deactivate(gone)
            if self._has_room():
                self.swaps[group.model] += 1
                logger.info("swap: %r gives way to %r, for which %d wait", gone.model, group.model, len(group.waiting))
        return True

    def _activate(self, group: Group) -> None:
        group.is_active = True
        self._active[group] = None
        self.turns += 1
        group.batch = len(group.waiting)
        self._batches += group.batch
        for place in group.waiting:
            place.in_batch = True

    def _deactivate(self, group: Group) -> None:
        if group is self._draining:
            self._draining = None
        del self._active[group]
        group.is_active = group.is_warm = group.is_leaving = False
        for place in group.waiting:
            self._put_outside(place)
        self._forget_if_unused(group)

    def _put_outside(self, place: Place) -> None:
        heapq.heappush(self._outside, (place.number, place))
        if len(self._outside) > 2 * len(self.waiting) + 8:  # most are stale, and one that waits long is before them
            fresh = [each for each in self.waiting if each.group is not None and not each.group.is_active]
            self._outside = [(each.number, each) for each in fresh]

    def _forget_if_unused(self, group: Group) -> None:
        if not (group.is_active or group.in_flight or group.waiting):
            self._groups.pop(group.model, None)
