"""`Channel`: carries the events of a run to its listeners, through a bounded buffer for each of them.

A slow listener slows the run down, so that memory does not grow. `asyncio.Queue` was the alternative, but before Python
3.13 it cannot end the iteration of its readers, and it cannot reserve room for a last event that must not be lost.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Generic, TypeVar

T = TypeVar("T")

CAPACITY: Final = 64
"""How many unread events a listener may have before the run waits for it."""


class Subscription(Generic[T]):
    """The events for one listener.

    Attributes:
        is_over: Whether no further event will be added.
    """

    def __init__(self, channel: Channel[T]) -> None:
        self._channel = channel
        self._waiting: deque[T] = deque()
        self._changed = asyncio.Event()
        self.is_over: bool = False

    async def put(self, event: T) -> None:
        """Adds an event as soon as there is room for it."""
        while len(self._waiting) >= CAPACITY and not self.is_over:
            await self._wait_for_change()
        self.put_now(event)

    def put_now(self, event: T) -> None:
        """Adds an event even if the buffer is full. After the end of the subscription, the event is dropped."""
        if not self.is_over:
            self._waiting.append(event)
            self._changed.set()

    async def get(self) -> T | None:
        """Waits for the next event; returns None if there will not be another one."""
        while not self._waiting and not self.is_over:
            await self._wait_for_change()
        if not self._waiting:
            return None
        event = self._waiting.popleft()
        self._changed.set()
        return event

    def end(self, *, discard: bool) -> None:
        """Ends the subscription, so that no more events are added. With `discard`, unread events are dropped."""
        self.is_over = True
        if discard:
            self._waiting.clear()
        self._changed.set()

    def leave(self) -> None:
        """Ends the subscription, because the listener no longer reads."""
        self._channel.drop(self)
        self.end(discard=True)

    async def _wait_for_change(self) -> None:
        # Writer and listener can share one asyncio.Event, because they never wait at the same time: the writer waits
        # while the buffer is full, and the listener while it is empty.
        self._changed.clear()
        await self._changed.wait()


class Channel(Generic[T]):
    """Carries events from one run to any number of listeners. Without a listener, events are dropped.

    Args:
        is_muted: True if there will never be a listener, so that no events need to be created.
    """

    def __init__(self, *, is_muted: bool = False) -> None:
        self.is_muted = is_muted
        self._subscriptions: list[Subscription[T]] = []
        self._last: T | None = None
        self._is_closed = False

    @property
    def has_listener(self) -> bool:
        """Whether there is at least one listener."""
        return bool(self._subscriptions)

    def subscribe(self) -> Subscription[T]:
        """Adds a listener, which gets all events from now on, and the last event even if it has already been sent."""
        subscription = Subscription(self)
        if self._last is not None:
            subscription.put_now(self._last)
        if self._is_closed:
            subscription.end(discard=False)
        else:
            self._subscriptions.append(subscription)
        return subscription

    def drop(self, subscription: Subscription[T]) -> None:
        """Removes a listener."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    async def put(self, event: T) -> None:
        """Sends an event to all listeners, and waits for the slow ones."""
        for subscription in tuple(self._subscriptions):
            await subscription.put(event)

    def put_last(self, event: T) -> None:
        """Sends the last event to all listeners, present and future. There is always room for it."""
        self._last = event
        for subscription in self._subscriptions:
            subscription.put_now(event)

    def close(self, *, discard: bool) -> None:
        """Ends all subscriptions; with `discard`, events that have not been read are dropped."""
        self._is_closed = True
        for subscription in self._subscriptions:
            subscription.end(discard=discard)
        self._subscriptions.clear()
