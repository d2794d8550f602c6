"""Measures what a journal costs: steps a second, and bytes a round.

    python -m benchmarks.journal_cost

It writes to a file in the current directory, because the system's folder for temporary files may be in memory. The
baseline is the same transaction by sqlite3 itself, with nothing around it.
"""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from lmbridge.agent.journal.resuming import JournalEntry, new_recorder
from lmbridge.agent.reply import ModelReply
from lmbridge.agent.run_journal import RecordedCall, RecordedReply, RecordedResult
from lmbridge.agent.settings import Settings

ROUNDS: Final = 50
CALLS: Final = 2
"""The calls of a round, which are made at the same time."""
RESULT: Final = "x" * 500
STEPS: Final = ROUNDS * (2 + 2 * CALLS)
"""The steps of a run: in each round the reply, the plan, and the start and the end of each call."""


async def record_run(path: Path, number: int) -> None:
    """Records a run of some rounds, each with parallel calls."""
    entry = JournalEntry(path, run_id=f"run-{number}")
    recorder = new_recorder(entry, task="Go.", messages=None, model="m", settings=Settings())
    await recorder.open()
    await recorder.begin("m", ["act"])
    for round_number in range(1, ROUNDS + 1):
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
    """Returns the seconds of as many transactions of sqlite3, each with a row of the size of a step."""
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


async def record_runs(path: Path, runs: int) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(record_run(path, number) for number in range(runs)))
    return time.perf_counter() - began


def main() -> None:
    with folder() as place:
        seconds = bare_transactions(place / "bare.db", STEPS)
        print(f"sqlite3 alone: {STEPS / seconds:,.0f} transactions a second")
    bytes_a_round = 0.0
    for runs in (1, 10, 100):
        with folder() as place:
            seconds = asyncio.run(record_runs(place / "runs.db", runs))
            bytes_a_round = (place / "runs.db").stat().st_size / runs / ROUNDS
        print(f"runs at once: {runs}: {runs * STEPS / seconds:,.0f} steps a second")
    print(f"{bytes_a_round:,.0f} bytes a round with {CALLS} calls, whose results have {CALLS * len(RESULT)} characters")


if __name__ == "__main__":
    main()
