"""A client of openai-python whose requests go through an `LLMClient`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import httpx2
import openai
import pytest

from lmbridge import (
    ContextLengthExceededError,
    LLMAuthenticationError,
    LLMClient,
    LLMConnectionError,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    LLMStreamError,
    LLMTimeoutError,
    LLMValidationError,
    ModelChangedDuringExecutionError,
    ModelLoadError,
    ModelMismatchError,
    ModelNotFoundError,
)
from lmbridge.interop.openai import as_openai_error, openai_client
from lmbridge.testing import ScriptedServer, answer, reply, sse, stall
from tests.support import HALF

MESSAGES: Any = [{"role": "user", "content": "Say hello."}]
REQUEST = httpx2.Request("POST", "http://127.0.0.1:1234/v1/chat/completions")


async def test_a_call_and_its_options_arrive(client: LLMClient, scripted_server: ScriptedServer) -> None:
    completion = await openai_client(client).chat.completions.create(
        model="test-model",
        messages=MESSAGES,
        temperature=0,
        extra_headers={"X-Tenant": "a"},
        extra_query={"q": "1"},
        extra_body={"min_p": 0.1},
    )
    assert completion.choices[0].message.content
    request = scripted_server.requests[-1]
    assert request.json == {"model": "test-model", "messages": MESSAGES, "temperature": 0, "min_p": 0.1}
    assert request.headers["X-Tenant"] == "a"
    assert request.query == "q=1"
    assert "Authorization" not in request.headers


async def test_the_raw_response_of_a_stream_is_there(client: LLMClient, scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("Hello there")
    completions = openai_client(client).chat.completions
    raw = await completions.with_raw_response.create(model="test-model", messages=MESSAGES, stream=True)
    assert raw.http_response.status_code == 200
    pieces = [chunk.choices[0].delta.content async for chunk in raw.parse() if chunk.choices]
    assert "".join(filter(None, pieces)) == "Hello there"


async def test_a_time_limit_of_a_call_holds(client: LLMClient, scripted_server: ScriptedServer) -> None:
    scripted_server.default = stall()
    with pytest.raises(openai.APITimeoutError) as caught:
        await openai_client(client).chat.completions.create(model="test-model", messages=MESSAGES, timeout=0.05)
    assert isinstance(caught.value.__cause__, LLMTimeoutError)
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_retries_are_those_of_the_llm_client(scripted_server: ScriptedServer, no_waits: list[float]) -> None:
    scripted_server.script(reply(503, {"error": "busy"}), answer("Hello"))
    async with LLMClient(scripted_server.api_base) as client:
        completion = await openai_client(client).chat.completions.create(model="test-model", messages=MESSAGES)
    assert completion.choices[0].message.content == "Hello"
    assert len(no_waits) == 1


async def test_half_a_stream_is_an_error(client: LLMClient, scripted_server: ScriptedServer) -> None:
    scripted_server.default = sse(*HALF)
    stream = await openai_client(client).chat.completions.create(model="test-model", messages=MESSAGES, stream=True)
    pieces: list[str | None] = []

    async def read() -> None:
        async for chunk in stream:
            pieces.append(chunk.choices[0].delta.content)  # noqa: PERF401 - what arrives before the error is kept

    with pytest.raises(openai.APIConnectionError, match="cut off") as caught:
        await read()
    assert pieces == ["Hel", "lo"]
    assert isinstance(caught.value.__cause__, LLMStreamError)


async def test_leaving_a_stream_reaches_the_server(client: LLMClient, scripted_server: ScriptedServer) -> None:
    scripted_server.default = stall(after=HALF)
    async with await openai_client(client).chat.completions.create(
        model="test-model", messages=MESSAGES, stream=True
    ) as stream:
        async for _ in stream:
            break
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_other_requests_are_refused_before_anything_is_sent(
    client: LLMClient, scripted_server: ScriptedServer
) -> None:
    with pytest.raises(LLMValidationError, match="is not a chat completion; use the LLMClient itself"):
        await openai_client(client).embeddings.create(model="test-model", input="text")
    with pytest.raises(LLMValidationError, match=r"GET /v1/models is not"):
        await openai_client(client).models.list()
    assert scripted_server.requests == []


async def test_a_mistake_in_the_arguments_stays_what_it_is(client: LLMClient, scripted_server: ScriptedServer) -> None:
    with pytest.raises(LLMValidationError, match="messages"):
        await openai_client(client).chat.completions.create(model="test-model", messages=[])
    assert scripted_server.requests == []


async def test_another_model_than_the_one_asked_for_is_an_error(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("Hello", model="gemma-3-4b")
    async with LLMClient(scripted_server.api_base, model_mismatch="raise") as client:
        with pytest.raises(openai.APIError, match="gemma-3-4b") as caught:
            await openai_client(client).chat.completions.create(model="qwen3-4b", messages=MESSAGES)
    assert isinstance(caught.value.__cause__, ModelMismatchError)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (LLMTimeoutError(), openai.APITimeoutError, None),
        (LLMConnectionError(), openai.APIConnectionError, None),
        (LLMStreamError(), openai.APIConnectionError, None),
        (LLMAuthenticationError(status=401), openai.AuthenticationError, "invalid_api_key"),
        (LLMAuthenticationError(status=403), openai.PermissionDeniedError, "invalid_api_key"),
        (LLMRateLimitError(status=429), openai.RateLimitError, "rate_limit_exceeded"),
        (LLMRateLimitError(), openai.RateLimitError, "rate_limit_exceeded"),
        (ContextLengthExceededError(status=400), openai.BadRequestError, "context_length_exceeded"),
        (ContextLengthExceededError(status=200), openai.BadRequestError, "context_length_exceeded"),
        (ModelNotFoundError("m", status=404), openai.NotFoundError, "model_not_found"),
        (ModelNotFoundError("m"), openai.NotFoundError, "model_not_found"),
        (ModelLoadError(), openai.InternalServerError, None),
        (LLMResponseError(status=422), openai.UnprocessableEntityError, None),
        (LLMResponseError(status=418), openai.APIStatusError, None),
        (LLMResponseError(status=200), openai.InternalServerError, None),
        (ModelMismatchError(asked="a", served="b"), openai.APIError, None),
        (ModelChangedDuringExecutionError(), openai.APIError, None),
        (LLMError("else"), openai.APIError, None),
        (LLMValidationError("no"), LLMValidationError, None),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_each_error_has_its_counterpart(error: LLMError, kind: type[Exception], code: str | None) -> None:
    made = as_openai_error(error, REQUEST)
    assert type(made) is kind
    assert getattr(made, "code", None) == code


def test_a_rate_limit_keeps_the_time_that_the_server_asked_for() -> None:
    made = as_openai_error(LLMRateLimitError(status=429, retry_after=2.5), REQUEST)
    assert isinstance(made, openai.RateLimitError)
    assert made.response.headers["Retry-After"] == "2.5"


@pytest.mark.parametrize(
    ("module", "package", "hint"),
    [
        ("openai", "openai", "pip install 'openai>=3.31'"),
        ("langchain", "langchain_core", r"pip install 'lmbridge\[langchain\]'"),
        ("pydantic_ai", "pydantic_ai", r"pip install 'lmbridge\[pydantic-ai\]'"),
        ("openai_agents", "agents", r"pip install 'lmbridge\[openai-agents\]'"),
    ],
)
def test_a_framework_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str, hint: str
) -> None:
    # None stands for a package that cannot be imported.
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"lmbridge.interop.{module}", raising=False)
    with pytest.raises(ImportError, match=hint):
        import_module(f"lmbridge.interop.{module}")
