"""A minute of `make soak`, without the embedded server, and the figures that it makes of its samples."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.reliability.line_chart import draw_lines
from tests.reliability.soak import slope_an_hour, soak


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mixed_traffic_with_kills_raises_named_errors_only() -> None:
    soaked = asyncio.run(soak(0.7, local=False))
    assert soaked.findings == []
    assert soaked.outcomes["done"] > 20
    assert soaked.outcomes["cancelled"]
    first, last = soaked.samples[0].held, soaked.samples[-1].held
    # asyncio starts the threads of its pool when they are needed, and both MCP servers may have just been killed when
    # the first sample was taken.
    assert last.threads <= first.threads + (os.cpu_count() or 1) + 4
    assert last.children <= first.children + 2


def test_the_slope_is_the_growth_in_an_hour() -> None:
    assert slope_an_hour([0, 30, 60], [10, 20, 30]) == pytest.approx(20)
    assert slope_an_hour([0, 30, 60], [5, 5, 5]) == 0
    assert slope_an_hour([1], [5]) == 0


def test_the_chart_has_a_strip_for_each_figure() -> None:
    chart = draw_lines([1, 2], {"MiB": [100, 101], "tasks": [0, 0]})
    assert chart.count("<polyline") == 2
    assert ">MiB<" in chart
