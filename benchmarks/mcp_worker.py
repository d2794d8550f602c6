"""The process in which calls of a server's tools are measured, one way beside the other; see `worker.py`."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from typing import Any, Final

from benchmarks.mcp_peers import Way, open_way
from benchmarks.worker import serve
from benchmarks.workloads import check, cpu

_CALLS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "stub": ("echo", {}),
    "time": ("get_current_time", {"timezone": "Europe/Berlin"}),
    "everything": ("echo", {"message": "hello"}),
}


class McpBench:
    """Ways to the tools of one server, each with a process of the server's.

    Args:
        server: Which one.
        core: Where its processes run; negative for anywhere.
    """

    def __init__(self, server: str, core: int) -> None:
        self._server, self._core = server, core
        self._ways: dict[str, Way] = {}

    async def spend(self, way: str, at_once: int, size: int, seconds: float) -> float:
        """CPU microseconds of the client per call, with so many at a time."""
        call = await self._call(way, size)

        async def wave() -> int:
            await (call() if at_once == 1 else asyncio.gather(*(call() for _ in range(at_once))))
            return at_once

        await wave()
        return await cpu(wave, seconds)

    async def take(self, way: str, size: int, seconds: float) -> float:
        """Microseconds per call, one after the other."""
        call = await self._call(way, size)
        gc.collect()
        done, began = 0, time.perf_counter()
        while not done or time.perf_counter() - began < seconds:
            await call()
            done += 1
        return (time.perf_counter() - began) / done * 1e6

    async def _call(self, way: str, size: int) -> Any:
        """Makes a call of a tool that is warm."""
        if way not in self._ways:
            self._ways[way] = await self._open(way)
        opened = self._ways[way]
        tool, arguments = _CALLS[self._server]
        if size:
            arguments = {"text": "x" * size}
        expected = len(await opened.call(tool, arguments))

        async def call() -> None:
            check(len(await opened.call(tool, arguments)), size or expected)

        return call

    async def _open(self, way: str) -> Way:
        """Opens a way; a process that is started begins on the core of the one who starts it."""
        if self._core < 0:
            return await open_way(way, self._server)
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self._core})
        try:
            return await open_way(way, self._server)
        finally:
            os.sched_setaffinity(0, own)


if __name__ == "__main__":
    serve(McpBench(sys.argv[1], int(sys.argv[2])))
