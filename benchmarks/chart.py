"""Charts as SVG that are readable on light and dark pages: the ratios to the limit as bars on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from benchmarks.report import TIMES

COLOURS: Final = {
    "lmbridge": ("#0b7a4b", "#3ecf8e"),
    "openai": ("#8250df", "#b392f0"),
    "httpx2": ("#0969da", "#58a6ff"),
    "litellm": ("#bc4c00", "#f0883e"),
}
"""The colours of the clients that are shown, on a light and on a dark page."""
_WIDTH: Final = 860
_LEFT: Final = 250
_RIGHT: Final = 70
_TOP: Final = 66
_BAR: Final = 11
_GAP: Final = 16


def draw_ratios(rows: Sequence[tuple[str, Mapping[str, float]]], titles: Mapping[str, str]) -> str:
    """Returns a chart of ratios.

    Args:
        rows: The titles of the rows, with the ratio of each client to the limit.
        titles: The titles of the clients, from top to bottom.
    """
    largest = max((value for _, ratios in rows for value in ratios.values()), default=10.0)
    decades = max(1.0, math.log10(largest))

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log10(max(value, 1.0)) / decades

    parts: list[str] = []
    y = _TOP
    for title, ratios in rows:
        height = _BAR * len(titles)
        middle = y + height / 2 + 4
        parts.append(f'<text x="{_LEFT - 12}" y="{middle:.0f}" text-anchor="end">{escape(title)}</text>')
        for name in titles:
            value = ratios.get(name)
            if value is None:
                parts.append(f'<text class="small" x="{_LEFT + 4}" y="{y + 9}">not finished</text>')
            else:
                width = max(x(value) - _LEFT, 1.5)
                parts.append(f'<rect class="{name}" x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR - 1}"/>')
                label = f"{value:.2f}" if value < 10 else f"{value:.0f}"
                parts.append(f'<text class="small" x="{_LEFT + width + 4:.1f}" y="{y + 9}">{label}{TIMES}</text>')
            y += _BAR
        y += _GAP
    grid = [
        f'<line x1="{x(10**power):.1f}" x2="{x(10**power):.1f}" y1="{_TOP - 8}" y2="{y - _GAP + 8}"/>'
        f'<text class="small" x="{x(10**power):.1f}" y="{_TOP - 14}" text-anchor="middle">'
        f"{'limit' if power == 0 else f'{10**power:,}{TIMES}'}</text>"
        for power in range(int(decades) + 1)
    ]
    legend, at = [], 16.0
    for name, title in titles.items():
        legend.append(f'<rect class="{name}" x="{at:.0f}" y="14" width="12" height="12"/>')
        legend.append(f'<text x="{at + 18:.0f}" y="25">{escape(title)}</text>')
        at += 42 + 7.5 * len(title)
    description = "Cost in multiples of the limit, on a logarithmic scale"
    return svg_page(_WIDTH, y, description, {name: COLOURS[name] for name in titles}, [*legend, *grid, *parts])


def svg_page(
    width: int, height: int, description: str, colours: Mapping[str, tuple[str, str]], parts: Sequence[str]
) -> str:
    """Returns an SVG document.

    Args:
        width: The width in pixels.
        height: The height in pixels.
        description: The text for readers who cannot see the chart.
        colours: The colours of each CSS class, on a light and on a dark page.
        parts: The elements of the chart.
    """
    light = "\n".join(f".{name} {{ fill: {on_light} }}" for name, (on_light, _) in colours.items())
    dark = "\n".join(f".{name} {{ fill: {on_dark} }}" for name, (_, on_dark) in colours.items())
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" \
aria-label="{escape(description)}">
<style>
text {{ font: 13px system-ui, sans-serif; fill: #1f2328 }}
.small {{ font-size: 10.5px; fill: #59636e }}
.page {{ fill: #ffffff }}
line {{ stroke: #d1d9e0 }}
{light}
@media (prefers-color-scheme: dark) {{
text {{ fill: #f0f6fc }}
.small {{ fill: #9198a1 }}
.page {{ fill: #0d1117 }}
line {{ stroke: #3d444d }}
{dark}
}}
</style>
<rect class="page" width="{width}" height="{height}" rx="8"/>
{body}
</svg>
"""
