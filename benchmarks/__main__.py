"""Measures, prints the tables, and writes them into the documentation if told to."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks import report
from benchmarks.chart import COLOURS, chart
from benchmarks.peers import PEERS
from benchmarks.processes import ROOT
from benchmarks.rows import ROWS, SWEEPS, Row
from benchmarks.run import STEADY_ROUNDS, Results, rows_of, sweeps_of

PAGE: Final = ROOT / "docs" / "performance.md"
CHART: Final = ROOT / "docs" / "performance.svg"
ROUNDS: Final = 15


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default="", help="rows whose name holds this: " + ", ".join(_names()))
    parser.add_argument("--peers", default=",".join(PEERS), help="these clients only; the limit is always one")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show whether it works")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} and {CHART.name} in docs/")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds is at least 1")
    unknown = set(given.peers.split(",")) - set(PEERS)
    if unknown:
        parser.error(f"there is no client {', '.join(sorted(unknown))}")
    if not any(given.only in name for name in _names()):
        parser.error(f"there is no row {given.only!r}")
    if given.write and (given.only or given.tiny or given.peers != ",".join(PEERS)):
        parser.error("only a full run is written")
    return given


def _names() -> list[str]:
    return [each.key for each in (*ROWS, *SWEEPS)]


def installed(names: Sequence[str]) -> list[str]:
    """The clients that can be imported here, the limit first."""
    return [
        name
        for name, about in PEERS.items()
        if name == "limit" or (name in names and importlib.util.find_spec(about.imports.partition(",")[0]))
    ]


def tell(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def write(rows: Sequence[Row], results: Results, first: str, second: str, where: str) -> None:
    """Brings the documentation up to date."""
    page = PAGE.read_text()
    for name, text in (("table", first), ("steady", second), ("machine", where)):
        page = report.replaced(page, name, text)
    bars = []
    for row in rows:
        if not row.absolute:
            limit = results[row.key, "limit"]
            ratios = {name: results[row.key, name].ratios(limit) for name in COLOURS}
            bars.append((row.title, {name: median(values) for name, values in ratios.items() if values}))
    PAGE.write_text(page)
    CHART.write_text(chart(bars, {name: PEERS[name].title for name in COLOURS}))


def main() -> None:
    given = arguments()
    began, load = time.monotonic(), os.getloadavg()[0]
    names = installed(given.peers.split(","))
    rows = [row for row in ROWS if given.only in row.key]
    sweeps = [sweep for sweep in SWEEPS if given.only in sweep.key]
    results = rows_of(rows, names, given.rounds, tell, tiny=given.tiny) if rows else {}
    steady = sweeps_of(sweeps, min(given.rounds, STEADY_ROUNDS), tell, tiny=given.tiny) if sweeps else {}
    tell("")
    tables = [report.table(rows, names, results)] if rows else []
    if sweeps:
        tables.append(report.steady_table(sweeps, steady, tiny=given.tiny))
    where = report.machine(names, given.rounds, load, time.monotonic() - began)
    stars = report.notes(rows, names, results)
    print("\n\n".join([*map(report.plain, tables), "\n".join([*stars, *where])]))
    if given.json:
        figures = {f"{row} / {name}": each.as_json() for (row, name), each in {**results, **steady}.items()}
        given.json.write_text(json.dumps(figures, indent=1))
    if given.write:
        first, second = map(report.markdown, tables)
        write(rows, results, "\n".join([first, *stars]), second, "\n".join(f"- {line}" for line in where))


if __name__ == "__main__":
    main()
