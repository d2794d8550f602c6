"""What a run tells, on its way to whoever listens: bounded, so that a slow listener slows the run down."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Generic, TypeVar

T = TypeVar("T")

CAPACITY: Final = 64
"""Events that may wait for a listener."""


class Subscription(Generic[T]):
    """The events for one listener."""

    def __init__(self, channel: Channel[T]) -> None:
        self._channel = channel
        self._waiting: deque[T] = deque()
        self._changed = asyncio.Event()
        self.is_over = False

    async def put(self, event: T) -> None:
        """Adds an event, as soon as there is room."""
        while len(self._waiting) >= CAPACITY and not self.is_over:
            await self._change()
        self.put_now(event)

    def put_now(self, event: T) -> None:
        """Adds an event, whether there is room or not; drops it if nobody listens any more."""
        if not self.is_over:
            self._waiting.append(event)
            self._changed.set()

    async def get(self) -> T | None:
        """The next event, or None if none is going to come."""
        while not self._waiting and not self.is_over:
            await self._change()
        if not self._waiting:
            return None
        event = self._waiting.popleft()
        self._changed.set()
        return event

    def end(self, *, discard: bool) -> None:
        """Ends it: no event is added any more, and those that wait may be dropped."""
        self.is_over = True
        if discard:
            self._waiting.clear()
        self._changed.set()

    def leave(self) -> None:
        """Ends it on the side of the listener."""
        self._channel.drop(self)
        self.end(discard=True)

    async def _change(self) -> None:
        # One event for both sides: at any time only one of them waits, but for the moment in which it is woken.
        self._changed.clear()
        await self._changed.wait()


class Channel(Generic[T]):
    """From a run to any number of listeners; without any, events are dropped.

    Args:
        is_muted: Whether there will never be any, so that nothing has to be made ready for them.
    """

    def __init__(self, *, is_muted: bool = False) -> None:
        self.is_muted = is_muted
        self._subscriptions: list[Subscription[T]] = []
        self._last: T | None = None
        self._is_closed = False

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._subscriptions)

    def subscribe(self) -> Subscription[T]:
        """Begins to listen: to what comes from now on, and to the last event in any case."""
        subscription = Subscription(self)
        if self._last is not None:
            subscription.put_now(self._last)
        if self._is_closed:
            subscription.end(discard=False)
        else:
            self._subscriptions.append(subscription)
        return subscription

    def drop(self, subscription: Subscription[T]) -> None:
        """Forgets a listener."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    async def put(self, event: T) -> None:
        """Tells all listeners; waits for those that are slow."""
        for subscription in tuple(self._subscriptions):
            await subscription.put(event)

    def put_last(self, event: T) -> None:
        """Tells all listeners the last event, for which there is always room; those that come later, too."""
        self._last = event
        for subscription in self._subscriptions:
            subscription.put_now(event)

    def close(self, *, discard: bool) -> None:
        """Ends all subscriptions.

        Args:
            discard: Whether what nobody has read yet is dropped.
        """
        self._is_closed = True
        for subscription in self._subscriptions:
            subscription.end(discard=discard)
        self._subscriptions.clear()
