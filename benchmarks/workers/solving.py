"""Counts the tasks that an agent solves with a model that makes mistakes."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from typing import Any

from benchmarks.solving.model import FallibleModel
from benchmarks.solving.tasks import make_task
from benchmarks.solving_peers import make_solver
from benchmarks.workers import serve
from lmbridge.testing import ScriptedServer


class SolvingWorkloads:
    """The workloads of one agent.

    Args:
        name: The name of the agent in `benchmarks.solving_peers`.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    async def solve(self, tasks: int, rate: float, groups: list[str], seed: int) -> dict[str, Any]:
        """Returns how many tasks were solved, how the others ended, and what the conversations looked like."""
        model = FallibleModel(rate, groups, seed)
        endings: Counter[str] = Counter()
        unsolved: list[tuple[int, list[str], str]] = []
        async with ScriptedServer() as server:
            server.default = model
            solver = make_solver(self._name, server.api_base)
            for number in range(tasks):
                task = make_task(number)
                try:
                    answer = await solver.solve(task)
                    ending = "answered"
                except Exception as error:  # noqa: BLE001 - a peer may raise any exception
                    answer, ending = "", type(error).__name__
                if task.is_solved(answer):
                    endings["solved"] += 1
                else:
                    endings[ending] += 1
                    unsolved.append((number, model.made.get(number, []), answer[-200:] or ending))
            requests = sum(request.path == "/v1/chat/completions" for request in server.requests)
        return {
            "tasks": tasks,
            "solved": endings["solved"],
            "endings": dict(endings),
            "requests": requests,
            "invalid": len(model.invalid_histories),
            "unsolved": unsolved,
        }


if __name__ == "__main__":
    # The warnings of thousands of mistakes that were made on purpose would hide everything else.
    logging.getLogger("lmbridge").setLevel(logging.ERROR)
    serve(SolvingWorkloads(sys.argv[1]))
