"""Model lists and health checks: they have limits of their own."""

from __future__ import annotations

import pytest

from lmbridge import (
    LLMClient,
    LLMTimeoutError,
    Timeouts,
)
from lmbridge.client import llm, server_api
from lmbridge.testing import ScriptedServer, reset, stall


def test_lists_and_health_checks_have_the_documented_limits() -> None:
    assert (server_api.PROBE_SECONDS, llm.HEALTH_CHECK_SECONDS) == (10, 5)


async def test_a_list_and_a_health_check_have_shorter_limits_than_a_generation(
    scripted_server: ScriptedServer, client: LLMClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_server.on_path("/v1/models", stall())
    monkeypatch.setattr(server_api, "PROBE_SECONDS", 0.05)
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


async def test_a_health_check_is_not_retried(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float]
) -> None:
    scripted_server.on_path("/v1/models", reset())
    assert await client.health_check() is False
    assert not no_waits
