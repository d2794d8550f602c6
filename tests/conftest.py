"""What every test has: a clean environment, a watch for blocking calls, and the scripted server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from blockbuster import BlockBuster, blockbuster_ctx

from lmbridge import LLMClient
from lmbridge.testing import ScriptedServer

pytest_plugins = ["lmbridge.testing.fixtures"]

_ENVIRONMENT = (
    "DEFAULT_MODEL",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "LMBRIDGE_API_BASE",
    "LMSTUDIO_HOST",
    "LMSTUDIO_PORT",
    "LM_API_TOKEN",
    "NO_PROXY",
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the settings of the machine that it runs on."""
    for name in _ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[BlockBuster]:
    """A blocking call that the package makes in the event loop fails the test."""
    with blockbuster_ctx("lmbridge") as watch:
        yield watch


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Retries and polls without their waits; the list gets what they would have been, before jitter."""
    ceilings: list[float] = []

    def no_jitter(ceiling: float) -> float:
        ceilings.append(ceiling)
        return 0.0

    monkeypatch.setattr("backoff.full_jitter", no_jitter)
    monkeypatch.setattr("lmbridge.transport.retry._FIRST_POLL", 0.0)
    return ceilings


@pytest_asyncio.fixture
async def client(scripted_server: ScriptedServer) -> AsyncIterator[LLMClient]:
    """A client of the scripted server that asks for its model."""
    async with LLMClient(scripted_server.api_base, "test-model") as client:
        yield client
