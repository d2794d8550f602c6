"""Clients of others at the gateway, in front of the embedded server: whole replies, streams and tool calls.

LangChain and Anthropic's SDK are installed by `nox -s clients`, which `make test-slow` runs.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from lmbridge import LLMClient, LocalServer, collect
from lmbridge.gateway import Gateway

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(180)]

NPM: Final = Path(__file__).parent / "npm"
QUESTION: Final = "Count from one to five."
SUM: Final = "What is 2 + 3? Use the tool."
NUMBERS: Final = {"a": {"type": "number"}, "b": {"type": "number"}}
PARAMETERS: Final = {"type": "object", "properties": NUMBERS, "required": ["a", "b"]}
TOOL: Final = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}}
MESSAGES: Final = [{"role": "user", "content": QUESTION}]
SHORT: Final[dict[str, Any]] = {"temperature": 0, "max_tokens": 24}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[LocalServer]:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs lmbridge[local]")
    async with LocalServer(n_ctx=4096, n_parallel=2) as running:
        yield running


@pytest_asyncio.fixture
async def gateway(server: LocalServer) -> AsyncIterator[Gateway]:
    async with Gateway(upstreams=[server.api_base]) as running:
        yield running
        # Each test has sent its requests through it, and nothing is left of them.
        assert running.stats().in_flight == 0


async def run(*command: str) -> str:
    """Runs a program and returns what it prints."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    printed, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return printed.decode()


def events(stream: str) -> list[Any]:
    """Returns the data of the events of a stream, which ends with `[DONE]`."""
    data = [line.removeprefix("data:").strip() for line in stream.splitlines() if line.startswith("data:")]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]


async def test_curl(gateway: Gateway, server: LocalServer) -> None:
    url = f"{gateway.api_base}/chat/completions"
    body = {"model": server.model, "messages": MESSAGES, **SHORT}
    command = ("curl", "-sSf", "-N", url, "-H", "Content-Type: application/json", "-d")
    plain = json.loads(await run(*command, json.dumps(body)))
    assert plain["choices"][0]["message"]["content"]
    chunks = events(await run(*command, json.dumps(body | {"stream": True})))
    assert len([each for each in chunks if each["choices"] and each["choices"][0]["delta"].get("content")]) > 2
    called = json.loads(await run(*command, json.dumps(body | {"tools": [TOOL], "max_tokens": 64})))
    assert called["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "add"
    models = json.loads(await run("curl", "-sSf", f"{gateway.api_base}/models"))
    assert [each["id"] for each in models["data"]] == [server.model]


async def test_lmbridge(gateway: Gateway, server: LocalServer) -> None:
    async with LLMClient(gateway.api_base, server.model) as client:
        plain = await client.chat_completion(MESSAGES, **SHORT)
        assert plain["choices"][0]["message"]["content"]
        streamed = await collect(await client.chat_completion(MESSAGES, stream=True, **SHORT))
        assert streamed["choices"][0]["message"]["content"]
        question = [{"role": "user", "content": SUM}]
        called = await client.chat_completion(
            question, tools=[TOOL], tool_choice="required", temperature=0, max_tokens=64
        )
        assert called["choices"][0]["message"].get("tool_calls", [])[0]["function"]["name"] == "add"
        assert await client.list_models() == [server.model]
        response = await client.create_response(QUESTION, temperature=0, max_output_tokens=16)
        assert response.get("status") in {"completed", "incomplete"}


async def test_openai_python(gateway: Gateway, server: LocalServer) -> None:
    openai = pytest.importorskip("openai", reason="nox -s clients installs openai")
    async with openai.AsyncOpenAI(base_url=gateway.api_base, api_key="none", max_retries=0) as client:
        create: Any = client.chat.completions.create
        plain = await create(model=server.model, messages=MESSAGES, **SHORT)
        assert plain.choices[0].message.content
        pieces = [
            chunk.choices[0].delta.content
            async for chunk in await create(model=server.model, messages=MESSAGES, stream=True, **SHORT)
            if chunk.choices and chunk.choices[0].delta.content
        ]
        assert len(pieces) > 2
        question = [{"role": "user", "content": SUM}]
        called = await create(
            model=server.model, messages=question, tools=[TOOL], tool_choice="required", temperature=0, max_tokens=64
        )
        assert called.choices[0].message.tool_calls[0].function.name == "add"
        assert [model.id async for model in client.models.list()] == [server.model]


async def test_openai_of_npm(gateway: Gateway, server: LocalServer) -> None:
    if shutil.which("node") is None or not (NPM / "node_modules").is_dir():
        pytest.skip("needs node, and the packages of tests/gateway/npm")
    got = json.loads(await run("node", str(NPM / "client.mjs"), gateway.api_base, server.model))
    assert got["plain"]
    assert len(got["pieces"]) > 2
    assert got["tool"] == "add"


async def test_langchain(gateway: Gateway, server: LocalServer) -> None:
    langchain: Any = pytest.importorskip("langchain_openai", reason="nox -s clients installs langchain-openai")
    chat = langchain.ChatOpenAI(
        base_url=gateway.api_base, api_key="none", model=server.model, max_retries=0, temperature=0, max_tokens=64
    )
    assert (await chat.ainvoke(QUESTION)).content
    assert len([piece.content async for piece in chat.astream(QUESTION) if piece.content]) > 2
    called = await chat.bind_tools([TOOL], tool_choice="any").ainvoke(SUM)
    assert called.tool_calls[0]["name"] == "add"


async def test_anthropic(gateway: Gateway, server: LocalServer) -> None:
    anthropic: Any = pytest.importorskip("anthropic", reason="nox -s clients installs anthropic")
    # Its addresses begin with /v1 themselves.
    base_url = gateway.api_base.removesuffix("/v1")
    async with anthropic.AsyncAnthropic(base_url=base_url, api_key="none", max_retries=0) as client:
        ask = {"model": server.model, "messages": MESSAGES, "max_tokens": 24}
        plain = await client.messages.create(**ask)
        assert plain.content[0].text
        async with client.messages.stream(**ask) as stream:
            pieces = [text async for text in stream.text_stream]
            final = await stream.get_final_message()
        assert len(pieces) > 2
        assert final.content[0].text == "".join(pieces)
        tool = {"name": "add", "description": "Adds.", "input_schema": PARAMETERS}
        question = [{"role": "user", "content": SUM}]
        ask |= {"messages": question, "tools": [tool], "tool_choice": {"type": "any"}}
        called = await client.messages.create(**ask | {"max_tokens": 64})
        # llama.cpp does not make the model call at this address, so the small model may answer with a text as well.
        assert called.content
        assert {block.type for block in called.content} <= {"text", "tool_use"}
