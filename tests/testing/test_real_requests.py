"""forbid_real_requests and retry_without_waiting."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest

from lmbridge import LLMClient, LLMConnectionError, LLMValidationError
from lmbridge.sync import LLMClient as BlockingClient
from lmbridge.testing import (
    Cassette,
    MockTransport,
    RealRequestError,
    ScriptedServer,
    answer,
    forbid_real_requests,
    reply,
    retry_without_waiting,
)
from tests.support import MESSAGES, in_flight


async def test_a_request_to_a_real_server_is_refused_and_named() -> None:
    async with LLMClient("http://127.0.0.1:1/v1", "m") as client:
        with forbid_real_requests(), pytest.raises(RealRequestError, match=r"POST http://127\.0\.0\.1:1/v1/chat"):
            await client.chat_completion(MESSAGES)
        assert in_flight(client) == 0
        # Nothing is left behind.
        with pytest.raises(LLMConnectionError):
            await client.chat_completion(MESSAGES, max_retries=0)


async def test_a_check_of_the_servers_health_does_not_hide_it() -> None:
    async with LLMClient("http://127.0.0.1:1/v1") as client:
        with forbid_real_requests(), pytest.raises(RealRequestError):
            await client.health_check()


async def test_servers_of_the_test_and_doubles_stay_allowed(client: LLMClient) -> None:
    mock = LLMClient(transport=MockTransport(lambda _: {"choices": [{"message": {"content": "Hello"}}]}))
    with forbid_real_requests():
        assert await client.ask("?")
        assert await mock.ask("?") == "Hello"


async def test_a_server_is_no_longer_allowed_when_it_has_ended() -> None:
    async with ScriptedServer() as server:
        api_base = server.api_base
    async with LLMClient(api_base) as client:
        with forbid_real_requests(), pytest.raises(RealRequestError):
            await client.ask("?")


async def test_further_servers_can_be_allowed() -> None:
    async with LLMClient("http://127.0.0.1:1", max_retries=0) as client:
        with forbid_real_requests(allow=["http://127.0.0.1:1"]), pytest.raises(LLMConnectionError):
            await client.ask("?")
    with pytest.raises(LLMValidationError), forbid_real_requests(allow=["no url"]):
        pass


def test_blocking_clients_are_refused_as_well() -> None:
    client = BlockingClient("http://127.0.0.1:1/v1", "m")
    with closing(client), forbid_real_requests(), pytest.raises(RealRequestError):
        client.chat_completion(MESSAGES)


async def test_a_cassette_inside_the_block_may_record(
    scripted_server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server counts as a real one.
    monkeypatch.setattr("lmbridge.testing.real_requests.running_origins", set())
    async with LLMClient(scripted_server.api_base, "m") as client:
        with Cassette(tmp_path / "c.json"), forbid_real_requests(), pytest.raises(RealRequestError):
            await client.ask("?")
        with forbid_real_requests(), Cassette(tmp_path / "c.json", "all"):
            assert await client.ask("?")


async def test_retries_and_polls_do_not_wait(scripted_server: ScriptedServer) -> None:
    loading = reply(503, {"error": {"message": "Loading model", "type": "unavailable_error"}})
    scripted_server.script(reply(429, {}, {"Retry-After": "30"}), reply(500, {}), loading, loading, answer("Hello"))
    async with asyncio.timeout(5), LLMClient(scripted_server.api_base, "m") as client:
        with retry_without_waiting():
            assert await client.ask("?") == "Hello"
    assert len(scripted_server.requests) == 5
