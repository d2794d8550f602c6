"""The types of requests and replies. mypy and pyright check this file; running it checks what is filled in."""

from __future__ import annotations

import ast
from itertools import zip_longest
from pathlib import Path
from typing import Any, assert_type

import pytest

import lmbridge.types
from lmbridge import Agent, ChatStream, LLMClient, RawResponse, RunHandle, ToolCallFinished, collect, image_part, sync
from lmbridge.agent import ToolRecord
from lmbridge.agent.tools import ToolCall as RequestedCall
from lmbridge.testing import ScriptedServer, reply
from lmbridge.types import (
    ChatCompletion,
    ChatMessage,
    Embeddings,
    ImagePart,
    Message,
    MessageToolCall,
    ResponseFormat,
    ToolChoice,
    ToolDefinition,
)

TOOL: ToolDefinition = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CHOICE: ToolChoice = {"type": "function", "function": {"name": "add"}}
FORMAT: ResponseFormat = {"type": "json_schema", "json_schema": {"name": "sum", "schema": {"type": "object"}}}


async def accepted_by_the_type_checkers(client: LLMClient) -> None:
    """Is never called: the type checkers verify what a program may write."""
    messages: list[ChatMessage] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}, image_part("picture.png")]},
    ]
    answer = await client.chat_completion(messages, tools=[TOOL], tool_choice=CHOICE, response_format=FORMAT)
    assert_type(answer, ChatCompletion)
    message = answer["choices"][0]["message"]
    assert_type(message, Message)
    assert_type(message["content"], str | None)
    assert_type(image_part("picture.png"), ImagePart)
    messages.append(message)
    for call in message.get("tool_calls", []):
        assert_type(call, MessageToolCall)
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": call["function"]["arguments"]})
    untyped: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
    await client.chat_completion(untyped)
    await client.chat_completion([{"role": "user", "content": "Hello"}], tools=[{"type": "function"}])
    async for chunk in await client.chat_completion(untyped, stream=True):
        for choice in chunk["choices"]:
            assert_type(choice["delta"].get("content"), str | None)
    async with client.stream_chat(untyped, temperature=0, max_tokens=5, timeout=3) as stream:
        assert_type(stream, ChatStream)
    assert_type(await client.embeddings("a", dimensions=3), Embeddings)
    raw = await client.with_raw_response.chat_completion(untyped, seed=1)
    assert_type(raw, RawResponse[ChatCompletion])
    assert_type(await collect(await client.chat_completion(untyped, stream=True)), ChatCompletion)


async def the_output_of_a_run_has_its_type(client: LLMClient) -> None:
    """Is never called: the type checkers verify it."""
    agent = Agent(client)
    assert_type((await agent.run("...", output_type=list[int])).output, list[int])
    handle = agent.start("...", output_type=int)
    assert_type(handle, RunHandle[int])
    assert_type((await handle.result()).output, int)
    async with agent.stream("...", output_type=str) as stream:
        assert_type((await stream.handle.result()).output, str)
    assert_type((await agent.start("...").result()).output, Any)
    blocking = sync.Agent(sync.LLMClient()).start("...", output_type=int)
    assert_type(blocking.result().output, int)


def test_the_required_fields_are_known_at_run_time() -> None:
    assert Message.__required_keys__ == {"content"}
    assert ChatCompletion.__required_keys__ == {"choices"}
    assert callable(accepted_by_the_type_checkers)
    assert callable(the_output_of_a_run_has_its_type)


async def test_fields_that_a_server_leaves_out_of_a_call_are_filled_in(scripted_server: ScriptedServer) -> None:
    sent = {"choices": [{"message": {"role": "assistant", "tool_calls": [{"function": {"name": "now"}}]}}]}
    scripted_server.script(reply(200, sent))
    async with LLMClient(scripted_server.api_base) as client:
        message = (await client.chat_completion([{"role": "user", "content": "Hello"}]))["choices"][0]["message"]
    assert message["content"] is None
    (call,) = message.get("tool_calls", [])
    assert call["id"].startswith("call_")
    assert (call["type"], call["function"]) == ("function", {"name": "now", "arguments": ""})


@pytest.mark.parametrize("name", ["text", "is_error", "raw", "seconds", "call"])
def test_an_event_has_the_fields_of_its_record(name: str) -> None:
    record = ToolRecord(call=RequestedCall(id="1", name="add", arguments={}), text="3", raw=3, seconds=0.5)
    assert getattr(ToolCallFinished(record), name) == getattr(record, name)


@pytest.mark.parametrize("name", ["lmstudio", "replies", "requests"])
def test_every_field_is_described_by_a_sentence(name: str) -> None:
    tree = ast.parse((Path(lmbridge.types.__file__).parent / f"{name}.py").read_text())
    undescribed = [
        f"{each.name}.{ast.unparse(field.target)}"
        for each in tree.body
        if isinstance(each, ast.ClassDef)
        for field, following in zip_longest(each.body, each.body[1:])
        if isinstance(field, ast.AnnAssign) and not _is_sentence(following)
    ]
    assert undescribed == []


def _is_sentence(node: ast.stmt | None) -> bool:
    text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
    return isinstance(text, str) and text[0].isupper() and text.endswith(".")
