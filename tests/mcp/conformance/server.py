"""The server that the conformance suite tests: lmbridge's own, on HTTP, because the suite speaks only HTTP.

It inherits a listening socket from its parent, whose file descriptor is its last argument. In addition to lmbridge's
tools it has some that the suite expects.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import uvicorn

from lmbridge import Tool
from lmbridge.mcp.bridge.bridge import Bridge
from lmbridge.mcp.sdk.server_session import HostAnswer, ReportProgress, build_server

NO_MODEL_SERVER: Final = "http://127.0.0.1:9/v1"
"""A URL at which no model server listens. None is needed, because the suite does not call lmbridge's tools."""
NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}}
SCHEMA_2020_12: Final[Mapping[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {"address": {"$anchor": "address", "type": "object", "properties": {"city": {"type": "string"}}}},
    "properties": {"name": {"type": "string"}, "kind": {"type": "string"}, "address": {"$ref": "#/$defs/address"}},
    "allOf": [{"anyOf": [{"required": ["name"]}, {"required": ["kind"]}]}],
    "if": {"required": ["kind"]},
    "then": {"required": ["name"]},
    "else": {"required": ["address"]},
    "additionalProperties": False,
}


class BridgeWithSuiteTools:
    """The bridge with the tools that the suite expects.

    Args:
        bridge: The bridge.
    """

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._suite_tools = {
            "test_simple_text": self._simple_text,
            "test_error_handling": self._error_handling,
            "test_tool_with_progress": self._progress,
            "json_schema_2020_12_tool": self._simple_text,
        }
        schemas = {"json_schema_2020_12_tool": SCHEMA_2020_12}
        self.tools = [
            *bridge.tools,
            *(_tool(name, schemas.get(name, NO_PARAMETERS), self._suite_tools[name]) for name in self._suite_tools),
        ]
        self.instructions = bridge.instructions

    async def call(self, name: str, arguments: Mapping[str, Any], report: ReportProgress | None) -> HostAnswer:
        """Calls one of the tools of the suite, or of the bridge."""
        if name not in self._suite_tools:
            return await self._bridge.call(name, arguments, report)
        return await self._suite_tools[name](report)

    async def _simple_text(self, _: ReportProgress | None) -> HostAnswer:
        return HostAnswer(["This is a simple text response for testing."])

    async def _error_handling(self, _: ReportProgress | None) -> HostAnswer:
        return HostAnswer(["This tool intentionally returns an error for testing"], is_error=True)

    async def _progress(self, report: ReportProgress | None) -> HostAnswer:
        for progress in (0, 50, 100):
            if report is not None:
                await report(progress, f"{progress} of 100")
        return HostAnswer(["done"])


def _tool(name: str, schema: Mapping[str, Any], function: Callable[..., Any]) -> Tool:
    return Tool(name, f"A tool for the scenario {name}.", schema, function)


async def main(descriptor: int) -> None:
    # The suite deliberately makes requests of which the SDK warns.
    logging.getLogger("mcp").setLevel(logging.ERROR)
    listening = socket.socket(fileno=descriptor)
    async with Bridge.opened(NO_MODEL_SERVER) as bridge:
        app = build_server(BridgeWithSuiteTools(bridge)).streamable_http_app()
        await uvicorn.Server(uvicorn.Config(app, log_level="error")).serve([listening])


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[-1])))
