"""The tools of MCP servers for a run, and the decision whether a call may be made.

The modules of agents and of MCP are imported when a tool is first used: they take longer than everything else that
`lmbridge chat` imports, and most answers need no tools.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from lmbridge._printable import one_line
from lmbridge.cli.terminal import json_text
from lmbridge.cli.tool_options import ToolOptions

if TYPE_CHECKING:
    from lmbridge.agent.tool_sources import RunInfo, RunTools
    from lmbridge.agent.tools import Tool, ToolCall
    from lmbridge.mcp.servers.hub import McpHub

Ask = Callable[[str], Awaitable[str]]
"""Asks the person a question, and returns the answer."""

ALL_SERVERS: Final = "all"
"""The name that stands for all enabled servers of the configuration."""


class ToolAccess:
    """The MCP servers that the runs of a command use. It is closed at the end of its `async with` block.

    Args:
        options: The servers, and what their tools may do.
        ask: Asks the person. With None, calls that need an approval are refused.
    """

    def __init__(self, options: ToolOptions, ask: Ask | None) -> None:
        self.names: list[str] = list(options.names)
        """The servers whose tools the next run gets."""
        self._options = options
        self._opened_hub: McpHub | None = None
        self._ask = ask
        # The tools whose calls are always made, each as the name of its server and its own name.
        self._always: set[tuple[str | None, str]] = set()

    async def __aenter__(self) -> Self:
        if ALL_SERVERS in self.names:
            self.names = await self.available()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opened_hub is not None:
            await self._opened_hub.close()

    @property
    def _hub(self) -> McpHub:
        if self._opened_hub is None:
            from lmbridge.mcp.servers.hub import McpHub  # noqa: PLC0415 - see the top of the module

            self._opened_hub = McpHub(self._options.config, trust_project=self._options.trust_project)
        return self._opened_hub

    async def available(self) -> list[str]:
        """Returns the names of the enabled servers in the configuration.

        Raises:
            MCPError: The configuration cannot be read.
        """
        return await self._hub.names()

    @asynccontextmanager
    async def open_tools(self, run: RunInfo) -> AsyncIterator[RunTools]:
        """Yields the tools of the servers for one run. The agent gets this method as `open_tools`.

        Raises:
            MCPError: A server is unknown, or cannot be started.
        """
        from lmbridge.agent.tool_sources import RunTools  # noqa: PLC0415 - see the top of the module

        if not self.names:
            yield RunTools()
            return
        limit = None if run.context_length is None else run.context_length // 2
        lease = await self._hub.tools(self.names, max_definition_tokens=limit)
        try:
            yield RunTools(tools=[lease])
        finally:
            lease.release()

    async def approve(self, call: ToolCall) -> bool | str:
        """Returns True if a call may be made, or else the reason why not. The agent gets this method as `approve`."""
        tool = call.tool
        if self._options.approval == "all" or tool is None or not may_change_something(tool):
            return True
        # The name of a call is not enough: in a later turn, it may belong to a tool of another server.
        key = (tool.server, tool.name)
        if key in self._always:
            return True
        if self._options.approval == "none":
            return "the user does not allow calls that may change something"
        if self._ask is None:
            return "the user would have to approve this call, but cannot be asked"
        arguments = one_line(json_text(dict(call.arguments or {})))
        answer = await self._ask(f"Run {one_line(call.name)} {arguments}? [y]es, [n]o, [a]lways: ")
        word = answer.strip().lower()
        if word in ("a", "always"):
            self._always.add(key)
            return True
        return True if word in ("y", "yes") else "the user has refused this call"


def may_change_something(tool: Tool) -> bool:
    """Returns whether calls of a tool need an approval.

    They do, unless a hint of its server says that the tool only reads. The hint `destructiveHint` is not enough: a tool
    that is not destructive may still add something, such as a file or a message that is sent.
    """
    return tool.annotations.get("readOnlyHint") is not True
