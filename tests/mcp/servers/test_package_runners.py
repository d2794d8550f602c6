"""Servers that npx, uvx and the like download before they start them: time limits, and a cache that is damaged."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lmbridge import MultiMCPError, ToolError
from lmbridge.mcp import McpEvent, ServerStarting
from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.sdk import load_sdk
from lmbridge.mcp.servers import package_runners
from lmbridge.mcp.servers.package_runners import (
    StartPatience,
    npx_hint,
    package_runner_of,
    runner_environment,
    start_patience,
)
from tests.mcp.conftest import MakeHub
from tests.mcp.support import SERVER, Recorder, function_of, names

DOWNLOAD_LINE = "npm http fetch GET 200 https://registry.npmjs.org/zod 51ms (cache miss)"


def runner(folder: Path, script: str, name: str = "npx") -> dict[str, Any]:
    """Returns the entry of a server that is started by a shell script with the name of a package runner."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"command": str(path), "args": ["-y", "some-server"]}


def then_serve(**options: Any) -> str:
    return f"exec {sys.executable} -I -S {SERVER} '{json.dumps(options)}'"


def spec_of(command: str, transport: Any = "stdio") -> ServerSpec:
    return ServerSpec(name="a", transport=transport, command=command)


def test_a_package_runner_has_more_time_than_another_program() -> None:
    assert start_patience(spec_of("python3"), None) == StartPatience(30, 30)
    assert start_patience(spec_of("/usr/bin/npx"), None) == StartPatience(120, 300)
    assert start_patience(spec_of("uvx"), None) == StartPatience(120, 300)
    assert start_patience(spec_of("", "http"), None) == StartPatience(30, 30)


@pytest.mark.parametrize(
    ("command", "args", "expected"),
    [
        ("npx", ["-y", "x"], "npx"),
        ("/opt/node/bin/npx", [], "npx"),
        ("C:\\node\\npx.cmd", [], "npx"),
        ("NPX.CMD", [], "npx"),
        ("sh", ["-c", "npx -y @scope/x"], "npx"),
        ("/bin/bash", ["-lc", "cd /srv && exec uvx 'some server'"], "uvx"),
        ("sh", ["-e", "-c", "A=1 /usr/bin/uvx x; true"], "uvx"),
        ("bash", ["-c", "npx 'unclosed"], "npx"),
        ("cmd", ["/c", "npx", "-y", "x"], "npx"),
        ("cmd.exe", ["/C", "uvx", "x"], "uvx"),
        ("env", ["A=1", "uvx", "x"], "uvx"),
        ("nice", ["-n", "5", "docker", "run", "x"], "docker"),
        ("env", ["-u", "NODE_ENV", "npx", "x"], "npx"),
        ("cmd", ["/c", "npx -y x"], "npx"),
        ("sh", ["-c", "if true; then exec env A=1 npx x; fi"], "npx"),
        ("sh", ["-c", "cd /srv\nnpx x"], "npx"),
        ("sh", ["-c", "cd /srv/docker && ./server"], None),
        ("sh", ["-c", "./server --backend docker"], None),
        ("nice", ["python", "server.py", "--backend", "docker"], None),
        ("env", ["A=1", "node", "npx"], None),
        ("python3", ["npx"], None),
        ("sh", ["npx"], None),
        ("sh", ["-c"], None),
        ("sh", ["-c", "node server.js"], None),
        ("env", ["node", "x"], None),
        ("", [], None),
    ],
)
def test_a_package_runner_is_recognized_behind_a_shell_or_a_wrapper(
    command: str, args: list[str], expected: str | None
) -> None:
    assert package_runner_of(command, args) == expected
    is_npm = runner_environment(command, args) != {}
    assert is_npm == (expected == "npx")
    patience = start_patience(ServerSpec(name="a", transport="stdio", command=command, args=tuple(args)), None)
    assert patience.total == (300 if expected else 30)


async def test_a_start_that_takes_long_is_reported(
    make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder[McpEvent]
) -> None:
    monkeypatch.setattr("lmbridge.mcp.servers.managed_server._START_REPORT_SECONDS", 0.05)
    go = tmp_path / "go"
    slow = f"while [ ! -e {go} ]; do sleep 0.01; done\n{then_serve(tools=['echo'])}"
    hub = make_hub({"a": runner(tmp_path, slow)}, on_event=recorder)
    starting = asyncio.create_task(hub.tools())
    first = await recorder.wait_for(lambda event: isinstance(event, ServerStarting))
    later = await recorder.wait_for(lambda event: isinstance(event, ServerStarting) and event.seconds > 0.1)
    await asyncio.to_thread(go.touch)
    assert names((await starting).tools) == ["echo"]
    for event in (first, later):
        assert isinstance(event, ServerStarting)
        assert (event.server, event.downloader) == ("a", "npx")


def test_a_connect_timeout_is_the_silence_that_a_package_runner_is_allowed() -> None:
    assert start_patience(spec_of("npx"), 5) == StartPatience(5, 300)
    assert start_patience(spec_of("npx"), 900) == StartPatience(900, 900)
    assert start_patience(spec_of("python3"), 5) == StartPatience(5, 5)


async def test_the_time_of_a_server_begins_when_the_sdk_has_been_imported(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported_at: list[float] = []

    def load() -> None:
        load_sdk()
        imported_at.append(time.monotonic())

    monkeypatch.setattr("lmbridge.mcp.servers.managed_server.load_sdk", load)
    hub = make_hub({"a": {}})
    await hub.tools()
    session = hub._servers["a"]._session
    assert session is not None
    assert session.opened_at >= imported_at[0]


async def test_the_log_quotes_the_first_lines_of_stderr_of_a_server_that_was_lost(
    make_hub: MakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noisy = f'for each in $(seq 60); do echo "line $each" >&2; done\n{then_serve(tools=["die"])}'
    lease = await make_hub({"a": runner(tmp_path, noisy)}).tools()
    with pytest.raises(ToolError, match="it was killed by SIGKILL"):
        await function_of(lease, "die")()
    (logged,) = [each for each in caplog.messages if "was lost" in each]
    assert "; the first and last lines of its stderr:\n  line 1\n" in logged


async def test_output_on_stderr_gives_a_package_runner_more_time(make_hub: MakeHub, tmp_path: Path) -> None:
    slow = f'for each in 1 2 3 4 5 6 7 8; do echo "{DOWNLOAD_LINE}" >&2; sleep 0.3; done\n{then_serve(tools=["echo"])}'
    hub = make_hub({"a": runner(tmp_path, slow)}, connect_timeout=2)
    assert names((await hub.tools()).tools) == ["echo"]
    assert hub.status()["a"].stderr_tail == ""


async def test_a_package_runner_that_is_silent_fails(make_hub: MakeHub, tmp_path: Path) -> None:
    entry = runner(tmp_path, "echo started >&2; exec sleep 600") | {"lmbridge": {"connectTimeout": 0.3}}
    with pytest.raises(MultiMCPError) as caught:
        await make_hub({"a": entry}).tools()
    text = str(caught.value)
    assert "it did not answer, and wrote nothing to stderr for 0.3 seconds" in text
    assert "waiting for the lock that it left behind: delete the folder" in text
    assert '"connectTimeout"' in text


async def test_a_package_runner_that_writes_for_ever_fails_as_well(
    make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_runners, "_RUNNER_START_SECONDS", 2.5)
    entry = runner(tmp_path, "while true; do echo still here >&2; sleep 0.05; done", name="uvx")
    with pytest.raises(MultiMCPError, match=r"it did not answer within 2.5 seconds"):
        await make_hub({"a": entry}, connect_timeout=2).tools()


async def test_output_of_another_program_gives_it_no_more_time(make_hub: MakeHub, tmp_path: Path) -> None:
    entry = runner(tmp_path, "while true; do echo still here >&2; sleep 0.05; done", name="server")
    with pytest.raises(MultiMCPError, match=r"it did not answer within 0.3 seconds"):
        await make_hub({"a": entry}, connect_timeout=0.3).tools()


async def test_npx_is_asked_to_report_its_downloads_unless_the_entry_says_otherwise(
    make_hub: MakeHub, tmp_path: Path
) -> None:
    npx = runner(tmp_path, then_serve(tools=["env"]))
    hub = make_hub({"a": npx, "b": npx | {"env": {"npm_config_loglevel": "error"}}, "c": {"tools": ["env"]}})
    lease = await hub.tools()
    levels = [
        json.loads(await function_of(lease, "env", server)()).get("npm_config_loglevel") for server in ("a", "b", "c")
    ]
    assert levels == ["http", "error", None]


@pytest.mark.parametrize(
    "line",
    [
        "npm error code ENOTEMPTY",
        "npm ERR! code EEXIST",
        "npm warn tar TAR_ENTRY_ERROR ENOENT: open '/x/_npx/0123456789abcdef/node_modules/a'",
        "Error: Cannot find module '/x/_npx/0123456789abcdef/node_modules/zod/index.js'",
        "sh: 1: mcp-server-everything: not found",
    ],
)
async def test_the_error_says_which_folder_to_delete_if_the_cache_of_npx_is_damaged(
    make_hub: MakeHub, tmp_path: Path, empty_home: Path, line: str
) -> None:
    with pytest.raises(MultiMCPError) as caught:
        await make_hub({"a": runner(tmp_path, f'echo "{line}" >&2; exit 1')}).tools()
    folder = "/x/_npx/0123456789abcdef" if "/x/" in line else f"{empty_home}/.npm/_npx"
    text = str(caught.value)
    assert "the cache of npx seems to be damaged, as happens when it is killed while it downloads" in text
    assert f"delete the folder {folder} and try again" in text


def test_the_folder_is_that_of_the_entrys_own_cache() -> None:
    spec = ServerSpec(name="a", transport="stdio", command="npx", env={"npm_config_cache": "/other"})
    assert "delete the folder /other/_npx" in str(npx_hint(spec, "ENOTEMPTY", timed_out=False))


@pytest.mark.parametrize(
    "line",
    [
        "npm http fetch GET https://registry.npmjs.org/zod attempt 1 failed with ECONNREFUSED",
        "npm error code UNABLE_TO_GET_ISSUER_CERT_LOCALLY",
    ],
)
def test_a_registry_that_cannot_be_reached_is_not_taken_for_a_damaged_cache(line: str) -> None:
    hint = npx_hint(spec_of("npx"), line, timed_out=True)
    assert hint == "npx cannot download the server: check the network, HTTPS_PROXY and NODE_EXTRA_CA_CERTS"


def test_other_programs_and_other_errors_say_nothing_about_the_cache_of_npx() -> None:
    own = "Error: Cannot find module './config.json'"
    assert npx_hint(spec_of("npx"), own, timed_out=False) is None
    assert npx_hint(spec_of("node"), "ENOTEMPTY", timed_out=True) is None


async def test_the_first_and_the_last_lines_of_stderr_are_in_the_error(
    make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The error also names such a variable, because the server does not get it.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    script = "echo the cause >&2; for each in $(seq 40); do echo line $each >&2; done; echo the end >&2; exit 3"
    with pytest.raises(MultiMCPError) as caught:
        await make_hub({"a": runner(tmp_path, script, name="server")}).tools()
    text = str(caught.value)
    assert "it ended with status 3; the first and last lines of its stderr:\n  the cause\n  line 1\n" in text
    assert "\n  [... 22 lines omitted]\n" in text
    assert text.endswith("\n  line 40\n  the end")


async def test_a_hint_after_several_lines_of_stderr_is_a_line_of_its_own(make_hub: MakeHub, tmp_path: Path) -> None:
    with pytest.raises(MultiMCPError) as caught:
        await make_hub({"a": runner(tmp_path, "echo ENOTEMPTY >&2; echo bye >&2; exit 1")}).tools()
    assert "\n  bye\nthe cache of npx seems to be damaged" in str(caught.value)


async def test_the_reasons_of_several_servers_are_separate_lines_if_they_have_several(
    make_hub: MakeHub, tmp_path: Path
) -> None:
    loud = runner(tmp_path, "echo one >&2; echo two >&2; exit 1", name="server")
    with pytest.raises(MultiMCPError) as caught:
        await make_hub({"a": loud, "b": {"command": "/nowhere/server"}}).tools()
    # The server that fails last is named last.
    first, last = caught.value.errors
    assert str(caught.value).startswith(f"MCP servers failed: {first}: MCP server ")
    assert f"\n{last}: MCP server {last!r} could not be started" in str(caught.value)
