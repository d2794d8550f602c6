"""Forge (the package `forge-guardrails`) with its `WorkflowRunner`, default options, and its tool for the answer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from forge import ContextManager, NoCompact, TieredCompact, ToolDef, ToolSpec, Workflow, WorkflowRunner
from forge.clients.openai_compat import OpenAICompatClient
from forge.tools import RESPOND_TOOL_NAME, respond_tool
from pydantic import create_model

from benchmarks.solving_peers import base


class Solver(base.Solver):
    def __init__(self, base_url: str) -> None:
        self._client = OpenAICompatClient(base.MODEL, base_url, api_key="none", temperature=0)

    async def solve(self, task: base.Task) -> str:
        tools = {tool.__name__: _define(tool) for tool in task.tools()}
        tools[RESPOND_TOOL_NAME] = respond_tool()
        workflow = Workflow(
            name="work",
            description="Works on a task.",
            tools=tools,
            required_steps=[],
            terminal_tool=RESPOND_TOOL_NAME,
            system_prompt_template=base.SYSTEM,
        )
        budget = task.context_length
        strategy = NoCompact() if budget is None else TieredCompact()
        runner = WorkflowRunner(self._client, ContextManager(strategy, budget), max_iterations=task.max_rounds)
        return str(await runner.run(workflow, task.prompt))


def _define(tool: Callable[..., Any]) -> ToolDef:
    hints = get_type_hints(tool)
    fields: dict[str, Any] = {
        name: (hints[name], ... if parameter.default is inspect.Parameter.empty else parameter.default)
        for name, parameter in inspect.signature(tool).parameters.items()
    }
    parameters = create_model(tool.__name__, **fields)
    return ToolDef(
        spec=ToolSpec(name=tool.__name__, description=tool.__doc__ or "", parameters=parameters), callable=tool
    )
