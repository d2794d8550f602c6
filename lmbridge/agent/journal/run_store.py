"""`RunStore`: writes the steps of runs, either itself or through another process that has the file open.

The recorder of a run knows the file only through this protocol. In a fleet of several machines, the file is on one of
them, because SQLite needs a local disk. The other machines write through a process on that machine (an actor of Ray).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Protocol, TypeVar

from lmbridge._tasks import mark_exception_retrieved
from lmbridge.agent.journal.database import Database, StoredStep
from lmbridge.agent.journal.journal import JournalState, read_start
from lmbridge.agent.journal.journal_file import JournalFile
from lmbridge.agent.journal.steps import RunStart, Step, encode, encode_step
from lmbridge.errors import JournalError

_T = TypeVar("_T")


class RunStore(Protocol):
    """Writes the steps of those runs of one journal that are in progress."""

    @property
    def path(self) -> str:
        """The path of the journal."""
        ...

    async def open_run(self, run_id: str, start: RunStart) -> list[StoredStep]:
        """Claims a run, adds it if it is new, and returns its steps.

        Raises:
            JournalError: The journal cannot be used, or the run is in progress elsewhere, or has another task or output
                type.
        """
        ...

    async def add_step(self, run_id: str, number: int, step: Step, state: JournalState | None) -> None:
        """Adds a step, and changes the state of the run unless it is None.

        The step is written even if the caller is cancelled.

        Raises:
            JournalError: The journal cannot be used, or the run is not open.
        """
        ...

    async def release_run(self, run_id: str) -> None:
        """Releases a run as soon as all its steps are on disk. It is idempotent."""
        ...


class FileStore:
    """Writes the steps of runs into a file, which is open as long as at least one of the runs is in progress.

    A store owns the runs that it has opened: until it releases a run, no other store can open it.

    Args:
        path: The path of the journal.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._files: dict[str, JournalFile] = {}

    @property
    def path(self) -> str:
        """The path of the journal."""
        return self._path

    async def open_run(self, run_id: str, start: RunStart) -> list[StoredStep]:
        """See `RunStore`."""
        if run_id not in self._files:
            file = await JournalFile.open(self._path)
            # The store uses the file once for each run, even if the run was opened a second time in the meantime.
            if run_id in self._files:
                file.release()
            else:
                self._files[run_id] = file

        def open_run(database: Database) -> list[StoredStep]:
            if not database.locks.claim(run_id, self):
                hint = "wait for its end, or end the program that runs it"
                raise database.error("in_use", f"the run {run_id!r} is in progress", hint)
            run = database.run(run_id)
            if run is None:
                database.add_run(run_id, "unfinished", encode(start))
                return []
            begun_with = read_start(database, run)
            if (begun_with.task, begun_with.messages) != (start.task, start.messages):
                hint = "give each task its own run_id"
                raise database.error("mismatch", f"the run {run_id!r} was begun with another task", hint)
            if mismatch := begun_with.output_mismatch(start.output_schema):
                reason, hint = mismatch
                raise database.error("mismatch", f"the run {run_id!r} cannot be resumed: {reason}", hint)
            return database.steps(run_id)

        return await self._submit(run_id, open_run, create=True)

    async def add_step(self, run_id: str, number: int, step: Step, state: JournalState | None) -> None:
        """See `RunStore`."""

        def write(database: Database) -> None:
            # A step may be large, so it is encoded in the thread of the journal.
            database.add_steps(run_id, number, [encode_step(step)])
            if state is not None:
                database.set_state(run_id, state)

        await self._submit(run_id, write)

    async def release_run(self, run_id: str) -> None:
        """See `RunStore`."""
        file = self._files.pop(run_id, None)
        if file is None:
            return
        released = file.submit(lambda database: database.locks.release(run_id, self))
        # The release fails if the file could not be opened, which `open_run` has already reported.
        released.add_done_callback(mark_exception_retrieved)
        file.release()
        await asyncio.wait([released])

    def _submit(self, run_id: str, function: Callable[[Database], _T], *, create: bool = False) -> asyncio.Future[_T]:
        file = self._files.get(run_id)
        if file is None:
            raise JournalError(
                f"the run {run_id!r} was released while it was in progress",
                problem="in_use",
                hint="run it in only one program at a time",
                path=self._path,
            )
        return file.submit(function, create=create)
