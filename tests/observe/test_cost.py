"""Nothing is done for observers that do not exist."""

from __future__ import annotations

import pytest

from benchmarks.observer_cost import WORK, Nothing, Work, calls_of_observe


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_without_observers_no_function_of_observe_is_called(work: Work) -> None:
    assert calls_of_observe(work, []) == 0
    assert calls_of_observe(work, [Nothing()]) > 0
