"""`Permit`, which is one request in the schedule, and `PermitHeap`, which sorts those that wait.

The rules for them, such as `max_concurrency`, are in `scheduler`. `admission` does the waiting, and its errors name the
holders of the permits.

How long a permit is held is decided by `transport` for plain requests, and by `events` for streams.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import weakref
from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

from lmbridge._scheduled_run import ScheduledRun

if TYPE_CHECKING:
    from lmbridge.transport.model_queue import ModelQueue

Rank: TypeAlias = tuple[float, ...]
"""The key by which waiting requests are sorted; the lowest goes first."""


@attrs.define(eq=False)
class Permit:
    """One request in the schedule: it waits for its admission, then holds the permit to generate, then returns it."""

    model: str | None
    """The model that the request names, or None if it leaves the choice to the server. Requests without a model are
    scheduled as if None were one more model."""
    arrived_at: float
    """The time at which the request arrived, by the clock of the event loop."""
    holder: weakref.ref[asyncio.Task[object]] | None = None
    """The task that last read the stream, or the task that opened it if the stream has not been read yet.

    The reference is weak because a task's result, or the traceback of its exception, may hold the very stream whose
    garbage collection returns the permit.
    """
    priority: int = 0
    """How urgent the request is; a higher number goes first."""
    run: ScheduledRun | None = None
    """The run that the request belongs to, or None if it belongs to no run."""
    admitted_at: float = math.inf
    """The time at which the request was admitted; infinity while it waits."""
    last_read_at: float = math.inf
    """The time at which the stream was last read, or at which the request was admitted if it never was."""
    state: Literal["new", "waiting", "in flight", "over"] = "new"
    """Where the request is: not in the schedule yet, waiting for admission, in flight, or no longer in the schedule."""
    level: int = 0
    """How urgent the waiting request has become: its priority, plus one for each `max_wait` seconds of waiting."""
    is_nested: bool = False
    """Whether the task that asks for the permit holds another one, so that waiting for other runs could be a
    deadlock."""
    is_newcomer: bool = False
    """Whether the request waits until its run may begin."""
    begins_run: bool = False
    """Whether the run has begun with this request, so that the time until its first event matters."""
    is_first_request: bool = False
    """Whether other requests for the same model wait for the first event of this one."""
    has_answered: bool = False
    """Whether the first event of the reply has arrived, or the whole reply if it is not streamed."""
    is_on_the_way: bool = False
    """Whether the conversation of the request is in a slot of the server, but the server may not have received the
    request yet (see `SlotUse.begin`)."""
    was_displaced: bool = False
    """Whether the conversation had lost its slot when the request was sent. Then the reply shows whether the server
    still remembers the conversation."""
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
        """Adds a request, unless it has no key."""
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
