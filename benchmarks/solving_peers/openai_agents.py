"""openai-agents with `Runner.run` and its default options."""

from __future__ import annotations

import openai
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled

from benchmarks.solving_peers import base


class Solver(base.Solver):
    def __init__(self, base: str) -> None:
        set_tracing_disabled(True)
        self._client = openai.AsyncOpenAI(base_url=base, api_key="none")

    async def solve(self, task: base.Task) -> str:
        agent = Agent(
            "worker",
            instructions=base.SYSTEM,
            tools=[*map(function_tool, task.tools())],
            model=OpenAIChatCompletionsModel(model=base.MODEL, openai_client=self._client),
            model_settings=ModelSettings(temperature=0),
        )
        return str((await Runner.run(agent, task.prompt, max_turns=task.max_rounds)).final_output)
