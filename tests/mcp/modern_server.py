"""An MCP server of the newest protocol, made with the SDK's second major: `python modern_server.py PORT`."""

from __future__ import annotations

import sys
from typing import Any

from mcp import server

app: Any = server.MCPServer("modern")  # the first major has none


@app.tool()  # type: ignore[untyped-decorator]  # as above
def echo(text: str) -> str:
    """Says it again."""
    return text


async def change(ctx: Any) -> str:
    app.add_tool(echo, name="new")
    await ctx.notify_tools_changed()
    return "changed"


if __name__ == "__main__":
    from mcp.server.mcpserver import Context

    change.__annotations__["ctx"] = Context
    app.add_tool(change)
    app.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
