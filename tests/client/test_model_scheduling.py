"""Scheduling of requests for several models, with a server that holds one model and kills generations of others."""

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


def fast_server(**options: Any) -> OneModelServer:
    """Returns a server whose loads and answers overlap, but are short."""
    return OneModelServer(**{"load_seconds": 0.005, "token_seconds": 0.0005, "tokens": 12, **options})


def scheduling_client(server: OneModelServer, **limits: Any) -> LLMClient:
    """Returns a client whose limits fit the server."""
    return LLMClient(server.api_base, limits=Limits(**{"max_concurrency": 4, "max_loaded_models": 1, **limits}))


async def ask(client: LLMClient, model: str, *, stream: bool = True) -> str:
    """Returns the text of a reply, streamed or plain."""
    if stream:
        reply = await collect(await client.chat_completion(MESSAGES, model=model, stream=True))
    else:
        reply = await client.chat_completion(MESSAGES, model=model)
    return reply["choices"][0]["message"]["content"] or ""


async def send_mixed(client: LLMClient, models: Iterable[str]) -> list[str | BaseException]:
    """Returns the outcomes of requests that start at the same time, every second one streamed."""
    asked = [ask(client, model, stream=bool(index % 2)) for index, model in enumerate(models)]
    return await asyncio.gather(*asked, return_exceptions=True)


def draw_models(count: int, models: Iterable[str], seed: int) -> list[str]:
    return random.Random(seed).choices(list(models), k=count)


@pytest.mark.parametrize("seed", range(5))
async def test_mixed_requests_are_all_answered_with_a_single_swap(seed: int) -> None:
    async with fast_server(seed=seed) as server, scheduling_client(server) as client:
        models = draw_models(60, (A, B), seed)
        assert await send_mixed(client, models) == [server.text(model) for model in models]
        assert (server.swaps, server.kills, server.double_loads) == (1, [], 0)
        assert client.stats().swaps == 1


@pytest.mark.parametrize("seed", range(5))
async def test_no_generation_is_killed_when_waiters_become_overdue(seed: int) -> None:
    async with fast_server(seed=seed, models=(A, B, C)) as server, scheduling_client(server, max_wait=0.01) as client:
        models = draw_models(60, server.models, seed)
        assert await send_mixed(client, models) == [server.text(model) for model in models]
        assert (server.kills, server.double_loads) == ([], 0)
        assert server.swaps == client.stats().swaps


async def test_without_scheduling_answers_are_lost_and_the_errors_suggest_scheduling() -> None:
    async with fast_server(endings=["error"]) as server, LLMClient(server.api_base, limits=Limits()) as client:
        models = draw_models(60, (A, B), 0)
        results = await send_mixed(client, models)
        lost = [result for result in results if isinstance(result, BaseException)]
        assert lost
        assert len(server.kills) == len(lost)
        assert server.double_loads
        for error in lost:
            assert isinstance(error, ModelLoadError)
            assert "max_loaded_models=1" in (error.hint or "")


@pytest.mark.parametrize("seed", range(3))
async def test_without_scheduling_no_broken_answer_looks_complete(seed: int, no_waits: list[float]) -> None:
    async with fast_server(seed=seed) as server, LLMClient(server.api_base, limits=Limits()) as client:
        models = draw_models(40, (A, B), seed)
        results = await send_mixed(client, models)
        assert server.kills
        for model, result in zip(models, results, strict=True):
            assert isinstance(result, LLMError) or result == server.text(model)


async def test_sequential_callers_share_the_loaded_model() -> None:
    async with fast_server(tokens=40) as server, scheduling_client(server) as client:
        models = [(A, B)[index % 2] for index in range(60)]
        tasks = []
        for number, model in enumerate(models, 1):
            tasks.append(asyncio.create_task(ask(client, model)))
            await wait_until_reached(client, server, number)
        assert await asyncio.gather(*tasks) == [server.text(model) for model in models]
        assert (server.kills, server.double_loads) == ([], 0)
        assert server.swaps <= 6


async def wait_until_reached(client: LLMClient, server: OneModelServer, number: int) -> None:
    """Waits until that many requests have arrived at the server or are queued in the client."""
    while len(server.requests) + client.stats().queued < number:
        await asyncio.sleep(0)


async def test_one_request_at_a_time_swaps_each_time_and_kills_no_generation() -> None:
    async with fast_server() as server, scheduling_client(server) as client:
        for model in (A, B) * 4:
            assert await ask(client, model) == server.text(model)
        assert server.loads == [A, B] * 4
        assert (server.kills, client.stats().swaps) == ([], 7)


async def test_a_busy_model_does_not_keep_another_waiting_forever() -> None:
    async with fast_server() as server, scheduling_client(server, max_wait=0.02) as client:
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


async def leave_stream_early(client: LLMClient, model: str) -> None:
    async with await client.chat_completion(MESSAGES, model=model, stream=True) as stream:
        await anext(stream)


async def cancel(client: LLMClient, model: str) -> None:
    """Starts a request and cancels it when another request has been answered."""
    task = asyncio.create_task(ask(client, model))
    await ask(client, model)
    task.cancel()
    await asyncio.wait({task})


async def drop(client: LLMClient, model: str) -> None:
    """Starts a request and cancels it in the queue, or while it is being sent."""
    task = asyncio.create_task(ask(client, model, stream=False))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})


@pytest.mark.parametrize("leave", [leave_stream_early, cancel, drop])
async def test_requests_that_are_abandoned_do_not_affect_the_others(
    leave: Callable[[LLMClient, str], Awaitable[None]],
) -> None:
    async with fast_server() as server, scheduling_client(server, max_wait=0.05) as client:
        models = draw_models(40, (A, B), 7)
        results, *_ = await asyncio.gather(
            send_mixed(client, models), *(leave(client, model) for model in draw_models(20, (A, B), 8))
        )
        assert results == [server.text(model) for model in models]
        assert in_flight(client) == client.stats().queued == 0


async def test_an_unread_stream_keeps_its_model_and_the_queue_timeout_names_it() -> None:
    async with fast_server() as server, scheduling_client(server, max_queue=0.05) as client:
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


async def test_a_closed_stream_makes_room_for_another_model() -> None:
    async with fast_server() as server, scheduling_client(server) as client:
        server.script(answer("one two", gate=asyncio.Event()))
        stream = await client.chat_completion(MESSAGES, model=A, stream=True)
        waiting = asyncio.create_task(ask(client, B))
        await wait_until_reached(client, server, 2)
        assert server.loads == [A]
        await stream.aclose()
        assert await waiting == server.text(B)


@pytest.mark.parametrize("seed", range(5))
async def test_three_models_share_a_server_with_room_for_two(seed: int) -> None:
    async with (
        fast_server(seed=seed, models=(A, B, C), capacity=2) as server,
        scheduling_client(server, max_loaded_models=2, max_wait=0.02) as client,
    ):
        models = draw_models(60, server.models, seed)
        assert await send_mixed(client, models) == [server.text(model) for model in models]
        assert server.kills == []


async def test_a_request_can_be_repeated_after_an_eviction() -> None:
    async with fast_server(endings=["error"]) as server, scheduling_client(server) as client:
        gate = asyncio.Event()
        server.script(answer("one two", gate=gate))
        lost = asyncio.create_task(ask(client, A))
        await server.wait_until(lambda: server.loaded == [A])
        async with LLMClient(server.api_base) as other:  # another program
            assert await ask(other, B) == server.text(B)
        with pytest.raises(ModelLoadError):
            await lost
        assert await send_mixed(client, [A] * 6) == [server.text(A)] * 6
        assert (len(server.kills), server.double_loads) == (1, 0)
