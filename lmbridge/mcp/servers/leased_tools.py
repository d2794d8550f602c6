"""`McpTools`: the tools of some servers, leased for a run. In the run, `lmbridge.agent.tool_names` chooses their names.

A tool that a run has been offered does not change during the run. Otherwise a server could replace a definition in the
middle of a run, after a person or a program has reviewed it. New tools are added, because a server may reveal them as a
result of a call, such as a login, and the run then cannot go on without them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lmbridge._copying import NotCopyable
from lmbridge.agent.definition_budget import definition_tokens
from lmbridge.agent.tools import Tool
from lmbridge.errors import MCPError
from lmbridge.mcp.servers.definitions import LeftOutTool, fit_budget, make_tools
from lmbridge.mcp.servers.managed_server import ManagedServer

logger: logging.Logger = logging.getLogger("lmbridge.mcp")


async def lease_tools(
    servers: Sequence[ManagedServer],
    definitions: Mapping[str, list[Any]],
    errors: Mapping[str, MCPError],
    *,
    call_timeout: float | None,
    max_definition_tokens: int | None,
) -> McpTools:
    """Returns the tools of some servers, all of which the caller has acquired.

    Args:
        servers: The servers.
        definitions: The definitions of the tools of those servers that could be started, by the names of the servers.
        errors: The errors of the servers that could not be started, by the names of the servers.
        call_timeout: Seconds that a call may take if the configuration does not say.
        max_definition_tokens: About how many tokens the definitions may take.
    """
    lease = McpTools(servers, errors, call_timeout=call_timeout, max_definition_tokens=max_definition_tokens)
    started = [(each, definitions[each.spec.name]) for each in servers if each.spec.name in definitions]
    await lease._add(started)  # noqa: SLF001 - a constructor cannot wait
    return lease


class McpTools(NotCopyable):
    """The tools of some servers, leased for a run until `release()`.

    `McpHub.tools` returns it. It is a provider of tools, so it can be passed to an agent as one of its `tools`.

    Attributes:
        tools: The tools. The definition of a tool stays the same; tools that a server announces later are added.
        errors: The errors of the servers that could not be started and whose tools are therefore missing. The keys are
            the names of the servers.
        left_out: The tools that are not offered, because their definition is not valid or exceeds the budget.
    """

    _instead_of_a_copy = "pass the lease itself on, and create a hub in each process"

    def __init__(
        self,
        servers: Sequence[ManagedServer],
        errors: Mapping[str, MCPError],
        *,
        call_timeout: float | None = None,
        max_definition_tokens: int | None = None,
    ) -> None:
        self.tools: list[Tool] = []
        self.left_out: list[LeftOutTool] = []
        order = [*(server.spec.name for server in servers), *errors]
        self.errors: dict[str, MCPError] = {name: errors[name] for name in order if name in errors}
        self._servers = list(servers)
        self._definitions: dict[str, list[Any]] = {}
        self._call_timeout, self._budget = call_timeout, max_definition_tokens
        self._announced: list[Tool] = []

    def __repr__(self) -> str:
        names = [tool.name for tool in self.tools]
        return f"McpTools(tools={names}, errors={self.errors!r}, left_out={self.left_out!r})"

    async def list_tools(self) -> list[Tool]:
        """Returns the tools."""
        return self.tools

    async def new_tools(self) -> list[Tool]:
        """Returns all tools that servers have announced since the lease began, which are also added to `tools`.

        An agent calls this method before each round. A server is asked only if it has announced other tools.
        """
        # The list is copied, because the lease may be released meanwhile.
        servers = list(self._servers)
        newer = await asyncio.gather(
            *(server.newer_definitions(self._definitions.get(server.spec.name)) for server in servers)
        )
        changed = [(server, each) for server, each in zip(servers, newer, strict=True) if each is not None]
        added = await self._add(changed)
        # Several runs may share the lease, so each call returns all announced tools, and not only those that are new
        # since the last call.
        self._announced += added
        return list(self._announced)

    def release(self) -> None:
        """Ends the lease, so that idle servers can be closed. A second call does nothing."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.release()

    async def _add(self, changed: Sequence[tuple[ManagedServer, list[Any]]]) -> list[Tool]:
        """Adds those tools that are new and fit into the budget, and returns them.

        Args:
            changed: The servers that have other definitions than before, each with all of its definitions.
        """
        left_out: list[LeftOutTool] = []
        found: list[Tool] = []
        for server, definitions in changed:
            found += await make_tools(server, definitions, self._call_timeout, left_out)
        # If the caller is cancelled before this point, nothing has been changed, and the next call finds the new tools.
        # There is no `await` from here on, so two runs that share the lease cannot add the same tool twice.
        self._definitions |= {server.spec.name: definitions for server, definitions in changed}
        known = {(tool.server, tool.name) for tool in self.tools}
        added = fit_budget([tool for tool in found if (tool.server, tool.name) not in known], self._budget, left_out)
        if self._budget is not None:
            self._budget -= sum(map(definition_tokens, added))
        named = {(each.server, each.tool) for each in self.left_out}
        for each in left_out:
            if (each.server, each.tool) not in named:
                logger.warning("MCP server %r: tool %r is left out: %s", each.server, each.tool, each.reason)
                self.left_out.append(each)
        self.tools += added
        return added
