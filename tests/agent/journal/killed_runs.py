"""Runs that are killed at a given point, and that go on in another process. `test_kills.py` starts this program.

    python -m tests.agent.journal.killed_runs API_BASE FOLDER KIND POINTS

KIND says what is counted: "writes" (before and after each transaction of the journal) or "awaits" (each turn of the
event loop that runs a task or a callback). POINTS is a range such as "0:500:1". For each point, one child process
begins a run and kills itself there, and further ones resume the run. A line of JSON says what came of it. The
program ends early when a run has come to its end without having reached its point.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from lmbridge import Agent, JournalError, LLMClient, Tool
from lmbridge.agent.journal import database, recorder, stored_options  # noqa: F401 - imported once, before the forks

TASK: Final = "Work."


class KillPoint:
    """Kills the process when it is passed for a given time."""

    def __init__(self, at: int) -> None:
        self._left = at

    def pass_by(self) -> None:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1


def count_writes(point: KillPoint) -> None:
    transaction = database.Database.transaction

    @contextmanager
    def counted(self: database.Database) -> Iterator[None]:
        with transaction(self):
            yield
            point.pass_by()
        point.pass_by()

    database.Database.transaction = counted  # type: ignore[method-assign]  # the point of this program


def count_awaits(point: KillPoint) -> None:
    run = asyncio.events.Handle._run

    def counted(self: asyncio.events.Handle) -> None:
        point.pass_by()
        run(self)

    asyncio.events.Handle._run = counted  # type: ignore[method-assign]  # the point of this program


def make_tools(log: Path) -> list[Tool]:
    """Returns tools that write to a log when they begin and when they end."""

    def note(word: str, name: str) -> None:
        with log.open("a") as file:
            file.write(f"{word} {name}\n")

    async def act(name: str) -> str:
        note("begin", name)
        await asyncio.sleep(0)
        note("end", name)
        return f"{name} is done"

    def act_in_thread(name: str) -> str:
        note("begin", name)
        note("end", name)
        return f"{name} is done"

    return [
        Tool.from_function(act, description="Acts."),
        Tool.from_function(act_in_thread, description="Acts."),
        Tool.from_function(act, name="look", description="Acts.", idempotent=True),
    ]


async def begin(api_base: str, journal: Path, log: Path) -> None:
    async with LLMClient(api_base, "m") as client:
        await Agent(client, tools=make_tools(log), max_rounds=3).run(TASK, journal=journal)


async def go_on(api_base: str, journal: Path, log: Path) -> dict[str, Any]:
    async with LLMClient(api_base, "m") as client:
        try:
            result = await Agent.resume(journal, client=client, tools=make_tools(log))
        except JournalError as error:
            if error.problem not in ("missing", "run"):
                raise
            # It was killed before it had begun.
            assert not log.exists()
            result = await Agent(client, tools=make_tools(log), max_rounds=3).run(TASK, journal=journal)
    return {
        "text": result.text,
        "rounds": result.rounds,
        "usage": result.usage,
        "messages": result.messages,
        "calls": log.read_text().splitlines(),
    }


def report(outcome: dict[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(outcome)}\n")
    sys.stdout.flush()


def in_child(work: Any) -> int:
    """Does some work in a child process, and returns its exit status, which is negative if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - reported to the test
            report({"error": f"{type(error).__name__}: {error}"})
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(api_base: str, folder: Path, kind: str, points: range) -> None:
    for number in points:
        journal, log = folder / f"{kind}-{number}.db", folder / f"{kind}-{number}.log"

        def begin_and_die(number: int = number, journal: Path = journal, log: Path = log) -> None:
            (count_writes if kind == "writes" else count_awaits)(KillPoint(number))
            asyncio.run(begin(api_base, journal, log))

        def go_on_twice(number: int = number, journal: Path = journal, log: Path = log) -> None:
            outcome = asyncio.run(go_on(api_base, journal, log))
            again = asyncio.run(go_on(api_base, journal, log))
            report({"point": number, **outcome, "is_same": again == outcome})

        status = in_child(begin_and_die)
        if in_child(go_on_twice) or status != -signal.SIGKILL:
            return


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], range(*map(int, sys.argv[4].split(":"))))
