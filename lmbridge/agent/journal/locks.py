"""`RunLocks`: marks the runs of a journal that are in progress in this process, so that no other process resumes them.

Two programs that resumed the same run would make its calls twice. A flag in the database would survive a program that
was killed, and a flag with a time limit would have to be renewed again and again while a tool takes hours. So each run
in progress holds a lock on a byte of a file beside the journal. The operating system releases the lock when the process
ends, however it ends. SQLite's own file cannot be used for this, because closing it anywhere in the process would also
release the locks of SQLite.
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
    """The runs of one journal that this process has in progress.

    A process must have only one such object for a journal at a time. The locks of one process do not conflict with each
    other, and if a process closes the file of locks anywhere, it loses all its locks on it.

    Args:
        journal: The path of the journal. The locks are in a file with "-lock" at the end of its name.
    """

    def __init__(self, journal: Path) -> None:
        self._path = journal.with_name(f"{journal.name}-lock")
        self._file: int | None = None
        self._owners: dict[str, object] = {}

    def claim(self, run_id: str, owner: object) -> bool:
        """Marks a run as in progress. Returns False if another owner, in this or another process, has marked it."""
        if run_id in self._owners:
            return self._owners[run_id] is owner
        if self._file is None:
            # Python opens files in such a way that child programs do not inherit them, so only this process has it.
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
    """Returns the number of the byte that a run locks, below 2 to the power of 56. The file itself stays empty."""
    return int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:7], "big")
