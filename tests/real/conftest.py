"""Fixtures with a real llama.cpp server and a real model, and with real MCP servers."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from benchmarks.routers import LLAMA_SERVER_VARIABLE
from lmbridge import Limits, LLMClient, LocalServer
from lmbridge.local import local_server as local_server_module
from lmbridge.mcp import McpHub
from tests.mcp.conftest import MakeHub

API_KEY = "sk-local-test"


@pytest.fixture(scope="session", autouse=True)
def other_llama_server() -> Iterator[None]:
    """Makes every `LocalServer` run the llama-server that the environment names, if it names one.

    The tests that name none run the one of the extra `local`. `make test-llama-server` runs the folder on Debian's.
    """
    if not os.environ.get(LLAMA_SERVER_VARIABLE):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalServer, "_child", Path(__file__).with_name("llama_server_child.py"))
        patch.setattr(local_server_module, "_check_machine", lambda: None)
        yield


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def local_server() -> AsyncIterator[LocalServer]:
    """Starts the embedded server. Its API key is required for generations only."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs lmbridge[local]")
    async with LocalServer(n_ctx=4096, n_parallel=4, api_key=API_KEY) as server:
        yield server


@pytest_asyncio.fixture
async def client(local_server: LocalServer) -> AsyncIterator[LLMClient]:
    """Connects a client to the shared server."""
    limits = Limits(max_concurrency=100)
    async with LLMClient(local_server.api_base, local_server.model, API_KEY, limits=limits) as client:
        yield client


@pytest_asyncio.fixture
async def make_hub(tmp_path: Path) -> AsyncIterator[MakeHub]:
    """Returns a function that makes hubs from server entries, and closes them after the test."""
    hubs: list[McpHub] = []

    def make(servers: Any, **options: Any) -> McpHub:
        path = tmp_path / "mcp.json"
        path.write_text(json.dumps({"mcpServers": servers}))
        hubs.append(McpHub(path, **options))
        return hubs[-1]

    yield make
    for hub in hubs:
        await hub.close()
