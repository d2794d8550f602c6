"""pydantic-ai with `Agent.run`, which does not stream."""

from __future__ import annotations

import pydantic_ai
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits

from benchmarks.agent_peers.base import SYSTEM, TASK, AgentPeer, add
from benchmarks.agent_peers.openai_client import openai_client

_UNLIMITED = UsageLimits(request_limit=None)


class Agent(AgentPeer):
    def __init__(self, base: str) -> None:
        self._provider = OpenAIProvider(openai_client=openai_client(base))
        self._agents: dict[str, pydantic_ai.Agent[None, str]] = {}

    async def run(self, model: str) -> int:
        if model not in self._agents:
            asked = OpenAIChatModel(model, provider=self._provider)
            self._agents[model] = pydantic_ai.Agent(asked, instructions=SYSTEM, tools=[add])
        return len((await self._agents[model].run(TASK, usage_limits=_UNLIMITED)).output)
