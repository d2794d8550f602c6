"""Results as tables for people, the same in a terminal and in the documentation."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.peers import PEERS, About, versions
from benchmarks.processes import cores
from benchmarks.rows import Row, Sweep
from benchmarks.run import Result, Results, spread

TIMES: Final = "\N{MULTIPLICATION SIGN}"
DASH: Final = "\N{EN DASH}"


def machine(
    names: Iterable[str], rounds: int, load_before: float, seconds: float, among: Mapping[str, About] = PEERS
) -> list[str]:
    """What was measured with what, where and when."""
    pinned = cores()
    pinning = f"server on core {pinned[0]}, clients on core {pinned[1]}" if pinned else "nothing pinned"
    found = versions(names, among)
    loads = f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {rounds} rounds in {seconds / 60:.0f} minutes",
        f"{_processor()}, {os.cpu_count()} cores, {pinning}; load average {loads}",
        f"{platform.platform(terse=True)}, {platform.python_implementation()} {platform.python_version()}",
        ", ".join(f"{name} {version}" for name, version in found.items()),
    ]


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def figure(value: float) -> str:
    """With as many digits as it is worth."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float) -> str:
    return f"{value:.0f}{TIMES}" if value >= 100 else f"{value:.1f}{TIMES}" if value >= 10 else f"{value:.2f}{TIMES}"


def percent(values: Sequence[float]) -> str:
    return f"±{spread(values) / median(values) * 100:.0f} %" if len(values) > 1 else ""


def verdict(row: Row, ours: Result, limit: Result) -> str:
    """Whether lmbridge is within our bar."""
    if ours.middle is None or limit.middle is None:
        return "" if not ours.never or not ours.figures else "over"
    more = ours.middle - limit.middle if row.absolute else median(ours.ratios(limit))
    return "ok" if more <= row.bar else "over"


def table(rows: Sequence[Row], names: Sequence[str], results: Results) -> list[list[str]]:
    """The first table: a line for each row, and the heading before them."""
    lines = [["", *(PEERS[name].title for name in names), "spread", "our bar", ""]]
    for row in rows:
        limit = results[row.key, "limit"]
        ours = results[row.key, "lmbridge"]
        bar = f"+{row.bar:g} ms" if row.absolute else f"{row.bar:.2f}{TIMES}"
        cells = [_cell(row, name, results[row.key, name], limit) for name in names]
        spreads = percent(ours.ratios(limit)) if not row.absolute else _milliseconds(ours)
        lines.append([row.title, *cells, spreads, bar, verdict(row, ours, limit)])
    return lines


def _milliseconds(result: Result) -> str:
    values = list(result.known.values())
    return f"±{spread(values):.2f} ms" if len(values) > 1 else ""


def _cell(row: Row, name: str, result: Result, limit: Result) -> str:
    if result.figures and result.never:
        return "never"
    if result.middle is None:
        return "failed*" if result.failed else DASH
    if row.absolute:
        return f"{result.middle:.2f} {row.unit}"
    if name == "limit":
        return f"{figure(result.middle)} {row.unit}"
    ratios = result.ratios(limit)
    mark = "*" if result.failed else ""
    return f"{ratio(median(ratios))}{mark}" if ratios else DASH


def notes(rows: Sequence[Row], names: Sequence[str], results: Results) -> list[str]:
    """What a star in the table means."""
    return [
        f"* {PEERS[name].title}, {row.title}: {result.failed.splitlines()[0][:160]}"
        for row in rows
        for name in names
        if (result := results[row.key, name]).failed
    ]


def steady_table(sweeps: Sequence[Sweep], results: Results, *, tiny: bool = False) -> list[list[str]]:
    """The second table."""
    lines = [["µs CPU", "limit", "growth", "lmbridge", "growth", "spread", "our bar", ""]]
    for sweep in sweeps:
        values = sweep.tiny_values if tiny else sweep.values
        cells = [sweep.title.format(", ".join(f"{value:,}" for value in values))]
        growths = {}
        for name in ("limit", "lmbridge"):
            figures = [results[f"{sweep.key} {value}", name] for value in values]
            cells.append(" · ".join(DASH if each.middle is None else figure(each.middle) for each in figures))
            base = figures[values.index(sweep.since) if sweep.since in values else 0]
            growths[name] = figures[-1].ratios(base)
            cells.append(ratio(median(growths[name])) if growths[name] else figures[-1].failed)
        more = [ours / limit for ours, limit in zip(growths["lmbridge"], growths["limit"], strict=False)]
        passed = ("ok" if median(more) <= sweep.bar else "over") if more else ""
        lines.append([*cells, percent(growths["lmbridge"]), f"{sweep.bar:.2f}{TIMES} the limit's", passed])
    return lines


def plain(lines: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table for the documentation."""
    head, *rest = lines
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rest])


def replaced(page: str, name: str, text: str) -> str:
    """The page with what stands between the markers of that name replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no {begin} ... {end}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
