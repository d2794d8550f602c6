"""What an asynchronous program can leave behind: descriptors, tasks, threads, children, warnings, lost exceptions."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import resource
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs


@attrs.frozen
class Holdings:
    """What a process holds at one moment."""

    descriptors: int
    tasks: int
    threads: int
    children: int

    def or_more(self, other: Holdings) -> Holdings:
        """Returns the larger one of each number."""
        pairs = zip(attrs.astuple(self), attrs.astuple(other), strict=True)
        return Holdings(*map(max, pairs))

    def more_than(self, before: Holdings) -> str:
        """Returns what has been added since then, or an empty text."""
        now, then = attrs.asdict(self), attrs.asdict(before)
        return ", ".join(f"{now[name] - then[name]} more {name}" for name in now if now[name] > then[name])


def holdings() -> Holdings:
    """Counts what this process holds. Descriptors and children are counted on Linux only."""
    processes = Path("/proc/self/task")
    children = [
        child
        for thread in (processes.iterdir() if processes.exists() else ())
        for child in _read(thread / "children").split()
    ]
    return Holdings(
        descriptors=len(list(Path("/proc/self/fd").iterdir())) if processes.exists() else 0,
        tasks=len(asyncio.all_tasks()),
        threads=threading.active_count(),
        children=len(children),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        # The thread has ended in the meantime.
        return ""


async def settled_holdings(before: Holdings, *, seconds: float = 5.0) -> Holdings:
    """Counts again and again until nothing has been added since `before`, for some seconds at most.

    The kernel, and the transports that asyncio closes, take some turns of the loop to let go.
    """
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        now = holdings()
        if not now.more_than(before) or asyncio.get_running_loop().time() > deadline:
            return now
        gc.collect()
        await asyncio.sleep(0.01)


def allow_descriptors() -> None:
    """Lets this process open as many descriptors as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def resident_kib() -> float:
    """Returns the memory of this process in KiB, on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


def return_free_memory() -> None:
    """Makes glibc return to the system what the program has freed, so that only what is in use counts."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Collects warnings, errors in the log, and what the loop reports to its exception handler, while the block runs.

    A garbage collection at its end finds the exceptions of tasks that nobody has awaited, and unclosed resources.
    """
    loop = asyncio.get_running_loop()
    found: list[str] = []

    def report(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        found.append(f"{context['message']}: {context.get('exception')!r}")

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        found.append(f"{category.__name__}: {message}")

    class Errors(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            found.append(f"{record.name}: {record.getMessage()} {error!r}")

    before, errors = loop.get_exception_handler(), Errors(logging.ERROR)
    loop.set_exception_handler(report)
    logging.getLogger().addHandler(errors)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            yield found
            gc.collect()
    finally:
        loop.set_exception_handler(before)
        logging.getLogger().removeHandler(errors)
