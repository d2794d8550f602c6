"""A real llama.cpp server with a real model, one for all tests here."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from lmbridge import Limits, LLMClient, LocalServer

API_KEY = "sk-local-test"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def local_server() -> AsyncIterator[LocalServer]:
    """The embedded server; only chats need its key."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs lmbridge[local]")
    async with LocalServer(n_ctx=4096, n_parallel=4, api_key=API_KEY) as server:
        yield server


@pytest_asyncio.fixture
async def client(local_server: LocalServer) -> AsyncIterator[LLMClient]:
    """A client of it."""
    limits = Limits(max_concurrency=100)
    async with LLMClient(local_server.api_base, local_server.model, API_KEY, limits=limits) as client:
        yield client
