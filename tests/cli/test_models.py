"""`lmbridge models`: the lists of servers, and loading, unloading and downloading."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from lmbridge import FoundServer, LLMAuthenticationError, ModelInfo, ServerInfo
from lmbridge.cli import models
from lmbridge.cli.terminal import Terminal
from lmbridge.testing import Exchange, reply
from tests.cli.support import Command
from tests.client.test_client_models import SUCCESS, Router, loading
from tests.threaded_server import ThreadedServer

LM_STUDIO = {
    "models": [
        {
            "type": "llm",
            "key": "qwen/qwen3-4b",
            "loaded_instances": [{"id": "qwen/qwen3-4b", "config": {"context_length": 8192, "parallel": 4}}],
            "capabilities": {"vision": True, "trained_for_tool_use": True},
            "size_bytes": 2_497_281_120,
        },
        {"type": "embedding", "key": "nomic", "loaded_instances": [], "size_bytes": 84_106_624},
        {"type": "llm", "key": "unsized", "loaded_instances": []},
    ]
}


@pytest.fixture
def lm_studio(server: ThreadedServer) -> ThreadedServer:
    server.scripted.on_path("/api/v1/models", reply(200, LM_STUDIO))
    return server


def test_the_models_of_the_server_are_listed(command: Command, lm_studio: ThreadedServer) -> None:
    status, output, errors = command("models")
    assert (status, errors) == (0, "")
    title, *rows = [line.split() for line in output.splitlines() if line]
    assert " ".join(title) == f"LM Studio at {lm_studio.api_base}"
    assert rows == [
        ["model", "state", "context", "slots", "size", "kind"],
        ["qwen/qwen3-4b", "loaded", "8192", "4", "2.5", "GB", "vision,", "tools"],
        ["nomic", "84", "MB", "embedding"],
        ["unsized"],
    ]


def test_the_list_as_json(command: Command, lm_studio: ThreadedServer) -> None:
    (server,) = json.loads(command("models", "--json").output)
    assert (server["api_base"], server["kind"], server["error"]) == (lm_studio.api_base, "lmstudio", None)
    assert [(each["id"], each["loaded"], each["size_bytes"]) for each in server["models"]] == [
        ("qwen/qwen3-4b", True, 2_497_281_120),
        ("nomic", False, 84_106_624),
        ("unsized", False, None),
    ]
    assert [(each["vision"], each["tools"]) for each in server["models"]] == [(True, True), (None, None), (None, None)]


def test_a_router_says_what_each_model_is_doing(command: Command, server: ThreadedServer) -> None:
    router = Router(server.scripted)
    router.statuses = {each: {"value": each} for each in ("loaded", "loading", "sleeping", "downloading", "unloaded")}
    status, output, _ = command("models")
    rows = [line.split() for line in output.splitlines()[2:] if line]
    assert status == 0
    assert [row[1] for row in rows] == list(router.statuses)
    (described,) = json.loads(command("models", "--json").output)
    assert [(each["status"], each["loaded"]) for each in described["models"]] == [
        ("loaded", True),
        ("loading", False),
        ("sleeping", True),
        ("downloading", False),
        ("unloaded", False),
    ]


def test_a_load_shows_how_far_it_is(command: Command, server: ThreadedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    is_half_done = threading.Event()

    def show(text: str) -> None:
        shown.append(text)
        if "50%" in text:
            is_half_done.set()

    @contextmanager
    def waiting(_terminal: Terminal, text: str) -> Iterator[Callable[[str], None]]:
        show(text)
        yield show

    async def load(exchange: Exchange) -> None:
        assert await asyncio.to_thread(is_half_done.wait, 20)
        router.statuses["small"] = {"value": "loaded"}
        await reply(200, SUCCESS)(exchange)

    monkeypatch.setattr(Terminal, "waiting", waiting)
    router = Router(server.scripted)
    router.events = [loading(0.5)]
    server.scripted.on_path("/models/load", load)
    assert command("models", "load", "small") == (0, "loaded small\n", "")
    assert shown == ["loading small ...", "loading small ...", "loading small: 50%"]


def test_without_an_address_all_servers_on_the_machine_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    info = ServerInfo(kind="ollama", version="0.20", models=(ModelInfo(id="evil\x1b[2J", loaded=False),))
    refused = LLMAuthenticationError("the server requires a key")
    servers = [
        FoundServer(api_base="http://127.0.0.1:11434/v1", info=info),
        FoundServer(api_base="http://127.0.0.1:8000/v1", info=ServerInfo(kind="unknown"), error=refused),
    ]

    async def discover(**_options: object) -> list[FoundServer]:
        return servers

    monkeypatch.setattr(models, "discover", discover)
    status, output, errors = Command()("models")
    assert status == 0
    assert "Ollama 0.20 at http://127.0.0.1:11434/v1" in output
    assert "evil␛[2J" in output
    assert "warning: the server requires a key" in errors


def test_a_model_is_loaded_with_options_of_the_server(command: Command, lm_studio: ThreadedServer) -> None:
    loaded = {"instance_id": "qwen/qwen3-4b", "load_time_seconds": 1.0, "status": "loaded"}
    lm_studio.scripted.on_path("/api/v1/models/load", reply(200, loaded))
    outcome = command("models", "load", "qwen/qwen3-4b", "--set", "context_length=8192", "--set", "mode=fast")
    assert outcome == (0, "loaded qwen/qwen3-4b, context 8192\n", "")
    (sent,) = [each.json for each in lm_studio.scripted.requests if each.path == "/api/v1/models/load"]
    assert sent == {"model": "qwen/qwen3-4b", "context_length": 8192, "mode": "fast"}


def test_a_model_is_unloaded(command: Command, lm_studio: ThreadedServer) -> None:
    lm_studio.scripted.on_path("/api/v1/models/unload", reply(200, {"instance_id": "qwen/qwen3-4b"}))
    assert command("models", "unload", "qwen/qwen3-4b") == (0, "unloaded qwen/qwen3-4b\n", "")


def test_a_download_reports_its_progress(command: Command, lm_studio: ThreadedServer) -> None:
    done = {"status": "already_downloaded", "total_size_bytes": 10, "downloaded_bytes": 10}
    lm_studio.scripted.on_path("/api/v1/models/download", reply(200, done))
    assert command("models", "pull", "qwen/qwen3-4b") == (0, "downloaded qwen/qwen3-4b\n", "")
    progress = json.loads(command("models", "pull", "qwen/qwen3-4b", "--json").output)
    assert progress["status"] == "completed"


def test_the_address_may_stand_before_or_behind_the_command(
    lm_studio: ThreadedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMBRIDGE_API_BASE", "http://127.0.0.1:1/v1")
    lm_studio.scripted.on_path("/api/v1/models/unload", reply(200, {"instance_id": "qwen/qwen3-4b"}))
    address = ["--api-base", lm_studio.api_base]
    assert Command()("models", *address, "unload", "qwen/qwen3-4b").status == 0
    assert Command()("models", "unload", "qwen/qwen3-4b", *address).status == 0


def test_an_option_without_a_value_is_refused(command: Command) -> None:
    status, _, errors = command("models", "load", "x", "--set", "context_length")
    assert status == 2
    assert "--set takes NAME=VALUE, not 'context_length'" in errors


def test_a_server_that_cannot_load_models_says_so(command: Command, server: ThreadedServer) -> None:
    status, _, errors = command("models", "load", "x")
    assert status == 1
    assert "error: model load" in errors
    assert "cannot load models" in errors
