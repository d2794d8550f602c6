"""The time limits of requests and streams, one by one and together."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lmbridge import (
    LLMClient,
    LLMRateLimitError,
    LLMTimeoutError,
    Timeouts,
)
from lmbridge.testing import Exchange, ScriptedServer, answer, reply, stall
from lmbridge.transport import session
from tests.support import HALF, MESSAGES, in_flight, opened, piece, read_text, replaced, turns
from tests.transport.support import ask


def test_the_time_limits_of_aiohttp_are_switched_off() -> None:
    limits = session._client_timeout(5)
    assert (limits.total, limits.connect, limits.sock_read, limits.sock_connect) == (None, None, None, 5)


async def never_resolved(*_: object, **__: object) -> object:
    return await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_resolver_that_never_answers_counts_as_connecting(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", never_resolved)
    async with LLMClient("http://lm.example", timeout=Timeouts(connect=0.1), max_retries=0) as client:
        # Concurrent requests share one resolution.
        requests = [ask(client, stream) for _ in range(3)]
        errors = await asyncio.gather(*requests, client.list_models(), return_exceptions=True)
    for error in errors:
        assert isinstance(error, LLMTimeoutError)
        assert error.phase == "connect"
        assert error.message == "the host name was not resolved within 0.1 s"
        assert "put an IP address into api_base" in (error.hint or "")


async def test_a_full_thread_pool_counts_as_connecting(scripted_server: ScriptedServer) -> None:
    loop, gate = asyncio.get_running_loop(), threading.Event()
    with ThreadPoolExecutor(1) as executor:
        loop.set_default_executor(executor)
        blocked = loop.run_in_executor(None, gate.wait)
        origin = replaced(scripted_server.origin, "127.0.0.1", "localhost")
        async with LLMClient(origin, timeout=Timeouts(connect=0.1), max_retries=0) as client:
            with pytest.raises(LLMTimeoutError) as caught:
                await client.chat_completion(MESSAGES)
            assert caught.value.phase == "connect"
            assert "threads" in (caught.value.hint or "")
            gate.set()
            await blocked
        async with LLMClient(origin) as client:
            assert (await client.chat_completion(MESSAGES))["choices"]


async def test_the_resolution_of_a_name_has_no_limit_without_one(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    resolve, gate = loop.getaddrinfo, asyncio.Event()

    async def slow(*arguments: Any, **options: Any) -> Any:
        await gate.wait()
        return await resolve(*arguments, **options)

    monkeypatch.setattr(loop, "getaddrinfo", slow)
    origin = replaced(scripted_server.origin, "127.0.0.1", "localhost")
    async with LLMClient(origin, timeout=Timeouts(connect=None)) as client:
        task = asyncio.create_task(ask(client, False))
        await turns()
        gate.set()
        assert await task


async def test_the_total_limit_ends_a_stream_whose_reader_is_slower_than_the_server(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script(answer("", chunks=["a" * 2000] * 1000))  # more than can arrive at a time
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(total=1)) as client:
        stream = await client.chat_completion(MESSAGES, stream=True)

        await anext(stream)
        # The reader's own time counts as well. After it, what has arrived can be read, and then the error comes.
        await asyncio.sleep(1.1)
        with pytest.raises(LLMTimeoutError) as caught:
            async for _ in stream:
                pass
    assert caught.value.phase == "total"


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_does_not_come_is_a_timeout(scripted_server: ScriptedServer, stream: bool) -> None:
    scripted_server.script(stall())
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=0.1)) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await ask(client, stream)
        assert client._server.transport.in_flight == 0
    assert caught.value.phase == "first_byte"
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    assert len(scripted_server.requests) == 1


async def test_a_plain_reply_has_to_be_complete_in_time(scripted_server: ScriptedServer) -> None:
    async def trickle(exchange: Exchange) -> None:
        await exchange.start(200, {"Content-Length": "1000"}, chunked=False)
        while True:
            await exchange.send(b" ")
            await asyncio.sleep(0.01)

    scripted_server.script(trickle)
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=0.1)) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.phase == "first_byte"


async def test_the_total_limit_includes_attempts_and_waits(
    scripted_server: ScriptedServer, no_waits: list[float]
) -> None:
    scripted_server.script(reply(503, {"error": "busy"}), stall())
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(total=1)) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.phase == "total"
    assert caught.value.context["attempts"] == 2


async def test_a_wait_that_would_exceed_the_total_limit_is_not_begun(scripted_server: ScriptedServer) -> None:
    scripted_server.script(reply(429, {"error": "slow down"}, {"Retry-After": "30"}))
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(total=5)) as client:
        with pytest.raises(LLMRateLimitError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.retry_after == 30


@pytest.fixture
def full_listener() -> Iterator[str]:
    """The address of a socket whose backlog is full: a further connect gets no answer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        yield f"http://{address[0]}:{address[1]}"
        for filler in fillers:
            filler.close()


async def test_connecting_has_its_own_time_limit(full_listener: str) -> None:
    async with LLMClient(full_listener, timeout=Timeouts(connect=0.1)) as client:
        with pytest.raises(LLMTimeoutError, match=r"could not connect within 0\.1 s") as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.phase == "connect"


async def test_the_total_limit_holds_beside_the_idle_limit(scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall(after=HALF))
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(idle=50, total=0.2)) as client:
        with pytest.raises(LLMTimeoutError, match=r"the reply did not end within 0\.2 s") as caught:
            await read_text(await opened(client))
    assert caught.value.phase == "total"


async def test_a_gap_may_be_longer_than_the_wait_for_the_first_event(scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall(after=HALF))
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=0.6, idle=1.2)) as client:
        with pytest.raises(LLMTimeoutError, match=r"no further event arrived within 1\.2 s") as caught:
            await read_text(await opened(client))
    assert caught.value.phase == "idle"


async def test_no_limit_runs_while_the_stream_is_not_read(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()

    async def in_two_parts(exchange: Exchange) -> None:
        for chunk in HALF:
            await exchange.chunk(chunk)
        await gate.wait()
        await exchange.chunk(piece("!", finish_reason="stop"))
        await exchange.done()

    scripted_server.script(in_two_parts)
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=5, idle=0.6)) as client:
        stream = await opened(client)
        await anext(stream)
        await anext(stream)  # which was waited for, with a limit
        gate.set()
        await asyncio.sleep(0.8)  # the reader's own time, longer than the limit
        assert await read_text(stream) == "!"


async def test_silence_after_the_finish_reason_does_not_break_an_answer(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script(stall(after=[*HALF, piece(finish_reason="stop")]))
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(idle=0.5)) as client:
        assert await read_text(await opened(client)) == "Hello"
        assert in_flight(client) == 0


async def test_a_late_first_event_does_not_delay_the_idle_limit(
    scripted_server: ScriptedServer,
) -> None:
    async def late(exchange: Exchange) -> None:
        await exchange.start()
        await asyncio.sleep(0.4)  # longer than a gap may be
        await exchange.chunk(piece("a"))
        await exchange.client_left()

    scripted_server.script(late)
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=50, idle=0.2)) as client:
        with pytest.raises(LLMTimeoutError, match=r"no further event arrived within 0\.2 s"):
            async with asyncio.timeout(10):
                await read_text(await opened(client))
