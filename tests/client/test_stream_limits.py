"""Streams: what holds them, how long, and what is closed when they are left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from lmbridge import (
    Limits,
    LLMClient,
    LLMStreamError,
    LLMTimeoutError,
    TaskCancelledError,
    Timeouts,
    collect,
)
from lmbridge.testing import Exchange, ScriptedServer, answer, stall
from lmbridge.transport import transport
from tests.support import HALF, MESSAGES, in_flight, opened, piece, read_text

# Left early


async def test_a_read_that_is_thrown_away_closes_the_connection(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))
    stream = await opened(client)
    await anext(stream)
    await anext(stream)
    read = stream.__anext__()
    read.send(None)  # into its wait
    read.close()
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_a_cancel_before_it_is_known_whether_it_is_a_stream_closes_the_connection(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    async def head_only(exchange: Exchange) -> None:
        await exchange.start(content_type="text/plain")
        started.set()
        await exchange.client_left()

    started = asyncio.Event()
    scripted_server.script(head_only)
    asked = asyncio.create_task(opened(client))
    await started.wait()
    await asyncio.sleep(0.05)  # until the client has read the head
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_a_stream_that_opens_while_the_client_closes_is_closed_too(
    scripted_server: ScriptedServer, client: LLMClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = transport._receive_stream

    async def close_meanwhile(*arguments: Any) -> Any:
        answer = await receive(*arguments)
        await client.close()
        return answer

    monkeypatch.setattr(transport, "_receive_stream", close_meanwhile)
    scripted_server.script(stall(after=HALF))
    with pytest.raises(TaskCancelledError, match="the client was closed"):
        await opened(client)
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


# Connections


async def test_the_place_is_held_until_the_body_has_ended(scripted_server: ScriptedServer) -> None:
    aborted_before: list[int] = []

    async def second(exchange: Exchange) -> None:
        aborted_before.append(len(scripted_server.aborts))
        await answer("second")(exchange)

    scripted_server.script(stall(after=[*HALF, piece(finish_reason="stop"), "data: [DONE]\n\n"]), second)
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:
        first = await opened(client)
        queued = asyncio.create_task(client.chat_completion(MESSAGES))
        assert await read_text(first) == "Hello"
        await queued
    assert aborted_before == [1]


# Time


async def test_the_whole_has_its_limit_beside_the_one_for_a_gap(scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall(after=HALF))
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(idle=50, total=0.2)) as client:
        with pytest.raises(LLMTimeoutError, match=r"no end within 0\.2 s") as caught:
            await read_text(await opened(client))
    assert caught.value.phase == "total"


async def test_a_gap_may_be_longer_than_the_wait_for_the_first_event(scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall(after=HALF))
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=0.6, idle=1.2)) as client:
        with pytest.raises(LLMTimeoutError, match=r"no further event within 1\.2 s") as caught:
            await read_text(await opened(client))
    assert caught.value.phase == "idle"


async def test_no_limit_runs_while_nobody_reads(scripted_server: ScriptedServer) -> None:
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


async def test_a_server_that_says_nothing_more_after_the_finish_reason_breaks_no_answer(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script(stall(after=[*HALF, piece(finish_reason="stop")]))
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(idle=0.5)) as client:
        assert await read_text(await opened(client)) == "Hello"
        assert in_flight(client) == 0


async def test_collect_closes_a_generator_that_it_gives_up() -> None:
    closed: list[bool] = []

    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield piece("a")
            yield piece(choices="none")
            yield piece("b")
        finally:
            closed.append(True)

    with pytest.raises(LLMStreamError, match="unknown shape"):
        await collect(chunks())
    assert closed == [True]


async def test_a_late_first_event_does_not_put_off_the_limit_of_the_gap_after_it(
    scripted_server: ScriptedServer,
) -> None:
    async def late(exchange: Exchange) -> None:
        await exchange.start()
        await asyncio.sleep(0.4)  # longer than a gap may be
        await exchange.chunk(piece("a"))
        await exchange.client_left()

    scripted_server.script(late)
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=50, idle=0.2)) as client:
        with pytest.raises(LLMTimeoutError, match=r"no further event within 0\.2 s"):
            async with asyncio.timeout(10):
                await read_text(await opened(client))
