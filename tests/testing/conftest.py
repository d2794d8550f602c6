from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from lmbridge.testing import ScriptedServer
from tests.testing.support import Client, Dial, Post


@pytest.fixture
def server(scripted_server: ScriptedServer) -> ScriptedServer:
    return scripted_server


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def dial() -> AsyncIterator[Dial]:
    """Returns a function that opens a raw connection to a server. It is closed after the test."""
    async with AsyncExitStack() as stack:

        async def connect(server: ScriptedServer) -> Client:
            host, _, port = server.origin.removeprefix("http://").partition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            stack.callback(writer.close)
            return reader, writer

        yield connect


@pytest.fixture
def post(dial: Dial) -> Post:
    """Returns a function that sends a request on a raw connection."""

    async def send(server: ScriptedServer, client: Client | None = None, **body: Any) -> Client:
        reader, writer = client or await dial(server)
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        return reader, writer

    return send
