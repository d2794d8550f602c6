"""A small process that briefly outlives lmbridge, in order to end the servers that lmbridge has left behind.

A program that is killed by SIGKILL, or that crashes, cannot clean up. Its servers would keep running, and so would the
processes that they have started. Linux can signal children when their parent dies (`PR_SET_PDEATHSIG`), but the signal
reaches only direct children, is sent as soon as the thread that started them ends, and does not exist on macOS.
Watching a pipe has none of these limits: the kernel closes it when the program ends, whatever the reason.

The guardian is run by its path, with `python -I -S`, and imports nothing of lmbridge, so that it starts in a few
milliseconds and needs little memory. On stdin it reads lines: `+123` for a process group that has started, `-123` for
one that is gone. At the end of stdin it ends the groups that are left.

`process_groups` starts the guardian. It also ends the servers itself, at the end of the program and after SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

_TERM_SECONDS = 2.0
"""How long the groups may take to end after SIGTERM, in seconds."""
_KILL_SECONDS = 2.0
"""How long the guardian waits for the groups after SIGKILL, in seconds."""
_POLL_SECONDS = 0.02


def main() -> None:
    """Keeps the list of process groups until stdin ends, and then ends the groups that are left."""
    # Signals to the program's process group, such as Ctrl-C, are for the program.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    groups: set[int] = set()
    for line in sys.stdin.buffer:
        if line.startswith(b"+"):
            groups.add(int(line))
        else:
            groups.discard(-int(line))
    end_groups(groups)


def end_groups(groups: Iterable[int]) -> None:
    """Ends process groups with SIGTERM, and those that ignore it with SIGKILL.

    The function blocks until the groups are gone, for about four seconds at most.
    """
    left = set(groups)
    for number, seconds in ((signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
        for group in left:
            send_signal(group, number)
        deadline = time.monotonic() + seconds
        while left := {group for group in left if not is_gone(group)}:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)


def send_signal(group: int, number: int) -> bool:
    """Sends a signal to a process group; returns False if the group has no process that could receive it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        # macOS raises PermissionError for processes that have ended.
        return False
    return True


def is_gone(group: int) -> bool:
    """Returns True if no process of a group is running. Zombies, whose exit status was not read, do not count."""
    if not send_signal(group, 0):
        return True
    processes = list(Path("/proc").glob("[0-9]*"))
    return bool(processes) and not any(_runs_in_group(process, group) for process in processes)


def _runs_in_group(process: Path, group: int) -> bool:
    try:
        stat = (process / "stat").read_bytes()
    except OSError:
        # The process has ended since the directory was listed.
        return False
    state, _, process_group = stat.rpartition(b")")[2].split()[:3]
    return int(process_group) == group and state not in (b"Z", b"X")


if __name__ == "__main__":
    main()
