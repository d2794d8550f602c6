"""langchain with `create_agent` and its default options, and exceptions of tools as messages to the model."""

from __future__ import annotations

from typing import Any

from langchain.agents import create_agent
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from benchmarks.solving.tasks import Task
from benchmarks.solving_peers import base


class Solver(base.Solver):
    def __init__(self, base: str) -> None:
        self._base = base

    async def solve(self, task: Task) -> str:
        model = ChatOpenAI(model=base.MODEL, base_url=self._base, api_key=SecretStr("none"), temperature=0)
        tools = [StructuredTool.from_function(coroutine=tool, handle_tool_error=True) for tool in task.tools()]
        agent: Any = create_agent(model, tools, system_prompt=base.SYSTEM)
        options = {"recursion_limit": 2 * base.MAX_ROUNDS}
        state = await agent.ainvoke({"messages": [{"role": "user", "content": task.prompt}]}, options)
        return str(state["messages"][-1].content)
