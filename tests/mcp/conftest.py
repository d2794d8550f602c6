"""What the tests of MCP have: hubs of scripted servers, closed in the end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import DynamicAutonomousAgent, LLMClient
from lmbridge.mcp import McpEvent, McpHub
from tests.mcp.support import Recorder, scripted


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the configuration of the machine that it runs on."""
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
    """A restart is tried at once, and nobody waits long for those that do not end."""
    monkeypatch.setattr("lmbridge.mcp.servers.managed._FIRST_WAIT", 0.0)
    monkeypatch.setattr("lmbridge.mcp.servers.processes._TERM_AFTER", 0.2)
    monkeypatch.setattr("lmbridge.mcp.servers.processes._KILL_AFTER", 0.2)
    monkeypatch.setattr("lmbridge.mcp.servers.processes._LAST_OUTPUT", 0.2)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A file for what a scripted server notes."""
    return tmp_path / "notes"


@pytest.fixture
def config(tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """Writes a configuration."""

    def write(servers: Mapping[str, Any]) -> Path:
        path = tmp_path / "mcp.json"
        path.write_text(json.dumps({"mcpServers": servers}))
        return path

    return write


MakeHub = Callable[..., McpHub]


@pytest_asyncio.fixture
async def make_hub(config: Callable[[Mapping[str, Any]], Path]) -> AsyncIterator[MakeHub]:
    """Makes hubs; a server is what a scripted one is told, or an entry with a "command" or "url"."""
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
    """For `on_event`: notes events, and waits for one."""
    return Recorder()


MakeAgent = Callable[..., DynamicAutonomousAgent]


@pytest_asyncio.fixture
async def make_agent(config: Callable[[Mapping[str, Any]], Path], client: LLMClient) -> AsyncIterator[MakeAgent]:
    """Makes agents of the scripted model and of scripted servers, told as to `make_hub`."""
    agents: list[DynamicAutonomousAgent] = []

    def make(servers: Mapping[str, Mapping[str, Any]], **options: Any) -> DynamicAutonomousAgent:
        path = config({name: scripted(entry) for name, entry in servers.items()})
        agents.append(DynamicAutonomousAgent(options.pop("client", client), config_path=path, **options))
        return agents[-1]

    yield make
    for agent in agents:
        await agent.close()
