"""The client that the conformance suite tests: `McpHub`. The last argument is the URL of the suite's server."""

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
"""Arguments of the tools that need some, for scenarios in which the suite does not give them."""
SCHEMA_TOOL: Final = "json_schema_2020_12_tool"
"""The tool whose schema the suite wants back, as an argument of the other tool."""


def planned_calls(tools: Iterable[Tool]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the calls that the suite asks for, or else one call of each tool."""
    requested = json.loads(os.environ.get("MCP_CONFORMANCE_CONTEXT") or "{}").get("toolCalls")
    if requested is not None:
        return [(call["name"], call["arguments"]) for call in requested]
    schemas = {tool.name: tool.parameters for tool in tools}
    if SCHEMA_TOOL in schemas:
        return [(name, {"schema": schemas[SCHEMA_TOOL]}) for name in schemas if name != SCHEMA_TOOL]
    return [(name, ARGUMENTS.get(name, {})) for name in schemas]


async def main(url: str) -> None:
    config = Path(tempfile.mkdtemp()) / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"suite": {"url": url, "type": "http"}}}))
    # The suite expects a user who accepts each form as it is shown.
    hub = McpHub(config, on_elicitation=lambda question: question.accept(question.defaults))
    try:
        lease = await hub.tools()
        print([tool.name for tool in lease.tools], lease.left_out)
        functions = {tool.name: tool.function for tool in lease.tools}
        for name, arguments in planned_calls(lease.tools):
            try:
                print(name, await functions[name](**arguments))
            except ToolError as error:
                # The suite judges what was sent, so a failing tool is not a failure of the client.
                print(name, "failed:", error)
        lease.release()
    finally:
        await hub.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[-1]))
