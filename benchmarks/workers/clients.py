"""The workloads of clients.

CPU time is the user and system time of this process, with the garbage collector switched on. The length of every text
is checked, so a client that loses a chunk has no figure.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections.abc import Callable
from statistics import median

from benchmarks.peers import make_client
from benchmarks.peers.base import ClientPeer
from benchmarks.stub import WORD
from benchmarks.workers import serve
from benchmarks.workers.measuring import ask_stub, check_length, cpu_microseconds, gather_calls, resident_kib

_REPLY_LENGTH = len(WORD) * 20
_NEVER_SECONDS = 1.0
"""The seconds after which a connection counts as never closed, if the server has not seen it closed by then."""


class ClientWorkloads:
    """The workloads of one client.

    Args:
        make: A function that returns the client for a number of concurrent requests.
        port: The port of the stub server.
    """

    def __init__(self, make: Callable[[int], ClientPeer], port: int) -> None:
        self._make = make
        self._port = port
        self._peers: dict[int, ClientPeer] = {}
        self._requests_made = 0
        self._tags = 0

    def _peer(self, at_once: int = 2000) -> ClientPeer:
        """Returns the client for a number of concurrent requests. The default is so large that no request waits."""
        if at_once not in self._peers:
            self._peers[at_once] = self._make(at_once)
        return self._peers[at_once]

    async def renew(self) -> None:
        """Replaces the client, so that no row finds the idle connections of another."""
        for peer in self._peers.values():
            await peer.close()
        self._peers.clear()
        self._requests_made = 0
        await asyncio.sleep(0.05)

    async def chunks(self, chunks: int, per_write: int, at_once: int, seconds: float) -> float:
        """Returns the CPU microseconds per chunk of streams that are read `at_once` at a time."""
        peer, model = self._peer(), f"stream-{chunks}-{per_write}"
        await gather_calls(at_once, lambda: peer.read("stream-20-5"))
        expected = len(WORD) * (chunks - 1)

        async def wave() -> int:
            for _, length in await gather_calls(at_once, lambda: peer.read(model)):
                check_length(length, expected)
            return at_once * chunks

        return await cpu_microseconds(wave, seconds)

    async def requests(self, at_once: int, each: int, seconds: float) -> float:
        """Returns the CPU microseconds per request if `at_once` tasks make `each` requests, one after another."""
        peer = self._peer()

        async def task(times: int) -> None:
            for _ in range(times):
                check_length(await peer.ask("plain"), _REPLY_LENGTH)

        async def wave() -> int:
            await gather_calls(at_once, lambda: task(each))
            return at_once * each

        await gather_calls(at_once, lambda: task(min(each, 5)))
        return await cpu_microseconds(wave, seconds)

    async def first_chunk(self, times: int) -> float:
        """Returns the median of the microseconds from the call to the first chunk on a warm connection."""
        peer = self._peer()
        for _ in range(5):
            await peer.read("stream-20-5")
        gc.collect()
        took: list[float] = []
        for _ in range(times):
            began = time.perf_counter()
            stream = aiter(await peer.stream("stream-20-5"))
            await anext(stream)
            took.append(time.perf_counter() - began)
            async for _ in stream:
                pass
        return median(took) * 1e6

    async def memory(self, streams: int) -> float:
        """Returns the KiB by which the process grows for each open stream with a task that waits for its next chunk."""
        peer = self._peer()
        await peer.read("stream-20-5")
        readers: list[asyncio.Task[None]] = []

        async def open_more(count: int) -> None:
            begun = asyncio.Semaphore(0)

            async def reader() -> None:
                async for _ in await peer.stream("stall-1-memory"):
                    begun.release()

            readers.extend([asyncio.create_task(reader()) for _ in range(count)])
            for _ in range(count):
                await begun.acquire()
            # After the first chunk, each task waits for the second one again.
            await asyncio.sleep(0.01)

        await open_more(1)
        gc.collect()
        before = resident_kib()
        while len(readers) <= streams:
            await open_more(min(50, streams + 1 - len(readers)))
        gc.collect()
        return (resident_kib() - before) / streams

    async def leave(self, how: str, times: int) -> float | None:
        """Returns the median of the milliseconds from leaving a stream until the server sees its connection closed.

        The figure is None if the server does not see that within a second.
        """
        peer = self._peer()
        await peer.read("stream-20-5")
        gc.collect()
        took: list[float] = []
        for _ in range(times):
            self._tags += 1
            tag = f"{os.getpid()}.{self._tags}"
            left = await getattr(self, f"_leave_by_{how}")(peer, f"stall-3-{tag}")
            if (closed := await self._time_of_close(tag)) is None:
                return None
            took.append((closed - left) * 1e3)
        return median(took)

    async def _leave_by_break(self, peer: ClientPeer, model: str) -> float:
        count, left = 0, 0.0
        async for _ in await peer.stream(model):
            count += 1
            if count == 3:
                left = time.monotonic()
                break
        return left

    async def _leave_by_close(self, peer: ClientPeer, model: str) -> float:
        stream = await peer.stream(model)
        chunks = aiter(stream)
        for _ in range(3):
            await anext(chunks)
        left = time.monotonic()
        await peer.leave(stream)
        return left

    async def _leave_by_cancel(self, peer: ClientPeer, model: str) -> float:
        read = asyncio.Event()

        async def reader() -> None:
            count = 0
            async for _ in await peer.stream(model):
                count += 1
                if count == 3:
                    read.set()

        task = asyncio.create_task(reader())
        await read.wait()
        # By now, the task waits for the fourth chunk, which never comes.
        await asyncio.sleep(0.002)
        left = time.monotonic()
        task.cancel()
        await asyncio.wait((task,))
        return left

    async def _time_of_close(self, tag: str) -> float | None:
        """Returns when the server saw a connection closed, or None.

        The server is asked after a pause, so that the request does not delay the server in noticing the close.
        """
        deadline = time.monotonic() + _NEVER_SECONDS
        while time.monotonic() < deadline:
            await asyncio.sleep(0.03)
            if (closed := await ask_stub(self._port, f"left/{tag}")) is not None:
                return float(closed)
        return None

    async def aged(self, before: int, requests: int) -> float:
        """Returns the CPU microseconds per request of a client that has made `before` requests, one at a time."""
        peer = self._peer()
        while self._requests_made < before:
            check_length(await peer.ask("plain"), _REPLY_LENGTH)
            self._requests_made += 1

        async def more() -> int:
            for _ in range(requests):
                check_length(await peer.ask("plain"), _REPLY_LENGTH)
            self._requests_made += requests
            return requests

        return await cpu_microseconds(more, 0)

    async def waiters(self, waiters: int, at_once: int, seconds: float) -> float:
        """Returns the CPU microseconds per request if `waiters` requests start together, `at_once` at a time."""
        peer = self._peer(at_once)

        async def wave() -> int:
            for length in await gather_calls(waiters, lambda: peer.ask("plain")):
                check_length(length, _REPLY_LENGTH)
            return waiters

        await gather_calls(at_once, lambda: peer.ask("plain"))
        return await cpu_microseconds(wave, seconds)


def main() -> None:
    name, port = sys.argv[1], int(sys.argv[2])
    serve(ClientWorkloads(lambda at_once: make_client(name, f"http://127.0.0.1:{port}/v1", at_once), port))


if __name__ == "__main__":
    main()
