"""The commands of the MCP servers whose tools are called."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Final

from benchmarks.processes import ROOT

_NPM: Final = ROOT / "tests" / "mcp" / "npm" / "node_modules"
MCP_SERVERS: Final[Mapping[str, Sequence[str]]] = {
    "stub": (sys.executable, "-m", "benchmarks.mcp_stub"),
    "time": (sys.executable, "-m", "mcp_server_time", "--local-timezone", "UTC"),
    "everything": ("node", str(_NPM / "@modelcontextprotocol" / "server-everything" / "dist" / "index.js"), "stdio"),
}
