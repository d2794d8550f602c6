"""A clock that stands still until a test moves it."""

from __future__ import annotations


class Clock:
    """Replaces the clock of an event loop. Time passes only when a test calls `wait`."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds
