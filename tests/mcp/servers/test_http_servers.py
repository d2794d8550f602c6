"""Servers on HTTP: headers, redirects, error statuses, and sessions and responses that end early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from lmbridge import MultiMCPError, ToolError
from tests.mcp.conftest import MakeHub
from tests.mcp.support import function_of, names


class HttpServer:
    """An MCP server on streamable HTTP that answers with plain JSON, and never answers a call of `sleep`."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        """The headers of the requests that arrived."""
        self.status = 0
        """An HTTP status with which every request is answered, or 0."""
        self.location = ""
        """A URL to which every request is redirected, or ""."""
        self.session = "s1"
        """The only session id that the server knows."""
        self.fault = ""
        """How calls end: "" for with a reply, "abort" for by a broken connection, "end" for by a stream of events that
        ends without a reply."""
        self.hangs_at = ""
        """A method that is never answered."""
        self.hanging = 0
        """How many requests of that method are waiting for their answer."""
        self.all_left = asyncio.Event()
        """Set when the client has given up the last of them."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        self._server = TestServer(app, handler_cancellation=True)

    async def start(self) -> None:
        await self._server.start_server()

    async def stop(self) -> None:
        await self._server.close()

    @property
    def url(self) -> str:
        return str(self._server.make_url("/mcp"))

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append(request.headers.copy())
        if self.location:
            raise web.HTTPTemporaryRedirect(self.location)
        if self.status:
            return web.Response(status=self.status, text="refused")
        if request.method != "POST":
            return web.Response(status=405 if request.method == "GET" else 200)
        message = await request.json()
        if message["method"] != "initialize" and request.headers.get("Mcp-Session-Id") not in (None, self.session):
            return web.json_response(
                {"jsonrpc": "2.0", "id": "x", "error": {"code": -32600, "message": "?"}}, status=404
            )
        if "id" not in message:
            return web.Response(status=202)
        if message["method"] == "tools/call" and self.fault:
            if self.fault == "abort" and request.transport:
                request.transport.abort()
            return web.Response(content_type="text/event-stream")
        return web.json_response(
            {"jsonrpc": "2.0", "id": message["id"], **await self.answer(message)},
            headers={"Mcp-Session-Id": self.session},
        )

    async def hang(self) -> None:
        self.hanging += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.hanging -= 1
            if not self.hanging:
                self.all_left.set()

    async def answer(self, message: Any) -> dict[str, Any]:
        if message["method"] == self.hangs_at:
            await self.hang()
        params = message.get("params") or {}
        match message["method"]:
            case "initialize":
                info = {"name": "http", "version": "1"}
                capabilities: dict[str, Any] = {"tools": {}}
                version = params["protocolVersion"]
                return {"result": {"protocolVersion": version, "capabilities": capabilities, "serverInfo": info}}
            case "tools/list":
                return {
                    "result": {
                        "tools": [{"name": each, "inputSchema": {"type": "object"}} for each in ("echo", "sleep")]
                    }
                }
            case "tools/call" if params["name"] == "sleep":
                await asyncio.Event().wait()
            case "tools/call":
                return {"result": {"content": [{"type": "text", "text": params["arguments"]["text"]}]}}
        return {"error": {"code": -32601, "message": "no such method"}}


@pytest_asyncio.fixture
async def server() -> AsyncIterator[HttpServer]:
    server = HttpServer()
    await server.start()
    yield server
    await server.stop()


@pytest_asyncio.fixture
async def other() -> AsyncIterator[HttpServer]:
    server = HttpServer()
    await server.start()
    yield server
    await server.stop()


async def test_a_server_on_http_is_called_with_its_headers(make_hub: MakeHub, server: HttpServer) -> None:
    hub = make_hub({"a": {"url": server.url, "headers": {"Authorization": "Bearer token"}}})
    lease = await hub.tools()
    assert names(lease.tools) == ["echo", "sleep"]
    assert await function_of(lease, "echo")(text="on") == "on"
    assert {request["Authorization"] for request in server.requests} == {"Bearer token"}
    await hub.close()


async def test_a_proxy_of_the_environment_is_not_used(
    make_hub: MakeHub, server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    hub = make_hub({"a": {"url": server.url}}, connect_timeout=5)
    assert (await hub.tools()).tools
    await hub.close()


async def test_a_redirect_is_not_followed(make_hub: MakeHub, server: HttpServer, other: HttpServer) -> None:
    server.location = other.url
    hub = make_hub({"a": {"url": server.url, "headers": {"Authorization": "Bearer token"}}}, connect_timeout=5)
    with pytest.raises(MultiMCPError) as caught:
        await hub.tools()
    assert other.requests == []
    assert f"it redirects to {other.url}, which is not followed" in str(caught.value)


async def test_a_redirect_to_the_same_origin_is_not_followed_either(make_hub: MakeHub, server: HttpServer) -> None:
    server.location = "/elsewhere"
    with pytest.raises(MultiMCPError, match="it redirects to /elsewhere"):
        await make_hub({"a": {"url": server.url}}, connect_timeout=5).tools()


@pytest.mark.parametrize("status", [401, 403, 500])
async def test_the_error_of_a_failed_start_names_the_http_status(
    make_hub: MakeHub, server: HttpServer, status: int
) -> None:
    server.status = status
    with pytest.raises(MultiMCPError, match=f"it answered with HTTP status {status}"):
        await make_hub({"a": {"url": server.url}}, connect_timeout=5).tools()


@pytest.mark.parametrize("path", ["/mcp", "/sse"])
async def test_a_server_that_cannot_be_reached_fails_to_start(make_hub: MakeHub, path: str) -> None:
    hub = make_hub({"a": {"url": f"http://127.0.0.1:9{path}"}}, connect_timeout=5)
    with pytest.raises(MultiMCPError, match=r"could not be started: .*(connect|refused)"):
        await hub.tools()


async def test_a_call_that_times_out_does_not_end_the_session(make_hub: MakeHub, server: HttpServer) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools(call_timeout=1)
    with pytest.raises(ToolError, match="did not answer within"):
        await function_of(lease, "sleep")()
    assert await function_of(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 1
    await hub.close()


async def test_a_connection_that_breaks_during_a_call_fails_the_call_and_the_session(
    make_hub: MakeHub, server: HttpServer
) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    server.fault = "abort"
    with pytest.raises(ToolError, match="may or may not have run"):
        await function_of(lease, "echo")(text="x")
    server.fault = ""
    assert await function_of(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 2
    await hub.close()


async def test_a_response_that_ends_without_a_reply_fails_the_call(
    make_hub: MakeHub, server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.mcp.sdk.http._REPLY_AFTER_END_SECONDS", 0.05)
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    server.fault = "end"
    with pytest.raises(ToolError, match="its answer broke off, and the tool may have run"):
        await function_of(lease, "echo")(text="x")
    server.fault = ""
    assert await function_of(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 1
    await hub.close()


async def test_the_error_of_a_lost_session_names_the_http_status(make_hub: MakeHub, server: HttpServer) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    server.status = 401
    with pytest.raises(ToolError, match="it answered with HTTP status 401"):
        await function_of(lease, "echo")(text="x")
    assert hub.status()["a"].error == "it answered with HTTP status 401"
    await hub.close()


async def test_the_error_of_a_lost_session_names_a_redirect(
    make_hub: MakeHub, server: HttpServer, other: HttpServer
) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    server.location = other.url
    with pytest.raises(ToolError, match="it redirects to"):
        await function_of(lease, "echo")(text="x")
    assert other.requests == []
    await hub.close()


async def test_arguments_that_cannot_be_sent_do_not_end_the_session(make_hub: MakeHub, server: HttpServer) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match="the arguments cannot be sent"):
        await function_of(lease, "echo")(text="\ud83d")
    assert await function_of(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 1
    await hub.close()


@pytest.mark.slow
async def test_a_list_that_takes_too_long_leaves_no_request_behind(make_hub: MakeHub, server: HttpServer) -> None:
    server.hangs_at = "tools/list"
    hub = make_hub({"a": {"url": server.url, "connectTimeout": 0.5}})
    with pytest.raises(MultiMCPError):
        await hub.tools(["a"])
    async with asyncio.timeout(10):
        await server.all_left.wait()
    assert server.hanging == 0
