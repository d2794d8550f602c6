"""`RunLocks`: which runs of a journal are in progress, known to all processes, and forgotten when a process dies.

Two programs that let the same run go on would make its calls twice. A flag in the database would survive a program that
was killed, and a time limit on it would have to be renewed while a tool takes hours. So each run in progress is a lock
on a byte of a file beside the journal: the system releases it when the process ends, however it ends. SQLite's own file
cannot be used for that, because closing it anywhere in the process would release the locks of SQLite, too.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Final

_MODE: Final = 0o600

if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: int, place: int) -> bool:
        os.lseek(file, place, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: int, place: int) -> None:
        os.lseek(file, place, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(file: int, place: int) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: int, place: int) -> None:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, place)


class RunLocks:
    """The runs that this process has in progress in one journal.

    A process has one object for each journal at a time: the locks of a process are released when it closes the file
    anywhere, and do not conflict with each other.

    Args:
        journal: The path of the journal. The locks are in a file with "-lock" at the end of its name.
    """

    def __init__(self, journal: Path) -> None:
        self._path = journal.with_name(f"{journal.name}-lock")
        self._file: int | None = None
        self._owners: dict[str, object] = {}

    def claim(self, run_id: str, owner: object) -> bool:
        """Marks a run as in progress. Returns False if it already is for another owner, here or in another process."""
        if run_id in self._owners:
            return self._owners[run_id] is owner
        if self._file is None:
            # Python opens all files so that other programs do not inherit them.
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, _MODE)
        if not _try_lock(self._file, _byte_of(run_id)):
            return False
        self._owners[run_id] = owner
        return True

    def release(self, run_id: str, owner: object) -> None:
        """Marks a run as no longer in progress, if it is in progress for this owner."""
        if self._owners.get(run_id) is owner and self._file is not None:
            del self._owners[run_id]
            _unlock(self._file, _byte_of(run_id))

    def close(self) -> None:
        """Releases all runs."""
        self._owners.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _byte_of(run_id: str) -> int:
    """Returns the place of a run in the file of locks, which has no content. It is below 2 to the power of 56."""
    return int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:7], "big")
