"""The workloads of agent loops."""

from __future__ import annotations

import asyncio
import gc
import sys

from benchmarks.agent_peers import make_agent
from benchmarks.stub import ANSWER
from benchmarks.workers import serve
from benchmarks.workers.measuring import ask_stub, check_length, cpu_microseconds, resident_kib

_SETTLING_SECONDS = 0.02
"""The time until the runs have read everything that the stub server has sent."""


class AgentWorkloads:
    """The workloads of one agent loop.

    Args:
        name: The name of the loop in `benchmarks.agent_peers`.
        port: The port of the stub server.
    """

    def __init__(self, name: str, port: int) -> None:
        self._name = name
        self._port = port

    async def calls(self, calls: int, seconds: float) -> float:
        """Returns the CPU microseconds per request of runs with a number of tool calls, one run after another.

        A run makes one request more than it has tool calls, for its answer.
        """
        peer, model = make_agent(self._name, f"http://127.0.0.1:{self._port}/v1"), f"agent-{calls}"

        async def run() -> int:
            check_length(await peer.run(model), len(ANSWER))
            return calls + 1

        await run()
        return await cpu_microseconds(run, seconds)

    async def memory(self, runs: int) -> float:
        """Returns the KiB by which the process grows for each run that has called its tool and waits for the model."""
        peer = make_agent(self._name, f"http://127.0.0.1:{self._port}/v1")
        check_length(await peer.run("agent-1"), len(ANSWER))
        waiting: list[asyncio.Task[int]] = []

        async def start(count: int) -> None:
            waiting.extend([asyncio.create_task(peer.run("agent-1-stall")) for _ in range(count)])
            while await ask_stub(self._port, "stalled") < len(waiting):  # noqa: ASYNC110 - the server is another process
                await asyncio.sleep(_SETTLING_SECONDS)
            await asyncio.sleep(_SETTLING_SECONDS)

        await start(1)
        gc.collect()
        before = resident_kib()
        while len(waiting) <= runs:
            await start(min(100, runs + 1 - len(waiting)))
        gc.collect()
        return (resident_kib() - before) / runs


if __name__ == "__main__":
    serve(AgentWorkloads(sys.argv[1], int(sys.argv[2])))
