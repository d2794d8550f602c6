"""openai-agents with `Runner.run`, which does not stream."""

from __future__ import annotations

from agents import Agent as OpenAIAgent
from agents import OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled

from benchmarks.agent_peers.base import MAX_ROUNDS, SYSTEM, TASK, AgentPeer, add
from benchmarks.agent_peers.openai_client import openai_client


class Agent(AgentPeer):
    def __init__(self, base: str) -> None:
        set_tracing_disabled(True)
        self._client = openai_client(base)
        self._tools = [function_tool(add)]
        self._agents: dict[str, OpenAIAgent[None]] = {}

    async def run(self, model: str) -> int:
        if model not in self._agents:
            asked = OpenAIChatCompletionsModel(model=model, openai_client=self._client)
            self._agents[model] = OpenAIAgent("adder", instructions=SYSTEM, tools=[*self._tools], model=asked)
        return len((await Runner.run(self._agents[model], TASK, max_turns=MAX_ROUNDS)).final_output)
