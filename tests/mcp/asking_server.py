"""An MCP server, made with the SDK, that asks the user: `python asking_server.py`, on stdio."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mcp import server
from pydantic import BaseModel

IS_V2 = hasattr(server, "MCPServer")
sdk: Any = import_module("mcp.server.mcpserver" if IS_V2 else "mcp.server.fastmcp")
app: Any = (sdk.MCPServer if IS_V2 else sdk.FastMCP)("asking")


class Booking(BaseModel):
    guests: int


async def book(ctx: Any) -> str:
    """Books a table."""
    answer = await ctx.elicit("For how many?", Booking)
    return f"{answer.action} {answer.data.guests}" if answer.action == "accept" else answer.action


async def log_in(ctx: Any) -> str:
    """Lets the user log in."""
    answer = await ctx.elicit_url("Log in", "https://a.example/login", "e1")
    return str(answer.action)


if __name__ == "__main__":
    # The SDK recognizes the parameter by its annotation, whose class differs between its majors.
    for function in (book, log_in):
        function.__annotations__["ctx"] = sdk.Context
        app.add_tool(function)
    app.run("stdio")
