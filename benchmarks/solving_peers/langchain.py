"""langchain with `create_agent`: exceptions of tools are messages to the model, and long runs are summarized."""

from __future__ import annotations

from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from benchmarks.solving_peers import base


class Solver(base.Solver):
    def __init__(self, base: str) -> None:
        self._base = base

    async def solve(self, task: base.Task) -> str:
        model = ChatOpenAI(model=base.MODEL, base_url=self._base, api_key=SecretStr("none"), temperature=0)
        tools = [StructuredTool.from_function(coroutine=tool, handle_tool_error=True) for tool in task.tools()]
        middleware = []
        if task.context_length is not None:
            trigger = ("tokens", int(task.context_length * 0.75))
            middleware.append(
                SummarizationMiddleware(model, trigger=trigger, keep=("messages", 6), trim_tokens_to_summarize=None)
            )
        agent: Any = create_agent(model, tools, system_prompt=base.SYSTEM, middleware=middleware)
        options = {"recursion_limit": 3 * task.max_rounds}
        state = await agent.ainvoke({"messages": [{"role": "user", "content": task.prompt}]}, options)
        return str(state["messages"][-1].content)
