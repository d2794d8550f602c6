"""The MCP layer (extra `mcp`): the tools of MCP servers, for agents.

Importing it needs no extra; the first server that is started does.
"""

from lmbridge.mcp.config.files import McpConfig, ServerSpec, load_config
from lmbridge.mcp.dynamic import DynamicAutonomousAgent
from lmbridge.mcp.servers.events import McpEvent, ServerLog, ServerStateChanged, ToolProgress, ToolsChanged
from lmbridge.mcp.servers.hub import McpHub, McpTools
from lmbridge.mcp.servers.managed import ServerState, ServerStatus
from lmbridge.mcp.servers.results import McpText

__all__ = [
    "DynamicAutonomousAgent",
    "McpConfig",
    "McpEvent",
    "McpHub",
    "McpText",
    "McpTools",
    "ServerLog",
    "ServerSpec",
    "ServerState",
    "ServerStateChanged",
    "ServerStatus",
    "ToolProgress",
    "ToolsChanged",
    "load_config",
]
