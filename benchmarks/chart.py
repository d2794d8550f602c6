"""SVGs that are readable on light and on dark pages; the ratios as bars on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from benchmarks.report import TIMES

COLOURS: Final = {
    "lmbridge": ("#0b7a4b", "#3ecf8e"),
    "openai": ("#8250df", "#b392f0"),
    "httpx": ("#0969da", "#58a6ff"),
    "litellm": ("#bc4c00", "#f0883e"),
}
"""On light, on dark."""
_WIDTH: Final = 860
_LEFT: Final = 250
_RIGHT: Final = 70
_TOP: Final = 66
_BAR: Final = 11
_GAP: Final = 16


def chart(rows: Sequence[tuple[str, Mapping[str, float]]], titles: Mapping[str, str]) -> str:
    """Draws it.

    Args:
        rows: What was measured, with each client's ratio to the limit.
        titles: The clients to show, from top to bottom, and what they are called.
    """
    most = max((value for _, ratios in rows for value in ratios.values()), default=10.0)
    decades = max(1.0, math.log10(most))

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
                told = f"{value:.2f}" if value < 10 else f"{value:.0f}"
                parts.append(f'<text class="small" x="{_LEFT + width + 4:.1f}" y="{y + 9}">{told}{TIMES}</text>')
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
    label = "Cost in multiples of the limit, on a logarithmic scale"
    return page(_WIDTH, y, label, {name: COLOURS[name] for name in titles}, [*legend, *grid, *parts])


def page(width: int, height: int, label: str, colours: Mapping[str, tuple[str, str]], parts: Sequence[str]) -> str:
    """An SVG of these parts.

    Args:
        width: In pixels.
        height: In pixels.
        label: What it says to those who cannot see it.
        colours: By class: on light, on dark.
        parts: The elements.
    """
    light = "\n".join(f".{name} {{ fill: {on_light} }}" for name, (on_light, _) in colours.items())
    dark = "\n".join(f".{name} {{ fill: {on_dark} }}" for name, (_, on_dark) in colours.items())
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" \
aria-label="{escape(label)}">
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
