"""MCP servers as tools for agents, and lmbridge as an MCP server for other programs (extra `mcp`).

The folders and modules of this package are layers, and imports go downwards only: `bridge` (lmbridge as a server for a
host program), `dynamic` (agents whose runs name the servers that they need), `servers` (the servers that lmbridge
connects to), `sdk` (the only importer of the official SDK), and at the bottom `config` (configuration files) and
`jsonrpc` (messages on byte streams).

Importing this package does not need the extra; starting the first server does.
"""

from lmbridge.mcp.config.files import McpConfig, ServerSpec, load_config
from lmbridge.mcp.config.server_spec import ClientCredentials
from lmbridge.mcp.dynamic import DynamicAutonomousAgent
from lmbridge.mcp.servers.definitions import LeftOutTool
from lmbridge.mcp.servers.elicitation import Elicitation, ElicitationAnswer
from lmbridge.mcp.servers.events import (
    ElicitationCompleted,
    McpEvent,
    ServerLog,
    ServerStarting,
    ServerStateChanged,
    ToolDefinitionChanged,
    ToolProgress,
    ToolsChanged,
    UnexpectedMessage,
)
from lmbridge.mcp.servers.hub import McpHub
from lmbridge.mcp.servers.leased_tools import McpTools
from lmbridge.mcp.servers.managed_server import ServerState, ServerStatus
from lmbridge.mcp.servers.results import McpText

__all__ = [
    "ClientCredentials",
    "DynamicAutonomousAgent",
    "Elicitation",
    "ElicitationAnswer",
    "ElicitationCompleted",
    "LeftOutTool",
    "McpConfig",
    "McpEvent",
    "McpHub",
    "McpText",
    "McpTools",
    "ServerLog",
    "ServerSpec",
    "ServerStarting",
    "ServerState",
    "ServerStateChanged",
    "ServerStatus",
    "ToolDefinitionChanged",
    "ToolProgress",
    "ToolsChanged",
    "UnexpectedMessage",
    "load_config",
]
