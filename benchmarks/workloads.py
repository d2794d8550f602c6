"""What is measured, in the process of the client.

CPU is the process's own, user and system, with the garbage collector on. Every text is checked for its length: who
loses a chunk has no figure.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.base import Peer
from benchmarks.stub import WORD

REPLY = len(WORD) * 20
NEVER = 1.0
"""Seconds after which a server that has not seen a stream closed never will."""


class Bench:
    """A client at work.

    Args:
        make: Makes the client, for so many requests at a time.
        port: The stub server's.
    """

    def __init__(self, make: Callable[[int], Peer], port: int) -> None:
        self._make = make
        self._port = port
        self._peers: dict[int, Peer] = {}
        self._asked = 0
        self._tags = 0

    def _peer(self, at_once: int = 2000) -> Peer:
        """The client for so many at a time; by default for more than are ever under way, so that none queues."""
        if at_once not in self._peers:
            self._peers[at_once] = self._make(at_once)
        return self._peers[at_once]

    async def renew(self) -> None:
        """Makes a new client: one row's idle connections shall not be in the way of the next."""
        for peer in self._peers.values():
            await peer.close()
        self._peers.clear()
        self._asked = 0
        await asyncio.sleep(0.05)

    async def chunks(self, chunks: int, per_write: int, at_once: int, seconds: float) -> float:
        """CPU microseconds per chunk of streams that are read `at_once` at a time."""
        peer, model = self._peer(), f"stream-{chunks}-{per_write}"
        await _wave(at_once, lambda: peer.read("stream-20-5"))
        expected = len(WORD) * (chunks - 1)

        async def wave() -> int:
            for _, length in await _wave(at_once, lambda: peer.read(model)):
                check(length, expected)
            return at_once * chunks

        return await cpu(wave, seconds)

    async def requests(self, at_once: int, each: int, seconds: float) -> float:
        """CPU microseconds per plain request of `at_once` tasks that make `each` of them, one after the other."""
        peer = self._peer()

        async def task(times: int) -> None:
            for _ in range(times):
                check(await peer.ask("plain"), REPLY)

        async def wave() -> int:
            await _wave(at_once, lambda: task(each))
            return at_once * each

        await _wave(at_once, lambda: task(min(each, 5)))
        return await cpu(wave, seconds)

    async def first_chunk(self, times: int) -> float:
        """Microseconds from the call to the first chunk on a warm connection: the median."""
        peer = self._peer()
        for _ in range(5):
            await peer.read("stream-20-5")
        gc.collect()
        took = []
        for _ in range(times):
            began = time.perf_counter()
            stream = aiter(await peer.stream("stream-20-5"))
            await anext(stream)
            took.append(time.perf_counter() - began)
            async for _ in stream:
                pass
        return median(took) * 1e6

    async def memory(self, streams: int) -> float:
        """KiB that the process grows by for each open stream, with a task that waits for its next chunk."""
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
            await asyncio.sleep(0.01)  # until they wait again

        await open_more(1)
        gc.collect()
        before = resident()
        while len(readers) <= streams:
            await open_more(min(50, streams + 1 - len(readers)))
        gc.collect()
        return (resident() - before) / streams

    async def leave(self, how: str, times: int) -> float | None:
        """Milliseconds from leaving a stream until the server sees its connection closed: the median, or never."""
        peer = self._peer()
        await peer.read("stream-20-5")
        gc.collect()
        took = []
        for _ in range(times):
            self._tags += 1
            tag = f"{os.getpid()}.{self._tags}"
            left = await getattr(self, f"_leave_by_{how}")(peer, f"stall-3-{tag}")
            if (seen := await self._seen(tag)) is None:
                return None
            took.append((seen - left) * 1e3)
        return median(took)

    async def _leave_by_break(self, peer: Peer, model: str) -> float:
        count, left = 0, 0.0
        async for _ in await peer.stream(model):
            count += 1
            if count == 3:
                left = time.monotonic()
                break
        return left

    async def _leave_by_close(self, peer: Peer, model: str) -> float:
        stream = await peer.stream(model)
        chunks = aiter(stream)
        for _ in range(3):
            await anext(chunks)
        left = time.monotonic()
        await peer.leave(stream)
        return left

    async def _leave_by_cancel(self, peer: Peer, model: str) -> float:
        read = asyncio.Event()

        async def reader() -> None:
            count = 0
            async for _ in await peer.stream(model):
                count += 1
                if count == 3:
                    read.set()

        task = asyncio.create_task(reader())
        await read.wait()
        await asyncio.sleep(0.002)  # until it waits for a fourth that does not come
        left = time.monotonic()
        task.cancel()
        await asyncio.wait((task,))
        return left

    async def _seen(self, tag: str) -> float | None:
        """When the server saw that connection closed. It is asked later, so as not to be busy with the question."""
        until = time.monotonic() + NEVER
        while time.monotonic() < until:
            await asyncio.sleep(0.03)
            if (seen := await ask_stub(self._port, f"left/{tag}")) is not None:
                return float(seen)
        return None

    async def aged(self, before: int, requests: int) -> float:
        """CPU microseconds per plain request, one by one, once the client has made `before` of them."""
        peer = self._peer()
        while self._asked < before:
            check(await peer.ask("plain"), REPLY)
            self._asked += 1

        async def more() -> int:
            for _ in range(requests):
                check(await peer.ask("plain"), REPLY)
            self._asked += requests
            return requests

        return await cpu(more, 0)

    async def waiters(self, waiters: int, places: int, seconds: float) -> float:
        """CPU microseconds per plain request of so many that are made at once, of which `places` can go ahead."""
        peer = self._peer(places)

        async def wave() -> int:
            for length in await _wave(waiters, lambda: peer.ask("plain")):
                check(length, REPLY)
            return waiters

        await _wave(places, lambda: peer.ask("plain"))
        return await cpu(wave, seconds)


async def _wave(count: int, make: Callable[[], Awaitable[Any]]) -> list[Any]:
    return [await make()] if count == 1 else await asyncio.gather(*(make() for _ in range(count)))


async def ask_stub(port: int, what: str) -> Any:
    """What the stub server tells of itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /%s HTTP/1.1\r\nHost: stub\r\n\r\n" % what.encode())
    line = (await reader.readuntil(b"}")).rpartition(b"\r\n")[2]
    writer.close()
    return next(iter(json.loads(line).values()))


async def cpu(work: Callable[[], Awaitable[int]], seconds: float) -> float:
    """CPU microseconds for each of what `work` says it did, over `seconds` of it or one turn."""
    gc.collect()
    done, spent, began = 0, 0.0, time.process_time()
    while not done or spent < seconds:
        done += await work()
        spent = time.process_time() - began
    return spent / done * 1e6


def check(length: int, expected: int) -> None:
    if length != expected:
        raise ValueError(f"a text of {length} characters, not of {expected}")


def resident() -> float:
    """KiB of memory that are this process's."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024
