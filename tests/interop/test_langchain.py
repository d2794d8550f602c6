"""What only LangChain has: blocking calls, the choice of a tool, and what it notes about a reply."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lmbridge import LLMClient, LLMValidationError, sync
from lmbridge.testing import ScriptedServer, answer
from tests.interop.frameworks import LangChain, add

pytestmark = [
    # Importing the framework takes seconds.
    pytest.mark.slow,
    # What the framework and its libraries deprecate is not ours.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture
def langchain() -> LangChain:
    return LangChain()


async def test_a_blocking_client_serves_all_methods(langchain: LangChain, scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("Hello there")

    def block() -> tuple[str, list[str]]:
        with sync.LLMClient(scripted_server.api_base, "test-model") as client:
            chat = langchain.chat(client)
            return chat.invoke("Hi").content, [piece.content for piece in chat.stream("Hi") if piece.content]

    assert await asyncio.to_thread(block) == ("Hello there", ["Hello", " there"])
    client = await asyncio.to_thread(sync.LLMClient, scripted_server.api_base, "test-model")
    try:
        chat = langchain.chat(client)
        assert (await chat.ainvoke("Hi")).content == "Hello there"
        assert [piece.content async for piece in chat.astream("Hi") if piece.content] == ["Hello", " there"]
    finally:
        await asyncio.to_thread(client.close)


def test_an_asynchronous_client_cannot_be_called_without_await(langchain: LangChain) -> None:
    chat = langchain.chat(LLMClient("http://127.0.0.1:9/v1"))
    with pytest.raises(LLMValidationError, match=r"use ainvoke\(\) or astream\(\)"):
        chat.invoke("Hi")
    with pytest.raises(LLMValidationError, match=r"lmbridge\.sync\.LLMClient"):
        list(chat.stream("Hi"))


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ("any", "required"),
        ("required", "required"),
        (True, "required"),
        (False, None),
        ({"type": "function", "function": {"name": "add"}}, {"type": "function", "function": {"name": "add"}}),
        ("auto", "auto"),
        ("none", "none"),
        ("add", {"type": "function", "function": {"name": "add"}}),
        (None, None),
    ],
)
async def test_the_choice_of_a_tool(
    langchain: LangChain, client: LLMClient, scripted_server: ScriptedServer, choice: Any, sent: Any
) -> None:
    await langchain.chat(client).bind_tools([add], tool_choice=choice).ainvoke("Hi")
    assert scripted_server.requests[-1].json.get("tool_choice") == sent


@pytest.mark.parametrize("choice", ["subtract", 3, ["add"]])
def test_a_choice_that_is_not_a_tool_is_refused(langchain: LangChain, client: LLMClient, choice: Any) -> None:
    with pytest.raises(LLMValidationError, match="tool_choice must be the name of one of the tools"):
        langchain.chat(client).bind_tools([add], tool_choice=choice)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_usage_reasoning_and_model_are_noted(
    langchain: LangChain, client: LLMClient, scripted_server: ScriptedServer, is_stream: bool
) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    scripted_server.default = answer("Hello there", reasoning="Be kind.", usage=usage)
    chat = langchain.chat(client)
    message: Any = None
    if is_stream:
        async for piece in chat.astream("Hi"):
            message = piece if message is None else message + piece
    else:
        message = await chat.ainvoke("Hi")
    assert message.content == "Hello there"
    assert message.additional_kwargs["reasoning_content"] == "Be kind."
    assert message.response_metadata["model_name"] == "test-model"
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.usage_metadata == {"input_tokens": 7, "output_tokens": 2, "total_tokens": 9}


async def test_parameters_of_a_call_replace_those_of_the_model(
    langchain: LangChain, client: LLMClient, scripted_server: ScriptedServer
) -> None:
    params = {"temperature": 0, "seed": 1, "stream_options": {"include_usage": False}}
    chat = langchain.chat(client, model="other", params=params)
    await chat.ainvoke("Hi", temperature=1, stop=["."], stream=False)
    sent = scripted_server.requests[-1].json
    assert {name: sent[name] for name in ("model", "temperature", "seed", "stop")} == {
        "model": "other",
        "temperature": 1,
        "seed": 1,
        "stop": ["."],
    }
    assert [piece async for piece in chat.astream("Hi")]
    assert scripted_server.requests[-1].json["stream_options"] == {"include_usage": False}


async def test_batches_run_at_the_same_time(
    langchain: LangChain, client: LLMClient, scripted_server: ScriptedServer
) -> None:
    gate = asyncio.Event()
    scripted_server.default = answer("Hello", gate=gate)
    task = asyncio.create_task(langchain.chat(client).abatch(["a", "b"]))
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 2)
    gate.set()
    assert [message.content for message in await task] == ["Hello", "Hello"]
