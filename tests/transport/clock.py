"""A clock that stands still until a test moves it."""

from __future__ import annotations


class Clock:
    """The loop's time, which passes when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds
