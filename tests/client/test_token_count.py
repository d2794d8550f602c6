"""`count_tokens()`: exact where llama.cpp or vLLM counts, and an estimate elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import (
    LLMAuthenticationError,
    LLMClient,
    LLMConnectionError,
    LLMResponseError,
    LLMValidationError,
    TokenCount,
)
from lmbridge.testing import ScriptedServer, reply
from tests.support import MESSAGES, cancel_at_each_step, in_flight

LLAMA_CPP = "/v1/chat/completions/input_tokens"
VLLM = "/tokenize"
COUNTED = reply(200, {"object": "response.input_tokens", "input_tokens": 23})
"""What llama.cpp answers, as recorded from the embedded server."""
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]


@pytest_asyncio.fixture
async def client(scripted_server: ScriptedServer) -> AsyncIterator[LLMClient]:
    async with LLMClient(scripted_server.api_base, "test-model") as client:
        yield client


async def test_llama_cpp_counts_exactly_with_one_request(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.on_path(LLAMA_CPP, COUNTED)
    assert await client.count_tokens(MESSAGES, tools=TOOLS) == TokenCount(23, exact=True)
    [request] = scripted_server.requests
    assert request.json == {"messages": MESSAGES, "tools": TOOLS, "model": "test-model"}
    assert request.query == "autoload=false"


async def test_vllm_counts_exactly_and_is_asked_directly_the_second_time(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path(LLAMA_CPP, reply(404, {"detail": "Not Found"}))
    scripted_server.on_path(VLLM, reply(200, {"count": 31, "max_model_len": 4096, "tokens": [1, 2]}))
    for _ in range(2):
        assert await client.count_tokens(MESSAGES) == TokenCount(31, exact=True)
    assert [request.path for request in scripted_server.requests] == [LLAMA_CPP, VLLM, VLLM]


@pytest.mark.parametrize(
    "answer",
    [
        reply(404, "404 page not found"),
        reply(200, {"error": "Unexpected endpoint or method. (POST /tokenize)"}),
        reply(200, {"tokens": []}),
    ],
    ids=["Ollama", "LM Studio", "an older llama.cpp"],
)
async def test_other_servers_get_an_estimate_and_are_not_asked_again(
    scripted_server: ScriptedServer, client: LLMClient, answer: Any
) -> None:
    scripted_server.on_path(LLAMA_CPP, reply(404))
    scripted_server.on_path(VLLM, answer)
    messages = [{"role": "user", "content": "x" * 3000}]
    counts = [await client.count_tokens(messages) for _ in range(3)]
    assert len(scripted_server.requests) == 2
    assert not counts[0].exact
    assert 1000 <= counts[0].tokens < 1050
    assert counts == [counts[0]] * 3


async def test_a_count_whose_name_was_damaged_is_asked_for_again(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path(LLAMA_CPP, reply(404))
    scripted_server.on_path(VLLM, reply(200, {"coun5": 31, "tokens": [1, 2]}))
    assert not (await client.count_tokens(MESSAGES)).exact
    scripted_server.on_path(VLLM, reply(200, {"count": 31, "tokens": [1, 2]}))
    assert await client.count_tokens(MESSAGES) == TokenCount(31, exact=True)


async def test_an_estimate_includes_the_tools(client: LLMClient) -> None:
    without, with_tools = await client.count_tokens(MESSAGES), await client.count_tokens(MESSAGES, tools=TOOLS)
    assert with_tools.tokens > without.tokens + 20


async def test_content_that_is_a_list_of_strings_is_estimated_by_its_strings(client: LLMClient) -> None:
    count = await client.count_tokens([{"role": "user", "content": ["x" * 1500, {"type": "text", "text": "x" * 1500}]}])
    assert 1000 <= count.tokens < 1050


async def test_an_estimate_includes_the_calls_and_the_reasoning_of_a_message_in_parts(client: LLMClient) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "x" * 1500}}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "x" * 1500}]}
    count = await client.count_tokens([{**parts, "tool_calls": [call], "reasoning_content": "x" * 1500}])
    assert 1500 <= count.tokens < 1600


async def test_a_model_that_the_router_has_not_loaded_is_estimated_and_asked_about_again(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    error = {"error": {"code": 400, "message": "model is not loaded", "type": "invalid_request_error"}}
    scripted_server.on_path(LLAMA_CPP, reply(400, error))
    assert not (await client.count_tokens(MESSAGES)).exact
    scripted_server.on_path(LLAMA_CPP, COUNTED)
    assert (await client.count_tokens(MESSAGES)).exact


async def test_another_server_at_the_same_address_is_found(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.on_path(LLAMA_CPP, COUNTED)
    await client.count_tokens(MESSAGES)
    scripted_server.on_path(LLAMA_CPP, reply(404))
    scripted_server.on_path(VLLM, reply(200, {"count": 31}))
    assert not (await client.count_tokens(MESSAGES)).exact
    assert await client.count_tokens(MESSAGES) == TokenCount(31, exact=True)


async def test_a_refusal_is_an_error_and_not_an_estimate(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.on_path(LLAMA_CPP, reply(401, {"error": {"message": "Invalid API Key"}}))
    with pytest.raises(LLMAuthenticationError):
        await client.count_tokens(MESSAGES)
    scripted_server.on_path(LLAMA_CPP, reply(400, {"error": {"message": "unknown role"}}))
    with pytest.raises(LLMResponseError, match="unknown role"):
        await client.count_tokens(MESSAGES)


async def test_bad_input_is_refused_before_anything_is_sent(scripted_server: ScriptedServer, client: LLMClient) -> None:
    with pytest.raises(LLMValidationError):
        await client.count_tokens([])
    with pytest.raises(LLMValidationError, match="content"):
        await client.count_tokens([{"role": "user", "content": [{"type": "text", "text": {1}}]}])
    assert not scripted_server.requests


async def test_a_server_that_does_not_answer_is_an_error() -> None:
    async with LLMClient("http://127.0.0.1:9/v1", max_retries=0) as client:
        with pytest.raises(LLMConnectionError):
            await client.count_tokens(MESSAGES)


async def test_a_count_can_be_cancelled_at_any_step(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.on_path(LLAMA_CPP, COUNTED)

    async def is_idle() -> None:
        assert in_flight(client) == 0

    await cancel_at_each_step(lambda: client.count_tokens(MESSAGES), is_idle, at_least=3)
    assert (await client.count_tokens(MESSAGES)).exact
