"""Requests that are cancelled at each of their awaits: nothing is left behind, and the next request works."""

from __future__ import annotations

import asyncio

import pytest

from lmbridge import Limits, LLMClient, collect
from lmbridge.testing import ScriptedServer, answer, hang_up, reply
from tests.support import MESSAGES, cancel_at_each_step


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
async def test_a_cancel_anywhere_in_a_request_leaves_nothing_behind(
    scripted_server: ScriptedServer, no_waits: list[float], stream: bool, fresh: bool
) -> None:
    scripted_server.default = answer("one two three")
    limits = Limits(max_concurrency=1)
    client = LLMClient(scripted_server.api_base, limits=limits)

    async def run() -> None:
        scripted_server._script.clear()
        scripted_server.script(reply(503, {"error": "busy"}), hang_up())
        if stream:
            await collect(await client.chat_completion(MESSAGES, stream=True))
        else:
            await client.chat_completion(MESSAGES)

    async def after() -> None:
        assert client._server.transport.in_flight == 0
        assert client._server.transport.queued == 0
        scripted_server._script.clear()
        if fresh:
            await client.close()
        assert (await client.chat_completion(MESSAGES))["choices"]

    async with client:
        await cancel_at_each_step(run, after, at_least=4)
    await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


async def test_a_cancel_anywhere_in_the_queue_passes_the_permit_on(scripted_server: ScriptedServer) -> None:
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:
        first: asyncio.Task[None]
        gate: asyncio.Event

        async def run() -> None:
            nonlocal first, gate
            gate = asyncio.Event()
            scripted_server._script.clear()
            scripted_server.script(answer("x y", gate=gate))
            first = asyncio.create_task(collecting())
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(gate.set)
            await client.chat_completion(MESSAGES)

        async def collecting() -> None:
            await collect(await client.chat_completion(MESSAGES, stream=True))

        async def after() -> None:
            gate.set()
            await first
            assert client._server.transport.in_flight == 0
            assert client._server.transport.queued == 0
            assert (await client.chat_completion(MESSAGES))["choices"]

        await cancel_at_each_step(run, after, at_least=2)


async def test_a_cancel_anywhere_while_closing_leaves_the_client_usable(scripted_server: ScriptedServer) -> None:
    client = LLMClient(scripted_server.api_base)

    async def run() -> None:
        await client.chat_completion(MESSAGES)
        await client.close()

    async def after() -> None:
        assert (await client.chat_completion(MESSAGES))["choices"]
        await client.close()

    await cancel_at_each_step(run, after, at_least=2)
    await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


async def test_a_plain_request_that_is_cancelled_closes_its_socket(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("never", gate=gate))
    asked = asyncio.create_task(client.chat_completion(MESSAGES))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await scripted_server.wait_until(lambda: scripted_server.aborts)
