"""The SQLite database behind a journal, and the translation of its errors.

A journal is an ordinary SQLite database, so that `sqlite3 runs.db` and other tools can read it. Each step of a run is a
row, added when the step happens. Nothing is ever updated except the state of a run.

The file is recognized by its first bytes, before SQLite opens it: SQLite would create its own files beside a database
of another program, and would take an empty file for a new database. A new journal is created under a temporary name and
then linked to its real name, so that a program that is killed in between does not leave half a journal. Renaming it
could replace a journal that another process has created in the meantime. File systems such as exFAT, and some folders
of a host that are mounted in a container, have no hard links. There, an empty file is created under the real name, and
the journal then replaces it.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from lmbridge.agent.journal.locks import RunLocks
from lmbridge.errors import JournalError, JournalProblem

_APPLICATION_ID: Final = 0x6C6D626A
"""The application id in the header of the file, by which a journal is recognized: "lmbj" in ASCII."""
_VERSION: Final = 1
"""The version of the schema and of the steps. It is increased with each change that other versions cannot read."""
_HEADER_BYTES: Final = 100
_MAGIC: Final = b"SQLite format 3\x00"
_MODE: Final = 0o600
_BUSY_SECONDS: Final = 60.0
"""How long a write waits for the writes of other processes, in seconds. Each of them takes milliseconds."""

_SCHEMA: Final = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
PRAGMA journal_mode = WAL;
CREATE TABLE runs (id TEXT PRIMARY KEY, began REAL NOT NULL, state TEXT NOT NULL, start TEXT NOT NULL);
CREATE TABLE steps (
  run TEXT NOT NULL REFERENCES runs, number INTEGER NOT NULL, kind TEXT NOT NULL, at REAL NOT NULL, data TEXT NOT NULL,
  PRIMARY KEY (run, number)
) WITHOUT ROWID;
"""

_PROBLEMS: Final[dict[int, tuple[JournalProblem, str]]] = {
    sqlite3.SQLITE_FULL: ("full", "make room on the disk, and resume the run with Agent.resume"),
    sqlite3.SQLITE_IOERR: ("unwritable", "check the disk, and resume the run with Agent.resume"),
    sqlite3.SQLITE_READONLY: ("unwritable", "the file and its folder must be writable for this user"),
    sqlite3.SQLITE_CANTOPEN: ("unwritable", "the folder must exist, and must be writable for this user"),
    sqlite3.SQLITE_PERM: ("unwritable", "the file and its folder must be writable for this user"),
    sqlite3.SQLITE_BUSY: ("busy", "another process keeps the file locked; look for a program that has it open"),
    sqlite3.SQLITE_LOCKED: ("busy", "another process keeps the file locked; look for a program that has it open"),
    sqlite3.SQLITE_CORRUPT: ("damaged", "a part of it is missing or was overwritten; nothing was written to it"),
    sqlite3.SQLITE_NOTADB: ("damaged", "a part of it is missing or was overwritten; nothing was written to it"),
}
"""For primary error codes of SQLite: the problem of the journal, and what the user can do about it."""


class StoredRun(NamedTuple):
    """A row of the table of runs."""

    id: str
    """The id of the run."""
    began: float
    """When the run began, in seconds since the beginning of 1970."""
    state: str
    """The state of the run; see `JournalState`."""
    start: str
    """The task and the options of the run: a `RunStart` as JSON."""


class StoredStep(NamedTuple):
    """A row of the table of steps."""

    number: int
    """The number of the step in its run, from 0."""
    kind: str
    """The kind of the step, such as "reply"."""
    at: float
    """When the step was written, in seconds since the beginning of 1970."""
    data: str
    """The data of the step as JSON; its form depends on the kind."""


_Row = TypeVar("_Row", StoredRun, StoredStep)


class Database:
    """An open journal. All methods block, and must be called in the thread that has opened it.

    Args:
        path: The path of the file.
        create: Whether the file is created if it does not exist.

    Raises:
        JournalError: The file does not exist, is not a journal of this version, or cannot be opened.

    Attributes:
        locks: The runs of the journal that this process has in progress.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self._path = path
        with self._translated("open"):
            if not path.exists():
                if not create:
                    raise self._file_error(
                        "missing", "does not exist", "check the path; a run with journal= creates it"
                    )
                _create(path)
            self._check_header()
            self._connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
                self._connection.execute("SELECT count(*) FROM runs WHERE id = ''")
            except BaseException:
                self._connection.close()
                raise
        self.locks: Final = RunLocks(path)

    def _check_header(self) -> None:
        with self._path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
        if not header:
            raise self._file_error(
                "damaged", "is empty", "a journal is never empty; delete the file to begin a new one"
            )
        if not header.startswith(_MAGIC[: len(header)]):
            raise self._file_error("foreign", "is not a journal", "name another file; nothing was written to this one")
        if len(header) < _HEADER_BYTES:
            raise self._file_error("damaged", "is cut off", "a part of it is missing; nothing was written to it")
        if int.from_bytes(header[68:72], "big") != _APPLICATION_ID:
            hint = "name another file; nothing was written to this one"
            raise self._file_error("foreign", "is a database of another program", hint)
        version = int.from_bytes(header[60:64], "big")
        if version != _VERSION:
            raise self._file_error(
                "version",
                f"has version {version}, and this version of lmbridge reads version {_VERSION}",
                "resume its runs with the version of lmbridge that began them; nothing was written to it",
            )

    @property
    def path(self) -> str:
        """The path of the file."""
        return str(self._path)

    def close(self) -> None:
        """Closes the file, and releases all runs."""
        self._connection.close()
        self.locks.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Runs the block in a transaction: either everything that the block writes is stored, or nothing.

        Raises:
            JournalError: The transaction could not be written.
        """
        with self._translated("write to"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite may have ended the transaction by itself, for example because the disk is full.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def runs(self) -> list[StoredRun]:
        """Returns all runs, the oldest first."""
        rows = self._execute("SELECT id, began, state, start FROM runs ORDER BY began, rowid")
        return [self._checked(StoredRun, row) for row in rows]

    def run(self, run_id: str) -> StoredRun | None:
        """Returns the run with an id, or None if the journal does not have it."""
        rows = self._execute("SELECT id, began, state, start FROM runs WHERE id = ?", run_id)
        return self._checked(StoredRun, rows[0]) if rows else None

    def steps(self, run_id: str) -> list[StoredStep]:
        """Returns the steps of a run, in order."""
        rows = self._execute("SELECT number, kind, at, data FROM steps WHERE run = ? ORDER BY number", run_id)
        return [self._checked(StoredStep, row) for row in rows]

    def first_step(self, run_id: str) -> StoredStep | None:
        """Returns the first step of a run, or None if it has none."""
        rows = self._execute("SELECT number, kind, at, data FROM steps WHERE run = ? AND number = 0", run_id)
        return self._checked(StoredStep, rows[0]) if rows else None

    def last_step(self, run_id: str) -> StoredStep | None:
        """Returns the last step of a run, or None if it has none."""
        query = "SELECT number, kind, at, data FROM steps WHERE run = ? ORDER BY number DESC LIMIT 1"
        rows = self._execute(query, run_id)
        return self._checked(StoredStep, rows[0]) if rows else None

    def add_run(self, run_id: str, state: str, start: str) -> None:
        """Adds a run."""
        self._execute("INSERT INTO runs VALUES (?, ?, ?, ?)", run_id, time.time(), state, start)

    def add_steps(self, run_id: str, first_number: int, steps: Sequence[tuple[str, str]]) -> None:
        """Adds steps to a run. Each step is given by its kind and its data."""
        now = time.time()
        for number, (kind, data) in enumerate(steps, first_number):
            self._execute("INSERT INTO steps VALUES (?, ?, ?, ?, ?)", run_id, number, kind, now, data)

    def set_state(self, run_id: str, state: str) -> None:
        """Changes the state of a run."""
        self._execute("UPDATE runs SET state = ? WHERE id = ?", state, run_id)

    def error(self, problem: JournalProblem, message: str, hint: str) -> JournalError:
        """Returns an error about a run of this journal."""
        return JournalError(message, problem=problem, hint=hint, path=str(self._path))

    def _checked(self, kind: type[_Row], row: tuple[Any, ...]) -> _Row:
        """Returns a row, after a check of the types of its columns, because SQLite stores values of any type."""
        try:
            return msgspec.convert(row, kind)
        except ValueError as exc:
            raise self._file_error(
                "damaged", f"has a row that cannot be read: {exc}", "something else has changed it"
            ) from exc

    def _file_error(self, problem: JournalProblem, what: str, hint: str) -> JournalError:
        return self.error(problem, f"the journal {str(self._path)!r} {what}", hint)

    def _execute(self, query: str, *values: Any) -> list[Any]:
        with self._translated("use"), closing(self._connection.execute(query, values)) as cursor:
            return cursor.fetchall()

    @contextmanager
    def _translated(self, action: str) -> Iterator[None]:
        """Translates the errors of SQLite and of the operating system.

        Raises:
            JournalError: The block raised such an error.
        """
        try:
            yield
        except sqlite3.Error as exc:
            code = getattr(exc, "sqlite_errorcode", None) or 0
            # The lowest byte is the primary code. The other bytes only refine it.
            problem, hint = _PROBLEMS.get(code & 0xFF, ("damaged", "nothing was written to it"))
            raise JournalError(
                f"could not {action} the journal {str(self._path)!r}: {exc}",
                exc,
                problem=problem,
                hint=hint,
                path=str(self._path),
            ) from exc
        except OSError as exc:
            raise JournalError(
                f"could not {action} the journal {str(self._path)!r}: {exc.strerror or exc}",
                exc,
                problem="unwritable",
                hint="it must be a file in an existing folder, and both must be writable for this user",
                path=str(self._path),
            ) from exc


def _create(path: Path) -> None:
    """Creates a journal without runs, unless another process creates it at the same time."""
    draft = path.with_name(f"{path.name}-{os.urandom(4).hex()}.new")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _MODE))
    try:
        with closing(sqlite3.connect(draft, isolation_level=None)) as connection:
            connection.executescript(_SCHEMA)
        try:
            _give_name(draft, path)
        except FileExistsError:
            return
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _give_name(draft: Path, path: Path) -> None:
    """Gives a file its real name, and never replaces another file.

    Raises:
        FileExistsError: There is a file with this name.
        OSError: The file cannot be given the name.
    """
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    # The errors of file systems without hard links differ. If the reason is another one, what follows fails as well.
    except OSError:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _MODE))
        try:
            draft.replace(path)
        except BaseException:
            path.unlink()
            raise


def _sync(folder: Path) -> None:
    """Makes sure that the entries of a folder are on the disk, if the system can do that.

    On Windows, a program cannot open a folder, and the system does this by itself. Some file systems, such as those on
    the network, do not support it.
    """
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
