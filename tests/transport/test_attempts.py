"""Retries and polls of a request: which replies and failures are repeated, and which errors stand."""

from __future__ import annotations

import asyncio
import logging
import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import aiohttp
import pytest

from lmbridge import (
    LLMClient,
    LLMConnectionError,
    LLMRateLimitError,
    LLMResponseError,
    LLMStreamError,
    LLMTimeoutError,
    ModelLoadError,
    Timeouts,
)
from lmbridge.testing import Behaviour, ScriptedServer, answer, hang_up, raw, reply, reset, sse
from tests.support import MESSAGES, piece
from tests.transport.support import ask, no_such_host


async def test_a_name_that_cannot_be_resolved_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", no_such_host)
    async with LLMClient("http://no-such-host.invalid") as client:
        with pytest.raises(LLMConnectionError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.context["attempts"] == 1


async def test_a_connect_timeout_is_not_retried(monkeypatch: pytest.MonkeyPatch, no_waits: list[float]) -> None:
    async def slow(*_: object, **__: object) -> object:
        raise aiohttp.ConnectionTimeoutError("Connection timeout to host")

    monkeypatch.setattr("aiohttp.TCPConnector._create_connection", slow)
    async with LLMClient("http://127.0.0.1:1") as client:
        with pytest.raises(LLMTimeoutError, match="could not connect within 5 s") as caught:
            await client.chat_completion(MESSAGES)
    assert (caught.value.phase, caught.value.context["attempts"]) == ("connect", 1)
    assert not no_waits


async def test_the_error_of_a_reply_that_broke_has_its_status(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(raw(b"HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\n{"))
    with pytest.raises(LLMConnectionError) as caught:
        await client.chat_completion(MESSAGES)
    assert caught.value.status == 201


LOADING = reply(503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_an_error_that_may_pass_is_retried(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], status: int, stream: bool
) -> None:
    scripted_server.script(reply(status, {"error": "busy"}), reply(status, b""), answer("Hi"))
    assert await ask(client, stream) == "Hi"
    assert len(scripted_server.requests) == 3
    assert no_waits == [0.5, 1.0]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("behaviour", [hang_up(), reset()])
async def test_a_connection_that_breaks_before_a_reply_is_retried(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], behaviour: Behaviour, stream: bool
) -> None:
    scripted_server.script(behaviour, behaviour, answer("Hi"))
    assert await ask(client, stream) == "Hi"
    assert len(no_waits) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 501])
async def test_an_error_in_the_request_is_not_retried(
    scripted_server: ScriptedServer, client: LLMClient, status: int
) -> None:
    scripted_server.script(reply(status, {"error": "no"}))
    with pytest.raises(LLMResponseError, match=f"the server answered {status}: no") as caught:
        await client.chat_completion(MESSAGES)
    assert caught.value.status == status
    assert caught.value.body == '{"error":"no"}'
    assert len(scripted_server.requests) == 1


async def test_a_500_that_would_occur_again_is_not_retried(scripted_server: ScriptedServer, client: LLMClient) -> None:
    error_body = {
        "error": {"code": 500, "message": "Failed to parse tool call arguments as JSON", "type": "server_error"}
    }
    scripted_server.script(reply(500, error_body))
    with pytest.raises(LLMResponseError, match="Failed to parse tool call arguments"):
        await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 1


@pytest.mark.parametrize(("asked_for", "made"), [(0, 0), (1, 1), (5, 5), (50, 5)])
async def test_no_more_than_five_retries_are_ever_made(
    scripted_server: ScriptedServer, no_waits: list[float], asked_for: int, made: int
) -> None:
    scripted_server.default = reply(429, {"error": "slow down"})
    async with LLMClient(scripted_server.api_base, max_retries=asked_for) as client:
        with pytest.raises(LLMRateLimitError) as caught:
            await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 1 + made
    assert caught.value.context["attempts"] == 1 + made
    assert max(no_waits, default=0) <= 15


@pytest.mark.parametrize("in_words", [True, False])
async def test_a_retry_after_that_is_too_long_is_raised_at_once(
    scripted_server: ScriptedServer, client: LLMClient, in_words: bool
) -> None:
    after = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True) if in_words else "100"
    scripted_server.script(reply(429, {"error": "slow down"}, {"Retry-After": after}))
    with pytest.raises(LLMRateLimitError) as caught:
        await client.chat_completion(MESSAGES)
    assert caught.value.retry_after == pytest.approx(100, abs=5)
    assert len(scripted_server.requests) == 1


async def test_a_retry_after_is_never_shortened(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    scripted_server.script(reply(429, {"error": "slow down"}, {"Retry-After": "0.3"}), answer("Hi"))
    loop = asyncio.get_running_loop()
    began = loop.time()
    with caplog.at_level(logging.DEBUG, "lmbridge.transport"):
        assert await ask(client, stream=False) == "Hi"
    assert loop.time() - began >= 0.3
    assert "chat completion: status 429; retry in 0.30 s" in caplog.text


async def test_a_stream_that_has_begun_is_never_retried(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse(piece("a"), end=False))
    with pytest.raises(LLMStreamError, match="the connection broke mid-stream"):
        await ask(client, stream=True)
    scripted_server.script(sse(end=False))  # not even before its first event
    with pytest.raises(LLMStreamError):
        await ask(client, stream=True)
    assert len(scripted_server.requests) == 2


async def test_a_plain_reply_cut_in_the_middle_is_an_error(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"))
    with pytest.raises(LLMConnectionError, match="in the middle of the answer"):
        await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 1


async def test_a_refused_connection_is_an_error_that_names_the_server(no_waits: list[float]) -> None:
    async with ScriptedServer() as gone:
        pass
    async with LLMClient(gone.api_base, "m") as client:
        with pytest.raises(LLMConnectionError) as caught:
            await client.chat_completion(MESSAGES)
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.__cause__ is not None
    message = str(caught.value)
    assert f"with model 'm' at {gone.api_base}/chat/completions: could not connect: Connection refused" in message
    assert "(after 3 attempts, " in message
    assert message.endswith("start the server there, or pass the right api_base")
    assert len(no_waits) == 2


async def test_a_server_that_does_not_speak_http_is_a_clear_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"))
    with pytest.raises(LLMConnectionError, match="not valid HTTP"):
        await client.chat_completion(MESSAGES)


async def test_a_name_that_cannot_be_resolved_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_such_host(*_: object, **__: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", no_such_host)
    async with LLMClient("http://no-such-host.invalid") as client:
        with pytest.raises(
            LLMConnectionError, match=r"cannot be resolved: .*Name or service not known.*check api_base"
        ):
            await client.chat_completion(MESSAGES)


async def test_a_loading_server_is_polled_without_counting_retries(
    scripted_server: ScriptedServer, no_waits: list[float]
) -> None:
    scripted_server.script(*[LOADING] * 8, reply(500, {"error": "hiccup"}), LOADING, answer("Hi"))
    async with LLMClient(scripted_server.api_base, max_retries=1) as client:
        assert await ask(client, stream=True) == "Hi"
        assert client.stats().retries == 1
    assert len(scripted_server.requests) == 11


async def test_loading_has_its_own_time_limit(scripted_server: ScriptedServer, no_waits: list[float]) -> None:
    scripted_server.default = LOADING
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(load=0.1)) as client:
        with pytest.raises(LLMTimeoutError, match=r"did not finish loading its model within 0\.1 s") as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.phase == "load"
    assert caught.value.status == 503
    assert "Loading model" in (caught.value.body or "")


@pytest.mark.parametrize("status", [400, 503])
async def test_no_model_loaded_is_raised_at_once_with_a_hint(
    scripted_server: ScriptedServer, client: LLMClient, status: int
) -> None:
    message = "No models loaded. Please load a model in the developer page or use the 'lms load' command."
    scripted_server.script(reply(status, {"error": message}))
    with pytest.raises(ModelLoadError, match="load a model first"):
        await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 1
