"""The workloads of calls of MCP tools. A worker has one session for each peer, all with the same kind of server."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from benchmarks.mcp_peers import McpPeer, open_session
from benchmarks.processes import SERVER_CORE, cores
from benchmarks.workers import serve
from benchmarks.workers.measuring import check_length, cpu_microseconds, gather_calls

_CALLS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "stub": ("echo", {}),
    "time": ("get_current_time", {"timezone": "Europe/Berlin"}),
    "everything": ("echo", {"message": "hello"}),
}
"""The tool that is called on each server, and its arguments."""


class McpWorkloads:
    """Calls of the tools of one server. Each peer has its own session and its own process of the server.

    Args:
        server: The name of the server in `benchmarks.mcp_servers`.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self._sessions: dict[str, McpPeer] = {}

    async def cpu_of_calls(self, peer: str, at_once: int, size: int, seconds: float) -> float:
        """Returns the CPU microseconds of the client per call, with `at_once` calls at a time."""
        call = await self._prepare(peer, size)

        async def wave() -> int:
            await gather_calls(at_once, call)
            return at_once

        await wave()
        return await cpu_microseconds(wave, seconds)

    async def time_of_calls(self, peer: str, size: int, seconds: float) -> float:
        """Returns the microseconds per call, one call after another."""
        call = await self._prepare(peer, size)
        gc.collect()
        done, began = 0, time.perf_counter()
        while not done or time.perf_counter() - began < seconds:
            await call()
            done += 1
        return (time.perf_counter() - began) / done * 1e6

    async def _prepare(self, peer: str, size: int) -> Callable[[], Awaitable[None]]:
        """Returns a function that calls the tool once, after a first call that is not measured."""
        if peer not in self._sessions:
            self._sessions[peer] = await self._open(peer)
        session = self._sessions[peer]
        tool, arguments = _CALLS[self._server]
        if size:
            arguments = {"text": "x" * size}
        expected = len(await session.call(tool, arguments))

        async def call() -> None:
            check_length(len(await session.call(tool, arguments)), size or expected)

        return call

    async def _open(self, peer: str) -> McpPeer:
        """Opens a session.

        The process of the server inherits the core of this process, which therefore moves to the core of servers first.
        """
        if (pair := cores()) is None:
            return await open_session(peer, self._server)
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {pair[SERVER_CORE]})
        try:
            return await open_session(peer, self._server)
        finally:
            os.sched_setaffinity(0, own)


if __name__ == "__main__":
    serve(McpWorkloads(sys.argv[1]))
