"""Helpers for the tests of the bridge: requests, replies, and the host's end of its process."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import mcp
from mcp.client.stdio import stdio_client

TOOL_NAMES = [
    "health_check",
    "list_models",
    "chat_completion",
    "text_completion",
    "generate_embeddings",
    "create_response",
    "autonomous_with_mcp",
    "autonomous_with_multiple_mcps",
    "autonomous_discover_and_execute",
    "list_available_mcps",
]
INITIALIZE = {
    "id": 0,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}
NO_SERVER_URL = "http://127.0.0.1:9/v1"
WriteConfig = Callable[[Mapping[str, Any]], Path]


def tool_call(name: str, arguments: str = "{}") -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def text_chunk(piece: str, finish_reason: str | None = None) -> dict[str, Any]:
    """Returns a chunk of a streamed text completion."""
    choice = {"text": piece, "index": 0, "finish_reason": finish_reason}
    return {"object": "text_completion", "model": "test-model", "choices": [choice]}


def final_response_event(text: str, **fields: Any) -> bytes:
    """Returns the event that ends a streamed response."""
    item = {"type": "message", "content": [{"type": "output_text", "text": text}]}
    response = {"id": "resp_1", "model": "test-model", "status": "completed", "output": [item], **fields}
    data = {"type": f"response.{response['status']}", "response": response}
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()


def call_request(number: int, tool: str, **arguments: Any) -> dict[str, Any]:
    return {"id": number, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}


def cancel_notification(number: int) -> dict[str, Any]:
    return {"method": "notifications/cancelled", "params": {"requestId": number}}


class Host:
    """The host's end of a bridge process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.process = process
        self.stdin, self.stdout, self.stderr = process.stdin, process.stdout, process.stderr

    def send(self, *messages: Mapping[str, Any]) -> None:
        """Writes messages in one piece."""
        self.stdin.write(b"".join(json.dumps({"jsonrpc": "2.0", **each}).encode() + b"\n" for each in messages))

    def call(self, number: int, tool: str, **arguments: Any) -> None:
        self.send(call_request(number, tool, **arguments))

    async def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self.stdout.readline())
        assert message["jsonrpc"] == "2.0"
        return message

    async def end(self) -> tuple[int, str, bytes]:
        """Waits for the process to end, and returns its status, its stderr and the rest of its stdout."""
        errors, output = await asyncio.gather(self.stderr.read(), self.stdout.read())
        return await self.process.wait(), errors.decode(), output


StartBridge = Callable[..., Any]


@asynccontextmanager
async def official_session(api_base: str, folder: Path, **env: str) -> AsyncIterator[tuple[Any, Any]]:
    """Yields a session of the official client with a bridge process, and the result of its initialization.

    The process must not write anything to stderr.
    """
    env = {"LMBRIDGE_API_BASE": api_base, "HOME": str(folder), **env}
    parameters = mcp.StdioServerParameters(command=sys.executable, args=["-m", "lmbridge.mcp"], env=env)
    errors = folder / "stderr"
    with errors.open("w") as log:
        async with stdio_client(parameters, errlog=log) as streams, mcp.ClientSession(*streams) as session:
            yield session, wire_form(await session.initialize())
    assert errors.read_text() == ""


def wire_form(model: Any) -> Any:
    """Returns a message of the SDK as it was on the wire."""
    return model.model_dump(by_alias=True, mode="json", exclude_none=True)
