"""What the tests of the command line share: a folder for its data, a server, and running a command in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.support import Command
from tests.threaded_server import ThreadedServer


@pytest.fixture(autouse=True)
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the log of conversations; tests must not touch that of the person who runs them."""
    folder = tmp_path / "data"
    monkeypatch.setenv("LMBRIDGE_DATA_HOME", str(folder))
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "MCP_JSON_PATH"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def server() -> Iterator[ThreadedServer]:
    """A scripted server in a thread, because a command has an event loop of its own."""
    with ThreadedServer() as server:
        yield server


@pytest.fixture
def command(server: ThreadedServer, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs commands whose environment names the scripted server."""
    monkeypatch.setenv("LMBRIDGE_API_BASE", server.api_base)
    return Command()
