"""Counts the tasks that an agent solves with a model that makes mistakes."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.solving.long_tasks import ForgetfulModel, make_long_task
from benchmarks.solving.model import FallibleModel
from benchmarks.solving.tasks import make_task
from benchmarks.solving_peers import make_solver
from benchmarks.solving_peers.base import MODEL, Task
from benchmarks.workers import serve
from lmbridge.testing import Behaviour, ScriptedServer, reply


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
        counts = await self._solve(model, [make_task(number) for number in range(tasks)])
        counts["invalid"] = len(model.invalid_histories)
        counts["unsolved"] = [(number, model.made.get(number, []), end) for number, end in counts["unsolved"]]
        return counts

    async def solve_long(self, tasks: int, pages: int) -> dict[str, Any]:
        """Returns the same about tasks that need more than the context of their model."""
        model = ForgetfulModel()
        counts = await self._solve(model, [make_long_task(number, pages) for number in range(tasks)])
        return {**counts, "invalid": len(model.invalid_histories), "overflows": model.overflows, "notes": model.notes}

    async def _solve(self, model: Behaviour, tasks: Sequence[Task]) -> dict[str, Any]:
        endings: Counter[str] = Counter()
        unsolved: list[tuple[int, str]] = []
        async with ScriptedServer() as server:
            server.default = model
            models = {"data": [{"id": MODEL, "owned_by": "vllm", "max_model_len": tasks[0].context_length}]}
            server.on_path("/v1/models", reply(200, models))
            solver = make_solver(self._name, server.api_base)
            for number, task in enumerate(tasks):
                try:
                    answer = await solver.solve(task)
                    ending = "answered"
                except Exception as error:  # noqa: BLE001 - a peer may raise any exception
                    answer, ending = "", type(error).__name__
                if task.is_solved(answer):
                    endings["solved"] += 1
                else:
                    endings[ending] += 1
                    unsolved.append((number, answer[-200:] or ending))
            requests = sum(request.path == "/v1/chat/completions" for request in server.requests)
        return {
            "tasks": len(tasks),
            "solved": endings["solved"],
            "endings": dict(endings),
            "requests": requests,
            "unsolved": unsolved,
        }


if __name__ == "__main__":
    # The warnings of thousands of mistakes that were made on purpose would hide everything else.
    logging.getLogger("lmbridge").setLevel(logging.ERROR)
    serve(SolvingWorkloads(sys.argv[1]))
