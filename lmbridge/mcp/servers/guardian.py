"""A process that outlives its host by a moment, to end the servers that the host left behind.

It is run by path and imports no lmbridge. It reads `+123` and `-123` from stdin, a process group that has begun or is
gone. The end of stdin is the end of the host, by whatever signal: then it ends the groups that are left.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

_TERM_SECONDS = 2.0
_KILL_SECONDS = 2.0
_POLL = 0.02


def main() -> None:
    """Waits for the end of stdin."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the host
    os.setsid()
    groups: set[int] = set()
    for line in sys.stdin.buffer:
        if line.startswith(b"+"):
            groups.add(int(line))
        else:
            groups.discard(-int(line))
    end_groups(groups)


def end_groups(groups: Iterable[int]) -> None:
    """Ends process groups, first politely; it blocks until they are gone, for about four seconds at most."""
    left = set(groups)
    for number, seconds in ((signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
        for group in left:
            send(group, number)
        deadline = time.monotonic() + seconds
        while left := {group for group in left if not is_gone(group)}:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL)


def send(group: int, number: int) -> bool:
    """Sends a signal to a process group; False if there is none that could get it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # the latter: macOS says it of processes that have ended
        return False
    return True


def is_gone(group: int) -> bool:
    """Whether no process of a group runs any more. Those that ended and that nobody has waited for do not count."""
    if not send(group, 0):
        return True
    processes = list(Path("/proc").glob("[0-9]*"))
    return bool(processes) and not any(_runs_in(group, process) for process in processes)


def _runs_in(group: int, process: Path) -> bool:
    try:
        stat = (process / "stat").read_bytes()
    except OSError:  # it has ended meanwhile
        return False
    state, _, its_group = stat.rpartition(b")")[2].split()[:3]
    return int(its_group) == group and state not in (b"Z", b"X")


if __name__ == "__main__":
    main()
