"""The client that the conformance suite runs: `McpHub`, told the address of the suite's server by its last argument."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from lmbridge import Tool, ToolError
from lmbridge.mcp import McpHub

ARGUMENTS: Final[Mapping[str, Mapping[str, Any]]] = {"add_numbers": {"a": 5, "b": 3}}
"""Of the tools that need some, where the suite does not say."""
FOCAL: Final = "json_schema_2020_12_tool"
"""The suite gets the schema of this one back, as an argument of the other."""


def calls(tools: Iterable[Tool]) -> list[tuple[str, Mapping[str, Any]]]:
    """What the suite wants to be called: what it says, or else each tool that there is."""
    told = json.loads(os.environ.get("MCP_CONFORMANCE_CONTEXT") or "{}").get("toolCalls")
    if told is not None:
        return [(call["name"], call["arguments"]) for call in told]
    schemas = {tool.name: tool.parameters for tool in tools}
    if FOCAL in schemas:
        return [(name, {"schema": schemas[FOCAL]}) for name in schemas if name != FOCAL]
    return [(name, ARGUMENTS.get(name, {})) for name in schemas]


async def main(url: str) -> None:
    config = Path(tempfile.mkdtemp()) / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"suite": {"url": url, "type": "http"}}}))
    hub = McpHub(config)
    try:
        lease = await hub.tools()
        print([tool.name for tool in lease.tools], lease.left_out)
        functions = {tool.name: tool.function for tool in lease.tools}
        for name, arguments in calls(lease.tools):
            try:
                print(name, await functions[name](**arguments))
            except ToolError as error:  # for a model to read; the suite looks at what was sent
                print(name, "failed:", error)
        lease.release()
    finally:
        await hub.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[-1]))
