"""lmbridge's agent, with nothing switched off."""

from __future__ import annotations

import lmbridge
from benchmarks.agent_peers.base import AT_ONCE, MOST_ROUNDS, SYSTEM, TASK, AgentPeer, add


class Agent(AgentPeer):
    def __init__(self, base: str) -> None:
        client = lmbridge.LLMClient(base, limits=lmbridge.Limits(max_concurrency=AT_ONCE))
        self._agent = lmbridge.Agent(client, tools=[add], system_prompt=SYSTEM, max_rounds=MOST_ROUNDS)

    async def run(self, model: str) -> int:
        return len((await self._agent.run(TASK, model=model)).text)
