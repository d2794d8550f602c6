"""Bar charts: in the terminal, and as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
_FULL: Final = "█"

_ROW, _LEFT, _BAR, _TOP, _RIGHT = 26, 60, 380, 64, 90
"""The height of a row, the width left of the bars, the width of the longest bar, the height above the bars, and the
width right of them, in pixels."""


def text_bars(values: Sequence[tuple[str, float]], width: int, unit: str) -> list[str]:
    """Returns a line for each value: its label, a bar, and its number.

    Args:
        values: The labels and the values, which are not negative.
        width: The length of the longest bar, in columns of the terminal.
        unit: The unit after each number.
    """
    highest = max((value for _, value in values), default=0.0) or 1.0
    margin = max((len(label) for label, _ in values), default=0)
    return [
        f"{label:>{margin}} {_bar(value / highest * width):<{width}} {value:.1f} {unit}".rstrip()
        for label, value in values
    ]


def _bar(columns: float) -> str:
    full, eighths = divmod(round(columns * 8), 8)
    return _FULL * full + (_EIGHTHS[eighths] if eighths else "")


def svg_bars(values: Sequence[tuple[str, float]], *, title: str, subtitle: str, unit: str, marked: str) -> str:
    """Returns a chart as SVG. It has a description for screen readers, and a dark mode.

    Args:
        values: The labels and the values.
        title: The first line.
        subtitle: The second line.
        unit: The unit after each number.
        marked: The label of the bar that stands out.
    """
    highest = max((value for _, value in values), default=0.0) or 1.0
    height = _TOP + _ROW * len(values) + 16
    width = _LEFT + _BAR + _RIGHT
    described = ", ".join(f"{label}: {value:.1f} {unit}" for label, value in values)
    rows = "\n".join(
        _svg_row(index, label, value, value / highest * _BAR, unit, is_marked=label == marked)
        for index, (label, value) in enumerate(values)
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"\
 role="img" aria-labelledby="title desc">
<title id="title">{escape(title)}</title>
<desc id="desc">{escape(described)}</desc>
<style>
  svg {{ background: #ffffff; font: 13px system-ui, sans-serif; fill: #1f2328; }}
  .heading {{ font-weight: 600; font-size: 15px; }}
  .small {{ fill: #59636e; }}
  .bar {{ fill: #9db7d9; }}
  .marked {{ fill: #1f6feb; }}
  @media (prefers-color-scheme: dark) {{
    svg {{ background: #0d1117; fill: #e6edf3; }}
    .small {{ fill: #9198a1; }}
    .bar {{ fill: #3b5a86; }}
    .marked {{ fill: #58a6ff; }}
  }}
</style>
<text class="heading" x="12" y="24">{escape(title)}</text>
<text class="small" x="12" y="44">{escape(subtitle)}</text>
{rows}
</svg>
"""


def _svg_row(index: int, label: str, value: float, length: float, unit: str, *, is_marked: bool) -> str:
    top = _TOP + index * _ROW
    kind = "bar marked" if is_marked else "bar"
    return (
        f'<text x="{_LEFT - 8}" y="{top + 14}" text-anchor="end">{escape(label)}</text>'
        f'<rect class="{kind}" x="{_LEFT}" y="{top}" width="{length:.1f}" height="{_ROW - 6}" rx="2"/>'
        f'<text class="small" x="{_LEFT + length + 8:.1f}" y="{top + 14}">{value:.1f} {escape(unit)}</text>'
    )
