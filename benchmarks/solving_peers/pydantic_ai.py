"""pydantic-ai with three retries, because its default of one ends most runs at the second mistake."""

from __future__ import annotations

import openai
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits

from benchmarks.solving_peers import base


class Solver(base.Solver):
    def __init__(self, base: str) -> None:
        client = openai.AsyncOpenAI(base_url=base, api_key="none")
        self._provider = OpenAIProvider(openai_client=client)

    async def solve(self, task: base.Task) -> str:
        model = OpenAIChatModel(base.MODEL, provider=self._provider)
        agent = Agent(model, instructions=base.SYSTEM, tools=task.tools(), retries=3, model_settings={"temperature": 0})
        limits = UsageLimits(request_limit=task.max_rounds)
        return str((await agent.run(task.prompt, usage_limits=limits)).output)
