"""Measures what a journal costs: steps a second, and bytes a round.

    python -m benchmarks.journal_cost           # a minute or two, depending on the disk
    python -m benchmarks.journal_cost --tiny    # a second, and figures that mean little
    python -m benchmarks.journal_cost --write   # writes the table of docs/durable-runs.md

It writes to a file in the current directory, because the system's folder for temporary files may be in memory. The
baseline is the same transaction by sqlite3 itself, with nothing around it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from benchmarks.processes import ROOT
from benchmarks.report import as_markdown, as_plain, describe_processor, replace_section
from lmbridge.agent.journal.stored_options import JournalEntry, new_recorder
from lmbridge.agent.journal_interface import RecordedCall, RecordedReply, RecordedResult
from lmbridge.agent.model_reply import ModelReply
from lmbridge.agent.settings import Settings

ROUNDS: Final = 50
RUNS: Final = (1, 10, 100)
"""The numbers of runs that are recorded at once."""
CALLS: Final = 2
"""The calls of a round, which are made at the same time."""
RESULT: Final = "x" * 500
STEPS: Final = 2 + 2 * CALLS
"""The steps of a round: the reply, the plan, and the start and the end of each call."""


async def record_run(path: Path, number: int, rounds: int) -> None:
    """Records a run of some rounds, each with parallel calls."""
    entry = JournalEntry(path, run_id=f"run-{number}")
    recorder = new_recorder(entry, task="Go.", messages=None, model="m", settings=Settings())
    await recorder.open()
    await recorder.begin("m", ["act"])
    for round_number in range(1, rounds + 1):
        function = {"name": "act", "arguments": '{"name": "something"}'}
        reply = ModelReply(
            text="I have to act twice before I can say more about it.",
            reasoning="",
            is_only_reasoning=False,
            reasoning_fields={},
            calls=[{"id": f"call_{place}", "type": "function", "function": function} for place in range(CALLS)],
            finish_reason="tool_calls",
            usage={"prompt_tokens": 1000, "completion_tokens": 40, "total_tokens": 1040},
        )
        await recorder.add_reply(RecordedReply(round=round_number, reply=reply, served_model="m", image_place="user"))
        await recorder.plan(
            [RecordedCall(place=place, id="call", name="act", arguments={"name": "it"}) for place in range(CALLS)]
        )
        await asyncio.gather(*(recorder.start(place) for place in range(CALLS)))
        result = RecordedResult(text=RESULT, is_error=False)
        await asyncio.gather(*(recorder.finish(place, result) for place in range(CALLS)))
    await recorder.close()


def bare_transactions(path: Path, count: int) -> float:
    """Returns the seconds that `count` transactions of sqlite3 take. Each inserts a row of the size of a step."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE steps (number INTEGER PRIMARY KEY, data TEXT)")
        began = time.perf_counter()
        for number in range(count):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO steps VALUES (?, ?)", (number, RESULT))
            connection.execute("COMMIT")
        return time.perf_counter() - began


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        yield Path(name)


async def record_runs(path: Path, runs: int, rounds: int) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(record_run(path, number, rounds) for number in range(runs)))
    return time.perf_counter() - began


def stored_bytes(path: Path) -> int:
    """Returns the size of a database without what its write-ahead log has in addition."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path.stat().st_size


def measure(rounds: int) -> list[list[str]]:
    """Returns the lines of the table.

    Args:
        rounds: The rounds of each run.
    """
    lines = [["", "steps a second", "bytes a round"]]
    with folder() as place:
        seconds = bare_transactions(place / "bare.db", STEPS * rounds)
        lines.append(["sqlite3 alone, a transaction for each step", f"{STEPS * rounds / seconds:,.0f}", ""])
    for runs in RUNS:
        with folder() as place:
            seconds = asyncio.run(record_runs(place / "runs.db", runs, rounds))
            size = stored_bytes(place / "runs.db") / runs / rounds
        title = "a journal, one run" if runs == 1 else f"a journal, {runs} runs at once"
        lines.append([title, f"{runs * STEPS * rounds / seconds:,.0f}", f"{size:,.0f}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.journal_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tiny", action="store_true", help="record runs of one round")
    parser.add_argument("--write", action="store_true", help="write the table in docs/")
    arguments = parser.parse_args()
    if arguments.tiny and arguments.write:
        parser.error("--write needs whole runs: leave out --tiny")
    load = os.getloadavg()[0]
    lines = measure(1 if arguments.tiny else ROUNDS)
    machine = (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {describe_processor()}, {os.cpu_count()} cores; "
        f"load average {load:.1f} before, {os.getloadavg()[0]:.1f} after"
    )
    print(f"{as_plain(lines)}\n\n{machine}")
    if arguments.write:
        page = ROOT / "docs" / "durable-runs.md"
        page.write_text(replace_section(page.read_text(), "journal-cost", f"{as_markdown(lines)}\n\n{machine}"))


if __name__ == "__main__":
    main()
