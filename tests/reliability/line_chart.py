"""A chart of figures over time as SVG, one below the other, which is readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

_WIDTH: Final = 860
_HEIGHT: Final = 70
_LEFT: Final = 130
_RIGHT: Final = 60
_STYLE: Final = (
    "<style>text{font:12px sans-serif;fill:#57606a}polyline{fill:none;stroke:#0b7a4b;stroke-width:1.5}"
    "line{stroke:#d0d7de}@media(prefers-color-scheme:dark){text{fill:#8b949e}polyline{stroke:#3ecf8e}"
    "line{stroke:#30363d}}</style>"
)


def draw_lines(minutes: Sequence[float], figures: Mapping[str, Sequence[float]]) -> str:
    """Returns a chart with a strip for each figure, from zero to its highest value."""
    longest = max(minutes)
    parts: list[str] = []
    for number, (name, values) in enumerate(figures.items()):
        bottom, highest = (number + 1) * _HEIGHT, max(*values, 1.0)
        across, up = (_WIDTH - _LEFT - _RIGHT) / longest, (_HEIGHT - 18) / highest
        points = " ".join(
            f"{_LEFT + across * minute:.1f},{bottom - up * value:.1f}"
            for minute, value in zip(minutes, values, strict=True)
        )
        parts += [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>',
            f'<polyline points="{points}"/>',
            f'<text x="{_LEFT - 10}" y="{bottom - 20}" text-anchor="end">{escape(name)}</text>',
            f'<text x="{_WIDTH - _RIGHT + 6}" y="{bottom - 20}">{values[-1]:.0f}</text>',
        ]
    height = len(figures) * _HEIGHT + 24
    parts.append(f'<text x="{_LEFT}" y="{height - 6}">0</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{height - 6}" text-anchor="end">{longest:.0f} minutes</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img"'
        f' aria-label="What the process held during the soak">{_STYLE}{"".join(parts)}</svg>\n'
    )
