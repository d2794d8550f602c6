"""What the commands that measure one table have in common: their options, and where the table goes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from benchmarks import report
from benchmarks.processes import ROOT
from benchmarks.run import Results

PAGE: Final = ROOT / "docs" / "performance.md"
ROUNDS: Final = 9


def arguments(module: str, about: str | None, option: str, known: Collection[str], told: str) -> argparse.Namespace:
    """What the command was given; `chosen` are those of the known ones that are to be measured.

    Args:
        module: The command's.
        about: What it does.
        option: The name of the option that chooses.
        known: What there is to choose from.
        told: What to say of that option.
    """
    everything = ",".join(known)
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(option, dest="chosen", default=everything, help=told)
    parser.add_argument("--tiny", action="store_true", help="sizes that only show whether it works")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name} in docs/")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds is at least 1")
    if given.write and (given.tiny or given.chosen != everything):
        parser.error("only a full run is written")
    given.chosen = given.chosen.split(",")
    if unknown := set(given.chosen) - set(known):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    return given


def publish(
    given: argparse.Namespace,
    section: str,
    lines: Sequence[Sequence[str]],
    below: Sequence[str],
    where: Sequence[str],
    results: Results,
) -> None:
    """Prints the table, and writes it and the figures to where the command was told.

    Args:
        given: What `arguments` returned.
        section: The name of the table in the page.
        lines: The table.
        below: What is to be said of it.
        where: On which machine it was made.
        results: The figures.
    """
    print("\n\n".join([report.plain(lines), "\n".join([*below, *where])]))
    if given.json:
        figures = {f"{row} / {name}": each.as_json() for (row, name), each in results.items()}
        given.json.write_text(json.dumps(figures, indent=1))
    if given.write:
        page = report.replaced(PAGE.read_text(), section, "\n".join([report.markdown(lines), *below]))
        PAGE.write_text(report.replaced(page, f"{section}-machine", "\n".join(f"- {line}" for line in where)))
