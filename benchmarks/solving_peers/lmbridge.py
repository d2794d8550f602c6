"""The agent of lmbridge with its default options."""

from __future__ import annotations

from typing import Literal

import lmbridge
from benchmarks.solving_peers import base
from lmbridge.agent.settings import CompactionMode


class Solver(base.Solver):
    compaction: CompactionMode = "summarize"
    on_limit: Literal["answer", "raise"] = "raise"
    """The defaults, which other columns replace."""

    def __init__(self, address: str) -> None:
        client = lmbridge.LLMClient(address)
        self._agent = lmbridge.Agent(
            client,
            system_prompt=base.SYSTEM,
            temperature=0,
            compaction=self.compaction,
            on_limit=self.on_limit,
        )

    async def solve(self, task: base.Task) -> str:
        run = self._agent.run(task.prompt, tools=task.tools(), max_rounds=task.max_rounds, model=base.MODEL)
        return (await run).text
