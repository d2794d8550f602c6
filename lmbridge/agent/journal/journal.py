"""`Journal`: lists the runs in a file, and exports their steps.

`Agent.resume` continues a run from its journal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeVar

import attrs
import msgspec

from lmbridge._checks import invalid_argument
from lmbridge._text import shorten
from lmbridge.agent.journal.database import Database, StoredRun, StoredStep
from lmbridge.agent.journal.journal_file import JournalFile
from lmbridge.agent.journal.steps import BegunStep, Recording, RunStart, Step, decode, decode_step
from lmbridge.errors import JournalError

_T = TypeVar("_T")

JournalState = Literal["unfinished", "failed", "finished"]
"""The state of a run in a journal.

"unfinished": it is in progress, or was interrupted. "failed": it ended with an error, and can be resumed. "finished":
it has a result.
"""

_LISTED_RUNS: Final = 10
"""How many runs an error lists."""
_SHOWN_CHARACTERS: Final = 40
"""The most characters of a task that an error quotes."""


@attrs.frozen(kw_only=True)
class JournaledRun:
    """A run, as `Journal.runs` lists it."""

    id: str
    """The id of the run, for `Agent.resume` and `Journal.export`."""
    state: JournalState
    """Whether the run is "unfinished", has "failed" or is "finished"; see `JournalState`."""
    began: datetime
    """The time at which the run began, in UTC."""
    updated: datetime
    """The time at which its last step was written, in UTC."""
    task: str | list[Any]
    """The task, as a string or as content parts."""
    model: str | None
    """The model with which the run was admitted, or the requested one before that; None if neither is named."""


class Journal:
    """A file that keeps the steps of agent runs, so that a run can be resumed after its program was interrupted.

    The first run that uses the file creates it. Any number of runs and of processes on one machine can share it::

        result = await agent.run("Summarise the reports.", journal="runs.db")

    After an interruption, `Agent.resume` continues the run::

        result = await Agent.resume("runs.db", client=client, tools=[read_report])

    The file is a SQLite database, which only its owner can read. It must be on a disk of this machine, because SQLite's
    write-ahead log, which it uses, does not work on network drives.

    Args:
        path: The path of the file, which need not exist yet.

    Raises:
        LLMValidationError: The path is empty, or not a path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not os.fspath(path):
            raise invalid_argument("path", "the path of a file", path)
        self._path = os.fspath(path)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._path!r}>"

    @property
    def path(self) -> str:
        """The path of the file."""
        return self._path

    async def runs(self) -> list[JournaledRun]:
        """Returns the runs of the journal, the oldest first.

        Raises:
            JournalError: The journal does not exist, or it cannot be read.
        """
        return await read_journal(self, lambda database: [_describe_run(database, run) for run in database.runs()])

    async def export(self, run_id: str) -> str:
        """Returns all that the journal has about a run, as JSON.

        The JSON is an object with the task and the options of the run (`start`), and with its `steps` in order.

        Raises:
            JournalError: The journal does not have the run, or it cannot be read.
        """
        exported = await read_journal(self, lambda database: _export(database, run_id))
        return msgspec.json.format(msgspec.json.encode(exported), indent=2).decode()


async def read_journal(journal: Journal, function: Callable[[Database], _T]) -> _T:
    """Calls a function with the open database, in the thread of the journal, and returns its result.

    Raises:
        JournalError: The journal does not exist, or it cannot be read.
    """
    file = await JournalFile.open(journal.path)
    try:
        return await file.submit(function)
    finally:
        file.release()


def find_run(database: Database, run_id: str | None) -> StoredRun:
    """Returns the run that is to be resumed.

    Args:
        database: The journal.
        run_id: The id of the run. None means the only run that has no result, or the only run at all.

    Raises:
        JournalError: The run does not exist, or several runs can be meant.
    """
    if run_id is not None:
        run = database.run(run_id)
        if run is None:
            raise database.error("run", f"the journal has no run {run_id!r}", _name_one(database, database.runs()))
        return run
    runs = database.runs()
    candidates = [run for run in runs if run.state != "finished"]
    if not candidates and len(runs) == 1:
        candidates = runs
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        message = f"the journal has {len(candidates)} runs that can be resumed"
    else:
        message = f"all {len(runs)} runs of the journal are finished" if runs else "the journal has no runs"
    raise database.error("run", message, _name_one(database, candidates or runs))


def _name_one(database: Database, runs: Sequence[StoredRun]) -> str:
    """Returns the hint that asks the user to name one of several runs."""
    if not runs:
        return "begin a run with agent.run(task, journal=...)"
    described = [f"{run.id} ({run.state}: {_shown_task(database, run)})" for run in runs[:_LISTED_RUNS]]
    more = f" and {len(runs) - _LISTED_RUNS} more" if len(runs) > _LISTED_RUNS else ""
    return f"pass run_id= with one of these: {', '.join(described)}{more}"


def _shown_task(database: Database, run: StoredRun) -> str:
    task = read_start(database, run).task
    return shorten(task if isinstance(task, str) else "a task of several parts", _SHOWN_CHARACTERS)


def _describe_run(database: Database, run: StoredRun) -> JournaledRun:
    start, last = read_start(database, run), database.last_step(run.id)
    return JournaledRun(
        id=run.id,
        state=_state(run),
        began=_moment(database, run.began),
        updated=_moment(database, run.began if last is None else last.at),
        task=start.task,
        model=begun_model(database, run),
    )


def begun_model(database: Database, run: StoredRun) -> str | None:
    """Returns the model with which a run was admitted, or the requested one if it has not been admitted yet."""
    first = database.first_step(run.id)
    begun = None if first is None else read_step(run.id, first, path=database.path)
    return begun.model if isinstance(begun, BegunStep) else read_start(database, run).model


def _state(run: StoredRun) -> JournalState:
    return "finished" if run.state == "finished" else "failed" if run.state == "failed" else "unfinished"


def _export(database: Database, run_id: str) -> dict[str, Any]:
    run = find_run(database, run_id)
    steps = [
        {"kind": step.kind, "at": _moment(database, step.at), "data": _decode_row(database, step.data)}
        for step in database.steps(run_id)
    ]
    began, start = _moment(database, run.began), _decode_row(database, run.start)
    return {"id": run.id, "state": run.state, "began": began, "start": start, "steps": steps}


def _moment(database: Database, seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError) as exc:
        raise damaged(f"{seconds} is not a time: {exc}", path=database.path) from exc


def _decode_row(database: Database, data: str) -> Any:
    try:
        return msgspec.json.decode(data)
    except (ValueError, RecursionError) as exc:
        raise damaged(f"a row of the run cannot be read: {exc}", path=database.path) from exc


def read_step(run_id: str, stored: StoredStep, *, path: str) -> Step:
    """Returns a step of a run in the journal at a path.

    Raises:
        JournalError: The step cannot be read.
    """
    try:
        return decode_step(stored)
    except (ValueError, RecursionError) as exc:
        raise damaged(f"step {stored.number} of the run {run_id!r} cannot be read: {exc}", path=path) from exc


def read_recording(run_id: str, stored: Sequence[StoredStep], *, path: str) -> Recording:
    """Returns the steps of a run in the journal at a path, in the form in which they are replayed.

    Raises:
        JournalError: The steps cannot be read, or contradict each other.
    """
    steps = [read_step(run_id, each, path=path) for each in stored]
    try:
        return Recording.of(steps)
    except (ValueError, LookupError) as exc:
        raise damaged(f"the steps of the run {run_id!r} cannot be read: {exc}", path=path) from exc


def read_start(database: Database, run: StoredRun) -> RunStart:
    """Returns the task and the options with which a run began.

    Raises:
        JournalError: They cannot be read.
    """
    try:
        return decode(run.start, RunStart)
    except (ValueError, RecursionError) as exc:
        raise damaged(f"the start of the run {run.id!r} cannot be read: {exc}", path=database.path) from exc


def damaged(message: str, *, path: str) -> JournalError:
    """Returns the error about a journal whose rows are not what lmbridge has written."""
    return JournalError(message, problem="damaged", hint="something else has changed the journal", path=path)
