"""Fixtures for the tests of the gateway."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import aiohttp
import pytest_asyncio

from lmbridge import Limits
from lmbridge.gateway import Gateway
from lmbridge.testing import ScriptedServer
from tests.gateway.support import Client


@pytest_asyncio.fixture
async def gateway(scripted_server: ScriptedServer) -> AsyncIterator[Gateway]:
    """A gateway in front of the scripted server, which admits two requests for one model at a time."""
    limits = Limits(max_concurrency=2, max_loaded_models=1)
    async with Gateway(scripted_server.api_base, limits=limits) as gateway:
        yield gateway


@pytest_asyncio.fixture(autouse=True)
async def closed_clients() -> AsyncIterator[None]:
    """Closes the raw connections of a test."""
    yield
    while Client.opened:
        writer = Client.opened.pop().writer
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client without any habits of its own: it leaves bodies compressed and follows no redirects."""
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session
