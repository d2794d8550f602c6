"""`Timeline`: bars on a time axis, as one HTML file that needs nothing else.

The page is made here, element by element, and its script only shows the text of the bar that is clicked. The
alternative was a script that draws the data with a library. But then every file would have to contain the library, or
load it from the network.

`RunResult.timeline` makes a timeline of one run, and `TimelineObserver` one of everything that it observes.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from string import Template
from typing import Final, Literal, TypeAlias

import attrs

from lmbridge._checks import check_path

BarKind: TypeAlias = Literal["round", "queue", "prompt", "tokens", "reply", "tool", "retry", "swap", "error"]
"""What a bar stands for: a round of a run, a wait for a permit, the time until the first token, the tokens, a whole
reply, a tool call, a wait before another attempt, a swap of models, or the error that ended something."""

_MOST_ROWS: Final = 60
"""How many rows a page shows at most. If there are more, it shows the rows that failed and the longest ones."""
_BINS: Final = 240
"""The number of points of a chart of totals."""
_MOST_TEXT: Final = 4000
"""How many characters of the text of a bar a page contains at most."""
_SHORTEST: Final = 1e-6
_TOTALS: Final[tuple[tuple[str, frozenset[str]], ...]] = (
    ("waiting", frozenset(("queue", "retry"))),
    ("generating", frozenset(("prompt", "tokens", "reply"))),
    ("calling tools", frozenset(("tool",))),
)
_LEGEND: Final = ("round", "queue", "prompt", "tokens", "reply", "tool", "retry", "swap", "error")


@attrs.frozen(kw_only=True)
class Bar:
    """A stretch of time in which one thing happened."""

    kind: BarKind
    """The kind of thing that happened."""
    start: float
    """When it began, in seconds, by a clock that all bars of a timeline share."""
    end: float
    """When it ended. It is equal to `start` if the bar stands for a moment."""
    label: str
    """A few words about it, such as the name of a tool."""
    text: str = ""
    """What is shown below the kind, the label and the duration when the bar is clicked, such as the result of a tool.
    By default, nothing is shown below them."""


@attrs.frozen(kw_only=True)
class Row:
    """A run, or a request outside of a run."""

    label: str
    """The name of the row."""
    bars: Sequence[Bar]
    """The bars of the row, in any order."""
    has_failed: bool = False
    """True if it ended with an error."""

    @property
    def start(self) -> float:
        """When its first bar began."""
        return min((bar.start for bar in self.bars), default=0.0)

    @property
    def end(self) -> float:
        """When its last bar ended."""
        return max((bar.end for bar in self.bars), default=0.0)


@attrs.frozen(kw_only=True)
class Timeline:
    """What happened in a run, or in a whole session, on a time axis.

    A notebook shows it directly; elsewhere, `write` it to a file and open that in a browser.
    """

    title: str
    """The title of the page."""
    rows: Sequence[Row]
    """The runs and requests, in any order."""

    def html(self) -> str:
        """Returns the page. It loads nothing, and shows all texts as they are, whatever they contain."""
        rows = [row for row in self.rows if row.bars]
        start = min((row.start for row in rows), default=0.0)
        seconds = max(max((row.end for row in rows), default=0.0) - start, _SHORTEST)
        shown = _most_interesting(rows)
        summary = [_describe_count(rows)]
        if len(shown) < len(rows):
            summary.append(f"{len(shown)} rows are shown: those that failed, and then the longest")
        return _PAGE.substitute(
            title=html.escape(self.title),
            summary=html.escape("; ".join(summary)),
            legend="".join(f'<span><i class="{kind}"></i>{kind}</span>' for kind in _LEGEND),
            totals=_totals(rows, start, seconds) if len(rows) > 1 else "",
            axis=_axis(seconds),
            rows="".join(_row_html(row, start, seconds) for row in shown),
        )

    def write(self, path: str | PathLike[str]) -> Path:
        """Writes the page to a file, and returns its path.

        Raises:
            LLMValidationError: `path` is neither a string nor a path object.
            OSError: The file cannot be written.
        """
        target = Path(check_path("path", path))
        target.write_text(self.html(), encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        # The frame keeps the styles of the page and of the notebook apart.
        height = 150 + 40 * min(len(self.rows), 8)
        return (
            f'<iframe sandbox="allow-scripts" style="width:100%;height:{height}px;border:0"'
            f' srcdoc="{html.escape(self.html())}"></iframe>'
        )


def _most_interesting(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows to show, ordered by their start: all of them, or those that failed and the longest others."""
    ranked = sorted(rows, key=lambda row: (not row.has_failed, row.start - row.end))
    return sorted(ranked[:_MOST_ROWS], key=lambda row: row.start)


def _describe_count(rows: Sequence[Row]) -> str:
    failed = sum(row.has_failed for row in rows)
    return f"{len(rows)} row{'' if len(rows) == 1 else 's'}, {failed} of them failed"


def _row_html(row: Row, start: float, seconds: float) -> str:
    lanes = _lanes(row.bars)
    height = 18 * (max(lanes, default=0) + 1)
    bars = "".join(_bar(bar, lane, start, seconds) for bar, lane in zip(row.bars, lanes, strict=True))
    failed = " failed" if row.has_failed else ""
    label = html.escape(row.label)
    return (
        f'<div class="row{failed}"><div class="label" title="{label}">{label}</div>'
        f'<div class="bars" style="height:{height}px">{bars}</div></div>\n'
    )


def _bar(bar: Bar, lane: int, start: float, seconds: float) -> str:
    left, width = 100 * (bar.start - start) / seconds, 100 * (bar.end - bar.start) / seconds
    head = f"{bar.kind}: {bar.label} ({bar.end - bar.start:.3f} s)"
    text = bar.text if len(bar.text) <= _MOST_TEXT else f"{bar.text[:_MOST_TEXT]}\n[{len(bar.text)} characters in all]"
    whole = html.escape(f"{head}\n\n{text}" if text else head)
    return (
        f'<button class="{bar.kind}" style="left:{left:.3f}%;width:{width:.3f}%;top:{18 * lane}px"'
        f' title="{html.escape(head)}" data-text="{whole}">{html.escape(bar.label)}</button>'
    )


def _lanes(bars: Sequence[Bar]) -> list[int]:
    """Returns the number of a lane for each bar: the first lane of the row that is free at that time.

    If bars begin at the same time, the longer one comes first, so that a round is above what happens in it.
    """
    ends: list[float] = []
    lanes = [0] * len(bars)
    for place in sorted(range(len(bars)), key=lambda each: (bars[each].start, -bars[each].end)):
        bar = bars[place]
        lane = next((number for number, end in enumerate(ends) if end <= bar.start), len(ends))
        ends[lane : lane + 1] = [bar.end]
        lanes[place] = lane
    return lanes


def _axis(seconds: float) -> str:
    return "".join(f'<span style="left:{10 * tick}%">{seconds * tick / 10:.3g} s</span>' for tick in range(10))


def _totals(rows: Iterable[Row], start: float, seconds: float) -> str:
    bars = [bar for row in rows for bar in row.bars]
    return "".join(_total(name, [bar for bar in bars if bar.kind in kinds], start, seconds) for name, kinds in _TOTALS)


def _total(name: str, bars: Sequence[Bar], start: float, seconds: float) -> str:
    """Returns a chart that shows how many of the bars overlap at each time."""
    changes = [0] * (_BINS + 1)
    for bar in bars:
        first = min(int(_BINS * (bar.start - start) / seconds), _BINS - 1)
        last = min(int(_BINS * (bar.end - start) / seconds), _BINS - 1)
        changes[first] += 1
        changes[last + 1] -= 1
    counts: list[int] = []
    for change in changes[:-1]:
        counts.append((counts[-1] if counts else 0) + change)
    most = max(counts)
    points = " ".join(f"{place},{40 - 40 * count / max(most, 1):.1f}" for place, count in enumerate(counts))
    chart = (
        f'<svg viewBox="0 0 {_BINS - 1} 40" preserveAspectRatio="none">'
        f'<polygon points="0,40 {points} {_BINS - 1},40"/></svg>'
    )
    return (
        f'<div class="row"><div class="label">{name}, at most {most}</div><div class="bars total">{chart}</div></div>'
    )


_PAGE: Final = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { font: 13px/1.4 system-ui, sans-serif; margin: 16px; }
h1 { font-size: 16px; margin: 0 0 4px; }
p { margin: 0 0 8px; opacity: .8; }
.legend span { margin-right: 12px; white-space: nowrap; }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 4px; border-radius: 2px; }
.row { display: flex; gap: 8px; border-top: 1px solid #8883; padding: 2px 0; }
.label { flex: 0 0 220px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; line-height: 18px; }
.failed .label { color: #c62828; }
.bars { position: relative; flex: 1; min-width: 0; }
.axis .bars { height: 18px; }
.axis span { position: absolute; font-size: 11px; opacity: .7; border-left: 1px solid #8886; padding-left: 3px; }
.total { height: 40px; }
.total svg { width: 100%; height: 100%; }
.total polygon { fill: #5c6bc0aa; }
button { position: absolute; height: 16px; min-width: 3px; padding: 0 2px; border: 0; border-radius: 2px;
  cursor: pointer; font: 11px/16px system-ui, sans-serif; text-align: left; overflow: hidden; white-space: nowrap;
  color: #000; }
button:focus { outline: 2px solid #1565c0; z-index: 1; }
.round { background: #d7ccc8; }
.queue { background: #cfd8dc; } .prompt { background: #90caf9; } .tokens, .reply { background: #64b5f6; }
.tool { background: #a5d6a7; } .retry { background: #ffe082; }
.swap { background: #ce93d8; } .error { background: #ef5350; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 40vh; overflow: auto; margin: 8px 0 0;
  padding: 8px; position: sticky; bottom: 0; background: Canvas; border-top: 2px solid #8886; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$summary</p>
<p class="legend">$legend</p>
$totals
<div class="row axis"><div class="label"></div><div class="bars">$axis</div></div>
$rows
<pre id="text">Click a bar to see its text.</pre>
<script>
document.addEventListener("click", (event) => {
  const text = event.target.dataset && event.target.dataset.text;
  if (text) document.getElementById("text").textContent = text;
});
</script>
</body>
</html>
""")
