"""Helpers for the tests of the gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import aiohttp

from lmbridge.gateway import Gateway
from lmbridge.gateway.generations import ENDPOINTS

PATHS = sorted(ENDPOINTS)
CHAT = "/v1/chat/completions"
BODY = b'{"model": "test-model", "messages": [{"role": "user", "content": "Hi"}]}'
STREAM = b'{"model": "test-model", "stream": true, "messages": []}'
SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """Returns a piece of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


async def fetch(
    http: aiohttp.ClientSession,
    gateway: Gateway,
    path: str = CHAT,
    body: bytes = BODY,
    *,
    method: str = "POST",
    headers: Mapping[str, str] | None = None,
) -> tuple[int, Mapping[str, str], bytes]:
    """Sends a request to a gateway, and returns status, headers and body."""
    async with http.request(
        method, gateway.origin + path, data=body if method == "POST" else None, headers=headers, allow_redirects=False
    ) as response:
        return response.status, response.headers, await response.read()


async def fetch_json(http: aiohttp.ClientSession, gateway: Gateway, path: str) -> Any:
    """Returns the JSON that a gateway has at a path."""
    status, _, body = await fetch(http, gateway, path, method="GET")
    assert status == 200, body
    return json.loads(body)


class Client:
    """A client that writes and reads bytes, for what an HTTP library would never send."""

    opened: ClassVar[list[Client]] = []
    """The clients of the current test. A fixture closes them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.opened.append(self)

    @classmethod
    async def connect(cls, gateway: Gateway) -> Client:
        """Connects to a gateway."""
        port = int(gateway.origin.rpartition(":")[2])
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, head: str, body: bytes = b"") -> None:
        """Sends a request whose head is given without its last empty line."""
        self.writer.write(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body)

    def post(self, body: bytes, *, path: str = CHAT, headers: str = "") -> None:
        """Sends a POST request."""
        more = f"\n{headers}" if headers else ""
        self.send(f"POST {path} HTTP/1.1\nHost: 127.0.0.1\nContent-Length: {len(body)}{more}", body)

    async def status(self) -> int:
        """Returns the status of the next response, or 0 if the connection was closed without one."""
        line = await self.reader.readline()
        return int(line.split()[1]) if line else 0

    async def rest(self) -> bytes:
        """Reads until the connection is closed."""
        return await self.reader.read()

    def leave(self) -> None:
        """Breaks the connection."""
        self.writer.transport.abort()
