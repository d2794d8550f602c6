"""The agent of lmbridge with its default options, except for its limits."""

from __future__ import annotations

import lmbridge
from benchmarks.agent_peers.base import AT_ONCE, MAX_ROUNDS, SYSTEM, TASK, AgentPeer, add


class Agent(AgentPeer):
    def __init__(self, base: str) -> None:
        client = lmbridge.LLMClient(base, limits=lmbridge.Limits(max_concurrency=AT_ONCE))
        self._agent = lmbridge.Agent(client, tools=[add], system_prompt=SYSTEM, max_rounds=MAX_ROUNDS)

    async def run(self, model: str) -> int:
        return len((await self._agent.run(TASK, model=model)).text)
