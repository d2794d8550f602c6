"""Child processes: running a command to its end, ending a process, and describing how it ended."""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import IO

from lmbridge._tasks import settle

_TAIL_BYTES = 4096
_TAIL_LINES = 10
_POLL_SECONDS = 0.1


def read_tail(log: IO[bytes]) -> str:
    """Returns the last lines of a log file.

    Call it only after the child has ended, because the child writes at the position that reading changes.
    """
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - _TAIL_BYTES))
    lines = log.read().decode(errors="replace").splitlines()
    return "\n".join(line.rstrip() for line in lines[-_TAIL_LINES:])


async def run_command(
    *command: str, log: IO[bytes], env: Mapping[str, str], poll: Callable[[], Awaitable[None]] | None = None
) -> int:
    """Runs a command to its end, and returns its exit status.

    On cancellation of the caller, the command is killed.

    Args:
        *command: The program and its arguments.
        log: The file to which the command writes its output and its errors.
        env: The environment variables of the command.
        poll: An async function that is called ten times a second while the command runs. If it raises an exception, the
            command is killed and the exception is raised.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=env
    )
    try:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_SECONDS if poll else None):
                    return await process.wait()
            if poll:
                await poll()
    except BaseException:
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
