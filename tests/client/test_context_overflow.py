"""Prompts that are longer than the context: raised or warned of before they are sent, and noticed afterwards."""

from __future__ import annotations

import asyncio
import logging
from collections import UserString
from types import MappingProxyType
from typing import Any

import pytest

from lmbridge import Agent, ChatStream, ContextLengthExceededError, LLMClient, LLMValidationError, collect
from lmbridge.client.context_overflow import PromptSize
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, reply
from tests.support import MESSAGES, in_flight, read_text

CHAT = "/v1/chat/completions"
COUNTS = "/v1/chat/completions/input_tokens"
LONG = [{"role": "user", "content": "word " * 3000}]
"""About 3,000 tokens, which are estimated as 5,000."""

WITH_USAGE = {"include_usage": True}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


def ollama(server: ScriptedServer, *, context: int | None = None, parameters: str = "") -> None:
    """Makes a server answer like Ollama, with a model that is loaded with a context, or is not loaded."""
    server.on_path("/v1/models", reply(200, {"data": [{"id": "qwen3:4b", "owned_by": "library"}]}))
    server.on_path("/api/version", reply(200, {"version": "0.35.0"}))
    running = [] if context is None else [{"name": "qwen3:4b", "context_length": context}]
    server.on_path("/api/ps", reply(200, {"models": running}))
    server.on_path("/api/show", reply(200, {"parameters": parameters, "model_info": {"qwen3.context_length": 262144}}))


def counted_answer(prompt_tokens: int) -> Any:
    return answer("Hello.", usage={"prompt_tokens": prompt_tokens, "completion_tokens": 2, "total_tokens": 9})


def loads_and_answers(server: ScriptedServer, prompt_tokens: int) -> Behaviour:
    """Returns an answer for which Ollama loads the model, with a context of 4096 tokens."""

    async def load_and_answer(exchange: Exchange) -> None:
        ollama(server, context=4096)
        await counted_answer(prompt_tokens)(exchange)

    return load_and_answer


def count_of(server: ScriptedServer, path: str) -> int:
    """Returns how many requests for a path the server has received."""
    return [request.path for request in server.requests].count(path)


def chats(server: ScriptedServer) -> int:
    """Returns how many chat completions the server was asked for."""
    return count_of(server, CHAT)


async def test_a_prompt_that_is_too_long_is_raised_before_it_is_sent(scripted_server: ScriptedServer) -> None:
    ollama(scripted_server, context=4096)
    async with LLMClient(scripted_server.api_base, "qwen3:4b", context_overflow="raise") as client:
        for stream in (False, True):
            with pytest.raises(ContextLengthExceededError, match="tokens, and the model's context has 4096") as caught:
                await client.chat_completion(LONG, stream=stream)
            assert caught.value.context_length == 4096
            assert "num_ctx" in str(caught.value)
    assert chats(scripted_server) == 0


async def test_an_exact_count_decides_where_the_server_can_count(scripted_server: ScriptedServer) -> None:
    models = {"data": [{"id": "test-model", "owned_by": "vllm", "max_model_len": 4096}]}
    scripted_server.on_path("/v1/models", reply(200, models))
    scripted_server.on_path(COUNTS, reply(200, {"input_tokens": 3001}))
    scripted_server.default = counted_answer(3001)
    async with LLMClient(scripted_server.api_base, "test-model", context_overflow="raise") as client:
        assert await client.chat_completion(LONG)
        scripted_server.on_path(COUNTS, reply(200, {"input_tokens": 5000}))
        with pytest.raises(ContextLengthExceededError, match="has 5000 tokens"):
            await client.chat_completion(LONG)
        assert await client.chat_completion(MESSAGES)
    paths = [request.path for request in scripted_server.requests]
    assert paths.count(COUNTS) == 2, "a short prompt is not counted"
    assert paths.count("/v1/models") == 1, "the context length is remembered"


async def test_the_exact_count_is_that_of_the_template_that_the_call_asks_for(scripted_server: ScriptedServer) -> None:
    models = {"data": [{"id": "test-model", "owned_by": "vllm", "max_model_len": 4096}]}
    scripted_server.on_path("/v1/models", reply(200, models))
    scripted_server.on_path(COUNTS, reply(200, {"input_tokens": 3001}))
    scripted_server.default = counted_answer(3001)
    template: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
    async with LLMClient(scripted_server.api_base, "test-model", context_overflow="raise") as client:
        await client.chat_completion(LONG, temperature=0, **template)
    (counted,) = [request.json for request in scripted_server.requests if request.path == COUNTS]
    assert counted == {"messages": LONG, "model": "test-model", **template}


async def test_a_warning_names_the_numbers_and_the_request_is_sent(
    scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    ollama(scripted_server, context=4096)
    async with LLMClient(
        scripted_server.api_base, "qwen3:4b", context_overflow="warn", model_mismatch="ignore"
    ) as client:
        with caplog.at_level(logging.WARNING, "lmbridge.client"):
            await client.chat_completion(LONG)
    assert "the model's context has 4096" in caplog.text
    assert chats(scripted_server) == 1


async def test_without_the_option_nothing_is_asked_or_checked(scripted_server: ScriptedServer) -> None:
    ollama(scripted_server, context=10)
    async with LLMClient(scripted_server.api_base, "qwen3:4b", model_mismatch="ignore") as client:
        await client.chat_completion(LONG)
    assert [request.path for request in scripted_server.requests] == [CHAT]


async def test_a_prompt_that_ollama_has_cut_is_noticed_by_its_count(scripted_server: ScriptedServer) -> None:
    ollama(scripted_server, context=8192)
    usage = {"prompt_tokens": 8192, "completion_tokens": 5, "total_tokens": 8197}
    message = {"role": "assistant", "content": "I see only the end."}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    scripted_server.script(reply(200, {"model": "qwen3:4b", "choices": choices, "usage": usage}))
    async with LLMClient(scripted_server.api_base, "qwen3:4b") as plain:
        client = plain.with_options(context_overflow="raise")
        with pytest.raises(ContextLengthExceededError, match="cut the prompt to 8192 tokens") as caught:
            await client.chat_completion([{"role": "user", "content": "字" * 5_000}])
    assert caught.value.partial["choices"] == choices


async def test_a_prompt_that_was_cut_is_raised_at_the_end_of_the_stream(scripted_server: ScriptedServer) -> None:
    ollama(scripted_server, context=4096)
    scripted_server.default = counted_answer(4096)
    options: dict[str, Any] = {"context_overflow": "raise", "model_mismatch": "ignore"}
    async with LLMClient(scripted_server.api_base, "qwen3:4b", **options) as client:
        async with client.stream_chat(MESSAGES, stream_options=WITH_USAGE) as stream:
            texts: list[str] = []
            with pytest.raises(ContextLengthExceededError, match="cut the prompt to 4096 tokens") as caught:
                texts.extend([text async for text in stream.text()])
            assert in_flight(client) == 0
            with pytest.raises(ContextLengthExceededError):
                await anext(stream)
        with pytest.raises(ContextLengthExceededError):
            await collect(await client.chat_completion(MESSAGES, stream=True, stream_options=WITH_USAGE))
    assert caught.value.partial["choices"][0]["message"]["content"] == "Hello."
    assert caught.value.context["operation"] == "chat completion"


async def test_a_prompt_that_was_cut_is_warned_of_once_at_the_end_of_the_stream(
    scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    ollama(scripted_server, context=4096)
    scripted_server.default = counted_answer(4096)
    options: dict[str, Any] = {"context_overflow": "warn", "model_mismatch": "ignore"}
    async with LLMClient(scripted_server.api_base, "qwen3:4b", **options) as client:
        stream = await client.chat_completion(MESSAGES, stream=True, stream_options=WITH_USAGE)
        assert await read_text(stream) == await read_text(await client.chat_completion(MESSAGES, stream=True))
        assert (await collect(stream))["choices"][0]["message"]["content"] == "Hello."
    # The second stream had no usage, so that what was read of the prompt is unknown.
    [record] = [each for each in caplog.records if "cut the prompt" in each.message]
    assert record.name == "lmbridge.client"


async def test_a_raw_response_of_a_prompt_that_was_cut_is_an_error_as_well(scripted_server: ScriptedServer) -> None:
    ollama(scripted_server, context=4096)
    scripted_server.script(counted_answer(4096))
    options: dict[str, Any] = {"context_overflow": "raise", "model_mismatch": "ignore"}
    async with LLMClient(scripted_server.api_base, "qwen3:4b", **options) as client:
        with pytest.raises(ContextLengthExceededError, match="cut the prompt"):
            await client.with_raw_response.chat_completion(MESSAGES)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_was_not_loaded_is_asked_for_its_context_again_after_its_first_reply(
    scripted_server: ScriptedServer, stream: bool
) -> None:
    ollama(scripted_server)
    scripted_server.script(loads_and_answers(scripted_server, 4096))
    options: dict[str, Any] = {"context_overflow": "raise", "model_mismatch": "ignore"}
    async with LLMClient(scripted_server.api_base, "qwen3:4b", **options) as client:

        async def ask() -> None:
            answered = await client.chat_completion(LONG, stream=stream, stream_options=WITH_USAGE)
            assert isinstance(answered, ChatStream)
            await collect(answered)

        with pytest.raises(ContextLengthExceededError, match="the model's context has 4096"):
            await ask()
        with pytest.raises(ContextLengthExceededError, match="the prompt has about"):
            await client.chat_completion(LONG, stream=stream)
        assert await client.chat_completion(MESSAGES)
    assert count_of(scripted_server, "/api/ps") == 2


async def test_a_model_that_is_unloaded_after_each_reply_is_asked_about_twice_a_minute(
    scripted_server: ScriptedServer,
) -> None:
    ollama(scripted_server)
    options: dict[str, Any] = {"context_overflow": "raise", "model_mismatch": "ignore"}
    async with LLMClient(scripted_server.api_base, "qwen3:4b", **options) as client:
        for _ in range(4):
            assert await client.chat_completion(LONG)
    assert count_of(scripted_server, "/api/ps") == 2


async def test_a_raw_response_has_the_headers_of_the_reply_whatever_was_asked_after_it(
    scripted_server: ScriptedServer,
) -> None:
    ollama(scripted_server)
    answered = {"model": "qwen3:4b", "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello."}}]}
    scripted_server.script(reply(200, answered, headers={"X-Id": "7"}))
    async with LLMClient(scripted_server.api_base, "qwen3:4b", context_overflow="raise") as client:
        raw = await client.with_raw_response.chat_completion(MESSAGES)
    assert raw.headers["X-Id"] == "7"
    assert count_of(scripted_server, "/api/ps") == 2


async def test_a_reader_that_is_cancelled_during_the_check_can_read_on(scripted_server: ScriptedServer) -> None:
    ollama(scripted_server)
    options: dict[str, Any] = {"context_overflow": "raise", "model_mismatch": "ignore"}
    async with LLMClient(scripted_server.api_base, "qwen3:4b", **options) as client:
        scripted_server.script(counted_answer(4096))
        stream = await client.chat_completion(LONG, stream=True, stream_options=WITH_USAGE)

        async def hold(exchange: Exchange) -> None:
            await exchange.client_left()

        scripted_server.on_path("/api/ps", hold)
        reading = asyncio.create_task(read_text(stream))
        await scripted_server.wait_until(lambda: count_of(scripted_server, "/api/ps") == 2)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        ollama(scripted_server, context=4096)
        with pytest.raises(ContextLengthExceededError):
            await anext(stream)
    assert in_flight(client) == 0


async def test_a_reply_teaches_how_far_the_estimate_is_off(scripted_server: ScriptedServer) -> None:
    ollama(scripted_server, context=4096)
    scripted_server.script(counted_answer(2001), counted_answer(3001))
    options: dict[str, Any] = {"context_overflow": "raise", "model_mismatch": "ignore"}
    async with LLMClient(scripted_server.api_base, "qwen3:4b", **options) as client:
        with pytest.raises(ContextLengthExceededError):
            await client.chat_completion(LONG)
        await client.chat_completion([{"role": "user", "content": "word " * 2000}])
        assert await client.chat_completion(LONG)
        with pytest.raises(ContextLengthExceededError):
            await client.chat_completion(LONG * 2)


async def test_num_ctx_of_a_model_that_ollama_has_not_loaded_is_its_context(scripted_server: ScriptedServer) -> None:
    ollama(scripted_server, parameters='stop    "<|im_end|>"\nnum_ctx                        2048\n')
    async with LLMClient(scripted_server.api_base, "qwen3:4b", context_overflow="raise") as client:
        assert (await client.server_info()).context_length == 2048
        with pytest.raises(ContextLengthExceededError):
            await client.chat_completion(LONG)
        ollama(scripted_server)
        assert (await client.server_info()).context_length is None


async def test_a_server_that_does_not_describe_itself_is_no_obstacle(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", reply(500, "broken"))
    async with LLMClient(scripted_server.api_base, "m", context_overflow="raise", max_retries=0) as client:
        for _ in range(3):
            assert await client.chat_completion(LONG)
    assert [request.path for request in scripted_server.requests].count("/v1/models") == 1


async def test_a_server_that_did_not_describe_itself_is_asked_again_after_a_minute(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_server.on_path("/v1/models", reply(500, "broken"))
    async with LLMClient(scripted_server.api_base, "qwen3:4b", context_overflow="raise", max_retries=0) as client:
        assert await client.chat_completion(LONG)
        ollama(scripted_server, context=4096)
        assert await client.chat_completion(LONG)
        monkeypatch.setattr("lmbridge.client.context_overflow._ASK_AGAIN_SECONDS", 0.0)
        with pytest.raises(ContextLengthExceededError):
            await client.chat_completion(LONG)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "\ud83d\ude42"},
        MappingProxyType({"role": "user", "content": (MappingProxyType({"type": "text", "text": "Hello"}),)}),
        {"role": "user", "content": ["Hello"]},
        {"role": "user", "content": [{"type": "text", "text": UserString("Hello")}]},
    ],
    ids=["halves of a character", "other mappings", "a list of strings", "a string of another class"],
)
async def test_all_messages_that_can_be_sent_can_be_measured(
    scripted_server: ScriptedServer, message: Any, stream: bool
) -> None:
    ollama(scripted_server, context=4096)
    options: dict[str, Any] = {"context_overflow": "raise", "model_mismatch": "ignore"}
    async with LLMClient(scripted_server.api_base, "qwen3:4b", **options) as client:
        answered = await client.chat_completion([message], stream=stream, tools=(MappingProxyType(TOOL),))
        assert not isinstance(answered, ChatStream) or await read_text(answered)
    assert chats(scripted_server) == 1


def test_the_option_is_checked() -> None:
    with pytest.raises(LLMValidationError, match="context_overflow"):
        LLMClient(context_overflow="ignore")  # type: ignore[arg-type]  # the wrong value is the case
    with pytest.raises(LLMValidationError, match="context_overflow"):
        Agent(LLMClient(), context_overflow="no")  # type: ignore[arg-type]  # the wrong value is the case


@pytest.mark.parametrize(
    ("tokens", "exact", "counted", "cut"),
    [
        (900, True, 900, False),
        (900, False, 1000, True),
        (1200, True, 700, True),
        (1200, False, 900, False),
        (1600, False, 900, True),
        (1600, False, None, False),
    ],
    ids=["fits", "pinned", "exactly counted", "perhaps overestimated", "far too long", "not counted"],
)
def test_a_cut_is_recognized_by_the_tokens_that_were_read(
    tokens: int, exact: bool, counted: int | None, cut: bool
) -> None:
    assert PromptSize(tokens, exact=exact, context_length=1000).was_cut(counted) is cut


# Agents


async def test_an_agent_warns_once_and_raises_if_asked_to(scripted_server: ScriptedServer) -> None:
    ollama(scripted_server, context=4096)
    async with LLMClient(scripted_server.api_base, "qwen3:4b", model_mismatch="ignore") as client:
        scripted_server.script(counted_answer(3001))
        assert (await Agent(client).run(LONG[0]["content"])).warnings == (), "the estimate was too high"
        scripted_server.script(answer(""), answer("Hello."))
        result = await Agent(client).run(2 * LONG[0]["content"])
        [warning] = result.warnings
        assert "the model's context has 4096" in warning
        with pytest.raises(ContextLengthExceededError):
            await Agent(client, context_overflow="raise").run(LONG[0]["content"])
    assert chats(scripted_server) == 3


async def test_an_agent_notices_that_its_prompt_was_cut(scripted_server: ScriptedServer) -> None:
    ollama(scripted_server, context=4096)
    scripted_server.default = counted_answer(4096)
    async with LLMClient(scripted_server.api_base, "qwen3:4b", model_mismatch="ignore") as client:
        [warning] = (await Agent(client).run("字" * 1500)).warnings
        assert warning.startswith("the server has cut the prompt to 4096 tokens")
        with pytest.raises(ContextLengthExceededError, match="cut the prompt"):
            await Agent(client, context_overflow="raise").run("字" * 1500)


async def test_an_agent_learns_the_context_of_a_model_that_was_not_loaded(scripted_server: ScriptedServer) -> None:
    ollama(scripted_server)
    scripted_server.script(loads_and_answers(scripted_server, 4096), counted_answer(2))
    async with LLMClient(scripted_server.api_base, "qwen3:4b", model_mismatch="ignore") as client:
        agent = Agent(client)
        [warning] = (await agent.run("字" * 1500)).warnings
        assert warning.startswith("the server has cut the prompt to 4096 tokens")
        assert (await agent.run("Hi.")).warnings == ()
        assert count_of(scripted_server, "/api/ps") == 2
        last = scripted_server.requests[-1].json
        assert last["max_tokens"] < 4096, "the answer has to fit into the context"


async def test_an_agent_asks_only_once_more_about_a_model_that_is_unloaded_again(
    scripted_server: ScriptedServer,
) -> None:
    ollama(scripted_server)
    async with LLMClient(scripted_server.api_base, "qwen3:4b", model_mismatch="ignore") as client:
        agent = Agent(client)
        for _ in range(3):
            assert (await agent.run("Hi.")).warnings == ()
    assert count_of(scripted_server, "/api/ps") == 2
