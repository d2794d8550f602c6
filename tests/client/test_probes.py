"""Model lists and health checks: they have limits of their own."""

from __future__ import annotations

from typing import Any

import pytest

from lmbridge import (
    LLMClient,
    LLMTimeoutError,
    Timeouts,
)
from lmbridge.client import api_requests, llm
from lmbridge.testing import ScriptedServer, reply, reset, stall


def test_lists_and_health_checks_have_the_documented_limits() -> None:
    assert (api_requests.PROBE_SECONDS, llm.HEALTH_CHECK_SECONDS) == (10, 5)


async def test_a_list_and_a_health_check_have_shorter_limits_than_a_generation(
    scripted_server: ScriptedServer, client: LLMClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_server.on_path("/v1/models", stall())
    monkeypatch.setattr(api_requests, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(llm, "HEALTH_CHECK_SECONDS", 0.05)
    assert await client.health_check() is False
    with pytest.raises(LLMTimeoutError) as caught:
        await client.list_models()
    assert caught.value.phase == "first_byte"


async def test_a_shorter_limit_of_the_client_applies_to_lists(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", stall())
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=0.05)) as client:
        with pytest.raises(LLMTimeoutError, match=r"the server did not answer within 0\.05 s"):
            await client.list_models()


@pytest.mark.parametrize("place", ["the call", "the client", "probes"])
async def test_each_limit_applies_to_the_question_about_the_parameters_of_a_model_as_well(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    scripted_server.on_path("/v1/models", reply(200, {"data": [{"id": "m:latest", "owned_by": "library"}]}))
    scripted_server.on_path("/api/version", reply(200, {"version": "0.35.0"}))
    scripted_server.on_path("/api/ps", reply(200, {"models": []}))
    scripted_server.on_path("/api/show", stall())
    if place == "probes":
        monkeypatch.setattr(api_requests, "PROBE_SECONDS", 0.05)
    timeouts = Timeouts(first_byte=0.05) if place == "the client" else Timeouts()
    options: Any = {"timeout": 0.05} if place == "the call" else {}
    async with LLMClient(scripted_server.api_base, "m", timeout=timeouts) as client:
        with pytest.raises(LLMTimeoutError, match=r"the server did not answer within 0\.05 s"):
            await client.server_info(**options)
    assert scripted_server.requests[-1].path == "/api/show"


async def test_a_health_check_is_not_retried(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float]
) -> None:
    scripted_server.on_path("/v1/models", reset())
    assert await client.health_check() is False
    assert not no_waits
