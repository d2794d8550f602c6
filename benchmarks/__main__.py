"""Measures tables, prints them, and writes them into the documentation with `--write`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import report
from benchmarks.processes import ROOT
from benchmarks.results import Results
from benchmarks.runner import measure_table
from benchmarks.specification import Table
from benchmarks.tables import TABLES

DOCS: Final = ROOT / "docs"


def parse_arguments() -> argparse.Namespace:
    listed = "\n".join(f"  {table.name:12} {table.about}; rows: {_keys(table)}" for table in TABLES.values())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"tables:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="default: all that this environment can measure")
    parser.add_argument("--rounds", type=int, help="default: as many as the table needs")
    parser.add_argument("--only", default="", metavar="ROW", help="measure the rows whose name contains this")
    parser.add_argument("--peers", default="", help="measure these columns, separated by commas, and the baseline")
    parser.add_argument("--tiny", action="store_true", help="use sizes that only show that everything works")
    parser.add_argument("--write", action="store_true", help="write the tables and charts in docs/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    arguments = parser.parse_args()
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if unknown := set(arguments.tables) - set(TABLES):
        parser.error(f"there is no table {', '.join(sorted(unknown))}; there are: {', '.join(TABLES)}")
    chosen = [TABLES[name] for name in arguments.tables or TABLES]
    if unknown := set(filter(None, arguments.peers.split(","))).difference(*(table.peers for table in chosen)):
        parser.error(f"there is no column {', '.join(sorted(unknown))}")
    if not any(arguments.only in row.key for table in chosen for row in table.rows):
        parser.error(f"no row has a name with {arguments.only!r}")
    if arguments.write and (arguments.only or arguments.tiny or arguments.peers):
        parser.error("--write needs whole tables: leave out --only, --peers and --tiny")
    return arguments


def _keys(table: Table) -> str:
    return ", ".join(row.key for row in table.rows)


def report_progress(text: str) -> None:
    """Shows what is being measured in the last line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def run_table(table: Table, arguments: argparse.Namespace) -> Results:
    """Measures a table, prints it, and writes it into the documentation if that was asked for."""
    wanted = arguments.peers.split(",") if arguments.peers else list(table.peers)
    peers = [name for name in table.installed_peers() if name in wanted or name == table.baseline]
    reasons = {row.key: row.why_missing() for row in table.rows}
    rows = [row for row in table.rows if arguments.only in row.key and reasons[row.key] is None]
    rounds = arguments.rounds or table.rounds
    began, load = time.monotonic(), os.getloadavg()[0]
    results = measure_table(table, rows, peers, rounds, report_progress, tiny=arguments.tiny)
    report_progress("")
    lines = table.format(table, rows, results) if table.format else report.format_ratios(table, rows, peers, results)
    notes = report.list_notes(table, rows, peers, results)
    notes += [
        f"Not measured here: {row.title} ({reason})."
        for row in table.rows
        if arguments.only in row.key and (reason := reasons[row.key])
    ]
    notes += [
        f"Not measured here: {info.title} (it needs Python {'.'.join(map(str, info.python))} or newer)."
        for name, info in table.peers.items()
        if name in wanted and info.needs_newer_python()
    ]
    machine = report.describe_machine(table, peers, rounds, load, time.monotonic() - began)
    print("\n\n".join([table.name, report.as_plain(lines), "\n".join([*notes, *machine]), ""]))
    if arguments.write:
        write(table, lines, notes, machine)
        if table.draw:
            (DOCS / table.chart).write_text(table.draw(table, results))
    return results


def write(table: Table, lines: Sequence[Sequence[str]], notes: Sequence[str], machine: Sequence[str]) -> None:
    """Replaces the sections of the table in its page: the table, its notes, and the machine."""
    page = (DOCS / table.page).read_text()
    sections = {
        table.name: report.as_markdown(lines),
        f"{table.name}-notes": "\n".join(f"- {line.removeprefix('* ')}" for line in notes),
        f"{table.name}-machine": "\n".join(f"- {line}" for line in machine),
    }
    for name, text in sections.items():
        page = report.replace_section(page, name, text)
    (DOCS / table.page).write_text(page)


def main() -> None:
    arguments = parse_arguments()
    figures = {}
    for name in arguments.tables or TABLES:
        table = TABLES[name]
        if not any(arguments.only in row.key for row in table.rows):
            continue
        if reason := table.why_missing():
            print(f"{name}: skipped, because {reason}\n")
            continue
        results = run_table(table, arguments)
        figures[name] = {f"{row} / {peer}": result.as_json() for (row, peer), result in results.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
