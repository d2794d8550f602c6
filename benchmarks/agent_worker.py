"""The process of one agent loop, and what is measured there; it is spoken to as `worker.py` is."""

from __future__ import annotations

import asyncio
import gc
import sys

from benchmarks.agent_peers import agent
from benchmarks.stub import ANSWER
from benchmarks.worker import serve
from benchmarks.workloads import ask_stub, check, cpu, resident

SETTLING = 0.02
"""Seconds until runs have read what the stub has sent."""


class AgentBench:
    """An agent loop at work.

    Args:
        name: Which one.
        port: The stub server's.
    """

    def __init__(self, name: str, port: int) -> None:
        self._name = name
        self._port = port

    async def calls(self, calls: int, seconds: float) -> float:
        """CPU microseconds per request of runs of so many tool calls, one run after another.

        A run asks once more than it calls: for its answer.
        """
        peer, model = agent(self._name, f"http://127.0.0.1:{self._port}/v1"), f"agent-{calls}"

        async def run() -> int:
            check(await peer.run(model), len(ANSWER))
            return calls + 1

        await run()
        return await cpu(run, seconds)

    async def memory(self, runs: int) -> float:
        """KiB that the process grows by for each run that has called its tool and waits for the model."""
        peer = agent(self._name, f"http://127.0.0.1:{self._port}/v1")
        check(await peer.run("agent-1"), len(ANSWER))
        waiting: list[asyncio.Task[int]] = []

        async def start(count: int) -> None:
            waiting.extend([asyncio.create_task(peer.run("agent-1-stall")) for _ in range(count)])
            while await ask_stub(self._port, "stalled") < len(waiting):  # noqa: ASYNC110 - a server cannot set events
                await asyncio.sleep(SETTLING)
            await asyncio.sleep(SETTLING)

        await start(1)
        gc.collect()
        before = resident()
        while len(waiting) <= runs:
            await start(min(100, runs + 1 - len(waiting)))
        gc.collect()
        return (resident() - before) / runs


if __name__ == "__main__":
    serve(AgentBench(sys.argv[1], int(sys.argv[2])))
