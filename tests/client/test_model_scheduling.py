"""Requests for several models, by a client, at a server that holds one and kills what it generates for another."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

from lmbridge import Limits, LLMClient, LLMError, LLMTimeoutError, ModelLoadError, collect
from lmbridge.testing import OneModelServer, answer
from tests.support import MESSAGES, in_flight

A, B, C = "model-a", "model-b", "model-c"


def quick(**options: Any) -> OneModelServer:
    """One whose loads and answers take long enough to be in each other's way."""
    return OneModelServer(**{"load_seconds": 0.005, "token_seconds": 0.0005, "tokens": 12, **options})


def scheduled(server: OneModelServer, **limits: Any) -> LLMClient:
    """A client that knows what the server can hold."""
    return LLMClient(server.api_base, limits=Limits(**{"max_concurrency": 4, "max_loaded_models": 1, **limits}))


async def ask(client: LLMClient, model: str, *, stream: bool = True) -> str:
    """What the model says, streamed or plain."""
    if stream:
        reply = await collect(await client.chat_completion(MESSAGES, model=model, stream=True))
    else:
        reply = await client.chat_completion(MESSAGES, model=model)
    return reply["choices"][0]["message"]["content"] or ""


async def mixed(client: LLMClient, models: Iterable[str]) -> list[str | BaseException]:
    """What becomes of requests that are made at once, every second one streamed."""
    asked = [ask(client, model, stream=bool(index % 2)) for index, model in enumerate(models)]
    return await asyncio.gather(*asked, return_exceptions=True)


def drawn(count: int, models: Iterable[str], seed: int) -> list[str]:
    return random.Random(seed).choices(list(models), k=count)


@pytest.mark.parametrize("seed", range(5))
async def test_mixed_traffic_is_whole_and_right_with_one_swap(seed: int) -> None:
    async with quick(seed=seed) as server, scheduled(server) as client:
        models = drawn(60, (A, B), seed)
        assert await mixed(client, models) == [server.text(model) for model in models]
        assert (server.swaps, server.kills, server.double_loads) == (1, [], 0)
        assert client.stats().swaps == 1


@pytest.mark.parametrize("seed", range(5))
async def test_nothing_is_killed_when_waiters_become_overdue(seed: int) -> None:
    async with quick(seed=seed, models=(A, B, C)) as server, scheduled(server, max_wait=0.01) as client:
        models = drawn(60, server.models, seed)
        assert await mixed(client, models) == [server.text(model) for model in models]
        assert (server.kills, server.double_loads) == ([], 0)
        assert server.swaps == client.stats().swaps


async def test_without_scheduling_answers_are_lost_and_the_errors_say_how_not_to() -> None:
    async with quick(endings=["error"]) as server, LLMClient(server.api_base) as client:
        models = drawn(60, (A, B), 0)
        results = await mixed(client, models)
        lost = [result for result in results if isinstance(result, BaseException)]
        assert lost
        assert len(server.kills) == len(lost)
        assert server.double_loads
        for error in lost:
            assert isinstance(error, ModelLoadError)
            assert "max_loaded_models=1" in (error.hint or "")


@pytest.mark.parametrize("seed", range(3))
async def test_without_scheduling_nothing_broken_looks_whole(seed: int, no_waits: list[float]) -> None:
    async with quick(seed=seed) as server, LLMClient(server.api_base) as client:
        models = drawn(40, (A, B), seed)
        results = await mixed(client, models)
        assert server.kills
        for model, result in zip(models, results, strict=True):
            assert isinstance(result, LLMError) or result == server.text(model)


async def test_callers_one_after_another_share_what_is_loaded() -> None:
    async with quick(tokens=40) as server, scheduled(server) as client:
        models = [(A, B)[index % 2] for index in range(60)]
        tasks = []
        for number, model in enumerate(models, 1):
            tasks.append(asyncio.create_task(ask(client, model)))
            await reached(client, server, number)
        assert await asyncio.gather(*tasks) == [server.text(model) for model in models]
        assert (server.kills, server.double_loads) == ([], 0)
        assert server.swaps <= 6


async def reached(client: LLMClient, server: OneModelServer, number: int) -> None:
    """Returns when that many requests have come to the server, or wait before it."""
    while len(server.requests) + client.stats().queued < number:
        await asyncio.sleep(0)


async def test_one_request_at_a_time_swaps_each_time_and_kills_nothing() -> None:
    async with quick() as server, scheduled(server) as client:
        for model in (A, B) * 4:
            assert await ask(client, model) == server.text(model)
        assert server.loads == [A, B] * 4
        assert (server.kills, client.stats().swaps) == ([], 7)


async def test_a_busy_model_does_not_keep_another_waiting_for_ever() -> None:
    async with quick() as server, scheduled(server, max_wait=0.02) as client:
        done = asyncio.Event()

        async def feed() -> None:
            while not done.is_set():
                assert await ask(client, A) == server.text(A)

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(feed())
            await server.wait_until(lambda: server.loaded == [A])
            assert await ask(client, B) == server.text(B)
            done.set()
        assert server.kills == []


async def break_off(client: LLMClient, model: str) -> None:
    async with await client.chat_completion(MESSAGES, model=model, stream=True) as stream:
        await anext(stream)


async def cancel(client: LLMClient, model: str) -> None:
    """Cancelled wherever it is when some other request has been answered."""
    task = asyncio.create_task(ask(client, model))
    await ask(client, model)
    task.cancel()
    await asyncio.wait({task})


async def drop(client: LLMClient, model: str) -> None:
    """Cancelled in the queue, or on the way."""
    task = asyncio.create_task(ask(client, model, stream=False))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})


@pytest.mark.parametrize("leave", [break_off, cancel, drop])
async def test_those_who_leave_take_nothing_from_the_others(
    leave: Callable[[LLMClient, str], Awaitable[None]],
) -> None:
    async with quick() as server, scheduled(server, max_wait=0.05) as client:
        models = drawn(40, (A, B), 7)
        results, *_ = await asyncio.gather(
            mixed(client, models), *(leave(client, model) for model in drawn(20, (A, B), 8))
        )
        assert results == [server.text(model) for model in models]
        assert in_flight(client) == client.stats().queued == 0


async def test_a_stream_that_nobody_reads_keeps_its_model_and_the_error_names_it() -> None:
    async with quick() as server, scheduled(server, max_queue=0.05) as client:
        gate = asyncio.Event()
        server.script(answer("one two", gate=gate))
        stream = await client.chat_completion(MESSAGES, model=A, stream=True)
        with pytest.raises(LLMTimeoutError, match=rf"{A} for .* \(unread for") as raised:
            await asyncio.create_task(ask(client, B))
        assert raised.value.phase == "queue"
        assert server.loads == [A]
        gate.set()
        assert (await collect(stream))["choices"][0]["message"]["content"] == "one two"
        assert await ask(client, B) == server.text(B)
        assert (server.kills, in_flight(client)) == ([], 0)


async def test_a_stream_that_is_closed_makes_room_for_another_model() -> None:
    async with quick() as server, scheduled(server) as client:
        server.script(answer("one two", gate=asyncio.Event()))
        stream = await client.chat_completion(MESSAGES, model=A, stream=True)
        waiting = asyncio.create_task(ask(client, B))
        await reached(client, server, 2)
        assert server.loads == [A]
        await stream.aclose()
        assert await waiting == server.text(B)


@pytest.mark.parametrize("seed", range(5))
async def test_with_room_for_two_three_models_share_it(seed: int) -> None:
    async with (
        quick(seed=seed, models=(A, B, C), capacity=2) as server,
        scheduled(server, max_loaded_models=2, max_wait=0.02) as client,
    ):
        models = drawn(60, server.models, seed)
        assert await mixed(client, models) == [server.text(model) for model in models]
        assert server.kills == []


async def test_who_lost_an_answer_may_ask_again() -> None:
    async with quick(endings=["error"]) as server, scheduled(server) as client:
        gate = asyncio.Event()
        server.script(answer("one two", gate=gate))
        lost = asyncio.create_task(ask(client, A))
        await server.wait_until(lambda: server.loaded == [A])
        async with LLMClient(server.api_base) as other:  # another program, which knows of nothing
            assert await ask(other, B) == server.text(B)
        with pytest.raises(ModelLoadError):
            await lost
        assert await mixed(client, [A] * 6) == [server.text(A)] * 6
        assert (len(server.kills), server.double_loads) == (1, 0)
