"""Child processes: run to their end, or ended; what they left in their log."""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import IO

from lmbridge.local.shield import settle

_TAIL_BYTES = 4096
_TAIL_LINES = 10
_WATCH_EVERY = 0.1  # seconds


def tail(log: IO[bytes]) -> str:
    """The last lines in the log of a child that has ended (reading moves the place where it would write)."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - _TAIL_BYTES))
    lines = log.read().decode(errors="replace").splitlines()
    return "\n".join(line.rstrip() for line in lines[-_TAIL_LINES:])


async def run(
    *command: str, log: IO[bytes], env: Mapping[str, str], watch: Callable[[], Awaitable[None]] | None = None
) -> int:
    """Runs a command to its end and returns its exit status; a cancel kills it.

    Meanwhile `watch` is awaited ten times a second; what it raises kills the command, too.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=env
    )
    try:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_EVERY if watch else None):
                    return await process.wait()
            if watch:
                await watch()
    except BaseException:
        await end(process)
        raise


async def end(process: Process, *, grace: float = 0.0) -> None:
    """Closes the child's stdin, kills it if it is still there after the grace (in seconds), and reaps it.

    A cancel has to wait for that.
    """
    await settle(_end(process, grace))


async def _end(process: Process, grace: float) -> None:
    if process.stdin is not None:
        process.stdin.close()
    with suppress(TimeoutError):
        async with asyncio.timeout(grace):
            await process.wait()
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()
    if process.stdout is not None:
        await process.stdout.read()  # asyncio closes its end of the pipe at the end of the data, not before


def describe_exit(returncode: int | None) -> str:
    """How the child ended, in words."""
    if returncode is None or returncode >= 0:
        return f"ended with status {returncode}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"was killed by signal {-returncode}"
