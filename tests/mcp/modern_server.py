"""An MCP server of the stateless protocol (2026-07-28), made with SDK 2.x: `python modern_server.py PORT`."""

from __future__ import annotations

import sys
from typing import Any

from mcp import server

# SDK 1.x has no MCPServer.
app: Any = server.MCPServer("modern")


@app.tool()  # type: ignore[untyped-decorator]  # `app` is of type Any
def echo(text: str) -> str:
    """Returns the text."""
    return text


async def change(ctx: Any) -> str:
    app.add_tool(echo, name="new")
    await ctx.notify_tools_changed()
    return "changed"


if __name__ == "__main__":
    from mcp.server.mcpserver import Context

    # The SDK recognizes the parameter by its annotation, which must not be imported with SDK 1.x.
    change.__annotations__["ctx"] = Context
    app.add_tool(change)
    app.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
