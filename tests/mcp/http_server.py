"""An MCP server on HTTP whose behaviour a test decides, for each method of the protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

Respond = Callable[[Any, web.Request], Any]


class HttpServer:
    """A server on streamable HTTP, with sessions, that answers with plain JSON unless a test says otherwise."""

    def __init__(self) -> None:
        self.requests: list[web.Request] = []
        """The requests that arrived."""
        self.methods: list[str] = []
        """The methods of the messages that arrived, as in "tools/call", and "GET" and "DELETE"."""
        self.responses: dict[str, Respond] = {}
        """For a method, or "GET" or "DELETE", the function that is called with the message and the request, and that
        returns what is sent: a response, an answer, or None for what is sent by default."""
        self.sessions = 0
        """How many sessions have been opened."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._server = TestServer(app)

    async def start(self) -> None:
        await self._server.start_server()

    async def stop(self) -> None:
        await self._server.close()

    @property
    def url(self) -> str:
        return str(self._server.make_url("/mcp"))

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        message = await request.json() if request.method == "POST" else None
        method = request.method if message is None else message.get("method", "reply")
        self.methods.append(method)
        respond = self.responses.get(method)
        response = None if respond is None else respond(message, request)
        if asyncio.iscoroutine(response):
            response = await response
        if response is None:
            response = self.default(message)
        if isinstance(response, web.StreamResponse):
            if method == "initialize" and isinstance(response, web.Response) and response.status == 200:
                response.headers.setdefault("Mcp-Session-Id", f"s{self.sessions}")
            return response
        headers = {"Mcp-Session-Id": f"s{self.sessions}"} if method == "initialize" else {}
        return web.json_response(response, headers=headers)

    def default(self, message: Any) -> Any:
        """Returns what is sent in answer to a message if nothing else is specified."""
        method = None if message is None else message.get("method")
        if message is None:
            return web.Response(status=405)
        if "id" not in message or method is None:
            return web.Response(status=202)
        if method == "initialize":
            self.sessions += 1
        results: Mapping[str, Any] = {
            "initialize": {
                "protocolVersion": "2025-06-18",
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "http", "version": "1"},
            },
            "ping": {},
            "tools/list": {"tools": [{"name": "echo", "inputSchema": {"type": "object"}}]},
            "tools/call": text("on"),
        }
        if method not in results:
            return error(message, -32601, "no such method")
        return answer(message, results[method])


def text(content: str) -> dict[str, Any]:
    """Returns a result of a tool that consists of a text."""
    return {"content": [{"type": "text", "text": content}]}


def answer(message: Any, result: Any) -> dict[str, Any]:
    """Returns the answer to a request."""
    return {"jsonrpc": "2.0", "id": message["id"], "result": result}


def error(message: Any, code: int, words: str) -> dict[str, Any]:
    """Returns the refusal of a request."""
    return {"jsonrpc": "2.0", "id": message["id"], "error": {"code": code, "message": words}}


def body(status: int, content: Any, kind: str = "application/json", **headers: str) -> web.Response:
    """Returns a response whose body is given as bytes, as a text, or as JSON."""
    data = content if isinstance(content, str | bytes) else json.dumps(content)
    data = data.encode() if isinstance(data, str) else data
    return web.Response(status=status, body=data, headers={"Content-Type": kind, **headers})


def events(*lines: str) -> web.Response:
    """Returns a stream of events that ends after the given lines."""
    return body(200, "".join(f"{line}\n" for line in lines), "text/event-stream")


def event(message: Any) -> str:
    """Returns the lines of an event."""
    return f"data: {json.dumps(message)}\n"
