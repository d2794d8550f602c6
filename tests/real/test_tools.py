"""Tools on a real llama.cpp server: its grammar accepts every schema, and the calls of its model can be made."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

from typing import Any

import pytest

from lmbridge import LLMClient, Tool, ToolContext, collect
from lmbridge.agent.toolset import ReadyCall, Toolset

pytestmark = [pytest.mark.real, pytest.mark.slow]

NODE = {"type": "object", "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/Node"}}}
UNUSUAL_SCHEMAS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "unknown type": {"type": "object", "properties": {"x": {"type": "any"}}},
    "no properties": {"type": "object", "properties": None},
    "recursion": {"properties": {"x": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": NODE}},
    "recursion at the top": {"type": "object", "properties": {"x": {"$ref": "#"}}},
    "remote": {"properties": {"x": {"$ref": "https://example.com/x.json"}}},
    "dangling": {"properties": {"x": {"$ref": "#/$defs/None"}}},
    "tuple": {"properties": {"x": {"type": "array", "prefixItems": [{"type": "integer"}], "items": False}}},
    "old tuple": {"properties": {"x": {"type": "array", "items": [{"type": "integer"}]}}},
    "pattern": {"properties": {"x": {"type": "string", "pattern": r"(?=\d)[a-z"}}},
    "bounds": {"properties": {"x": {"type": "string", "maxLength": 100_000}}},
    "format": {"properties": {"x": {"type": "string", "format": "email"}}},
    "types": {"properties": {"x": {"type": ["integer", "string", "null"]}}, "required": ["x", "y"]},
    "not": {"properties": {"x": {"not": {}}}, "if": {}, "then": {"required": ["x"]}},
    "one of": {"oneOf": [{"properties": {"k": {"const": 1}}}, {"properties": {"k": {"const": "b"}}}]},
    "all of": {"allOf": [{"properties": {"x": {}}}, {"properties": {"y": {"allOf": [{"enum": [1, None]}]}}}]},
    "enum": {"properties": {"x": {"enum": [f"value {number}" for number in range(1_000)]}}},
    "booleans": {"properties": {"x": True, "y": False, "z": {"additionalProperties": {}}}},
}


@pytest.mark.parametrize("name", UNUSUAL_SCHEMAS)
async def test_a_tool_with_an_unusual_schema_is_accepted(client: LLMClient, name: str) -> None:
    tools = await Toolset.collect([Tool(name, "Does it.", UNUSUAL_SCHEMAS[name], print)])
    message = {"role": "user", "content": "Do it."}
    reply = await client.chat_completion([message], tools=tools.definitions, max_tokens=2, temperature=0)
    assert reply["choices"]


async def test_many_tools_with_unusual_schemas_are_accepted_together(client: LLMClient) -> None:
    tools = await Toolset.collect([Tool(name, "", schema, print) for name, schema in UNUSUAL_SCHEMAS.items()])
    message = {"role": "user", "content": "Hello!"}
    reply = await client.chat_completion([message], tools=tools.definitions, max_tokens=2, temperature=0)
    assert reply["choices"]


async def test_a_call_of_the_model_is_read_and_executed(client: LLMClient) -> None:
    def add(a: int, b: int) -> int:
        """Adds two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        return a + b

    tools = await Toolset.collect([add])
    messages = [{"role": "user", "content": "What is 317 plus 225?"}]
    stream = await client.chat_completion(
        messages, stream=True, tools=tools.definitions, tool_choice="required", max_tokens=80, temperature=0
    )
    call, *_ = (await collect(stream))["choices"][0]["message"]["tool_calls"]
    ready = tools.read(call)
    assert isinstance(ready, ReadyCall)
    context = ToolContext("run", ready.call.id, ready.call.name, lambda: False)
    outcome = await tools.call(ready, context, timeout=30, max_output=100)
    # Which numbers a small model adds differs between processors.
    assert outcome.text == str(ready.arguments["a"] + ready.arguments["b"])
