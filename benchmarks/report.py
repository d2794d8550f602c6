"""Formats results as tables, in the same way for a terminal and for the documentation."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.processes import cores
from benchmarks.results import Result, Results, spread
from benchmarks.specification import OURS, Growth, Row, Table, TableLines

TIMES: Final = "\N{MULTIPLICATION SIGN}"
DASH: Final = "\N{EN DASH}"
_FAILURE_CHARACTERS: Final = 160


def format_ratios(table: Table, rows: Sequence[Row], peers: Sequence[str], results: Results) -> TableLines:
    """Returns a line for each row, with the figure of the baseline and the ratios of the other peers."""
    lines = [["", *(table.peers[name].title for name in peers), "spread", "our bar", ""]]
    for row in rows:
        name_of_baseline = row.baseline or table.baseline
        baseline, ours = results[row.key, name_of_baseline], results[row.key, OURS]
        cells = [_cell(row, results[row.key, name], baseline, is_baseline=name == name_of_baseline) for name in peers]
        lines.append([row.title, *cells, _spread(row, ours, baseline), _bar(row), _verdict(row, ours, baseline)])
    keys = {row.key for row in rows}
    return lines + [
        _growth_line(growth, table, peers, results) for growth in table.growths if {growth.first, growth.last} <= keys
    ]


def _cell(row: Row, result: Result, baseline: Result, *, is_baseline: bool) -> str:
    if result.figures and result.is_never:
        return "never"
    if result.median is None:
        return "failed*" if result.failure else DASH
    mark = "*" if result.failure else ""
    if row.is_absolute:
        return f"{result.median:.2f} {row.unit}{mark}"
    if is_baseline:
        return f"{format_figure(result.median)} {row.unit}{mark}"
    ratios = result.ratios(baseline)
    return f"{_ratio(median(ratios))}{mark}" if ratios else DASH


def _spread(row: Row, ours: Result, baseline: Result) -> str:
    if row.is_absolute:
        values = list(ours.known.values())
        return f"±{spread(values):.2f} {row.unit}" if len(values) > 1 else ""
    return _percent(ours.ratios(baseline))


def _bar(row: Row) -> str:
    if row.bar is None:
        return ""
    return f"+{row.bar:g} {row.unit}" if row.is_absolute else f"{row.bar:.2f}{TIMES}"


def _verdict(row: Row, ours: Result, baseline: Result) -> str:
    """Returns "ok" or "over" for a row with a bar, and nothing if it was not measured."""
    if row.bar is None:
        return ""
    if ours.figures and ours.is_never:
        return "over"
    if ours.median is None or baseline.median is None:
        return ""
    cost = ours.median - baseline.median if row.is_absolute else median(ours.ratios(baseline) or [0.0])
    return "ok" if cost <= row.bar else "over"


def _growth_line(growth: Growth, table: Table, peers: Sequence[str], results: Results) -> list[str]:
    growths = {name: results[growth.last, name].ratios(results[growth.first, name]) for name in peers}
    more = [ours / limit for ours, limit in zip(growths.get(OURS, ()), growths.get(table.baseline, ()), strict=False)]
    cells = [_ratio(median(each)) if each else DASH for each in growths.values()]
    verdict = ("ok" if median(more) <= growth.bar else "over") if more else ""
    return [growth.title, *cells, _percent(more), f"{growth.bar:.2f}{TIMES} the growth of the limit", verdict]


def format_figure(value: float) -> str:
    """Returns a figure with about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(value: float) -> str:
    return f"{format_figure(value)}{TIMES}"


def _percent(values: Sequence[float]) -> str:
    return f"±{spread(values) / median(values) * 100:.0f} %" if len(values) > 1 else ""


def list_notes(table: Table, rows: Sequence[Row], peers: Sequence[str], results: Results) -> list[str]:
    """Returns the lines below a table: the reasons for failures, and the peers that this environment lacks."""
    notes = [
        f"* {table.peers[name].title}, {row.title}: {result.failure.splitlines()[0][:_FAILURE_CHARACTERS]}"
        for row in rows
        for name in peers
        if (result := results.get((row.key, name))) is not None and result.failure
    ]
    missing = [info.title for name, info in table.peers.items() if name not in peers]
    if missing:
        notes.append(f"Not measured here: {', '.join(missing)}.")
    return notes + (table.notes(table, rows, results) if table.notes else [])


def describe_machine(table: Table, peers: Iterable[str], rounds: int, load_before: float, seconds: float) -> list[str]:
    """Returns lines with the time of the measurement, the machine and the versions of the packages."""
    pair = cores()
    pinning = f"server on core {pair[0]}, clients on core {pair[1]}" if pair else "processes are not pinned"
    times = "1 round" if rounds == 1 else f"{rounds} rounds"
    loads = f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {times} in {seconds / 60:.0f} minutes",
        f"{describe_processor()}, {os.cpu_count()} cores, {pinning}; load average {loads}",
        f"{platform.platform(terse=True)}, {platform.python_implementation()} {platform.python_version()}",
        ", ".join(f"{name} {version}" for name, version in _versions(table, peers).items()),
    ]


def _versions(table: Table, peers: Iterable[str]) -> dict[str, str]:
    versions: dict[str, str] = {}
    for distribution in (each for name in peers for each in table.peers[name].distributions):
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_processor() -> str:
    """Returns the name of the processor of this machine."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def as_plain(lines: Sequence[Sequence[str]]) -> str:
    """Returns a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    """Returns a table for the documentation."""
    head, *rest = lines
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rest])


def replace_section(page: str, name: str, text: str) -> str:
    """Returns the page with other text between the markers of a section.

    Raises:
        ValueError: The page has no such section.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no section between {begin} and {end}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
