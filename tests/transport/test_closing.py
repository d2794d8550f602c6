"""Closing a transport while requests and streams are in flight."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lmbridge import (
    Limits,
    LLMClient,
    TaskCancelledError,
)
from lmbridge.testing import ScriptedServer, reply, stall
from lmbridge.transport import transport
from lmbridge.transport.receive import receive_stream
from tests.support import HALF, MESSAGES, in_flight, opened, piece, read_text
from tests.threaded_server import ThreadedServer, run_program


async def test_closing_ends_requests_that_wait_for_a_connection(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", stall())
    client = LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1))
    lists = [asyncio.create_task(client.list_models()) for _ in range(4)]
    await scripted_server.wait_until(lambda: len(scripted_server.requests) == 3)
    await client.close()
    results = await asyncio.gather(*lists, return_exceptions=True)
    assert [type(result) for result in results] == [TaskCancelledError] * 4


async def test_closing_ends_the_lookup_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    looking, never = asyncio.Event(), asyncio.Event()

    async def look_up(*_: object, **__: object) -> object:
        looking.set()
        return await never.wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    client = LLMClient("http://slow.example")
    asked = asyncio.create_task(client.chat_completion(MESSAGES))
    await looking.wait()
    await client.close()
    with pytest.raises(TaskCancelledError):
        await asked


async def test_closing_ends_a_request_on_a_kept_connection(scripted_server: ScriptedServer, client: LLMClient) -> None:
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
        client._server.transport.nodes[0].__del__()


async def test_the_error_says_that_a_request_was_still_queued(scripted_server: ScriptedServer) -> None:
    scripted_server.default = stall()
    client = LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1))
    asked = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(2)]
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    await client.close()
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert "while the request was queued" in str(results[1])
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
    with ThreadedServer() as server:
        run = run_program(LEFT, server.api_base, warnings="always::ResourceWarning")
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


def test_reading_a_stream_after_its_loop_was_closed_is_a_clear_error() -> None:
    with ThreadedServer() as server:
        run = run_program(KEPT, server.api_base, warnings="ignore")
    assert "the event loop in which it was opened is closed" in run.stdout


async def test_a_stream_that_opens_while_the_client_closes_is_closed_too(
    scripted_server: ScriptedServer, client: LLMClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = receive_stream

    async def close_meanwhile(*arguments: Any) -> Any:
        answer = await receive(*arguments)
        await client.close()
        return answer

    monkeypatch.setattr(transport, "receive_stream", close_meanwhile)
    scripted_server.script(stall(after=HALF))
    with pytest.raises(TaskCancelledError, match="the client was closed"):
        await opened(client)
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_closing_ends_a_stream_with_its_partial_reply(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(stall(after=[piece("a"), piece("b")]))
    stream = await client.chat_completion(MESSAGES, stream=True)
    await anext(stream)
    await anext(stream)
    reader = asyncio.create_task(read_text(stream))
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(TaskCancelledError, match="the client was closed") as caught:
        await reader
    assert caught.value.partial["choices"][0]["message"]["content"] == "ab"
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_closing_ends_requests_in_flight_and_in_the_queue(scripted_server: ScriptedServer) -> None:
    scripted_server.default = stall()
    client = LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=2))
    asked = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(5)]
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 2)
    await client.close()
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(result) for result in results] == [TaskCancelledError] * 5
    assert len(scripted_server.requests) == 2


async def test_closing_ends_the_wait_before_a_retry(scripted_server: ScriptedServer) -> None:
    scripted_server.default = reply(429, {"error": "slow down"}, {"Retry-After": "50"})
    client = LLMClient(scripted_server.api_base)
    asked = asyncio.create_task(client.chat_completion(MESSAGES))
    await scripted_server.wait_until(lambda: scripted_server.requests and scripted_server.requests[0].finished)
    await asyncio.sleep(0.05)  # until the client has read the answer and waits
    await client.close()
    with pytest.raises(TaskCancelledError):
        await asked
    assert len(scripted_server.requests) == 1
