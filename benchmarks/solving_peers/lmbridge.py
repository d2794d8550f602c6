"""The agent of lmbridge with its default options."""

from __future__ import annotations

import lmbridge
from benchmarks.solving_peers import base
from lmbridge.agent.settings import CompactionMode


class Solver(base.Solver):
    compaction: CompactionMode = "summarize"
    """The default, which other columns replace."""

    def __init__(self, base: str) -> None:
        self._client = lmbridge.LLMClient(base)

    async def solve(self, task: base.Task) -> str:
        agent = lmbridge.Agent(
            self._client,
            tools=task.tools(),
            system_prompt=base.SYSTEM,
            max_rounds=task.max_rounds,
            temperature=0,
            compaction=self.compaction,
        )
        return (await agent.run(task.prompt, model=base.MODEL)).text
