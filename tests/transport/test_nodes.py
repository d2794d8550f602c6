"""Several servers behind one client: which one is chosen, and what happens when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial

import pytest
import pytest_asyncio

from lmbridge import (
    LLMClient,
)
from lmbridge.testing import ScriptedServer, answer, reply
from tests.transport.support import ask

STREAM = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


@pytest_asyncio.fixture
async def servers() -> AsyncIterator[list[ScriptedServer]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(ScriptedServer()) for _ in range(3)]


def generations(server: ScriptedServer) -> int:
    return sum(request.method == "POST" for request in server.requests)


def is_busy(server: ScriptedServer, requests: int) -> bool:
    return server.in_flight == requests


def client_of(*servers: ScriptedServer, model: str | None = "test-model") -> LLMClient:
    return LLMClient([server.api_base for server in servers], model)


@STREAM
async def test_a_server_that_is_not_running_is_passed_over(servers: list[ScriptedServer], stream: bool) -> None:
    await servers[0].close()
    async with client_of(servers[0], servers[1]) as client:
        for _ in range(3):
            assert await ask(client, stream) == "Hello from the scripted server."
        stats = client.stats()
    assert [stats.by_server[server.api_base].is_available for server in servers[:2]] == [False, True]


@STREAM
@pytest.mark.usefixtures("no_waits")
async def test_a_temporary_error_goes_to_another_server(servers: list[ScriptedServer], stream: bool) -> None:
    servers[0].default = reply(503, {"error": "busy"})
    async with client_of(*servers[:2]) as client:
        for _ in range(4):
            await ask(client, stream)
    assert (generations(servers[0]), generations(servers[1])) == (1, 4)


async def test_idle_servers_share_the_load(servers: list[ScriptedServer]) -> None:
    gate = asyncio.Event()
    for server in servers:
        server.default = answer("Done.", gate=gate)
    async with client_of(*servers) as client:
        tasks = [asyncio.create_task(client.ask(f"Question {number}")) for number in range(9)]
        for server in servers:
            await server.wait_until(partial(is_busy, server, 3))
        gate.set()
        assert await asyncio.gather(*tasks) == ["Done."] * 9
