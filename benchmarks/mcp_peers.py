"""The ways to call a tool of an MCP server that are compared: through the official SDK, and through lmbridge."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any, Final, Protocol

from mcp import Client, StdioServerParameters, stdio_client

from benchmarks.mcp_servers import MCP_SERVERS
from benchmarks.processes import ROOT
from lmbridge.agent.tool_execution import call_tool
from lmbridge.agent.tools import ToolContext
from lmbridge.mcp import McpHub

_TIMEOUT: Final = 60.0
_MAX_OUTPUT: Final = 10**6
_session_owners: Final[list[asyncio.Task[None]]] = []
"""The tasks that hold sessions open until the process ends."""


class McpPeer(Protocol):
    """A session with a server."""

    async def call(self, tool: str, arguments: dict[str, Any]) -> str:
        """Calls a tool, and returns the text of its result."""
        ...


class _SdkSession:
    """A client of the official SDK, used as its documentation shows."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def call(self, tool: str, arguments: dict[str, Any]) -> str:
        result = await self._client.call_tool(tool, arguments)
        text: str = result.content[0].text
        return text


class _HubTools:
    """The tools of an `McpHub`, called directly."""

    def __init__(self, lease: Any) -> None:
        self._tools = {tool.name: tool for tool in lease.tools}

    async def call(self, tool: str, arguments: dict[str, Any]) -> str:
        text: str = await self._tools[tool].function(**arguments)
        return text


class _AgentTools:
    """The tools of an `McpHub`, called as the agent loop does, with validation, a time limit and a limit of output."""

    def __init__(self, lease: Any) -> None:
        self._tools = {tool.name: (tool, tool.convert) for tool in lease.tools}
        self._context = ToolContext("run", "call", "tool", lambda: False, _TIMEOUT)

    async def call(self, tool: str, arguments: dict[str, Any]) -> str:
        found, convert = self._tools[tool]
        keywords = convert(arguments)
        outcome = await call_tool(found, keywords, self._context, timeout=_TIMEOUT, max_output=_MAX_OUTPUT)
        return outcome.text


async def open_session(peer: str, server: str) -> McpPeer:
    """Starts a server, and opens a session with it that stays open until the process ends."""
    opened: asyncio.Future[McpPeer] = asyncio.get_running_loop().create_future()
    owner = _own_sdk_session(server, opened) if peer in ("sdk", "sdk-again") else _own_hub(peer, server, opened)
    _session_owners.append(task := asyncio.create_task(owner))
    waited_for: set[asyncio.Future[Any]] = {task, opened}
    await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    return opened.result()


async def _own_sdk_session(server: str, opened: asyncio.Future[McpPeer]) -> None:
    command, *args = MCP_SERVERS[server]
    parameters = StdioServerParameters(command=command, args=args, cwd=ROOT)
    async with Client(stdio_client(parameters), mode="legacy") as client:
        await client.list_tools()
        opened.set_result(_SdkSession(client))
        # The session has to be closed by the task that opened it, so this task never ends.
        await asyncio.get_running_loop().create_future()


async def _own_hub(peer: str, server: str, opened: asyncio.Future[McpPeer]) -> None:
    command, *args = MCP_SERVERS[server]
    config = Path(tempfile.mkdtemp()) / "mcp.json"
    entry = {"command": command, "args": args, "cwd": str(ROOT)}
    config.write_text(json.dumps({"mcpServers": {server: entry}}))
    lease = await McpHub(config).tools(call_timeout=_TIMEOUT)
    opened.set_result(_AgentTools(lease) if peer == "lmbridge-agent" else _HubTools(lease))
