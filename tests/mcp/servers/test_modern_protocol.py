"""The stateless revision of the protocol (2026-07-28), in which a client has to subscribe to changes."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from lmbridge.mcp import McpEvent, ToolsChanged, sdk
from tests.mcp.conftest import MakeHub
from tests.mcp.support import Recorder, function_of, names

pytestmark = pytest.mark.skipif(not sdk.is_v2(), reason="SDK 1.x does not speak this revision")


@pytest_asyncio.fixture
async def url() -> AsyncIterator[str]:
    """The URL of a server that is made with the SDK."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(__file__).parent.parent / "modern_server.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, program, str(port), stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
    )
    assert process.stderr is not None
    async for line in process.stderr:
        if b"running on" in line:
            break
    yield f"http://127.0.0.1:{port}/mcp"
    process.kill()
    await process.stderr.read()
    await process.wait()


async def test_tools_can_be_called_and_their_changes_are_noticed(
    make_hub: MakeHub, recorder: Recorder[McpEvent], url: str
) -> None:
    hub = make_hub({"a": {"url": url}}, on_event=recorder)
    lease = await hub.tools()
    assert hub.status()["a"].protocol == "2026-07-28"
    assert names(lease.tools) == ["echo", "change"]
    assert await function_of(lease, "echo")(text="on") == "on"
    assert await function_of(lease, "change")() == "changed"
    await recorder.wait_for(lambda event: event == ToolsChanged("a"))
    assert names((await hub.tools()).tools) == ["echo", "change", "new"]
    await hub.close()


def definition(name: str, header: str) -> dict[str, Any]:
    """Returns the definition of a tool whose argument is also to be sent in the given HTTP header."""
    argument = {"type": "string", "x-mcp-header": header}
    return {"name": name, "inputSchema": {"type": "object", "properties": {"text": argument}}}


RESULTS: dict[str, dict[str, Any]] = {
    "server/discover": {
        "resultType": "complete",
        "supportedVersions": ["2026-07-28"],
        "capabilities": {"tools": {}},
        "ttlMs": 0,
        "cacheScope": "private",
    },
    "tools/list": {
        "resultType": "complete",
        "tools": [definition("good", "Text"), definition("bad", "no token")],
        "ttlMs": 0,
        "cacheScope": "private",
    },
    "tools/call": {"content": [{"type": "text", "text": "of no type"}]},
}


@pytest_asyncio.fixture
async def url_and_methods() -> AsyncIterator[list[str]]:
    """The URL of a server that answers from `RESULTS`, and after it the methods that were requested."""
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        message = await request.json()
        seen.append(message["method"])
        reply = {"jsonrpc": "2.0", "id": message.get("id"), "result": RESULTS.get(message["method"], {})}
        return web.json_response(reply)

    app = web.Application()
    app.router.add_post("/mcp", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    seen.append(f"http://127.0.0.1:{runner.addresses[0][1]}/mcp")
    yield seen
    await runner.cleanup()


async def test_a_tool_with_an_invalid_header_is_left_out_as_the_protocol_requires(
    make_hub: MakeHub, url_and_methods: list[str]
) -> None:
    lease = await make_hub({"a": {"url": url_and_methods[0]}}).tools()
    assert names(lease.tools) == ["good"]
    (left_out,) = lease.left_out
    assert left_out.tool == "bad"
    assert "x-mcp-header" in left_out.reason


async def test_a_result_without_a_type_counts_as_complete_as_the_protocol_requires(
    make_hub: MakeHub, url_and_methods: list[str]
) -> None:
    lease = await make_hub({"a": {"url": url_and_methods[0]}}).tools()
    assert await function_of(lease, "good")(text="on") == "of no type"
    assert url_and_methods[1:] == ["server/discover", "tools/list", "tools/call"]
