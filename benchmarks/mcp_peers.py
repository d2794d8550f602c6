"""The two ways to a tool of an MCP server that are compared: the official SDK's own, and ours."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from mcp import Client, StdioServerParameters, stdio_client

from benchmarks.peers import About
from benchmarks.processes import ROOT
from lmbridge.agent.calling import call_tool
from lmbridge.agent.tools import ToolContext
from lmbridge.mcp import McpHub
from lmbridge.transport.deadline import DeadlineTimer

_NPM: Final = ROOT / "tests" / "mcp" / "npm" / "node_modules"
SERVERS: Final[Mapping[str, Sequence[str]]] = {
    "stub": (sys.executable, "-m", "benchmarks.mcp_stub"),
    "time": (sys.executable, "-m", "mcp_server_time", "--local-timezone", "UTC"),
    "everything": ("node", str(_NPM / "@modelcontextprotocol" / "server-everything" / "dist" / "index.js"), "stdio"),
}
"""Commands of servers."""
WAYS: Final[Mapping[str, About]] = {
    "sdk": About("the official SDK", "", "mcp", ("mcp", "pydantic", "anyio")),
    "again": About("the SDK again", "", "mcp", ("mcp",)),
    "lmbridge": About("lmbridge", "", "lmbridge", ("lmbridge", "msgspec")),
    "agent": About("lmbridge, as an agent calls", "", "lmbridge", ("lmbridge",)),
}


class Way(Protocol):
    """A way to a tool."""

    async def call(self, tool: str, arguments: dict[str, Any]) -> str:
        """The text of a call's result."""
        ...


class _Sdk:
    """A client of the official SDK, as its documentation shows it."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def call(self, tool: str, arguments: dict[str, Any]) -> str:
        result = await self._client.call_tool(tool, arguments)
        text: str = result.content[0].text
        return text


class _Hub:
    """A tool of our hub, called by itself."""

    def __init__(self, lease: Any) -> None:
        self._functions = {tool.name: tool.function for tool in lease.tools}

    async def call(self, tool: str, arguments: dict[str, Any]) -> str:
        text: str = await self._functions[tool](**arguments)
        return text


class _Agent:
    """A tool of our hub, called as an agent's loop does: its arguments are checked, its time and output bounded."""

    def __init__(self, lease: Any) -> None:
        self._tools = {tool.name: (tool, tool.convert) for tool in lease.tools}
        self._context = ToolContext("run", "call", "tool", lambda: False)
        self._deadline_timer = DeadlineTimer(asyncio.get_running_loop())

    async def call(self, tool: str, arguments: dict[str, Any]) -> str:
        found, convert = self._tools[tool]
        outcome = await call_tool(
            found,
            convert(arguments),
            self._context,
            timeout=60.0,
            max_output=10**6,
            deadline_timer=self._deadline_timer,
        )
        return outcome.text


async def open_way(name: str, server: str) -> Way:
    """A way to the tools of a server of its own, open until the process ends."""
    opened: asyncio.Future[Way] = asyncio.get_running_loop().create_future()
    owner = (_own_sdk if name in ("sdk", "again") else _own_hub)(name, server, opened)
    _owners.append(task := asyncio.create_task(owner))
    await asyncio.wait({task, opened}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    return opened.result()


_owners: Final[list[asyncio.Task[None]]] = []
"""The tasks that hold sessions open."""


async def _own_sdk(_: str, server: str, opened: asyncio.Future[Way]) -> None:
    command, *args = SERVERS[server]
    parameters = StdioServerParameters(command=command, args=args, cwd=ROOT)
    async with Client(stdio_client(parameters), mode="legacy") as client:
        await client.list_tools()
        opened.set_result(_Sdk(client))
        await asyncio.get_running_loop().create_future()


async def _own_hub(name: str, server: str, opened: asyncio.Future[Way]) -> None:
    command, *args = SERVERS[server]
    config = Path(tempfile.mkdtemp()) / "mcp.json"
    entry = {"command": command, "args": args, "cwd": str(ROOT)}
    config.write_text(json.dumps({"mcpServers": {server: entry}}))
    lease = await McpHub(config).tools(call_timeout=60.0)
    make: Callable[[Any], Way] = _Agent if name == "agent" else _Hub
    opened.set_result(make(lease))
