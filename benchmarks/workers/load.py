"""The workloads of very many things at a time: whether all of them end well, what each costs, and what stays behind.

Each text is checked to be whole, so a client that loses a part under load has no figure.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Awaitable, Callable
from functools import partial

from benchmarks.agent_peers import make_agent
from benchmarks.agent_peers.base import AgentPeer
from benchmarks.gateways import GatewayProcess
from benchmarks.peers import make_client
from benchmarks.peers.base import ClientPeer
from benchmarks.stub import ANSWER, WORD
from benchmarks.workers import serve
from benchmarks.workers.measuring import check_length, cpu_microseconds, gather_calls, resident_kib

_CHUNKS = 20
_STREAM = f"stream-{_CHUNKS}-1"
_CALLS = 2
_AGENTS = {"limit": "limit", "lmbridge": "lmbridge", "openai": "openai-agents"}
"""The agent loop for each client."""
_WARM_UP = 3
"""The number of waves that give the process the memory that it needs for so much at a time."""


class LoadWorkloads:
    """The workloads of one client.

    Args:
        name: The name of the client.
        port: The port of the stub server.
    """

    def __init__(self, name: str, port: int) -> None:
        self._name = name
        self._port = port
        self._gateway: GatewayProcess | None = None
        self._peers: dict[tuple[str, int], ClientPeer] = {}
        self._agent: AgentPeer | None = None

    async def renew(self) -> None:
        """Closes the connections."""
        for peer in self._peers.values():
            await peer.close()
        self._peers.clear()

    async def cost(self, kind: str, at_once: int, seconds: float) -> float:
        """Returns the CPU microseconds of one unit of a wave."""
        wave = self._wave(kind, at_once)
        await wave()
        return await cpu_microseconds(wave, seconds)

    async def growth(self, kind: str, at_once: int, waves: int) -> float:
        """Returns the MiB by which this process grows while one wave follows another."""
        wave = self._wave(kind, at_once)
        for _ in range(_WARM_UP):
            await wave()
        gc.collect()
        before = resident_kib()
        for _ in range(waves):
            await wave()
        gc.collect()
        return (resident_kib() - before) / 1024

    def _wave(self, kind: str, at_once: int) -> Callable[[], Awaitable[int]]:
        return partial(getattr(self, f"_{kind}"), at_once)

    def _peer(self, base: str, at_once: int) -> ClientPeer:
        if (base, at_once) not in self._peers:
            self._peers[base, at_once] = make_client(self._name, base, at_once)
        return self._peers[base, at_once]

    async def _streams(self, at_once: int) -> int:
        return await self._read_all(f"http://127.0.0.1:{self._port}/v1", at_once)

    async def _through_gateway(self, at_once: int) -> int:
        if self._gateway is None:
            self._gateway = GatewayProcess("lmbridge", f"http://127.0.0.1:{self._port}/v1")
        return await self._read_all(self._gateway.api_base, at_once)

    async def _read_all(self, base: str, at_once: int) -> int:
        peer = self._peer(base, 2 * at_once)
        for _, length in await gather_calls(at_once, lambda: peer.read(_STREAM)):
            check_length(length, len(WORD) * (_CHUNKS - 1))
        return at_once

    async def _queued(self, at_once: int) -> int:
        """Makes all requests at once, of which the client sends ten at a time."""
        peer = self._peer(f"http://127.0.0.1:{self._port}/v1", 10)
        for length in await gather_calls(at_once, lambda: peer.ask("plain")):
            check_length(length, len(WORD) * 20)
        return at_once

    async def _runs(self, at_once: int) -> int:
        """Runs all agents at once, each of which calls a tool twice."""
        if self._agent is None:
            self._agent = make_agent(_AGENTS[self._name], f"http://127.0.0.1:{self._port}/v1")
        agent = self._agent
        for length in await gather_calls(at_once, lambda: agent.run(f"agent-{_CALLS}")):
            check_length(length, len(ANSWER))
        return at_once


if __name__ == "__main__":
    serve(LoadWorkloads(sys.argv[1], int(sys.argv[2])))
