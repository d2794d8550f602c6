"""Measures how much work a single step of the event loop does.

The tests that use this depend neither on the speed of the machine nor on what else it does: instead of the time of a
step, they count the lines of Python that are executed in it, those of asyncio and of other libraries included. Whatever
comes, and in however many pieces, this number must not depend on the size.

The time that C code takes for a long text, such as decoding JSON, cannot be counted like this. The table `steps` of the
benchmarks measures it.
"""

from __future__ import annotations

import gc
import sys
from asyncio.events import Handle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest


def divide_into_short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divides work into slices of a tenth of their size, so that a loop without slices stands out with fewer calls."""
    replaced = 0
    for name, module in list(sys.modules.items()):
        if name.startswith("lmbridge."):
            for constant, value in (("ITEMS_PER_STEP", 10), ("SIZE_PER_STEP", 10_000)):
                if hasattr(module, constant):
                    monkeypatch.setattr(module, constant, value)
                    replaced += 1
    assert replaced >= 8


class StepMeter:
    """Counts the lines of Python that are executed in each step of the event loop."""

    def __init__(self) -> None:
        self.most_lines = 0
        self._lines = 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Counts from the next step on."""
        run = Handle._run

        def measured(handle: Handle) -> None:
            self._lines = 0
            run(handle)
            self.most_lines = max(self.most_lines, self._lines)

        # A garbage collection would run finalizers in any step.
        gc.collect()
        gc.disable()
        before = sys.gettrace()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Handle, "_run", measured)
            sys.settrace(self._trace)
            try:
                yield
            finally:
                sys.settrace(before)
                gc.enable()

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        # A loop within one line counts each time as well, because each of its jumps back is an event.
        self._lines += event == "line"
        return self._trace


def assert_work_stays_equal(largest_step: Callable[[int], int], size: int) -> None:
    """Checks that the largest step does not do more work if four times as much arrives.

    Args:
        largest_step: Returns the number of lines in the largest step, given how much arrives.
        size: How much arrives at first.
    """
    # The first time, patterns are compiled, and modules imported.
    largest_step(size)
    small = largest_step(size)
    large = largest_step(4 * size)
    if large >= 1.2 * small:
        # The larger size may have been the first that needs them.
        large = largest_step(4 * size)
    assert small > 0
    assert large < 1.2 * small, f"the largest step grew from {small} lines to {large}"
