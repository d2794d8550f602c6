"""Closing clients and transports while something is under way."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from lmbridge import Limits, LLMClient, TaskCancelledError, Transport
from lmbridge.testing import Exchange, ScriptedServer, answer, reply, stall
from tests.client.test_lifecycle import ServerThread
from tests.support import MESSAGES, read_text


async def test_close_ends_a_request_on_a_kept_connection(scripted_server: ScriptedServer, client: LLMClient) -> None:
    await client.chat_completion(MESSAGES)
    scripted_server.script(stall())
    asked = asyncio.create_task(client.chat_completion(MESSAGES))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    await client.close()
    with pytest.raises(TaskCancelledError, match="the client was closed"):
        await asked
    assert len(scripted_server.requests) == 2


async def test_a_transport_that_is_dropped_unclosed_warns(scripted_server: ScriptedServer, client: LLMClient) -> None:
    await client.chat_completion(MESSAGES)
    # Called by hand: aiohttp's session warns and logs as well when it is collected.
    with pytest.warns(ResourceWarning, match="unclosed <Transport http.*>; close its client, or use `async with`"):
        client._server.transport.__del__()


async def test_a_client_that_closes_leaves_the_streams_of_a_shared_transport_alone(
    scripted_server: ScriptedServer,
) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("one two", gate=gate))
    async with Transport(scripted_server.api_base) as transport:
        stream = await LLMClient(transport=transport).chat_completion(MESSAGES, stream=True)
        async with LLMClient(transport=transport) as other:
            assert await other.health_check()
        gate.set()
        assert await read_text(stream) == "one two"


async def test_the_connections_to_an_old_server_are_closed_once_it_is_idle(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.transport.session.KEEPALIVE", 60)  # so that they do not just run out
    async with ScriptedServer() as other, LLMClient(scripted_server.api_base) as client:
        await client.chat_completion(MESSAGES)
        client.api_base = other.api_base
        await client.chat_completion(MESSAGES)
        await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


async def test_a_list_that_is_under_way_ends_on_the_old_server(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()

    async def held(exchange: Exchange) -> None:
        await gate.wait()
        await reply(200, {"data": [{"id": "old"}]})(exchange)

    scripted_server.on_path("/v1/models", held)
    async with ScriptedServer() as other, LLMClient(scripted_server.api_base) as client:
        listing = asyncio.create_task(client.list_models())
        await scripted_server.wait_until(lambda: scripted_server.requests)
        client.api_base = other.api_base
        await client.chat_completion(MESSAGES)
        gate.set()
        assert await listing == ["old"]


async def test_close_says_that_a_request_was_still_queued(scripted_server: ScriptedServer) -> None:
    scripted_server.default = stall()
    client = LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1))
    asked = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(2)]
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    await client.close()
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert "while it was queued" in str(results[1])
    assert scripted_server.api_base in str(results[1])


LEFT = """
import asyncio, sys
from lmbridge import LLMClient
async def ask():
    stream = await LLMClient(sys.argv[1]).chat_completion([{"role": "user", "content": "x"}], stream=True)
    await anext(stream)
    return stream
stream = asyncio.run(ask())
del stream
"""


def test_a_stream_that_outlives_its_loop_is_dropped_with_a_warning_and_no_traceback() -> None:
    with ServerThread() as api_base:
        run = subprocess.run(
            [sys.executable, "-W", "always::ResourceWarning", "-c", LEFT, api_base],
            capture_output=True,
            text=True,
            timeout=50,
            check=True,
        )
    assert "ResourceWarning: unclosed stream of chat completion" in run.stderr
    assert "Exception ignored in: <function EventStream.__del__" not in run.stderr


KEPT = """
import asyncio, sys
from lmbridge import LLMClient, LLMStreamError, collect
async def ask():
    return await LLMClient(sys.argv[1]).chat_completion([{"role": "user", "content": "x"}], stream=True)
async def read():
    try:
        await collect(stream)
    except LLMStreamError as error:
        print(error)
    await stream.aclose()
stream = asyncio.run(ask())
asyncio.run(read())
"""


def test_a_stream_that_is_read_after_its_loop_was_closed_is_a_named_error() -> None:
    with ServerThread() as api_base:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", KEPT, api_base],
            capture_output=True,
            text=True,
            timeout=50,
            check=True,
        )
    assert "the event loop that it was opened in is closed" in run.stdout


async def test_limits_stay_when_the_server_changes(scripted_server: ScriptedServer) -> None:
    async with LLMClient("http://127.0.0.1:1", limits=Limits(max_concurrency=2)) as client:
        client.api_base = scripted_server.api_base
        await asyncio.gather(*[client.chat_completion(MESSAGES) for _ in range(8)])
    assert scripted_server.max_in_flight == 2
