"""Keeps track of the process groups of stdio servers, and ends them completely.

A server is often a chain of processes: `npx` starts a shell, which starts node. Ending only the process that was
started is not enough, because a shell that gets SIGTERM leaves its children alive. So each server leads a new process
group, and the group is signalled and polled until it is empty, even if its leader has already ended. Searching for
descendants instead would miss those whose parent has ended. A control group would also catch a process that leaves its
process group, but control groups exist only on Linux and need privileges.

Servers have to be ended on three kinds of occasions, and each is covered:

- After `close()`, a cancellation or a failed start, `end_group` ends the group.
- SIGTERM ends the groups and then the program: a handler is installed at the first start, unless the program has one.
- Any other end of the program, SIGKILL included, is noticed by the guardian, a separate process; see `guardian`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Final

from lmbridge.errors import MCPError
from lmbridge.mcp.servers import guardian
from lmbridge.mcp.servers.environment import base_environment

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_TERM_GRACE_SECONDS: Final = 1.5
"""How long a group may take to end after SIGTERM before it gets SIGKILL, in seconds."""
KILL_WAIT_SECONDS: Final = 2.0
"""How long `end_group` waits for a group to be gone after SIGKILL, in seconds."""


class ProcessGroups:
    """The process groups that this process has started and that are not gone yet.

    The guardian gets a copy of the list through a pipe.
    """

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._host_pid = 0
        self._guardian_pipe = -1
        self._unsent = bytearray()
        self._has_checked_sigterm = False
        self._has_warned = False

    def add(self, group: int) -> None:
        """Adds a group that has started.

        Raises:
            MCPError: The guardian cannot be started. The group has been added, and the caller has to end it.
        """
        self._host_pid = os.getpid()
        if not self._has_checked_sigterm and threading.current_thread() is threading.main_thread():
            self._has_checked_sigterm = True
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, self._on_sigterm)
        self._groups.add(group)
        try:
            self._write_to_guardian(b"+%d\n" % group)
        except OSError as exc:
            raise MCPError(
                "the process that would end the MCP servers if this program were killed cannot be started: "
                f"{exc.strerror or exc}",
                exc,
                hint="this process may have reached its limit of open files or of processes; see `ulimit -a`",
            ) from exc

    def discard(self, group: int) -> None:
        """Removes a group that is gone."""
        if group in self._groups:
            self._groups.discard(group)
            try:
                self._write_to_guardian(b"-%d\n" % group)
            except OSError as exc:
                # The group is gone. The next guardian, which `add` starts, gets the list without it.
                logger.warning("MCP servers may be left running if this process is killed: %s", exc)

    def _write_to_guardian(self, line: bytes) -> None:
        self._unsent += line
        try:
            self._send_unsent()
        except OSError:
            # No guardian has been started yet, or it was killed. A new guardian gets the whole list.
            self._close_guardian_pipe()
            self._guardian_pipe = _start_guardian() if sys.executable else -1
            if self._guardian_pipe < 0 and not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "MCP servers may be left running if this process is killed: the process that would end them cannot "
                    "be started, because the path of Python is not known (sys.executable is empty)"
                )
            if self._groups and self._guardian_pipe >= 0:
                self._unsent += b"".join(b"+%d\n" % group for group in self._groups)
                self._send_unsent()

    def _send_unsent(self) -> None:
        """Writes the lines that the guardian has not received yet, as far as its pipe has room."""
        # A guardian that is stopped (SIGSTOP) does not read, but its pipe must not be closed. Otherwise the guardian
        # would end all groups as soon as it continues.
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: os.write(self._guardian_pipe, self._unsent)]

    def forget_after_fork(self) -> None:
        """Leaves the groups to the parent process. An open copy of the pipe would keep the guardian waiting."""
        self._groups = set()
        self._close_guardian_pipe()

    def _close_guardian_pipe(self) -> None:
        if self._guardian_pipe >= 0:
            os.close(self._guardian_pipe)
        self._guardian_pipe = -1
        self._unsent.clear()

    def _on_sigterm(self, number: int, _frame: object) -> None:
        """Ends the groups, and then ends this process by the same signal with its default action."""
        if self._host_pid == os.getpid():
            guardian.end_groups(self._groups)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


process_groups: Final = ProcessGroups()
# Windows cannot fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=process_groups.forget_after_fork)


def _start_guardian() -> int:
    """Starts the guardian and returns the write end of its pipe."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    discard_output = [(os.POSIX_SPAWN_OPEN, each, os.devnull, os.O_WRONLY, 0) for each in (1, 2)]
    command = [sys.executable, "-I", "-S", str(Path(guardian.__file__))]
    try:
        os.posix_spawn(
            sys.executable,
            command,
            base_environment(),
            file_actions=[(os.POSIX_SPAWN_DUP2, read_end, 0), *discard_output],
        )
    except OSError:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    return write_end


async def end_group(group: int, *, patience: float) -> None:
    """Ends a process group and waits until it has no process left. If the caller is cancelled, the group is killed.

    Args:
        group: The id of the group, which is the process id of its leader.
        patience: How long to wait for the group to end by itself before it gets SIGTERM, in seconds.
    """
    # Signal 0 only checks whether the group exists.
    stages = ((0, patience), (signal.SIGTERM, _TERM_GRACE_SECONDS), (signal.SIGKILL, KILL_WAIT_SECONDS))
    try:
        for number, seconds in stages:
            guardian.send_signal(group, number)
            if await _is_gone_within(group, seconds):
                process_groups.discard(group)
                return
    except asyncio.CancelledError:
        guardian.send_signal(group, signal.SIGKILL)
        # Nothing survives SIGKILL, and the id may soon be given to another group.
        process_groups.discard(group)
        raise
    logger.error("the process group %d is still running %g seconds after SIGKILL", group, KILL_WAIT_SECONDS)


async def _is_gone_within(group: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    pause = 0.005
    while not await _is_gone(group):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(pause)
        pause = min(2 * pause, 0.1)
    return True


async def _is_gone(group: int) -> bool:
    # The search for zombies runs in a thread, because it reads a file for each process of the system.
    return not guardian.send_signal(group, 0) or await asyncio.to_thread(guardian.is_gone, group)
