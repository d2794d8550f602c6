"""`ServerProcess`: starts the child process of a stdio server, exchanges bytes with it, and ends it.

The class is an asyncio protocol. `asyncio.create_subprocess_exec` is not used for three reasons: its streams limit the
length of a line, it cannot pause the reading of stdout alone, and it reports the end of a process only when the pipes
are closed, which a grandchild may keep open for ever.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, cast

from lmbridge._tasks import settle
from lmbridge.errors import MCPError
from lmbridge.mcp.servers.environment import base_environment
from lmbridge.mcp.servers.package_runners import is_download_line, runner_environment
from lmbridge.mcp.servers.process_groups import KILL_WAIT_SECONDS, end_group, process_groups

_EXIT_GRACE_SECONDS: Final = 1.0
"""How long a server may take to end by itself once its stdin is closed, before it gets SIGTERM, in seconds."""
_LAST_OUTPUT_SECONDS: Final = 1.0
"""How long the report of a process's end waits for the last output and the exit status, in seconds.

The last output, the closing of the pipes and the exit status arrive separately and in any order.
"""
_FIRST_STDERR_LINES: Final = 10
"""How many lines at the beginning of stderr are kept: the first error is often the cause of all others."""
_LAST_STDERR_LINES: Final = 10
"""How many lines at the end of stderr are kept."""
_STDERR_LINE_LENGTH: Final = 500
"""How many characters of each line are kept."""
_MOST_BYTES_PER_CHARACTER: Final = 4
"""The length of the longest character in UTF-8, in bytes."""

_STDIN, _STDOUT, _STDERR = 0, 1, 2


class ServerProcess(asyncio.SubprocessProtocol):
    """A child process that leads its own process group.

    Args:
        on_output: Called with each piece of bytes that the process writes to stdout.
        on_end: Called once, with a description of how the process ended, when no more output will come.
    """

    def __init__(self, on_output: Callable[[bytes], None], on_end: Callable[[str], None]) -> None:
        self.stderr: StderrExcerpt = StderrExcerpt()
        """The first and the last lines that the process wrote to stderr."""
        self.last_stderr_at: float | None = None
        """The time of the event loop at which the process last wrote to stderr, or None if it has not."""
        self._on_output, self._on_end = on_output, on_end
        self._transport: asyncio.SubprocessTransport | None = None
        # The error of `process_groups.add`. asyncio would only log it.
        self._unguarded: MCPError | None = None
        self._exited = asyncio.Event()
        self._open_pipes = {_STDOUT, _STDERR}
        self._end_is_reported = False
        self._is_writable = asyncio.Event()
        self._is_writable.set()

    async def start(self, command: str, args: Sequence[str], env: Mapping[str, str], cwd: str | None) -> None:
        """Starts the process, without a shell and in a new process group.

        A process may have been created even if this method fails or is cancelled, so call `end` then as well.

        Args:
            command: The program. It is searched for in the PATH of its environment.
            args: The arguments of the program.
            env: Environment variables, in addition to the few that every server gets.
            cwd: The working directory, or None for the working directory of this process.

        Raises:
            OSError: The process cannot be started.
            MCPError: The event loop cannot start processes; or the guardian, which would end the process if this
                program were killed, cannot be started.
        """
        starting = asyncio.ensure_future(
            asyncio.get_running_loop().subprocess_exec(
                lambda: self,
                command,
                *args,
                env={**base_environment(), **runner_environment(command, args), **env},
                cwd=cwd,
                start_new_session=True,
            )
        )
        try:
            # A process that has been created must not be lost, even if the caller is cancelled more than once.
            await settle(starting)
        except NotImplementedError as exc:
            loop = type(asyncio.get_running_loop()).__name__
            raise MCPError(
                f"the event loop ({loop}) cannot start processes", exc, hint="use the default event loop of asyncio"
            ) from exc
        if self._unguarded is not None:
            raise self._unguarded

    @property
    def pid(self) -> int | None:
        """The id of the process and of its group, or None before it has started."""
        return None if self._transport is None else self._transport.get_pid()

    async def write(self, data: bytes) -> None:
        """Writes to the process's stdin, and waits while the process does not read.

        Raises:
            ConnectionError: The process no longer reads.
        """
        stdin = self._pipe(_STDIN)
        if self._end_is_reported or stdin is None or stdin.is_closing():
            raise BrokenPipeError("the server no longer reads its stdin")
        stdin.write(data)
        await self._is_writable.wait()

    def pause_reading(self) -> None:
        """Stops reading the process's stdout, so that the process has to wait when its pipe is full."""
        if stdout := self._open_stdout():
            stdout.pause_reading()

    def resume_reading(self) -> None:
        """Continues to read the process's stdout."""
        if stdout := self._open_stdout():
            stdout.resume_reading()

    async def end(self, *, patience: float | None = None) -> None:
        """Ends the process and its whole group. On cancellation, the caller still waits until they are gone.

        Args:
            patience: How many seconds to wait for the process to end by itself once its stdin is closed. Default: 1.
        """
        if self._transport is not None:
            await settle(self._end_and_reap(self._transport, _EXIT_GRACE_SECONDS if patience is None else patience))

    async def _end_and_reap(self, transport: asyncio.SubprocessTransport, patience: float) -> None:
        if (stdin := self._pipe(_STDIN)) is not None:
            stdin.close()
        try:
            await end_group(transport.get_pid(), patience=patience)
            # Without this wait, asyncio would learn the exit status later, when the event loop may be closed.
            with suppress(TimeoutError):
                async with asyncio.timeout(KILL_WAIT_SECONDS):
                    await self._exited.wait()
        finally:
            transport.close()

    def _pipe(self, fd: int) -> Any:
        return None if self._transport is None else cast("Any", self._transport.get_pipe_transport(fd))

    def _open_stdout(self) -> Any:
        stdout = self._pipe(_STDOUT)
        return None if stdout is None or stdout.is_closing() else stdout

    # The following methods are called by asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Stores the transport of the new process.

        The output of the process may arrive before `start` returns, and may be so much that reading has to be paused,
        which needs the transport.
        """
        self._transport = cast("asyncio.SubprocessTransport", transport)
        try:
            process_groups.add(self._transport.get_pid())
        except MCPError as error:
            self._unguarded = error

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Passes on the output of the process."""
        if fd == _STDERR:
            self.last_stderr_at = asyncio.get_running_loop().time()
            self.stderr.feed(data)
        elif not self._end_is_reported:
            self._on_output(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Records that a pipe was closed."""
        if fd == _STDIN:
            self._is_writable.set()
        self._open_pipes.discard(fd)
        if fd != _STDERR:
            self._report_end_soon()

    def process_exited(self) -> None:
        """Records that the process has ended."""
        self._exited.set()
        self._report_end_soon()

    def pause_writing(self) -> None:
        """Makes writers wait, because the pipe is full."""
        self._is_writable.clear()

    def resume_writing(self) -> None:
        """Lets writers continue."""
        self._is_writable.set()

    def _report_end_soon(self) -> None:
        """Reports the end of the process at once if everything about it is known, and otherwise after a second.

        A process that the server has started may keep the pipes open after the server's end. Conversely, a
        server may close its stdout and keep running.
        """
        if not self._open_pipes and self._exited.is_set():
            self._report_end()
        else:
            asyncio.get_running_loop().call_later(_LAST_OUTPUT_SECONDS, self._report_end)

    def _report_end(self) -> None:
        if not self._end_is_reported:
            self._end_is_reported = True
            self._is_writable.set()
            self._on_end(self._describe_end())

    def _describe_end(self) -> str:
        code = None if self._transport is None else self._transport.get_returncode()
        if code is None:
            return "it closed its stdout" if _STDOUT not in self._open_pipes else "it no longer reads its stdin"
        if code >= 0:
            return f"it ended with status {code}"
        with suppress(ValueError):
            return f"it was killed by {signal.Signals(-code).name}"
        return f"it was killed by signal {-code}"


class StderrExcerpt:
    """The first and the last lines of a byte stream that arrives in pieces, each cut to a maximum length.

    Empty lines are left out, and so are the lines that only say that npm has downloaded a file.

    Args:
        first: How many lines at the beginning are kept.
        last: How many lines at the end are kept.
    """

    def __init__(self, first: int = _FIRST_STDERR_LINES, last: int = _LAST_STDERR_LINES) -> None:
        self._first_count = first
        self._first_lines: list[str] = []
        self._last_lines: deque[str] = deque(maxlen=last)
        self._later_count = 0
        self._unfinished_line = b""

    def feed(self, data: bytes) -> None:
        """Adds the next piece."""
        *lines, rest = (self._unfinished_line + data).split(b"\n")
        for line in filter(_is_worth_keeping, lines):
            if len(self._first_lines) < self._first_count:
                self._first_lines.append(_decode_line(line))
            else:
                self._last_lines.append(_decode_line(line))
                self._later_count += 1
        self._unfinished_line = rest[: _MOST_BYTES_PER_CHARACTER * _STDERR_LINE_LENGTH]

    @property
    def text(self) -> str:
        """The lines, including an unfinished one at the end. A line in the middle says how many lines are left out."""
        omitted = self._later_count - len(self._last_lines)
        gap = [f"[... {omitted:,} line{'' if omitted == 1 else 's'} omitted]"] if omitted else []
        return "\n".join([*self._first_lines, *gap, *self._latest_lines()])

    @property
    def tail(self) -> str:
        """The last lines, including an unfinished one."""
        lines = [*self._first_lines, *self._latest_lines()]
        return "\n".join(lines[-(self._last_lines.maxlen or 1) :])

    def _latest_lines(self) -> list[str]:
        unfinished = self._unfinished_line
        return [*self._last_lines, *([_decode_line(unfinished)] if _is_worth_keeping(unfinished) else [])]


def _is_worth_keeping(line: bytes) -> bool:
    return bool(line.strip()) and not is_download_line(line)


def _decode_line(line: bytes) -> str:
    cut = line[: _MOST_BYTES_PER_CHARACTER * _STDERR_LINE_LENGTH]
    return cut.decode(errors="replace").rstrip()[:_STDERR_LINE_LENGTH]
