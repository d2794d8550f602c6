"""Real MCP servers from PyPI and npm: their tools and calls work, and the failure of one does not affect the others."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import ToolContext, ToolError
from lmbridge.agent.toolset import ReadyCall, Toolset
from lmbridge.mcp import McpEvent, ToolProgress
from lmbridge.mcp.servers import guardian
from tests.mcp.conftest import MakeHub
from tests.mcp.servers.test_process_groups import HOST
from tests.mcp.support import Recorder, function_of, names, scripted, wait_until_gone
from tests.support import turns

pytestmark = [pytest.mark.real, pytest.mark.slow]

NPM = Path(__file__).parent.parent / "mcp" / "npm"
EVERYTHING = NPM / "node_modules/@modelcontextprotocol/server-everything/dist/index.js"


def python_server(module: str, *args: str) -> dict[str, Any]:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module.replace('_', '-')}, of the dependency group dev")
    return {"command": sys.executable, "args": ["-m", module, *args]}


def npm_server(name: str, *args: str, **env: str) -> dict[str, Any]:
    program = NPM / "node_modules" / ".bin" / f"mcp-server-{name}"
    if shutil.which("node") is None or not program.exists():
        pytest.skip("needs node, and `npm ci --prefix tests/mcp/npm`")
    return {"command": str(program), "args": list(args), "env": env}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a git repository with one file."""
    folder = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    (folder / "notes.txt").write_text("text of the file\n")
    return folder


@pytest.fixture
def servers(folder: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Returns the entries of five servers, two in Python and three in JavaScript."""
    return {
        "time": python_server("mcp_server_time", "--local-timezone", "UTC"),
        "git": python_server("mcp_server_git"),
        "everything": npm_server("everything", "stdio"),
        "filesystem": npm_server("filesystem", str(folder)),
        "memory": npm_server("memory", MEMORY_FILE_PATH=str(tmp_path / "memory.json")),
    }


async def test_every_tool_of_every_server_is_usable(make_hub: MakeHub, servers: Any) -> None:
    lease = await make_hub(servers).tools()
    toolset = await Toolset.collect([lease])
    counts = {server: sum(each.server == server for each in lease.tools) for server in servers}
    assert counts["git"] >= 12
    assert counts["filesystem"] >= 14
    assert counts["memory"] >= 9
    assert counts["everything"] >= 12
    assert counts["time"] == 2
    assert [each.reason for each in lease.left_out] == ["it can only be called as a task, which is not supported"]
    assert len(toolset.definitions) == len(lease.tools)
    assert all(each["function"]["parameters"]["type"] == "object" for each in toolset.definitions)


async def test_calls_of_every_server_work(make_hub: MakeHub, servers: Any, folder: Path) -> None:
    lease = await make_hub(servers).tools()
    toolset = await Toolset.collect([lease])

    async def call(name: str, **arguments: Any) -> str:
        ready = toolset.read({"id": "1", "function": {"name": name, "arguments": json.dumps(arguments)}})
        assert isinstance(ready, ReadyCall), ready
        context = ToolContext("run", "1", name, lambda: False)
        outcome = await toolset.call(ready, context, timeout=30, max_output=10_000)
        assert not outcome.is_error, outcome.text
        return outcome.text

    assert '"timezone": "Europe/Berlin"' in await call("get_current_time", timezone="Europe/Berlin")
    assert "notes.txt" in await call("git_status", repo_path=str(folder))
    assert await call("echo", message="hello") == "Echo: hello"
    assert "5" in await call("get_sum", a="2", b=3)
    assert "[image image/png, " in await call("get_tiny_image")
    assert await call("read_text_file", path=str(folder / "notes.txt")) == "text of the file\n"
    entity = {"name": "lmbridge", "entityType": "package", "observations": ["is here"]}
    await call("create_entities", entities=[entity])
    assert "is here" in await call("read_graph")


async def test_errors_contain_the_text_of_the_server(make_hub: MakeHub, servers: Any) -> None:
    lease = await make_hub(servers).tools(["time", "filesystem"])
    with pytest.raises(ToolError, match=r"(?i)invalid timezone"):
        await function_of(lease, "get_current_time")(timezone="Nowhere/Land")
    with pytest.raises(ToolError, match=r"(?i)access denied"):
        await function_of(lease, "read_text_file")(path="/etc/passwd")


async def test_destructive_hints_are_available_as_annotations(make_hub: MakeHub, servers: Any) -> None:
    lease = await make_hub(servers).tools(["filesystem", "git"])
    hints = {each.name: each.annotations["destructiveHint"] for each in lease.tools}
    assert hints["write_file"]
    assert hints["git_reset"]
    assert not hints["read_text_file"]
    assert not hints["git_status"]


async def test_servers_that_fail_in_several_ways_leave_the_others_usable(make_hub: MakeHub, servers: Any) -> None:
    faults = {
        "missing": {"command": "no-such-server"},
        "hanging": {**scripted({"hang": True}), "lmbridge": {"connectTimeout": 1}},
        "dying": scripted({"exit": 1}),
        "noisy": scripted({"garbage": True, "tools": ["parts"]}),
    }
    hub = make_hub({**faults, **servers})
    lease = await hub.tools(on_error="continue")
    assert set(lease.errors) == {"missing", "hanging", "dying"}
    assert await function_of(lease, "parts", "noisy")() == "one\ntwo"
    assert "Echo: x" in await function_of(lease, "echo")(message="x")


async def test_a_server_that_is_killed_in_a_call_restarts_and_the_others_go_on(make_hub: MakeHub, servers: Any) -> None:
    recorder: Recorder[McpEvent] = Recorder()
    hub = make_hub({name: servers[name] for name in ("everything", "time")}, on_event=recorder)
    lease = await hub.tools()
    long = asyncio.create_task(function_of(lease, "trigger-long-running-operation")(duration=1, steps=10))
    await recorder.wait_for(lambda event: isinstance(event, ToolProgress))
    pid = hub.status()["everything"].pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    assert "UTC" in await function_of(lease, "get_current_time")(timezone="UTC")
    # The tool is declared idempotent, so the call was repeated.
    assert "completed" in await long
    assert await function_of(lease, "echo")(message="back") == "Echo: back"
    assert {name: status.starts for name, status in hub.status().items()} == {"everything": 2, "time": 1}


async def test_a_call_that_is_not_idempotent_is_not_repeated_when_its_server_is_killed(
    make_hub: MakeHub, servers: Any, folder: Path
) -> None:
    hub = make_hub({"git": servers["git"]})
    lease = await hub.tools()
    pid = hub.status()["git"].pid
    assert pid
    # A stopped server cannot answer before it is killed.
    os.kill(pid, signal.SIGSTOP)
    call = asyncio.create_task(function_of(lease, "git_commit")(repo_path=str(folder), message="once"))
    await turns(10)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ToolError, match="may or may not have run"):
        await call
    assert "Untracked" in await function_of(lease, "git_status")(repo_path=str(folder))
    assert hub.status()["git"].starts == 2


async def test_a_call_that_times_out_leaves_its_session_usable(make_hub: MakeHub, servers: Any) -> None:
    hub = make_hub({"everything": servers["everything"]})
    lease = await hub.tools(call_timeout=2)
    with pytest.raises(ToolError, match=r"did not answer within 2 seconds"):
        await function_of(lease, "trigger-long-running-operation")(duration=60, steps=1)
    assert await function_of(lease, "echo")(message="on") == "Echo: on"
    assert hub.status()["everything"].starts == 1


async def test_output_of_a_launcher_before_the_server_starts_is_skipped(make_hub: MakeHub, servers: Any) -> None:
    command = servers["everything"]["command"]
    script = f"echo 'Starting...'; echo '{{half of a'; printf 'no end of line '; exec {command} stdio"
    lease = await make_hub({"a": {"command": "sh", "args": ["-c", script]}}).tools()
    assert await function_of(lease, "echo")(message="on") == "Echo: on"


async def test_a_missing_package_is_reported_in_the_words_of_its_launcher(make_hub: MakeHub, servers: Any) -> None:
    missing = {
        "npm": {"command": "npx", "args": ["--no-install", "no-such-mcp-server"], "cwd": str(NPM)},
        "pypi": {"command": sys.executable, "args": ["-m", "no_such_mcp_server"]},
    }
    lease = await make_hub({**missing, "time": servers["time"]}).tools(on_error="continue")
    assert {each.server for each in lease.tools} == {"time"}
    assert "no-such-mcp-server" in str(lease.errors["npm"])
    assert "No module named no_such_mcp_server" in str(lease.errors["pypi"])


async def test_a_cancelled_call_leaves_the_session_usable(make_hub: MakeHub, servers: Any) -> None:
    recorder: Recorder[McpEvent] = Recorder()
    hub = make_hub({"everything": servers["everything"]}, on_event=recorder)
    lease = await hub.tools()
    long = asyncio.create_task(function_of(lease, "trigger-long-running-operation")(duration=60, steps=600))
    await recorder.wait_for(lambda event: isinstance(event, ToolProgress))
    long.cancel()
    await asyncio.wait([long])
    assert long.cancelled()
    assert await function_of(lease, "echo")(message="on") == "Echo: on"
    assert hub.status()["everything"].starts == 1


async def test_a_hundred_runs_share_one_process_for_each_server(make_hub: MakeHub, servers: Any) -> None:
    hub = make_hub(servers)

    async def run(number: int) -> str:
        lease = await hub.tools()
        try:
            return str(await function_of(lease, "echo")(message=str(number)))
        finally:
            lease.release()

    assert await asyncio.gather(*map(run, range(100))) == [f"Echo: {number}" for number in range(100)]
    assert [status.starts for status in hub.status().values()] == [1] * len(servers)


async def test_all_processes_of_npx_are_gone_when_close_returns(make_hub: MakeHub, servers: Any) -> None:
    # The fixture has skipped the test if a server is not installed; its entries are not needed.
    del servers
    hub = make_hub(
        {"a": {"command": "npx", "args": ["--no-install", "mcp-server-everything", "stdio"], "cwd": str(NPM)}}
    )
    lease = await hub.tools()
    assert await function_of(lease, "echo")(message="on") == "Echo: on"
    group = hub.status()["a"].pid
    assert group
    assert await asyncio.to_thread(count_processes, group) > 1
    await hub.close()
    assert await asyncio.to_thread(guardian.is_gone, group)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
async def test_all_processes_of_npx_are_gone_after_the_end_of_their_host(
    servers: Any, tmp_path: Path, number: signal.Signals
) -> None:
    # The fixture has skipped the test if a server is not installed; its entries are not needed.
    del servers
    entry = {"command": "npx", "args": ["--no-install", "mcp-server-everything", "stdio"], "cwd": str(NPM)}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"a": entry}}))
    host = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOST, str(tmp_path / "mcp.json")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    assert host.stdout is not None
    group = int(await host.stdout.readline())
    assert await asyncio.to_thread(count_processes, group) > 1
    host.send_signal(number)
    assert await host.wait() == -number
    await wait_until_gone(group)


def count_processes(group: int) -> int:
    """Returns the number of processes in a process group."""
    return sum(guardian._runs_in_group(each, group) for each in Path("/proc").glob("[0-9]*"))


@pytest_asyncio.fixture(params=["streamableHttp", "sse"])
async def everything_url(request: pytest.FixtureRequest, servers: Any) -> AsyncIterator[str]:
    """Starts server-everything on HTTP, and returns its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {**os.environ, "PORT": str(port)}
    process = await asyncio.create_subprocess_exec(
        "node",
        str(EVERYTHING),
        request.param,
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    async for line in process.stdout:
        if str(port).encode() in line:
            break
    yield f"http://127.0.0.1:{port}/{'sse' if request.param == 'sse' else 'mcp'}"
    process.kill()
    await process.stdout.read()
    await process.wait()


async def test_a_server_on_http_is_usable(make_hub: MakeHub, everything_url: str) -> None:
    recorder: Recorder[McpEvent] = Recorder()
    hub = make_hub({"a": {"url": everything_url}}, on_event=recorder)
    lease = await hub.tools()
    assert "echo" in names(lease.tools)
    assert await function_of(lease, "echo")(message="on") == "Echo: on"
    await function_of(lease, "trigger-long-running-operation")(duration=0.1, steps=2)
    assert await recorder.wait_for(lambda event: isinstance(event, ToolProgress))
    await hub.close()
