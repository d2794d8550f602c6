"""The agent of lmbridge with its default options."""

from __future__ import annotations

import lmbridge
from benchmarks.solving.tasks import Task
from benchmarks.solving_peers import base


class Solver(base.Solver):
    def __init__(self, base: str) -> None:
        self._client = lmbridge.LLMClient(base)

    async def solve(self, task: Task) -> str:
        agent = lmbridge.Agent(
            self._client,
            tools=task.tools(),
            system_prompt=base.SYSTEM,
            max_rounds=base.MAX_ROUNDS,
            temperature=0,
        )
        return (await agent.run(task.prompt, model=base.MODEL)).text
