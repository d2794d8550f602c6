"""Child processes of stdio servers. Each leads a process group of its own, of which nothing is left in the end.

`close()`, a cancel and a failed start end the group from here. If the host ends in another way, its guardian does: a
small process that notices by the end of a pipe, which no signal can prevent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

from lmbridge.errors import MCPError
from lmbridge.mcp.servers import guardian

logger = logging.getLogger("lmbridge.mcp")

_TERM_AFTER: Final = 1.0
"""Seconds that a server has to end by itself once its stdin is closed."""
_KILL_AFTER: Final = 1.5
"""Seconds that its group has to end once it was asked to by SIGTERM."""
_GONE_AFTER: Final = 2.0
"""Seconds that are waited for a killed group."""
_LAST_OUTPUT: Final = 1.0
"""Seconds in which what a server wrote last arrives, and the news of its end after the end of its output."""
_LONGEST_LINE: Final = 500
_INHERITED: Final = ("HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER")
"""What the MCP specification's own SDKs give to servers: nothing that is likely to be a secret."""


class Groups:
    """The process groups that this process has started and that are not gone yet."""

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._host = 0
        self._pipe = -1
        self._asked_for_sigterm = False

    def add(self, group: int) -> None:
        """Notes a group that has begun; the guardian is told."""
        self._host = os.getpid()
        if not self._asked_for_sigterm and threading.current_thread() is threading.main_thread():
            self._asked_for_sigterm = True
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, self._on_sigterm)
        self._groups.add(group)
        self._tell(b"+%d\n" % group)

    def discard(self, group: int) -> None:
        """Notes that a group is gone."""
        if group in self._groups:
            self._groups.discard(group)
            self._tell(b"-%d\n" % group)

    def _tell(self, line: bytes) -> None:
        try:
            os.write(self._pipe, line)
        except OSError:  # there is no guardian yet, or somebody ended it
            self._drop_pipe()
            self._pipe = _start_guardian()
            if self._groups and self._pipe >= 0:
                os.write(self._pipe, b"".join(b"+%d\n" % group for group in self._groups))

    def forget(self) -> None:
        """Leaves the groups to the process that this one is a fork of: held open here, its pipe would outlive it."""
        self._groups = set()
        self._drop_pipe()

    def _drop_pipe(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
        self._pipe = -1

    def _on_sigterm(self, number: int, _frame: object) -> None:
        """Ends the groups, then this process as the signal would have."""
        if self._host == os.getpid():
            guardian.end_groups(self._groups)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


groups: Final = Groups()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=groups.forget)


def _start_guardian() -> int:
    """Starts the guardian; returns the end of the pipe that it reads, or -1 if there can be none."""
    if not sys.executable:
        logger.warning("servers may outlive this process if it is killed: there is no Python to watch it")
        return -1
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)
    null = [(os.POSIX_SPAWN_OPEN, each, os.devnull, os.O_WRONLY, 0) for each in (1, 2)]
    command = [sys.executable, "-I", "-S", str(Path(guardian.__file__))]
    try:
        os.posix_spawn(
            sys.executable, command, _base_environment(), file_actions=[(os.POSIX_SPAWN_DUP2, theirs, 0), *null]
        )
    except OSError:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return ours


def _base_environment() -> dict[str, str]:
    known = {name: os.environ.get(name, "") for name in _INHERITED}
    return {name: value for name, value in known.items() if value and not value.startswith("()")}


async def end_group(group: int, *, patience: float) -> None:
    """Ends a process group and waits until nothing of it is left; a cancel kills it at once.

    Args:
        group: Its number, which is its leader's.
        patience: Seconds that it has before it is asked to end.
    """
    try:
        for number, seconds in ((0, patience), (signal.SIGTERM, _KILL_AFTER), (signal.SIGKILL, _GONE_AFTER)):
            guardian.send(group, number)
            if await _is_gone_within(group, seconds):
                groups.discard(group)
                return
    except asyncio.CancelledError:
        guardian.send(group, signal.SIGKILL)
        groups.discard(group)  # nothing survives that, and its number may soon be somebody else's
        raise
    logger.error("the process group %d is still there %g seconds after SIGKILL", group, _GONE_AFTER)


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
    return not guardian.send(group, 0) or await asyncio.to_thread(guardian.is_gone, group)


class Child(asyncio.SubprocessProtocol):
    """A server's process: what it writes is handed on as it comes.

    Args:
        on_output: Called with what it writes to stdout.
        on_end: Called once, with what became of it in words, when nothing will come any more.
    """

    def __init__(self, on_output: Callable[[bytes], None], on_end: Callable[[str], None]) -> None:
        self.stderr = Tail()
        self._on_output, self._on_end = on_output, on_end
        self._transport: asyncio.SubprocessTransport | None = None
        self._exited = asyncio.Event()
        self._open = {1, 2}
        self._has_ended = False
        self._writable = asyncio.Event()
        self._writable.set()

    async def start(self, command: str, args: Sequence[str], env: Mapping[str, str], cwd: str | None) -> None:
        """Starts it, without a shell, in a group of its own.

        Args:
            command: The program, searched for in the PATH of its environment.
            args: Its arguments.
            env: Variables that it gets besides the few that each server gets.
            cwd: Its working directory.

        Raises:
            OSError: it cannot be started.
            MCPError: this system has no process groups.
        """
        if sys.platform == "win32":
            raise MCPError("stdio servers need process groups, which Windows has not", hint='use a server with "url"')
        starting = asyncio.ensure_future(
            asyncio.get_running_loop().subprocess_exec(
                lambda: self,
                command,
                *args,
                env={**_base_environment(), **env},
                cwd=cwd,
                start_new_session=True,
            )
        )
        try:
            await settle(starting)  # a cancel, or a second one, must not lose a process that has begun
        finally:
            if not starting.cancelled() and starting.exception() is None:
                self._transport = starting.result()[0]
                groups.add(self._transport.get_pid())

    @property
    def pid(self) -> int | None:
        """Its number, and that of its group."""
        return None if self._transport is None else self._transport.get_pid()

    async def write(self, data: bytes) -> None:
        """Writes to its stdin; waits while it does not read.

        Raises:
            ConnectionError: it does not read any more.
        """
        stdin = self._pipe(0)
        if self._has_ended or stdin is None or stdin.is_closing():
            raise BrokenPipeError("the server does not read any more")
        stdin.write(data)
        await self._writable.wait()

    def pause(self, *, paused: bool) -> None:
        """Stops reading its stdout, or goes on with it."""
        stdout = self._pipe(1)
        if stdout is not None and not stdout.is_closing():
            stdout.pause_reading() if paused else stdout.resume_reading()

    async def end(self, *, patience: float = _TERM_AFTER) -> None:
        """Ends it and its whole group; a cancel waits for that.

        Args:
            patience: Seconds that it has to end by itself, once its stdin is closed.
        """
        if self._transport is not None:
            await settle(self._end(self._transport, patience))

    async def _end(self, transport: asyncio.SubprocessTransport, patience: float) -> None:
        if (stdin := self._pipe(0)) is not None:
            stdin.close()
        try:
            await end_group(transport.get_pid(), patience=patience)
            with suppress(TimeoutError):
                async with asyncio.timeout(_GONE_AFTER):
                    await self._exited.wait()  # else asyncio would hear of it when its loop may be closed
        finally:
            transport.close()

    def _pipe(self, number: int) -> Any:
        return None if self._transport is None else cast("Any", self._transport.get_pipe_transport(number))

    # What asyncio calls

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Hands on what came."""
        if fd == 2:
            self.stderr.feed(data)
        elif not self._has_ended:
            self._on_output(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Notes the end of a pipe."""
        if fd == 0:
            self._writable.set()
        self._open.discard(fd)
        if fd != 2:
            self._ended_soon()

    def process_exited(self) -> None:
        """Notes its end."""
        self._exited.set()
        self._ended_soon()

    def pause_writing(self) -> None:
        """Has writers wait."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Lets them go on."""
        self._writable.set()

    def _ended_soon(self) -> None:
        """Reports the end: once all of it is known, or when the rest has had its time.

        A process that it started may hold its pipes after its end; and it may close its output and go on.
        """
        if not self._open and self._exited.is_set():
            self._ended()
        else:
            asyncio.get_running_loop().call_later(_LAST_OUTPUT, self._ended)

    def _ended(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._writable.set()
            self._on_end(self._fate())

    def _fate(self) -> str:
        code = None if self._transport is None else self._transport.get_returncode()
        if code is None:
            return "it closed its output" if 1 not in self._open else "it does not read any more"
        if code >= 0:
            return f"it ended with status {code}"
        with suppress(ValueError):
            return f"it was killed by {signal.Signals(-code).name}"
        return f"it was killed by signal {-code}"


class Tail:
    """The last lines of a text that comes in pieces."""

    def __init__(self, lines: int = 10) -> None:
        self._lines: deque[str] = deque(maxlen=lines)
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Takes the next piece."""
        *lines, rest = (self._rest + data).split(b"\n")
        self._lines += [self._line(line) for line in lines if line.strip()]
        self._rest = rest[: 4 * _LONGEST_LINE]

    @property
    def text(self) -> str:
        """The lines, the one that has not ended included."""
        rest = [self._line(self._rest)] if self._rest.strip() else []
        return "\n".join([*self._lines, *rest][-(self._lines.maxlen or 1) :])

    def _line(self, line: bytes) -> str:
        return line[: 4 * _LONGEST_LINE].decode(errors="replace").rstrip()[:_LONGEST_LINE]


async def settle(work: Any) -> None:
    """Waits until the work is done, also if the caller is cancelled meanwhile; the cancel goes on after that."""
    task = asyncio.ensure_future(work)
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not report it as lost: the cancel is what counts
        raise cancelled
    task.result()
