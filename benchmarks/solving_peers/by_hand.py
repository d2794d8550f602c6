"""A careful hand-written loop on openai-python: every mistake becomes a message to the model."""

from __future__ import annotations

import inspect
import json
from typing import Any

import openai

from benchmarks.solving_peers import base
from lmbridge.agent import Tool


class Solver(base.Solver):
    def __init__(self, base: str) -> None:
        self._client = openai.AsyncOpenAI(base_url=base, api_key="none")

    async def solve(self, task: base.Task) -> str:
        tools = {tool.__name__: tool for tool in task.tools()}
        definitions: Any = [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": tool.__doc__,
                    "parameters": Tool.from_function(tool).parameters,
                },
            }
            for name, tool in tools.items()
        ]
        messages: list[Any] = [
            {"role": "system", "content": base.SYSTEM},
            {"role": "user", "content": task.prompt},
        ]
        for _ in range(task.max_rounds):
            completion = await self._client.chat.completions.create(
                model=base.MODEL, messages=messages, tools=definitions, temperature=0
            )
            message = completion.choices[0].message
            messages.append(message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True))
            if not message.tool_calls:
                return message.content or ""
            for call in message.tool_calls:
                text = await self._call(tools, call.function) if call.type == "function" else "not a function"
                messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
        raise RuntimeError("too many rounds")

    async def _call(self, tools: dict[str, Any], function: Any) -> str:
        tool = tools.get(function.name)
        if tool is None:
            return f"Error: there is no tool {function.name!r}. The tools are: {', '.join(tools)}"
        try:
            arguments = json.loads(function.arguments)
            inspect.signature(tool).bind(**arguments)
            return str(await tool(**arguments))
        except Exception as error:  # noqa: BLE001 - the model is told of any mistake
            return f"Error: {type(error).__name__}: {error}"
