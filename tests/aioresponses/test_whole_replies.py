"""Plain requests, answered by mocks of aiohttp's session instead of a server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from aioresponses import aioresponses
from aioresponses.core import RequestCall

from lmbridge import (
    LLMAuthenticationError,
    LLMClient,
    LLMConnectionError,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    LLMTimeoutError,
    LLMValidationError,
    ModelLoadError,
    ModelMismatchError,
    ModelNotFoundError,
    ModelValidator,
)
from tests.aioresponses.conftest import API_BASE
from tests.support import MESSAGES

CHAT = f"{API_BASE}/chat/completions"
MODELS = f"{API_BASE}/models"


def completion(content: str = "Hello", model: str = "test-model") -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {"object": "chat.completion", "model": model, "choices": [{"index": 0, "message": message}]}


def calls(mock: aioresponses) -> list[RequestCall]:
    """Returns the requests that were made to any URL."""
    return [call for made in mock.requests.values() for call in made]


# Replies


async def test_a_reply_is_returned_unchanged(mock: aioresponses, client: LLMClient) -> None:
    mock.post(CHAT, payload=completion("Grüße") | {"extra": [1, None]})
    assert await client.chat_completion(MESSAGES) == completion("Grüße") | {"extra": [1, None]}


async def test_a_request_has_the_arguments_and_the_key(mock: aioresponses, client: LLMClient) -> None:
    mock.post(CHAT, payload=completion())
    await client.chat_completion(MESSAGES, temperature=0.5)
    (call,) = calls(mock)
    assert json.loads(call.kwargs["data"]) == {"messages": MESSAGES, "model": "test-model", "temperature": 0.5}
    assert call.kwargs["headers"]["Authorization"] == "Bearer a-secret-key"
    assert call.kwargs["headers"]["Content-Type"] == "application/json"
    assert call.kwargs["timeout"].total is None


async def test_models_are_listed(mock: aioresponses, client: LLMClient) -> None:
    mock.get(MODELS, payload={"object": "list", "data": [{"id": "a:8b"}, {"id": "b@q4_k_m"}]})
    assert await client.list_models() == ["a:8b", "b@q4_k_m"]


async def test_concurrent_validations_make_one_request(mock: aioresponses, client: LLMClient) -> None:
    mock.get(MODELS, payload={"data": [{"id": "test-model"}]})
    validator = ModelValidator(client=client)
    assert await asyncio.gather(*[validator.validate_model("test-model") for _ in range(10)]) == ["test-model"] * 10
    assert len(calls(mock)) == 1


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (500, False), (503, False)])
async def test_the_health_check_asks_for_the_model_list(
    mock: aioresponses, client: LLMClient, status: int, healthy: bool
) -> None:
    mock.get(MODELS, status=status, payload={"data": []})
    assert await client.health_check() is healthy


async def test_a_server_that_is_not_there_is_not_healthy(mock: aioresponses, client: LLMClient) -> None:
    assert await client.health_check() is False


# Errors


@pytest.mark.parametrize(
    ("status", "body", "kind", "expected_text"),
    [
        (400, {"error": {"message": "temperature must be a number"}}, LLMResponseError, "temperature must be a number"),
        (401, {"error": {"message": "Invalid API key"}}, LLMAuthenticationError, "Invalid API key"),
        (404, {"error": {"message": "model 'test-model' not found"}}, ModelNotFoundError, "'test-model' not found"),
        (200, {"error": "model crashed"}, ModelLoadError, "model crashed"),
        (200, {"unexpected": True}, LLMResponseError, "not a chat completion"),
    ],
)
async def test_the_body_decides_the_class_of_the_error(
    mock: aioresponses, client: LLMClient, status: int, body: dict[str, Any], kind: type[LLMError], expected_text: str
) -> None:
    mock.post(CHAT, status=status, payload=body)
    with pytest.raises(kind, match=expected_text) as caught:
        await client.chat_completion(MESSAGES)
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert json.loads(caught.value.body or "") == body
    # If the model is missing, the client asks once which models there are.
    assert len(calls(mock)) == (2 if kind is ModelNotFoundError else 1)


async def test_an_answer_of_another_model_can_raise(mock: aioresponses) -> None:
    mock.post(CHAT, payload=completion(model="other"))
    async with LLMClient(API_BASE, "test-model", model_mismatch="raise") as client:
        with pytest.raises(ModelMismatchError) as caught:
            await client.chat_completion(MESSAGES)
    assert (caught.value.asked, caught.value.served) == ("test-model", "other")
    assert caught.value.partial == completion(model="other")


async def test_a_redirect_raises_and_is_not_followed(mock: aioresponses, client: LLMClient) -> None:
    mock.post(CHAT, status=307, headers={"Location": "http://elsewhere.test/v1/chat/completions"})
    with pytest.raises(LLMResponseError, match=r"redirects .*elsewhere"):
        await client.chat_completion(MESSAGES)
    assert len(calls(mock)) == 1


@pytest.mark.parametrize(
    ("raised", "kind", "expected_text"),
    [
        (aiohttp.ServerDisconnectedError(), LLMConnectionError, "closed the connection without an answer"),
        (aiohttp.ClientPayloadError(), LLMConnectionError, "broke in the middle of the answer"),
        (ConnectionResetError(), LLMConnectionError, "broke before the server answered"),
        (aiohttp.ConnectionTimeoutError(), LLMTimeoutError, "could not connect within 5 s"),
    ],
)
async def test_exceptions_of_aiohttp_become_errors_of_lmbridge(
    mock: aioresponses, raised: Exception, kind: type[LLMError], expected_text: str
) -> None:
    mock.post(CHAT, exception=raised, repeat=True)
    async with LLMClient(API_BASE, "test-model", max_retries=0) as client:
        with pytest.raises(kind, match=expected_text) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.context["attempts"] == 1


async def test_bad_arguments_are_refused_before_anything_is_sent(mock: aioresponses, client: LLMClient) -> None:
    with pytest.raises(LLMValidationError):
        await client.chat_completion([])
    assert calls(mock) == []


# Retries


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_a_temporary_error_is_retried(
    mock: aioresponses, client: LLMClient, no_waits: list[float], status: int
) -> None:
    mock.post(CHAT, status=status, body="busy")
    mock.post(CHAT, payload=completion())
    assert await client.chat_completion(MESSAGES) == completion()
    assert len(calls(mock)) == 2
    assert len(no_waits) == 1


async def test_the_number_of_retries_is_limited(mock: aioresponses, client: LLMClient, no_waits: list[float]) -> None:
    mock.post(CHAT, status=503, body="busy", repeat=True)
    with pytest.raises(LLMResponseError, match="after 3 attempts"):
        await client.chat_completion(MESSAGES)
    assert len(calls(mock)) == 3


@pytest.mark.usefixtures("no_waits")
async def test_a_server_that_loads_its_model_is_polled_until_it_is_ready(mock: aioresponses, client: LLMClient) -> None:
    loading = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    mock.post(CHAT, status=503, payload=loading, repeat=5)
    mock.post(CHAT, payload=completion())
    assert await client.chat_completion(MESSAGES) == completion()
    assert len(calls(mock)) == 6


async def test_a_long_retry_after_is_raised_instead_of_waited_for(mock: aioresponses, client: LLMClient) -> None:
    mock.post(CHAT, status=429, body="slow down", headers={"Retry-After": "3600"})
    with pytest.raises(LLMRateLimitError) as caught:
        await client.chat_completion(MESSAGES)
    assert caught.value.retry_after == 3600
    assert len(calls(mock)) == 1
