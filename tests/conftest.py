"""Fixtures for all tests: a clean environment, a check for blocking calls, and the scripted server."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import settings

from lmbridge import LLMClient
from lmbridge.testing import ScriptedServer

pytest_plugins = ["lmbridge.testing.fixtures"]

# How long an example takes says more about the machine than about the code.
settings.register_profile("lmbridge", deadline=None)
settings.load_profile("lmbridge")

_ENVIRONMENT = (
    "DEFAULT_MODEL",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "LMBRIDGE_API_BASE",
    "LMBRIDGE_MODEL",
    "LMSTUDIO_HOST",
    "LMSTUDIO_PORT",
    "LM_API_TOKEN",
    "NO_PROXY",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Returns the number of workers for `-n auto`: one more than CPUs, because many tests wait for other processes."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


def pytest_collection_finish() -> None:
    """Excludes what exists by now from later garbage collections, each of which would take half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes environment variables that would make a test depend on the machine that it runs on."""
    for name in _ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    """A test, or a page of the documentation, may call `enable_logging`; the next one has the logger as it was."""
    logger, prompts = logging.getLogger("lmbridge"), logging.getLogger("lmbridge.prompts")
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    prompts_level = prompts.level
    yield
    prompts.setLevel(prompts_level)
    logger.setLevel(level)
    logger.propagate = propagate
    logger.handlers[:] = handlers


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[BlockBuster]:
    """Fails a test in which the package makes a blocking call in the event loop."""
    # A cassette is a small file that a test reads and writes in an ordinary `with`.
    cassettes = ["lmbridge.testing.cassette", "lmbridge.testing.cassette_file"]
    with blockbuster_ctx("lmbridge", excluded_modules=cassettes) as blockbuster:
        for function in blockbuster.functions.values():
            # A program that writes a picture of its session has asked for it.
            function.can_block_in("lmbridge/observe/timeline.py", {"write"})
        yield blockbuster


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Removes the waits of retries and polls. The list receives how long each wait would have been, before jitter."""
    ceilings: list[float] = []

    def no_jitter(ceiling: float) -> float:
        ceilings.append(ceiling)
        return 0.0

    monkeypatch.setattr("backoff.full_jitter", no_jitter)
    monkeypatch.setattr("lmbridge.transport.retry._FIRST_POLL_WAIT", 0.0)
    return ceilings


@pytest_asyncio.fixture
async def client(scripted_server: ScriptedServer) -> AsyncIterator[LLMClient]:
    """A client of the scripted server, which requests the server's model."""
    async with LLMClient(scripted_server.api_base, "test-model") as client:
        yield client
