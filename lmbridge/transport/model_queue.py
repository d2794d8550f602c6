"""`ModelQueue`, the requests for one model, and `ActiveModels`, which knows the queues of all models.

They keep the state of the rules about models. The rules themselves are in `lmbridge.transport.scheduler`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sized

import attrs

from lmbridge.transport.permits import Permit, PermitHeap


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
    """The request that was sent alone because the model was not known to be loaded; None once its first event has
    arrived or it has ended."""
    waiting: OrderedDict[Permit, None] = attrs.field(factory=OrderedDict)
    """The waiting requests in the order of their arrival. In an OrderedDict, any of them can be removed quickly."""
    ready: PermitHeap = attrs.field(init=False)
    """The waiting requests that need not wait for other runs, in the order in which they go."""
    newcomers: PermitHeap = attrs.field(init=False)
    """The waiting requests with which a run would begin, which may have to wait for other runs."""
    ready_in_batch: PermitHeap = attrs.field(init=False)
    """The members of the batch that are also in `ready`."""
    newcomers_in_batch: PermitHeap = attrs.field(init=False)
    """The members of the batch that are also in `newcomers`."""
    idle_since: float = -math.inf
    """The time at which a request for the model last ended."""
    is_surplus: bool = False
    """Whether the model exceeds limits that were lowered while it had requests in flight."""

    def __attrs_post_init__(self) -> None:
        self.ready = self._heap_of(lambda permit: not permit.is_newcomer)
        self.newcomers = self._heap_of(lambda permit: permit.is_newcomer)
        self.ready_in_batch = self._heap_of(lambda permit: permit.in_batch and not permit.is_newcomer)
        self.newcomers_in_batch = self._heap_of(lambda permit: permit.in_batch and permit.is_newcomer)

    def _heap_of(self, belongs: Callable[[Permit], bool]) -> PermitHeap:
        waiting = self.waiting
        return PermitHeap(waiting, lambda permit: permit.rank if permit in waiting and belongs(permit) else None)

    def push(self, permit: Permit) -> None:
        """Adds a waiting request to the heaps that it belongs to. Call it again when its rank or its state changes."""
        (self.newcomers if permit.is_newcomer else self.ready).push(permit)
        if permit.in_batch:
            (self.newcomers_in_batch if permit.is_newcomer else self.ready_in_batch).push(permit)


class ActiveModels:
    """The queues of all models, which of the models are active, and the requests that wait for the others.

    Args:
        limit: The highest number of active models, or None if models are not limited. Then all requests share one
            queue, which is always active.
        waiting: All waiting requests.
    """

    def __init__(self, limit: int | None, waiting: Sized) -> None:
        self.limit = limit
        self.queues: dict[str | None, ModelQueue] = {}
        """The queues of all models that are active or have requests."""
        self.active: dict[ModelQueue, None] = {}
        """The active models. The one that has been active longest comes first."""
        self.draining: ModelQueue | None = None
        """The active model that gets no new requests, so that another one can take its slot."""
        self.batch_members: int = 0
        """The number of batch members of all models that are still waiting."""
        self.ready: PermitHeap = PermitHeap(
            waiting,
            lambda permit: permit.rank if _waits_for_inactive_model(permit) and not permit.is_newcomer else None,
        )
        """The requests whose model is not active and that need not wait for other runs, in the order in which they
        go."""
        self.newcomers: PermitHeap = PermitHeap(
            waiting, lambda permit: permit.rank if _waits_for_inactive_model(permit) and permit.is_newcomer else None
        )
        """The requests whose model is not active and with which a run would begin, which may have to wait for other
        runs."""
        self.next_overdue: PermitHeap = PermitHeap(
            waiting,
            lambda permit: (permit.arrived_at, permit.arrival_number) if _waits_for_inactive_model(permit) else None,
        )
        """All requests whose model is not active, in the order in which they become overdue."""
        self._only_queue: ModelQueue | None = None
        if limit is None:
            self._only_queue = ModelQueue(None, is_active=True, is_loaded=True)
            self.active[self._only_queue] = None

    def queue_for(self, model: str | None) -> ModelQueue:
        """Returns the queue of a model, and creates it if necessary."""
        if self._only_queue is not None:
            return self._only_queue
        return self.queues.get(model) or self.queues.setdefault(model, ModelQueue(model))

    def take_over(self, permit: Permit) -> None:
        """Adds a request that was in flight before the limits changed.

        Its model becomes active. If there is no room for it, it is also surplus.
        """
        permit.queue = queue = self.queue_for(permit.model)
        queue.in_flight += 1
        queue.is_active = True
        permit.is_first_request = permit.is_first_request and self.limit is not None
        if permit.is_first_request:
            queue.first_request = permit
        queue.is_loaded = queue.first_request is None
        if queue not in self.active:
            queue.is_surplus = not self.has_room()
            self.active[queue] = None

    def has_room(self) -> bool:
        """Returns whether one more model can become active without taking the slot of another one."""
        limit = self.limit
        return limit is None or len(self.active) < limit

    def is_held_back(self, queue: ModelQueue) -> bool:
        """Returns whether an active model gets no new requests.

        A drain holds back no batch, because it begins only when all batches have been admitted.
        """
        return queue.is_surplus or queue is self.draining

    def push(self, permit: Permit) -> None:
        """Adds a waiting request to the heaps that it belongs to now."""
        if permit.queue is not None:
            permit.queue.push(permit)
            if not permit.queue.is_active:
                (self.newcomers if permit.is_newcomer else self.ready).push(permit)

    def remove_waiting(self, permit: Permit, queue: ModelQueue) -> None:
        """Removes a request that no longer waits from the queue of its model."""
        del queue.waiting[permit]
        if permit.in_batch:
            permit.in_batch = False
            self.batch_members -= 1

    def activate(self, queue: ModelQueue) -> None:
        """Makes a model active. The requests that wait for it are its batch."""
        queue.is_active = True
        self.active[queue] = None
        self.batch_members += len(queue.waiting)
        for permit in queue.waiting:
            permit.in_batch = True
            queue.push(permit)

    def deactivate(self, queue: ModelQueue) -> None:
        """Takes the slot away from a model that has nothing in flight. The requests that wait for it go on waiting."""
        if queue is self.draining:
            self.draining = None
        del self.active[queue]
        queue.is_active = queue.is_loaded = queue.is_surplus = False
        for permit in queue.waiting:
            # Some of them may be members of its batch: those whose runs may not begin yet.
            self.batch_members -= permit.in_batch
            permit.in_batch = False
            self.push(permit)
            self.next_overdue.push(permit)
        self.discard_if_unused(queue)

    def discard_if_unused(self, queue: ModelQueue) -> None:
        """Forgets the queue of a model that is not active and has no requests."""
        if not (queue.is_active or queue.in_flight or queue.waiting):
            self.queues.pop(queue.model, None)


def _waits_for_inactive_model(permit: Permit) -> bool:
    return permit.state == "waiting" and permit.queue is not None and not permit.queue.is_active
