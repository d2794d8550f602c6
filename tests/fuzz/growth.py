"""Checks that the time of a target grows with its input, and not with the square of it.

A piece of an input is repeated until the whole has some ten thousand bytes, and then eight times as many. The processor
time of this thread is compared, the smallest of several. A linear target takes eight times as long, a quadratic one 64
times. On a busy machine even processor time can be several times as long for a while, so a ratio that is too large is
measured again, and counts only if it is too large each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from tests.fuzz.targets import Target

_SMALL_BYTES: Final = 12_000
_FACTOR: Final = 8
_LARGEST_RATIO: Final = 30.0
_UNIMPORTANT_SECONDS: Final = 0.04
"""A target that needs no longer for the large input is fast enough, and its time too short to be compared."""
_TIMES: Final = 4
"""How often a time is measured; the shortest one counts."""
_ATTEMPTS: Final = 5
"""How often a ratio that is too large is measured before it counts."""


def check_growth(
    target: Target,
    unit: bytes,
    before: bytes = b"",
    after: bytes = b"",
    *,
    clock: Callable[[], float] = time.thread_time,
) -> None:
    """Raises an `AssertionError` if a target takes much more time for a longer input.

    Args:
        target: The target.
        unit: The piece that is repeated.
        before: What comes before it.
        after: What comes after it.
        clock: Returns the seconds that this thread has used.
    """
    if not unit:
        return
    count = max(1, _SMALL_BYTES // len(unit))
    small, large = (before + unit * times + after for times in (count, _FACTOR * count))
    ratios: list[float] = []
    while not ratios or ratios[-1] > _LARGEST_RATIO:
        assert len(ratios) < _ATTEMPTS, (
            f"{target.name}: {before!r} + {unit!r} * n + {after!r} takes {min(ratios):.0f} times as long for"
            f" {_FACTOR} times n"
        )
        seconds = _seconds(target, large, clock)
        if seconds <= _UNIMPORTANT_SECONDS:
            return
        ratios.append(seconds / max(_seconds(target, small, clock), 1e-6))


def _seconds(target: Target, data: bytes, clock: Callable[[], float]) -> float:
    """Returns the shortest of several times, or the first one that is too short to matter."""
    best = float("inf")
    for _ in range(_TIMES):
        began = clock()
        target.run(data)
        best = min(best, clock() - began)
        if best <= _UNIMPORTANT_SECONDS / _FACTOR:
            break
    return best
