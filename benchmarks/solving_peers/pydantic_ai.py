"""pydantic-ai with three retries, because its default of one ends most runs at the second mistake."""

from __future__ import annotations

import openai
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from benchmarks.solving.tasks import Task
from benchmarks.solving_peers import base


class Solver(base.Solver):
    def __init__(self, base: str) -> None:
        client = openai.AsyncOpenAI(base_url=base, api_key="none")
        self._provider = OpenAIProvider(openai_client=client)

    async def solve(self, task: Task) -> str:
        model = OpenAIChatModel(base.MODEL, provider=self._provider)
        agent = Agent(model, instructions=base.SYSTEM, tools=task.tools(), retries=3, model_settings={"temperature": 0})
        return str((await agent.run(task.prompt)).output)
