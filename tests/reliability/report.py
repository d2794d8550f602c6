"""Prints the figures of a command, and writes them between the markers of its section in docs/reliability.md."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from benchmarks.report import as_markdown, as_plain, replace_section

PAGE: Final = Path(__file__).parents[2] / "docs" / "reliability.md"


def progress(text: str) -> None:
    """Shows what is being done."""
    print(text, file=sys.stderr, flush=True)


def describe_step(step: int, noun: str) -> str:
    """Says which of many places were tried, for a note."""
    return f"tried at every {noun}" if step == 1 else f"tried at one {noun} of {step}"


def publish(name: str, lines: Sequence[Sequence[str]], notes: Sequence[str], began: float, *, write: bool) -> None:
    """Prints a table with its notes, and replaces the section `name` of the page with both if `write`."""
    minutes = (time.monotonic() - began) / 60
    machine = (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {minutes:.0f} minutes, {os.cpu_count()} cores,"
        f" {platform.platform(terse=True)}, {platform.python_implementation()} {platform.python_version()}"
    )
    print("\n\n".join([name, as_plain(lines), "\n".join([*notes, machine])]))
    if write:
        text = "\n\n".join([as_markdown(lines), "\n".join(f"- {each}" for each in [*notes, machine])])
        PAGE.write_text(replace_section(PAGE.read_text(), name, text))
