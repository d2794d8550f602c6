"""The stateless revision of the protocol (2026-07-28), in which a client has to subscribe to changes."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from lmbridge.mcp import McpEvent, ToolsChanged, sdk
from tests.mcp.conftest import MakeHub
from tests.mcp.http_server import event
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


class ListenServer:
    """A server that announces changes of its tools, but ends the stream of announcements when a test says so."""

    def __init__(self) -> None:
        self.url = ""
        self.tools = ["first"]
        self.listens = 0
        self.end_gracefully = True
        self.is_over = asyncio.Event()
        self.accepts = asyncio.Event()
        self.accepts.set()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        message = await request.json()
        if message["method"] == "subscriptions/listen":
            return await self._announce(message["id"], request)
        result = RESULTS.get(message["method"], {})
        if message["method"] == "server/discover":
            result = {**result, "capabilities": {"tools": {"listChanged": True}}}
        if message["method"] == "tools/list":
            # Without a time for which the list is valid, it is read again only after a change or a minute.
            tools = [{"name": name, "inputSchema": {"type": "object"}} for name in self.tools]
            result = {"resultType": "complete", "tools": tools}
        return web.json_response({"jsonrpc": "2.0", "id": message.get("id"), "result": result})

    async def _announce(self, request_id: str, request: web.Request) -> web.StreamResponse:
        await self.accepts.wait()
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        meta = {"io.modelcontextprotocol/subscriptionId": request_id}
        params = {"notifications": {"toolsListChanged": True}, "_meta": meta}
        method = "notifications/subscriptions/acknowledged"
        await stream.write(event({"jsonrpc": "2.0", "method": method, "params": params}).encode() + b"\n")
        self.listens += 1
        await self.is_over.wait()
        if self.end_gracefully:
            result = {"resultType": "complete", "_meta": meta}
            await stream.write(event({"jsonrpc": "2.0", "id": request_id, "result": result}).encode() + b"\n")
        return stream


@pytest_asyncio.fixture
async def listen_server() -> AsyncIterator[ListenServer]:
    server = ListenServer()
    app = web.Application()
    app.router.add_post("/mcp", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/mcp"
    yield server
    server.is_over.set()
    server.accepts.set()
    await runner.cleanup()


@pytest.mark.parametrize("gracefully", [True, False])
async def test_changes_are_noticed_after_the_server_has_ended_the_stream_that_announces_them(
    make_hub: MakeHub, listen_server: ListenServer, monkeypatch: pytest.MonkeyPatch, gracefully: bool
) -> None:
    monkeypatch.setattr("lmbridge.mcp.servers.session_owner._LISTEN_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr("lmbridge.mcp.sdk.http._REPLY_AFTER_END_SECONDS", 0.0)
    hub = make_hub({"a": {"url": listen_server.url}})
    in_flight = await hub.tools()
    await wait_until(lambda: listen_server.listens == 1)
    assert names((await hub.tools()).tools) == ["first"]
    # While nobody listens, each run reads the list anew, and a run in flight reads it once.
    listen_server.end_gracefully = gracefully
    listen_server.accepts.clear()
    listen_server.is_over.set()
    listen_server.tools.append("second")
    await wait_until(lambda: hub._servers["a"]._session.has_announced_tools)  # type: ignore[union-attr]
    assert names(await in_flight.new_tools()) == ["second"]
    listen_server.tools.append("third")
    assert names((await hub.tools()).tools) == ["first", "second", "third"]
    # What has changed before the server announces changes again was not announced.
    listen_server.tools.append("fourth")
    listen_server.is_over.clear()
    listen_server.accepts.set()
    await wait_until(lambda: listen_server.listens == 2)
    await wait_until(lambda: hub._servers["a"]._session.has_announced_tools)  # type: ignore[union-attr]
    assert names(await in_flight.new_tools()) == ["second", "third", "fourth"]
    await hub.close()


async def wait_until(is_met: Callable[[], bool]) -> None:
    """Waits until a condition is met, at most ten seconds."""
    async with asyncio.timeout(10):
        while not is_met():
            await asyncio.sleep(0.005)
