"""Fixtures for the tests of MCP: hubs and agents with scripted servers, which are closed after the test."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import DynamicAutonomousAgent, LLMClient
from lmbridge.mcp import McpEvent, McpHub
from lmbridge.mcp.servers.process_groups import ProcessGroups
from tests.mcp.http_server import HttpServer
from tests.mcp.support import Recorder, scripted


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives each test an empty home and working directory, so that no test sees the configuration of its machine."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.delenv("MCP_JSON_PATH", raising=False)
    monkeypatch.delenv("LMBRIDGE_TRUST_PROJECT", raising=False)
    return home


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes restarts happen at once, and gives processes little time to end by themselves."""
    monkeypatch.setattr("lmbridge.mcp.servers.managed_server._FIRST_BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr("lmbridge.mcp.servers.server_process._EXIT_GRACE_SECONDS", 0.2)
    monkeypatch.setattr("lmbridge.mcp.servers.process_groups._TERM_GRACE_SECONDS", 0.2)
    monkeypatch.setattr("lmbridge.mcp.servers.server_process._LAST_OUTPUT_SECONDS", 0.2)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """The path of a file to which a scripted server adds lines."""
    return tmp_path / "notes"


@pytest.fixture
def config(tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """A function that writes a configuration file and returns its path."""

    def write(servers: Mapping[str, Any]) -> Path:
        path = tmp_path / "mcp.json"
        path.write_text(json.dumps({"mcpServers": servers}))
        return path

    return write


MakeHub = Callable[..., McpHub]


@pytest_asyncio.fixture
async def make_hub(config: Callable[[Mapping[str, Any]], Path]) -> AsyncIterator[MakeHub]:
    """A function that makes hubs. A server is given by the options of a scripted server, or by its entry."""
    hubs: list[McpHub] = []

    def make(servers: Mapping[str, Mapping[str, Any]], **options: Any) -> McpHub:
        path = config({name: scripted(entry) for name, entry in servers.items()})
        hubs.append(McpHub(path, **options))
        return hubs[-1]

    yield make
    for hub in hubs:
        await hub.close()


@pytest.fixture
def recorder() -> Recorder[McpEvent]:
    """A callback for `on_event` that records events and can wait for one."""
    return Recorder()


MakeAgent = Callable[..., DynamicAutonomousAgent]


@pytest_asyncio.fixture
async def make_agent(config: Callable[[Mapping[str, Any]], Path], client: LLMClient) -> AsyncIterator[MakeAgent]:
    """A function that makes agents with the scripted model and with servers that are given as for `make_hub`."""
    agents: list[DynamicAutonomousAgent] = []

    def make(servers: Mapping[str, Mapping[str, Any]], **options: Any) -> DynamicAutonomousAgent:
        path = config({name: scripted(entry) for name, entry in servers.items()})
        agents.append(DynamicAutonomousAgent(options.pop("client", client), config_path=path, **options))
        return agents[-1]

    yield make
    for agent in agents:
        await agent.close()


@pytest_asyncio.fixture
async def server() -> AsyncIterator[HttpServer]:
    """Starts an MCP server on HTTP whose answers the test decides."""
    server = HttpServer()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def unguarded_groups(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Makes it impossible to start a guardian. The set gets the process groups that have been added nevertheless."""
    added: set[int] = set()

    class Groups(ProcessGroups):
        def add(self, group: int) -> None:
            added.add(group)
            super().add(group)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    groups = Groups()
    for module in ("process_groups", "server_process", "changing_headers"):
        monkeypatch.setattr(f"lmbridge.mcp.servers.{module}.process_groups", groups)
    monkeypatch.setattr(os, "posix_spawn", fail)
    return added
