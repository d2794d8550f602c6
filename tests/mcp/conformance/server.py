"""The server that the conformance suite asks: lmbridge's own, on HTTP, which is all that the suite speaks.

What it listens on comes from its parent: the number of a socket's file descriptor, in the last argument. Besides its
own tools it has some that the suite wants to be there.
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

NOBODY: Final = "http://127.0.0.1:9/v1"
"""A model server that is not there: the suite does not know our tools, so that it calls none."""
EMPTY: Final[Mapping[str, Any]] = {"type": "object", "properties": {}}
RICH: Final[Mapping[str, Any]] = {
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


class Served:
    """The bridge, and tools of the suite.

    Args:
        bridge: The bridge.
    """

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._added = {
            "test_simple_text": self._simple_text,
            "test_error_handling": self._error_handling,
            "test_tool_with_progress": self._progress,
            "json_schema_2020_12_tool": self._simple_text,
        }
        schemas = {"json_schema_2020_12_tool": RICH}
        self.tools = [
            *bridge.tools,
            *(_tool(name, schemas.get(name, EMPTY), self._added[name]) for name in self._added),
        ]
        self.instructions = bridge.instructions

    async def call(self, name: str, arguments: Mapping[str, Any], report: ReportProgress | None) -> HostAnswer:
        """Calls one of the tools."""
        if name not in self._added:
            return await self._bridge.call(name, arguments, report)
        return await self._added[name](report)

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
    return Tool(name, f"Is there for {name}.", schema, function)


async def main(number: int) -> None:
    logging.getLogger("mcp").setLevel(logging.ERROR)  # the suite makes requests that deserve a warning
    listening = socket.socket(fileno=number)
    async with Bridge.opened(NOBODY) as bridge:
        app = build_server(Served(bridge)).streamable_http_app()
        await uvicorn.Server(uvicorn.Config(app, log_level="error")).serve([listening])


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[-1])))
