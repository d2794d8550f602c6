"""Functions that all workers use to measure."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any


async def gather_calls(count: int, call: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Makes `count` calls at the same time, and returns their results."""
    return [await call()] if count == 1 else await asyncio.gather(*(call() for _ in range(count)))


async def ask_stub(port: int, path: str) -> Any:
    """Returns the value that the stub server reports about its connections at a path."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /%s HTTP/1.1\r\nHost: stub\r\n\r\n" % path.encode())
    body = (await reader.readuntil(b"}")).rpartition(b"\r\n")[2]
    writer.close()
    return next(iter(json.loads(body).values()))


async def cpu_microseconds(work: Callable[[], Awaitable[int]], seconds: float) -> float:
    """Returns the CPU time of one unit of work.

    Args:
        work: A function that does some work, and returns the number of units.
        seconds: The minimum of CPU seconds to spend. The work is done at least once.
    """
    gc.collect()
    done, spent, began = 0, 0.0, time.process_time()
    while not done or spent < seconds:
        done += await work()
        spent = time.process_time() - began
    return spent / done * 1e6


def check_length(length: int, expected: int) -> None:
    """Raises if a text is incomplete, because a peer that loses text must not have a figure.

    Raises:
        ValueError: The length is not the expected one.
    """
    if length != expected:
        raise ValueError(f"the text has {length} characters instead of {expected}")


def resident_kib() -> float:
    """Returns the resident memory of this process in KiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024
