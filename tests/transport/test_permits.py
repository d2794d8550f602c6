"""Permits: how long a request holds one, who waits for it, and that it always comes back."""

from __future__ import annotations

import asyncio

import pytest

from lmbridge import (
    Limits,
    LLMClient,
    LLMError,
    LLMTimeoutError,
    collect,
)
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, hang_up, raw, reply, sse, stall
from tests.support import HALF, MESSAGES, opened, piece, read_text
from tests.transport.support import ask


@pytest.mark.parametrize("first", [reply(503, {"error": "busy"}), reply(503, {"error": "Loading model"}), hang_up()])
async def test_a_permit_is_held_through_retries_and_polls(
    scripted_server: ScriptedServer, no_waits: list[float], first: Behaviour
) -> None:
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:
        for stream in (True, False):
            scripted_server.requests.clear()
            scripted_server._script.clear()
            scripted_server.script(first)
            asked = asyncio.create_task(client.chat_completion(MESSAGES, model="a", stream=stream))
            await asyncio.sleep(0)
            queued = asyncio.create_task(client.chat_completion(MESSAGES, model="b"))
            reply_or_stream = await asked
            if stream:
                await read_text(reply_or_stream)  # type: ignore[arg-type]  # a stream, here
            await queued
            assert [request.json["model"] for request in scripted_server.requests] == ["a", "a", "b"]


async def test_the_task_that_reads_a_stream_holds_its_permit(scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall(after=[piece("a")]))
    limits = Limits(max_concurrency=1, max_queue=0.05)
    async with LLMClient(scripted_server.api_base, limits=limits) as client:  # noqa: SIM117 - it reads better apart
        async with await asyncio.create_task(client.chat_completion(MESSAGES, stream=True)) as stream:
            with pytest.raises(LLMTimeoutError, match="not admitted within"):  # it is another task's
                await client.chat_completion(MESSAGES)
            await anext(stream)
            with pytest.raises(LLMTimeoutError, match="forever for streams that its own task holds open"):
                await client.chat_completion(MESSAGES)


async def test_at_most_max_concurrency_generations_are_in_flight(scripted_server: ScriptedServer) -> None:
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=3)) as client:
        texts = await asyncio.gather(*[ask(client, stream=bool(number % 2)) for number in range(30)])
    assert texts == ["Hello from the scripted server."] * 30
    assert scripted_server.max_in_flight == 3


async def test_a_permit_is_held_for_a_whole_stream_and_passed_on_in_order(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("first", gate=gate))
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:
        stream = await client.chat_completion(MESSAGES, stream=True)

        async def ask_for(number: int) -> None:
            await client.chat_completion(MESSAGES, model=f"m{number}")

        waiting = [asyncio.create_task(ask_for(number)) for number in range(5)]
        await asyncio.sleep(0)
        assert client._server.transport.queued == 5
        assert await client.health_check()
        assert await client.list_models() == ["test-model"]  # these do not queue
        waiting[1].cancel()
        gate.set()
        await read_text(stream)
        await asyncio.gather(*waiting, return_exceptions=True)
    asked = [request.json["model"] for request in scripted_server.requests[1:] if request.method == "POST"]
    assert asked == ["m0", "m2", "m3", "m4"]


async def test_the_error_of_a_request_that_was_not_admitted_lists_the_holders(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script(stall(after=[piece("a")]))
    limits = Limits(max_concurrency=1, max_queue=0.05)
    async with LLMClient(scripted_server.api_base, "m", limits=limits) as client:
        async with await client.chat_completion(MESSAGES, stream=True):
            asked = asyncio.create_task(client.chat_completion(MESSAGES))  # another task: it may well wait
            with pytest.raises(LLMTimeoutError, match=r"held by: m for \d+ s \(unread for \d+ s\)") as caught:
                await asked
        assert caught.value.phase == "queue"
        assert str(caught.value).startswith(f"chat completion with model 'm' at {scripted_server.api_base}/chat")
        assert (await client.chat_completion(MESSAGES))["choices"]
    assert len(scripted_server.requests) == 2


async def test_a_task_that_would_wait_for_its_own_stream_fails_at_once(scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall(after=[piece("a")]))
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:
        async for _ in (stream := await client.chat_completion(MESSAGES, stream=True)):
            with pytest.raises(LLMTimeoutError, match="forever for streams that its own task holds open") as caught:
                await client.chat_completion(MESSAGES)
            assert caught.value.phase == "queue"
            break
        await stream.aclose()


async def test_a_permit_is_returned_however_a_request_ends(
    scripted_server: ScriptedServer, no_waits: list[float]
) -> None:
    behaviours = [
        reply(400, {"error": "no"}),
        reply(500, {"error": "no"}),
        reply(200, b"no"),
        sse(piece("a")),
        sse(piece("a"), {"error": "no"}),
        sse(done=True),
        raw(b"no"),
    ]
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=2), max_retries=0) as client:
        for behaviour in behaviours * 12:
            for stream in (True, False):
                scripted_server.script(behaviour)
                with pytest.raises(LLMError):
                    await ask(client, stream)
        scripted_server.default = stall(after=[piece("a")])
        for _ in range(50):
            await (await client.chat_completion(MESSAGES, stream=True)).aclose()
        assert client._server.transport.in_flight == 0
        scripted_server.default = answer("Hi")
        assert await ask(client, stream=True) == "Hi"


async def test_a_hundred_streams_at_a_time_are_all_complete(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("one two three four")
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=100)) as client:

        async def one() -> str:
            reply = await collect(await client.chat_completion(MESSAGES, stream=True))
            return reply["choices"][0]["message"]["content"] or ""

        assert await asyncio.gather(*[one() for _ in range(100)]) == ["one two three four"] * 100


async def test_a_permit_is_held_until_the_body_has_ended(scripted_server: ScriptedServer) -> None:
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
