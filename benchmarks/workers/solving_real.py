"""Counts the tasks that agents solve with real models on the embedded server."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections import Counter, defaultdict
from typing import Any

import aiohttp

from benchmarks.solving.leaderboard import make_leaderboard_tasks
from benchmarks.solving.real_models import start_model
from benchmarks.solving.real_tasks import MAX_TOKENS, make_real_tasks
from benchmarks.solving.recording_proxy import RecordingProxy
from benchmarks.solving_peers import make_solver
from benchmarks.solving_peers.base import MODEL
from benchmarks.workers import serve
from lmbridge.testing import ScriptedServer, reply

_CONTEXT_LENGTH = 4096
_SECONDS_PER_TASK = 300.0


class RealSolvingWorkloads:
    """The workloads of all agents with one model.

    Args:
        model: The name of the model in `benchmarks.solving.real_models`.
    """

    def __init__(self, model: str) -> None:
        self._model = model

    async def solve(self, peer: str, per_group: int) -> dict[str, Any]:
        """Returns how many tasks of each group were solved, how the others ended, and what the server did."""
        solved: defaultdict[str, int] = defaultdict(int)
        endings: Counter[str] = Counter()
        async with (
            start_model(self._model, _CONTEXT_LENGTH) as api_base,
            # The server closes idle connections, and an agent takes its time between two requests.
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
            ScriptedServer() as server,
        ):
            server.default = proxy = RecordingProxy(session, api_base, MAX_TOKENS)
            models = {"data": [{"id": MODEL, "owned_by": "vllm", "max_model_len": _CONTEXT_LENGTH}]}
            server.on_path("/v1/models", reply(200, models))
            solver = make_solver(peer, server.api_base)
            tasks = [*make_real_tasks(per_group), *make_leaderboard_tasks(per_group)]
            for task in tasks:
                try:
                    async with asyncio.timeout(_SECONDS_PER_TASK):
                        answer = await solver.solve(task)
                    ending = "answered"
                except Exception as error:  # noqa: BLE001 - a peer may raise any exception
                    answer, ending = "", type(error).__name__
                is_solved = task.is_solved(answer)
                solved[task.group] += is_solved
                endings["solved" if is_solved else ending] += 1
        return {
            "tasks": len(tasks),
            "per_group": per_group,
            "solved": sum(solved.values()),
            "groups": dict(solved),
            "endings": dict(endings),
            **proxy.counts,
        }


def be_modest() -> None:
    """Lets other work on the machine go first, on all cores: the numbers of solved tasks do not depend on time."""
    os.setpriority(os.PRIO_PROCESS, 0, 5)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


if __name__ == "__main__":
    be_modest()
    logging.getLogger("lmbridge").setLevel(logging.ERROR)
    serve(RealSolvingWorkloads(sys.argv[1]))
