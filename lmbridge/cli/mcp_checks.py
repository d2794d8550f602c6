"""The check of `lmbridge doctor` that finds out whether the MCP servers of the configuration can be started."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from lmbridge._tasks import settle
from lmbridge.cli.findings import Finding
from lmbridge.cli.tool_options import ToolOptions
from lmbridge.errors import MCPError, MultiMCPError

if TYPE_CHECKING:
    from lmbridge.mcp.servers.hub import McpHub

_CONFIGURATION_FIX: Final = "correct the configuration file, or name another one with --mcp-config"
_SERVER_FIX: Final = 'correct its entry in the configuration, or switch it off there with "disabled": true'


async def check_mcp_servers(options: ToolOptions) -> list[Finding]:
    """Starts the enabled servers of the configuration one by one and lists their tools. All are stopped at the end."""
    try:
        from lmbridge.mcp.sdk import load_sdk  # noqa: PLC0415 - the extra may be missing

        await settle(asyncio.to_thread(load_sdk))
    except ImportError as error:
        return [Finding("MCP servers", "skipped", str(error))]
    from lmbridge.mcp.servers.hub import McpHub  # noqa: PLC0415 - as above

    hub = McpHub(options.config, trust_project=options.trust_project)
    try:
        config = await hub.reload()
        names = await hub.names()
        if not names:
            where = f" in {config.path}" if config.path else ""
            return [Finding("MCP servers", "skipped", f"none is configured{where}")]
        return [await _check_server(hub, name) for name in names]
    except MCPError as error:
        return [Finding.of_error("MCP servers", error.message, error.hint, _CONFIGURATION_FIX)]
    finally:
        await hub.close()


async def _check_server(hub: McpHub, name: str) -> Finding:
    try:
        lease = await hub.tools([name])
    except MultiMCPError as failed:
        error = failed.errors[name]
        text, hint = (error.message, error.hint) if isinstance(error, MCPError) else (str(error), None)
        return Finding.of_error(f"MCP: {name}", text, hint, _SERVER_FIX)
    try:
        tools = await lease.list_tools()
    finally:
        lease.release()
    return Finding(f"MCP: {name}", "ok", f"{len(tools)} tool{'' if len(tools) == 1 else 's'}")
