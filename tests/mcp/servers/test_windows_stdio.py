"""Servers in the SDK's own stdio transport, which is what runs them on Windows. It works on every system."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, NoReturn

import pytest

from lmbridge import MCPConnectionError, MCPError, MultiMCPError, ToolError
from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.sdk import is_v2
from lmbridge.mcp.servers import session_owner
from lmbridge.mcp.servers.server_process import ServerProcess
from lmbridge.mcp.servers.windows_stdio import WindowsStdioLink
from tests.mcp.conftest import MakeHub
from tests.mcp.support import function_of


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[WindowsStdioLink]:
    """The links that are made, as on Windows."""
    made: list[WindowsStdioLink] = []

    def make(spec: ServerSpec, on_end: Any) -> WindowsStdioLink:
        made.append(WindowsStdioLink(spec, on_end))
        return made[-1]

    monkeypatch.setattr(session_owner, "_link_to_process", make)
    return made


async def test_tools_are_called_and_the_server_is_ended(make_hub: MakeHub, links: list[WindowsStdioLink]) -> None:
    hub = make_hub({"a": {"env": {"OWN": "yes"}}})
    lease = await hub.tools()
    assert await function_of(lease, "echo")(text="über") == "über"
    assert '"OWN": "yes"' in await function_of(lease, "env")()
    await hub.close()
    assert await links[0].receive() is None


async def test_the_error_of_a_server_that_ends_at_once_quotes_its_stderr(
    make_hub: MakeHub, links: list[WindowsStdioLink]
) -> None:
    with pytest.raises(MultiMCPError) as caught:
        await make_hub({"a": {"exit": 3}}).tools()
    error = caught.value.errors["a"]
    assert isinstance(error, MCPConnectionError)
    assert "it closed its stdout; its stderr: missing API_KEY" in str(error)
    assert links[0].last_stderr_at is not None


async def test_a_program_that_does_not_exist_is_named(make_hub: MakeHub, links: list[WindowsStdioLink]) -> None:
    with pytest.raises(MultiMCPError, match="'/nowhere/server' was not found"):
        await make_hub({"a": {"command": "/nowhere/server"}}).tools()
    assert len(links) == 1


async def test_a_server_that_dies_during_a_call_is_started_again(
    make_hub: MakeHub, links: list[WindowsStdioLink]
) -> None:
    lease = await make_hub({"a": {}}).tools()
    with pytest.raises(ToolError, match="it closed its stdout"):
        await function_of(lease, "die")()
    assert await function_of(lease, "echo")(text="again") == "again"
    assert len(links) == 2


@pytest.mark.skipif(not is_v2(), reason="SDK 1.x leaves its own ends of the streams unclosed in this case")
async def test_sending_to_a_server_that_has_ended_fails() -> None:
    reasons: list[str] = []
    arguments = ("-c", "import sys; sys.stdin.close(); sys.stdout.close()")
    spec = ServerSpec(name="a", transport="stdio", command=sys.executable, args=arguments)
    link = WindowsStdioLink(spec, reasons.append)
    with pytest.raises(ConnectionError):
        await link.send(b"{}")
    await link.start()
    assert await link.receive() is None
    with pytest.raises(ConnectionError):  # noqa: PT012 - the pipe is closed a moment later
        while True:
            await link.send(b'{"jsonrpc": "2.0", "method": "ping"}')
            await asyncio.sleep(0)
    await link.end()
    assert reasons == ["it closed its stdout"]


async def test_an_event_loop_without_processes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unsupported(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError

    monkeypatch.setattr(asyncio.get_running_loop(), "subprocess_exec", unsupported)
    process = ServerProcess(lambda _: None, lambda _: None)
    with pytest.raises(MCPError, match=r"the event loop \(\w+\) cannot start processes; use the default") as caught:
        await process.start("true", [], {}, None)
    assert isinstance(caught.value.__cause__, NotImplementedError)
