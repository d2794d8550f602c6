"""The workloads of gateways: what a gateway between a client and the stub server costs.

The client shares the core of the stub server, so that the gateway has its own. It only sends bytes, counts the events
of each answer, and looks for its end. Every answer has to be complete, so a gateway that loses a chunk has no figure.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from statistics import median
from typing import Final

from benchmarks.gateways import GatewayProcess, wait_until_ready
from benchmarks.processes import SERVER_CORE, cores
from benchmarks.workers import serve

_END: Final = b"0\r\n\r\n"
_DIRECT: Final = "direct"
_GROWTH_PAUSE: Final = 200
"""The milliseconds between two chunks of each stream while the memory is watched."""


class Connection:
    """A connection to a server, which is kept open from request to request."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, model: str) -> asyncio.StreamReader:
        """Sends a request for a streamed answer."""
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**24)
        messages = [{"role": "user", "content": "Say hello."}]
        body = json.dumps({"model": model, "stream": True, "messages": messages}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
        self._writer.write((head % self._port).encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        return self._reader

    async def read(self, model: str, chunks: int) -> float:
        """Reads a whole answer, and returns the seconds until its first bytes.

        Raises:
            ValueError: The answer is not complete.
        """
        began = time.perf_counter()
        reader = await self.send(model)
        head = await reader.readuntil(b"\r\n\r\n")
        data = await reader.read(65536)
        first = time.perf_counter() - began
        found, rest = data.count(b"data: "), data[-5:]
        while not rest.endswith(_END):
            piece = await reader.read(65536)
            if not piece:
                raise ValueError(f"the answer ended after {found} events: {head[:60]!r}")
            # A mark that is split between two reads is counted with the second one.
            found += (rest + piece).count(b"data: ") - rest.count(b"data: ")
            rest = (rest + piece)[-5:]
        if not head.startswith(b"HTTP/1.1 200") or found != chunks + 1:
            raise ValueError(f"the answer has {found} events instead of {chunks + 1}: {head[:60]!r}")
        return first

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


class GatewayWorkloads:
    """The workloads of one gateway.

    Args:
        kind: Its name, or "direct" for none.
        port: The port of the stub server.
    """

    def __init__(self, kind: str, port: int) -> None:
        self._kind = kind
        self._stub = port
        self._process: GatewayProcess | None = None
        if pair := cores():
            os.sched_setaffinity(0, {pair[SERVER_CORE]})

    async def renew(self) -> None:
        """Does nothing, because only the process of the gateway is kept from row to row."""

    async def _gateway(self) -> tuple[GatewayProcess, int]:
        """Returns the process of the gateway, which is started by the first workload, and its port."""
        if self._process is None:
            self._process = GatewayProcess(self._kind, f"http://127.0.0.1:{self._stub}/v1")
            port = int(self._process.api_base.rpartition(":")[2].partition("/")[0])

            async def is_ready() -> bool:
                connection = Connection(port)
                try:
                    await connection.read("stream-20-5", 20)
                except (ValueError, EOFError):
                    return False
                finally:
                    connection.close()
                return True

            await wait_until_ready(is_ready)
        return self._process, int(self._process.api_base.rpartition(":")[2].partition("/")[0])

    async def chunks(self, chunks: int, milliseconds: float, at_once: int) -> float:
        """Returns the CPU microseconds of the gateway per chunk, of streams with a pause between two chunks."""
        process, port = await self._gateway()
        connections = [Connection(port) for _ in range(at_once)]

        async def wave(count: int) -> None:
            model = f"paced-{count}-{milliseconds:g}"
            await asyncio.gather(*(each.read(model, count) for each in connections))

        await wave(3)
        before = process.cpu_seconds
        await wave(chunks)
        spent = process.cpu_seconds - before
        for each in connections:
            each.close()
        return spent / (chunks * at_once) * 1e6

    async def first_byte(self, times: int) -> float:
        """Returns the median of the milliseconds to the first bytes of an answer, on a warm connection."""
        port = self._stub if self._kind == _DIRECT else (await self._gateway())[1]
        connection = Connection(port)
        for _ in range(5):
            await connection.read("stream-20-5", 20)
        gc.collect()
        took = [await connection.read("stream-20-5", 20) for _ in range(times)]
        connection.close()
        return median(took) * 1e3

    async def memory(self, streams: int) -> float:
        """Returns the KiB by which the gateway grows for each open stream."""
        process, port = await self._gateway()
        await self._open_stalled(port, 1)
        before = process.resident_kib
        opened = await self._open_stalled(port, streams)
        grown = process.resident_kib - before
        for each in opened:
            each.close()
        return grown / streams

    async def _open_stalled(self, port: int, count: int) -> list[Connection]:
        connections = [Connection(port) for _ in range(count)]

        async def begin(connection: Connection) -> None:
            await (await connection.send("stall-1-gateway")).readuntil(b"data: ")

        waiting = iter(connections)
        # Fifty at a time, so that no queue of unaccepted connections overflows.
        while batch := [each for each, _ in zip(waiting, range(50), strict=False)]:
            await asyncio.gather(*map(begin, batch))
        return connections

    async def growth(self, streams: int, chunks: int, waves: int) -> float:
        """Returns the MiB by which the gateway grows while it passes on one wave of streams after another."""
        process, port = await self._gateway()

        async def wave() -> None:
            connections = [Connection(port) for _ in range(streams)]
            model = f"paced-{chunks}-{_GROWTH_PAUSE}"

            async def one(connection: Connection, index: int) -> None:
                await asyncio.sleep(index / streams)
                await connection.read(model, chunks)

            await asyncio.gather(*(one(each, index) for index, each in enumerate(connections)))
            for each in connections:
                each.close()

        # The first two waves give the process the memory that it needs for so many streams.
        for _ in range(2):
            await wave()
        before = process.resident_kib
        for _ in range(waves):
            await wave()
        return (process.resident_kib - before) / 1024


if __name__ == "__main__":
    serve(GatewayWorkloads(sys.argv[1], int(sys.argv[2])))
