"""The bridge as a process: driven by the official client, and byte by byte as any host might."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import mcp
import pytest
from mcp.client.stdio import stdio_client

from lmbridge import MCPConnectionError, MultiMCPError
from lmbridge._version import __version__
from lmbridge.mcp import sdk
from lmbridge.testing import Exchange, ScriptedServer, answer, stall
from tests.mcp.bridge.support import (
    INITIALIZE,
    NO_SERVER_URL,
    TOOL_NAMES,
    StartBridge,
    WriteConfig,
    call_request,
    cancel_notification,
    official_session,
    tool_call,
    wire_form,
)
from tests.mcp.conftest import MakeHub
from tests.mcp.support import scripted, wait_for_notes, wait_until_gone
from tests.support import HALF

# Driven by the official client


async def test_the_official_client_lists_and_calls_the_tools(scripted_server: ScriptedServer, tmp_path: Path) -> None:
    failure: type[Exception] = getattr(mcp, "MCPError", None) or mcp.McpError  # type: ignore[attr-defined]  # of 1.x
    progress: list[tuple[float, str | None]] = []

    async def on_progress(done: float, _total: float | None, message: str | None) -> None:
        progress.append((done, message))

    scripted_server.script(answer("Hello there."))
    async with official_session(scripted_server.api_base, tmp_path, DEFAULT_MODEL="gemma-3-4b") as (session, started):
        assert started["serverInfo"]["name"] == sdk.LMBRIDGE_NAME == "lmbridge"
        assert started["serverInfo"]["version"] == __version__
        assert started["instructions"]
        tools = wire_form(await session.list_tools())["tools"]
        assert [tool["name"] for tool in tools] == TOOL_NAMES
        assert all(tool["inputSchema"]["type"] == "object" for tool in tools)
        assert tools[0]["annotations"]["readOnlyHint"]
        asked = {"prompt": "Hi."}
        got = wire_form(await session.call_tool("chat_completion", asked, progress_callback=on_progress))
        assert got["content"] == [{"type": "text", "text": "Hello there."}]
        assert got["structuredContent"]["model"] == "gemma-3-4b"
        assert not got["isError"]
        wrong = wire_form(await session.call_tool("chat_completion", {"prompt": {}}))
        assert wrong["isError"]
        assert "expected `str | null`" in wrong["content"][0]["text"]
        with pytest.raises(failure, match=r"Unknown tool: chat\. The tools are: health_check") as error:
            await session.call_tool("chat", {})
        details: Any = getattr(error.value, "error", error.value)
        assert details.code == -32602
    assert progress[0] == (1, "started")
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})


@pytest.mark.slow
async def test_calls_run_concurrently(scripted_server: ScriptedServer, tmp_path: Path) -> None:
    all_arrived = asyncio.Event()

    async def answer_when_all_arrived(exchange: Exchange) -> None:
        if scripted_server.in_flight == 3:
            all_arrived.set()
        await all_arrived.wait()
        await answer("Hello.")(exchange)

    scripted_server.default = answer_when_all_arrived
    async with official_session(scripted_server.api_base, tmp_path) as (session, _):
        calls = (session.call_tool("chat_completion", {"prompt": str(each)}) for each in range(3))
        got = await asyncio.gather(*calls)
    assert [wire_form(each)["content"][0]["text"] for each in got] == ["Hello."] * 3


@pytest.mark.slow
async def test_the_newest_protocol_version_supports_progress_and_cancellation(
    scripted_server: ScriptedServer, tmp_path: Path
) -> None:
    if not sdk.is_v2():
        pytest.skip("SDK 1.x does not support this protocol version")
    env = {"LMBRIDGE_API_BASE": scripted_server.api_base, "HOME": str(tmp_path)}
    parameters = mcp.StdioServerParameters(command=sys.executable, args=["-m", "lmbridge.mcp"], env=env)
    reported = asyncio.Event()

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        reported.set()

    scripted_server.script(stall([*HALF]))
    async with mcp.Client(stdio_client(parameters), mode="2026-07-28") as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == TOOL_NAMES
        call = asyncio.create_task(
            client.call_tool("chat_completion", {"prompt": "Hi."}, progress_callback=on_progress)
        )
        await reported.wait()
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
        call.cancel()
        await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 1)
        await asyncio.wait({call})
        assert not (await client.call_tool("chat_completion", {"prompt": "Hi."})).is_error


# Driven byte by byte


@pytest.mark.slow
async def test_any_value_is_accepted_as_a_progress_token(start: StartBridge) -> None:
    host = await start()
    tokens: list[int | str] = [0, "", "a"]
    for number, token in enumerate(tokens, 1):
        params = {"name": "list_models", "_meta": {"progressToken": token}}
        host.send({"id": number, "method": "tools/call", "params": params})
        assert (await host.receive())["params"]["progressToken"] == token
        assert (await host.receive())["id"] == number


async def test_a_cancelled_call_stops_the_generation(start: StartBridge, scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall([*HALF]))
    host = await start()
    host.call(1, "chat_completion", prompt="Hi.")
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
    host.send(cancel_notification(1))
    await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 1)
    host.send({"id": 2, "method": "ping"})
    while (message := await host.receive())["id"] != 2:
        # SDK 1.x answers a cancelled call with an error; 2.x does not answer it.
        assert "error" in message
    host.stdin.close()
    assert await host.end() == (0, "", b"")


@pytest.mark.slow
async def test_cancelling_a_run_cancels_its_calls_of_mcp_servers(
    start: StartBridge, scripted_server: ScriptedServer, config: WriteConfig, notes: Path
) -> None:
    entry = scripted({"tools": ["sleep"], "noted": ["sleep"], "notes": str(notes)})
    host = await start(MCP_JSON_PATH=str(config({"slow": entry})))
    scripted_server.script(answer("", tool_calls=[tool_call("sleep")]), answer("Hello again."))
    host.call(1, "autonomous_with_mcp", mcp_name="slow", task="Sleep.")
    await wait_for_notes(notes)
    host.send(cancel_notification(1))
    assert (await wait_for_notes(notes, 2))[1].startswith("cancelled")
    host.call(2, "autonomous_with_mcp", mcp_name="slow", task="Say hello.")
    while (message := await host.receive())["id"] != 2:
        # See test_a_cancelled_call_stops_the_generation.
        assert "error" in message
    assert message["result"]["content"][0]["text"] == "Hello again."
    host.stdin.close()
    assert await host.end() == (0, "", b"")


@pytest.mark.slow
async def test_a_call_that_is_cancelled_at_once_sends_nothing(
    start: StartBridge, scripted_server: ScriptedServer
) -> None:
    host = await start()
    host.send(call_request(1, "chat_completion", prompt="Hi."), cancel_notification(1), {"id": 2, "method": "ping"})
    while (await host.receive())["id"] != 2:
        pass
    host.stdin.close()
    assert await host.end() == (0, "", b"")
    assert all(request.path != "/v1/chat/completions" for request in scripted_server.requests)


@pytest.mark.parametrize("ending", ["stdin", "SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
async def test_the_process_ends_at_once_with_calls_in_flight(
    start: StartBridge, scripted_server: ScriptedServer, config: WriteConfig, notes: Path, ending: str
) -> None:
    entry = scripted({"tools": ["sleep"], "noted": ["sleep"], "notes": str(notes)})
    host = await start("-m", "lmbridge.mcp", "--eof-timeout", "0", MCP_JSON_PATH=str(config({"slow": entry})))
    scripted_server.script(answer("", tool_calls=[tool_call("sleep")]), stall([*HALF]))
    host.call(1, "autonomous_with_mcp", mcp_name="slow", task="Sleep.")
    await wait_for_notes(notes)
    host.call(2, "chat_completion", prompt="Hi.")
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
    groups = await asyncio.to_thread(groups_of_children, host.process.pid)
    assert groups
    if ending == "stdin":
        host.stdin.close()
    else:
        host.process.send_signal(getattr(signal, ending))
    status, errors, output = await host.end()
    assert (status, errors) == (0, "")
    if ending == "stdin":
        # SDK 1.x may still send its own answer to a call that it cancels.
        answered = {each["id"]: each for each in map(json.loads, output.splitlines())}
        assert all("stdin was closed" in answered[each]["error"]["message"] for each in (1, 2))
    await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 1)
    for group in groups:
        await wait_until_gone(group)


def groups_of_children(pid: int) -> list[int]:
    """Returns the process groups that a process has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [group for each in children if (group := os.getpgid(int(each))) != os.getpgid(pid)]


# Requests that are piped to the process, followed by the end of the input


async def test_piped_requests_are_answered_before_the_process_exits(
    start: StartBridge, scripted_server: ScriptedServer
) -> None:
    scripted_server.default = answer("Hello.")
    host = await start(initialise=False)
    host.send(
        INITIALIZE,
        {"method": "notifications/initialized"},
        {"id": "list", "method": "tools/list"},
        call_request(1, "chat_completion", prompt="Hi."),
        call_request(2, "chat_completion", prompt="Hi again."),
    )
    host.stdin.close()
    status, errors, output = await host.end()
    assert (status, errors) == (0, "")
    replies = {each["id"]: each["result"] for each in map(json.loads, output.splitlines())}
    assert {*replies} == {0, "list", 1, 2}
    assert len(replies["list"]["tools"]) == len(TOOL_NAMES)
    assert [replies[each]["content"][0]["text"] for each in (1, 2)] == ["Hello."] * 2


@pytest.mark.slow
async def test_a_long_call_is_answered_after_the_end_of_the_input(
    start: StartBridge, scripted_server: ScriptedServer
) -> None:
    has_ended = asyncio.Event()

    async def answer_after_the_end(exchange: Exchange) -> None:
        await has_ended.wait()
        await answer("Hello.")(exchange)

    scripted_server.default = answer_after_the_end
    host = await start()
    host.call(1, "chat_completion", prompt="Hi.")
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
    host.stdin.close()
    has_ended.set()
    assert (await host.receive())["result"]["content"][0]["text"] == "Hello."
    assert await host.end() == (0, "", b"")


@pytest.mark.slow
async def test_nobody_waits_for_answers_that_nobody_reads(start: StartBridge, scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall([*HALF]))
    host = await start("-m", "lmbridge.mcp", "--eof-timeout", "1000")
    host.call(1, "chat_completion", prompt="Hi.")
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
    host.stdin.close()
    host.process._transport.get_pipe_transport(1).close()
    assert await host.process.wait() == 0


PRINTING_BRIDGE = """
import os
from lmbridge import LLMClient
from lmbridge.mcp.__main__ import main

async def list_models(self):
    print("noise", flush=True)
    os.write(1, b"noise")
    os.system("echo noise")
    assert os.read(0, 1) == b""
    raise ZeroDivisionError("a bug")

LLMClient.list_models = list_models
main([])
"""


async def test_stdout_carries_only_messages(start: StartBridge) -> None:
    host = await start("-c", PRINTING_BRIDGE)
    host.call(1, "list_models")
    got = await host.receive()
    assert got["result"]["content"][0]["text"] == "list_models failed: ZeroDivisionError: a bug"
    host.stdin.close()
    status, errors, output = await host.end()
    assert (status, output) == (0, b"")
    assert errors.count("noise") == 3
    assert "Traceback" in errors


@pytest.mark.slow
async def test_lines_that_are_not_messages_are_skipped_and_logged_once(start: StartBridge) -> None:
    host = await start()
    host.stdin.write(b"hello?\n\xff\xfe\n[]\n{}\n" + b'{"jsonrpc": "2.0", "id": 5}\n')
    host.send({"id": 6, "method": "ping"})
    assert (await host.receive())["id"] == 6
    host.stdin.write(b"hello again?\n")
    host.send({"id": 7, "method": "ping"})
    assert (await host.receive())["id"] == 7
    host.stdin.close()
    warning = (
        "WARNING lmbridge.mcp: skipped a line from the host that is not a JSON-RPC message "
        "(later ones are not logged): b'hello?'\n"
    )
    assert await host.end() == (0, warning, b"")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{"method": "ping", "params": []}, {"method": 5}, {"method": "ping", "jsonrpc": "1"}])
async def test_an_invalid_request_is_answered_with_an_error(start: StartBridge, wrong: dict[str, Any]) -> None:
    host = await start()
    host.send({"id": "a", **wrong}, {"id": 2, "method": "ping"})
    refused = await host.receive()
    assert (refused["id"], refused["error"]["code"]) == ("a", -32600)
    assert (await host.receive())["id"] == 2
    host.send({"id": True, **wrong}, {"id": None, **wrong}, wrong, {"id": 3, "method": "ping"})
    assert (await host.receive())["id"] == 3


@pytest.mark.slow
async def test_each_request_of_a_batch_is_answered(start: StartBridge) -> None:
    host = await start()
    host.stdin.write(json.dumps([{"jsonrpc": "2.0", "id": each, "method": "ping"} for each in (1, 2)]).encode() + b"\n")
    assert {(await host.receive())["id"] for _ in range(2)} == {1, 2}


BRIDGE_WITH_SMALL_MESSAGES = """
from lmbridge.mcp import jsonrpc
from lmbridge.mcp.__main__ import main

jsonrpc.MessageReader.__init__.__defaults__ = (1000,)
main([])
"""


@pytest.mark.slow
async def test_a_message_that_is_too_large_ends_the_process_with_one_line(start: StartBridge) -> None:
    host = await start("-c", BRIDGE_WITH_SMALL_MESSAGES)
    host.stdin.write(b"x" * 2000)
    status, errors, output = await host.end()
    assert (status, output) == (1, b"")
    assert errors == "lmbridge-mcp: the connection to the host was closed: it sent a message of more than 1,000 bytes\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "env", "status", "expected"),
    [
        (("-m", "lmbridge.mcp"), {"LMBRIDGE_API_BASE": "ftp://x"}, 2, "api_base 'ftp://x' is not an http or https URL"),
        (
            ("-c", "import sys; sys.modules['mcp'] = None; from lmbridge.mcp.__main__ import main; main([])"),
            {},
            1,
            "the bridge needs the official MCP SDK: pip install 'lmbridge[mcp]'",
        ),
    ],
)
async def test_an_error_at_the_start_is_one_line(
    start: StartBridge, args: tuple[str, ...], env: dict[str, str], status: int, expected: str
) -> None:
    host = await start(*args, initialise=False, **env)
    ended_with, errors, output = await host.end()
    assert (ended_with, output) == (status, b"")
    assert errors.startswith(f"lmbridge-mcp: {expected}")
    assert len(errors.splitlines()) == 1


BROKEN_BRIDGE = """
import sys
from lmbridge.mcp import __main__

def check_sdk():
    raise ZeroDivisionError("a bug\\n\\x1b[2J")

__main__._check_sdk = check_sdk
__main__.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--http", "--port", "0")])
async def test_a_traceback_is_shown_only_with_debug(start: StartBridge, arguments: tuple[str, ...]) -> None:
    status, errors, _ = await (await start("-c", BROKEN_BRIDGE, *arguments, initialise=False)).end()
    what = "lmbridge-mcp: unexpected ZeroDivisionError: a bug ␛[2J"
    assert (status, errors) == (1, f"{what}; run it again with --debug for the traceback\n")
    status, errors, _ = await (await start("-c", BROKEN_BRIDGE, *arguments, "--debug", initialise=False)).end()
    assert status == 1
    assert "Traceback" in errors
    assert "\x1b" not in errors
    assert errors.endswith(f"{what}\n")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-"])
async def test_without_stdin_or_stdout_the_process_ends_with_one_line(start: StartBridge, closed: str) -> None:
    program = f'import os; os.execlp("sh", "sh", "-c", "exec {sys.executable} -m lmbridge.mcp {closed}")'
    status, errors, output = await (await start("-c", program, initialise=False)).end()
    assert (status, output) == (1, b"")
    assert errors == (
        "lmbridge-mcp: stdin or stdout is closed; an MCP host should start this program with a pipe for each\n"
    )


@pytest.mark.slow
async def test_command_line_options_override_the_environment(
    start: StartBridge, scripted_server: ScriptedServer
) -> None:
    options = ("--api-base", scripted_server.api_base, "--model", "qwen3-4b")
    host = await start("-m", "lmbridge.mcp", *options, LMBRIDGE_API_BASE=NO_SERVER_URL, DEFAULT_MODEL="other")
    host.call(1, "chat_completion", prompt="Hi.")
    got = await host.receive()
    assert got["result"]["structuredContent"]["model"] == "qwen3-4b"
    version = await start("-m", "lmbridge.mcp", "--version", initialise=False)
    assert await version.end() == (0, "", f"lmbridge {__version__}\n".encode())


@pytest.mark.slow
async def test_our_own_hub_refuses_the_bridge_under_any_name(make_hub: MakeHub) -> None:
    disguised = "from lmbridge.mcp.__main__ import main; main([])"
    hub = make_hub({"stranger": {"command": sys.executable, "args": ["-c", disguised]}})
    with pytest.raises(MultiMCPError) as failed:
        await hub.tools(["stranger"])
    assert isinstance(failed.value.errors["stranger"], MCPConnectionError)
    assert "it is lmbridge itself" in str(failed.value)
