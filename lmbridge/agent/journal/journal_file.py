"""`JournalFile`: an open journal with its own thread, which does everything that blocks.

A run waits until each of its steps is on disk, which takes milliseconds, and a connection of SQLite belongs to one
thread. So each journal has one thread for all runs of the process. The thread takes all steps that wait for it, and
writes them in one transaction. So the results of tools that end at the same time, or the steps of a hundred runs, need
only one flush of the disk. In a pool of threads, each would need its own connection and its own flushes.

The thread ends when the journal is no longer used. It is a daemon, so that it never keeps a program from ending. Steps
that are lost when the program ends do no harm, because a run continues only after its step has been written.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

import attrs

from lmbridge._tasks import call_in_loop
from lmbridge.agent.journal.database import Database

_T = TypeVar("_T")

_MOST_AT_ONCE: Final = 500
"""The largest number of pieces of work that share one transaction."""


@attrs.define(eq=False)
class _Work:
    """A piece of work that waits for the thread of the journal."""

    function: Callable[[Database], Any]
    create: bool
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


class JournalFile:
    """An open journal, shared by all runs of the process that use it. Get it from `open`, and `release` it later."""

    _files: ClassVar[dict[str, JournalFile]] = {}
    # The threads of journals that are being closed, by path. The next thread for the same path waits until its
    # predecessor has ended, because both would otherwise hold locks on the same file.
    _closing: ClassVar[dict[str, threading.Thread]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: str, predecessor: threading.Thread | None) -> None:
        self._path = path
        self._predecessor = predecessor
        self._users = 0
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="lmbridge-journal", daemon=True)

    @classmethod
    async def open(cls, path: str | os.PathLike[str]) -> JournalFile:
        """Returns the open journal at a path. The file itself is opened by the first piece of work."""
        opening = asyncio.ensure_future(asyncio.to_thread(cls._open, path))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_release_opened)
            raise

    @classmethod
    def _open(cls, path: str | os.PathLike[str]) -> JournalFile:
        real = os.path.realpath(path)
        with cls._lock:
            file = cls._files.get(real)
            if file is None:
                file = cls._files[real] = cls(real, cls._closing.pop(real, None))
                file._thread.start()
            file._users += 1
            return file

    def release(self) -> None:
        """Closes the journal when all its work is done, unless another run still uses it."""
        with JournalFile._lock:
            self._users -= 1
            if not self._users:
                del JournalFile._files[self._path]
                JournalFile._closing[self._path] = self._thread
                self._queue.put(None)

    def submit(self, function: Callable[[Database], _T], *, create: bool = False) -> asyncio.Future[_T]:
        """Lets the thread do a piece of work, in the order of the calls, and returns the future of its result.

        The work is done even if the future is cancelled.

        Args:
            function: The work. If it raises an exception, what it has written is undone. It may be called twice: if one
                of the pieces of work in a transaction fails, all of them are done again, one by one.
            create: Whether the file is created if it does not exist.
        """
        loop = asyncio.get_running_loop()
        work = _Work(function, create, loop.create_future(), loop)
        self._queue.put(work)
        return work.future

    # In the thread

    def _work(self) -> None:
        if self._predecessor is not None:
            self._predecessor.join()
            self._predecessor = None
        database: Database | None = None
        is_open = True
        while is_open:
            batch, is_open = self._next_batch()
            if batch and database is None:
                try:
                    database = Database(Path(self._path), create=any(each.create for each in batch))
                except Exception as error:  # noqa: BLE001 - the callers that wait get it
                    for each in batch:
                        _deliver(each, None, error)
                    continue
            if database is not None:
                _do_together(batch, database)
        if database is not None:
            database.close()
        with JournalFile._lock:
            if JournalFile._closing.get(self._path) is self._thread:
                del JournalFile._closing[self._path]

    def _next_batch(self) -> tuple[list[_Work], bool]:
        """Waits for work. Returns all work that is waiting, and whether more may follow."""
        batch: list[_Work] = []
        item = self._queue.get()
        while item is not None:
            batch.append(item)
            if len(batch) == _MOST_AT_ONCE:
                return batch, True
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return batch, True
        return batch, False


def _do_together(batch: list[_Work], database: Database) -> None:
    """Does several pieces of work in one transaction; if that fails, each piece in a separate transaction."""
    try:
        with database.transaction():
            results = [each.function(database) for each in batch]
    except Exception as error:  # noqa: BLE001 - the callers that wait get it
        if len(batch) == 1:
            _deliver(batch[0], None, error)
        else:
            for each in batch:
                _do_together([each], database)
        return
    for each, result in zip(batch, results, strict=True):
        _deliver(each, result, None)


def _deliver(work: _Work, result: Any, error: Exception | None) -> None:
    def deliver() -> None:
        if work.future.done():
            return
        if error is None:
            work.future.set_result(result)
        else:
            work.future.set_exception(error)

    # If the loop has been closed, no task is waiting for the result.
    call_in_loop(work.loop, deliver)


def _release_opened(opening: asyncio.Future[JournalFile]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().release()


def _forget_after_fork() -> None:
    """Forgets the journals of the parent process, whose threads are gone, and whose connections must not be used."""
    JournalFile._lock = threading.Lock()  # noqa: SLF001 - a function of the class's own module
    _of_parent.extend(JournalFile._files.values())  # noqa: SLF001 - as above
    JournalFile._files.clear()  # noqa: SLF001 - as above
    JournalFile._closing.clear()  # noqa: SLF001 - as above


_of_parent: Final[list[JournalFile]] = []
"""Journals of the parent process, kept because closing their connections would disturb the parent."""

# Windows has no fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
