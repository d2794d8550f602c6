"""Clients that are opened, closed, shared, and used in several event loops."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from lmbridge import Limits, LLMClient, LLMError, LLMValidationError, Transport, collect
from lmbridge.testing import ScriptedServer, answer
from tests.support import MESSAGES, read_text
from tests.threaded_server import ThreadedServer, run_program


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


async def test_a_closed_client_opens_again_and_closes_twice(scripted_server: ScriptedServer) -> None:
    client = LLMClient(scripted_server.api_base)
    await client.close()
    for _ in range(2):
        assert (await client.chat_completion(MESSAGES))["choices"]
        await client.close()
        await client.close()
    await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


async def test_an_unused_client_needs_no_loop_and_no_closing() -> None:
    LLMClient("http://127.0.0.1:1")
    await asyncio.to_thread(LLMClient, "http://127.0.0.1:1")


async def test_clients_that_share_a_transport_share_its_limits_and_leave_it_open(
    scripted_server: ScriptedServer,
) -> None:
    async with Transport(scripted_server.api_base, limits=Limits(max_concurrency=2)) as transport:
        clients = [LLMClient(transport=transport, model=f"m{number}") for number in range(4)]
        await asyncio.gather(*[client.chat_completion(MESSAGES) for client in clients for _ in range(5)])
        assert scripted_server.max_in_flight == 2
        await clients[0].close()
        assert await clients[1].health_check()
        with pytest.raises(LLMValidationError, match="api_base cannot be set"):
            clients[1].api_base = "http://127.0.0.1:1"
    await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


UNCLOSED = """
import asyncio, sys, warnings
from lmbridge import LLMClient, collect
client = LLMClient(sys.argv[1])
async def ask():
    print((await collect(await client.chat_completion([{"role": "user", "content": "x"}], stream=True)))["model"])
async def ask_and_close():
    async with client:
        await ask()
asyncio.run(ask())
asyncio.run(ask())
asyncio.run(client.close())
asyncio.run(ask_and_close())
"""


def test_a_client_that_was_not_closed_before_its_loop_warns_and_works_on() -> None:
    # In a process of its own: asyncio and aiohttp warn as well, whenever the dead loop's sockets are collected.
    with ThreadedServer() as server:
        run = run_program(UNCLOSED, server.api_base, warnings="default::ResourceWarning")
    assert run.stdout.split() == ["test-model"] * 3
    assert run.stderr.count("ResourceWarning: an lmbridge client was still open when its event loop was closed") == 2


QUIET = """
import asyncio, gc, sys
from lmbridge import LLMClient
client = LLMClient(sys.argv[1])
messages = [{"role": "user", "content": "x"}]
async def ask():
    global client
    await client.chat_completion(messages)
    client = LLMClient(sys.argv[1])  # as if the cell of a notebook was run again
    gc.collect()
    await client.chat_completion(messages)
asyncio.run(ask())
asyncio.run(ask())
"""


def test_clients_that_are_never_closed_print_nothing_with_the_settings_of_python() -> None:
    with ThreadedServer() as server:
        run = subprocess.run(
            [sys.executable, "-c", QUIET, server.api_base], capture_output=True, text=True, timeout=50, check=True
        )
        server.wait_until(lambda scripted: not scripted.open_connections)
    assert (run.stdout, run.stderr) == ("", "")


DROPPED = """
import asyncio, gc, sys
from lmbridge import LLMClient, collect
async def ask():
    messages = [{"role": "user", "content": "x"}]
    stream = await LLMClient(sys.argv[1]).chat_completion(messages, stream=True)
    gc.collect()
    await asyncio.sleep(0)
    print(len((await collect(stream))["choices"][0]["message"]["content"]))
asyncio.run(ask())
"""


def test_a_stream_can_be_read_after_its_client_was_dropped() -> None:
    with ThreadedServer() as server:
        server.answer(answer("word " * 20_000))  # too long to have arrived when the client is dropped
        run = subprocess.run(
            [sys.executable, "-c", DROPPED, server.api_base], capture_output=True, text=True, timeout=50, check=True
        )
    assert run.stdout == "100000\n"


def test_a_client_that_was_closed_works_in_the_next_loop() -> None:
    with ThreadedServer() as server:
        client = LLMClient(server.api_base)
        for _ in range(3):
            asyncio.run(closing(client))


async def test_a_second_live_loop_is_a_clear_error(client: LLMClient) -> None:
    await client.chat_completion(MESSAGES)

    def elsewhere() -> None:
        for use in (client.chat_completion(MESSAGES), client.close()):
            with pytest.raises(LLMError, match="another event loop that is still alive; make one for each event loop"):
                asyncio.run(use)

    await asyncio.to_thread(elsewhere)
    assert (await client.chat_completion(MESSAGES))["choices"]


async def collecting(client: LLMClient) -> None:
    await collect(await client.chat_completion(MESSAGES, stream=True))


async def closing(client: LLMClient) -> None:
    async with client:
        await collecting(client)
