"""A bar chart of the fates of requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from benchmarks.chart import svg_page

FATES: Final = ("whole", "truncated", "failed", "wrong model")
"""The ways in which a request can end, in the order of the table and the chart."""
COLOURS: Final = {
    "whole": ("#0b7a4b", "#3ecf8e"),
    "truncated": ("#bf8700", "#d29922"),
    "failed": ("#cf222e", "#f85149"),
    "wrong-model": ("#8250df", "#b392f0"),
}
"""The colours of each fate, on a light and on a dark page."""
_WIDTH: Final = 860
_LEFT: Final = 220
_RIGHT: Final = 150
_BAR: Final = 18
_STEP: Final = 24


def draw_swaps(bars: Sequence[tuple[str, str, Mapping[str, int], str]], requests: int) -> str:
    """Returns the chart.

    Args:
        bars: For each bar, the row, the client, the number of requests of each fate, and a remark. The bars of one row
            have to be neighbours.
        requests: The number of requests that each bar stands for.
    """
    parts, at = [], 16.0
    for fate in FATES:
        parts.append(f'<rect class="{_css_class(fate)}" x="{at:.0f}" y="14" width="12" height="12"/>')
        parts.append(f'<text x="{at + 18:.0f}" y="25">{fate}</text>')
        at += 46 + 7.5 * len(fate)
    y, last = 36, ""
    for place, client, counts, remark in bars:
        if place != last:
            y, last = y + 24, place
            parts.append(f'<text x="16" y="{y}" font-weight="600">{escape(place)}</text>')
            y += 10
        parts.append(f'<text x="{_LEFT - 12}" y="{y + 13}" text-anchor="end">{escape(client)}</text>')
        x = float(_LEFT)
        for fate, count in counts.items():
            width = (_WIDTH - _LEFT - _RIGHT) * count / requests
            if count:
                parts.append(
                    f'<rect class="{_css_class(fate)}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}"/>'
                )
            x += width
        parts.append(f'<text class="small" x="{_WIDTH - _RIGHT + 8}" y="{y + 13}">{escape(remark)}</text>')
        y += _STEP
    return svg_page(_WIDTH, y + 10, "The fates of the requests, by server and client", COLOURS, parts)


def _css_class(fate: str) -> str:
    return fate.replace(" ", "-")
