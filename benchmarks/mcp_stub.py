"""An MCP server on stdio that does almost nothing, so that the cost of a call is that of the client."""

from __future__ import annotations

import json
import sys
from typing import Any, Final

_TOOL: Final = {
    "name": "echo",
    "description": "Returns its text.",
    "inputSchema": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
}


def answer(message: dict[str, Any]) -> dict[str, Any]:
    """Returns the result of a request."""
    params = message.get("params") or {}
    if message["method"] == "initialize":
        info = {"name": "stub", "version": "1"}
        return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": info}
    if message["method"] == "tools/list":
        return {"tools": [_TOOL]}
    return {"content": [{"type": "text", "text": params["arguments"]["text"]}], "isError": False}


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "id" in message:
            reply = {"jsonrpc": "2.0", "id": message["id"], "result": answer(message)}
            sys.stdout.write(f"{json.dumps(reply)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
