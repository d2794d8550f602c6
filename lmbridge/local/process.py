"""Child processes: running a command to its end, ending a process, and describing how it ended."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import IO, Any, Final

from lmbridge._tasks import settle
from lmbridge.errors import LLMConnectionError

_TAIL_BYTES = 4096
_TAIL_LINES = 10
_POLL_SECONDS = 0.1

_START_HINTS: Final[Mapping[int | None, str]] = {
    errno.ENOENT: "check that the file exists, and the interpreter in its first line if it is a script",
    errno.EACCES: "check that the file is a program that this user may run",
    errno.EPERM: "check that the file is a program that this user may run",
    errno.ENOEXEC: "check that the file is a program for this system and this CPU",
    errno.E2BIG: "the environment variables are too large; remove some of them",
    errno.EMFILE: "close files and connections, or raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close files and connections, or raise the limit on open files (ulimit -n)",
    errno.ENOMEM: "end other programs, because the machine has no memory left",
    errno.EAGAIN: "end other programs, or raise the limit on processes (ulimit -u)",
}
"""The hint for each error number with which the system may refuse to start a process."""


def read_tail(log: IO[bytes]) -> str:
    """Returns the last lines of a log file.

    Call it only after the child has ended, because the child writes at the position that reading changes.
    """
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - _TAIL_BYTES))
    lines = log.read().decode(errors="replace").splitlines()
    return "\n".join(line.rstrip() for line in lines[-_TAIL_LINES:])


async def start_process(program: str | None, *arguments: str, **options: Any) -> Process:
    """Starts a child process.

    Args:
        program: The path of the program, or `sys.executable`, which may be empty or None in an embedded interpreter.
        *arguments: The arguments of the program.
        **options: Options of `asyncio.create_subprocess_exec`.

    Raises:
        LLMConnectionError: The process cannot be started.
    """
    if not program:
        raise LLMConnectionError(
            "could not start a process, because sys.executable is not set",
            hint="set sys.executable to the path of the Python interpreter in which lmbridge is installed",
        )
    try:
        return await asyncio.create_subprocess_exec(program, *arguments, **options)
    except NotImplementedError as exc:
        loop = type(asyncio.get_running_loop()).__name__
        raise LLMConnectionError(
            f"could not start a process, because the event loop ({loop}) does not support it",
            exc,
            hint="use the default event loop of asyncio, which is the ProactorEventLoop on Windows",
        ) from exc
    except (OSError, ValueError, RuntimeError) as exc:
        # asyncio raises a RuntimeError if a thread cannot be started, or if no child watcher is active.
        code = getattr(exc, "errno", None)
        reason = os.strerror(code) if code else str(exc)
        hint = _START_HINTS.get(code, "see the reason, and check the path of the program")
        raise LLMConnectionError(f"could not start {program}: {reason}", exc, hint=hint) from exc


async def run_to_end(
    *command: str, log: IO[bytes], env: Mapping[str, str], poll: Callable[[], Awaitable[None]] | None = None
) -> int:
    """Runs a command to its end, and returns its exit status.

    On cancellation of the caller, the command is killed.

    Args:
        *command: The program and its arguments.
        log: The file to which the command writes its output and its errors.
        env: The environment variables of the command.
        poll: An async function that is called about ten times a second while the command runs. If it raises an
            exception, the command is killed and the exception is raised.

    Raises:
        LLMConnectionError: The command cannot be started.
    """
    process = await start_process(*command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=env)
    try:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_SECONDS if poll else None):
                    return await process.wait()
            if poll:
                await poll()
    except BaseException:
        # A process that is no longer waited for must not be left behind.
        await end_process(process)
        raise


async def end_process(process: Process, *, grace: float = 0.0) -> None:
    """Closes the stdin of a child, kills the child if it is still running after a grace period, and reaps it.

    On cancellation of the caller, this work goes on, and the cancellation is raised when it is done.

    Args:
        process: The child process.
        grace: The seconds that the child has to end on its own. By default it is killed at once.
    """
    await settle(_end_process(process, grace))


async def _end_process(process: Process, grace: float) -> None:
    if process.stdin is not None:
        process.stdin.close()
    with suppress(TimeoutError):
        async with asyncio.timeout(grace):
            await process.wait()
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()
    if process.stdout is not None:
        # asyncio closes its end of the pipe only after all data has been read.
        await process.stdout.read()


def describe_exit(returncode: int | None) -> str:
    """Describes how a child ended, for example "ended with status 1" or "was killed by SIGKILL"."""
    if returncode is None or returncode >= 0:
        return f"ended with status {returncode}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"was killed by signal {-returncode}"
