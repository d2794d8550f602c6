"""The pool of clients: leases, waiting, giving back, cancellation, lost clients, closing, event loops."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge import (
    Limits,
    LLMClient,
    LLMClientPool,
    LLMError,
    LLMResponseError,
    LLMTimeoutError,
    LLMValidationError,
    ModelMismatchError,
    PoolStats,
    TaskCancelledError,
    Timeouts,
    Transport,
    collect,
)
from lmbridge.client.pool import PooledClient
from lmbridge.testing import Exchange, ScriptedServer, answer, reply, stall
from tests.client.test_lifecycle import collecting
from tests.support import HALF, MESSAGES, cancel_at_each_step, opened, piece, read_text, text_of, turns
from tests.threaded_server import ThreadedServer

NOWHERE = "http://127.0.0.1:1"


@pytest_asyncio.fixture
async def pool(scripted_server: ScriptedServer) -> AsyncIterator[LLMClientPool]:
    """A pool of two clients of the scripted server."""
    async with LLMClientPool(2, api_base=scripted_server.api_base, model="test-model") as pool:
        yield pool


def unconnected_pool(size: int = 1, **options: Any) -> LLMClientPool:
    """Returns a pool whose clients send no requests."""
    return LLMClientPool(size, api_base=NOWHERE, **options)


def start_get(pool: LLMClientPool, model: str | None = None) -> asyncio.Task[LLMClient]:
    """Starts a task that waits for a client."""
    return asyncio.create_task(pool.get_client(model))


def counts(pool: LLMClientPool) -> tuple[int, int]:
    """Returns the number of clients in use and of waiting callers."""
    stats = pool.stats()
    return stats.in_use, stats.waiting


async def name_the_model(exchange: Exchange) -> None:
    """Answers with the name of the requested model in the content."""
    await answer(f"I am {exchange.model}")(exchange)


# Leases


async def test_the_pools_model_is_that_of_clients_requested_without_one() -> None:
    assert LLMClientPool(model="m").model == "m"
    assert LLMClientPool().model is None


async def test_a_client_asks_for_the_model_it_was_leased_for(
    pool: LLMClientPool, scripted_server: ScriptedServer
) -> None:
    scripted_server.default = name_the_model
    async with pool.client("a") as a, pool.client() as default:
        assert (a.model, default.model) == ("a", "test-model")
        replies = [
            await a.chat_completion(MESSAGES),
            await default.chat_completion(MESSAGES),
            await a.chat_completion(MESSAGES, model="b"),
            await collect(await a.chat_completion(MESSAGES, stream=True)),
        ]
        assert await a.list_models() == ["test-model"]
        assert await default.health_check()
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == [
        "I am a",
        "I am test-model",
        "I am b",
        "I am a",
    ]


async def test_two_hundred_tasks_over_fifty_models_get_two_hundred_right_answers(
    scripted_server: ScriptedServer,
) -> None:
    rng = random.Random(1)

    async def in_any_order(exchange: Exchange) -> None:
        await turns(rng.randrange(20))
        await name_the_model(exchange)

    scripted_server.default = in_any_order
    most = 0

    async with LLMClientPool(api_base=scripted_server.api_base, model_mismatch="raise") as pool:

        async def ask(number: int) -> str:
            nonlocal most
            model = f"model-{number % 50}"
            async with pool.client(model) as client:
                most = max(most, pool.stats().in_use)
                if number % 2:
                    reply = await client.chat_completion(MESSAGES)
                else:
                    reply = await collect(await client.chat_completion(MESSAGES, stream=True))
            return reply["choices"][0]["message"]["content"] or ""

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(number)) for number in range(200)]
        assert pool.stats() == PoolStats(size=10, in_use=0, waiting=0)
    assert Counter(task.result() for task in tasks) == {f"I am model-{number}": 4 for number in range(50)}
    assert all(task.result() == f"I am model-{number % 50}" for number, task in enumerate(tasks))
    assert (most, scripted_server.max_in_flight, len(scripted_server.requests)) == (10, 10, 200)
    assert scripted_server.connections <= 12


async def test_a_client_shared_by_many_tasks_has_no_more_requests_in_flight_than_the_pool_size(
    pool: LLMClientPool, scripted_server: ScriptedServer
) -> None:
    gate = asyncio.Event()
    scripted_server.default = answer("Hello", gate=gate)
    async with pool.client() as client:
        requests = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(10)]
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 2)
        gate.set()
        await asyncio.gather(*requests)
    assert scripted_server.max_in_flight == 2


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (20, 3)])
async def test_limits_can_lower_the_number_of_requests_in_flight_but_not_raise_it(
    scripted_server: ScriptedServer, limit: int, most: int
) -> None:
    limits = Limits(max_concurrency=limit)
    async with LLMClientPool(3, api_base=scripted_server.api_base, limits=limits) as pool, pool.client() as client:
        await asyncio.gather(*[client.chat_completion(MESSAGES) for _ in range(10)])
    assert scripted_server.max_in_flight == most


async def test_a_pair_of_mismatched_names_is_logged_once_per_pool(
    pool: LLMClientPool, scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    scripted_server.default = answer("Hi", model="other")
    with caplog.at_level(logging.WARNING, "lmbridge.client"):
        for model in ("a", "b", "a"):
            async with pool.client(model) as client:
                await client.chat_completion(MESSAGES)
    assert [record.args[:2] for record in caplog.records if isinstance(record.args, tuple)] == [
        ("a", "other"),
        ("b", "other"),
    ]


async def test_clients_have_the_options_of_their_pool(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("Hi", model="other")
    pool = LLMClientPool(
        api_base=scripted_server.origin,
        api_key="secret-key",
        max_retries=0,
        timeout=Timeouts(first_byte=0.05),
        model_mismatch="raise",
    )
    async with pool, pool.client("a") as client:
        assert client.api_base == scripted_server.api_base
        with pytest.raises(LLMValidationError, match="api_base cannot be set"):
            client.api_base = NOWHERE
        with pytest.raises(ModelMismatchError):
            await client.chat_completion(MESSAGES)
        scripted_server.script(reply(503), stall())
        with pytest.raises(LLMResponseError, match="after 1 attempt"):
            await client.chat_completion(MESSAGES)
        with pytest.raises(LLMTimeoutError, match=r"within 0\.05 s"):
            await client.chat_completion(MESSAGES)
    assert scripted_server.requests[0].headers["authorization"] == "Bearer secret-key"


@pytest.mark.parametrize(
    "options",
    [
        {"api_base": "nonsense"},
        {"model": " "},
        {"api_key": "a b"},
        {"timeout": "5"},
        {"max_retries": -1},
        {"limits": 5},
        {"model_mismatch": "shout"},
        {"ssl": "yes"},
        {"transport": "tcp"},
        {"limits": Limits(), "transport": Transport(NOWHERE)},
    ],
)
def test_an_invalid_option_raises_the_same_error_as_for_a_client(options: dict[str, Any]) -> None:
    with pytest.raises(LLMValidationError) as of_the_client:
        LLMClient(**options)
    with pytest.raises(LLMValidationError) as of_the_pool:
        LLMClientPool(**options)
    assert str(of_the_pool.value) == str(of_the_client.value)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "10", None])
def test_an_invalid_size_is_refused(size: Any) -> None:
    with pytest.raises(LLMValidationError, match=r"pool_size must be an integer of at least 1, not "):
        LLMClientPool(size)


async def test_stats_and_repr_show_the_state_of_the_pool() -> None:
    pool = unconnected_pool(2)
    assert repr(pool) == "<LLMClientPool http://127.0.0.1:1/v1 0 of 2 in use>"
    held = [await pool.get_client(), await pool.get_client()]
    waiting = start_get(pool)
    await turns()
    assert pool.stats() == PoolStats(size=2, in_use=2, waiting=1)
    pool.release_client(held.pop())
    assert pool.stats() == PoolStats(size=2, in_use=2, waiting=0)
    pool.release_client(await waiting)
    assert pool.stats() == PoolStats(size=2, in_use=1, waiting=0)
    await pool.close()
    assert repr(pool) == "<LLMClientPool http://127.0.0.1:1/v1 closed>"
    with pytest.raises(AttributeError):
        pool.stats().size = 3  # type: ignore[misc]  # stats are read-only


# Order


async def test_a_free_client_is_returned_without_waiting() -> None:
    getting = unconnected_pool().get_client("a")
    with pytest.raises(StopIteration) as given_at_once:
        getting.send(None)
    await given_at_once.value.value.close()


async def test_callers_are_served_in_the_order_in_which_they_came() -> None:
    pool = unconnected_pool(3)
    tasks = [start_get(pool, str(number)) for number in range(10)]
    for done in range(3, 11):
        await turns()
        assert [task.done() for task in tasks] == [True] * done + [False] * (10 - done)
        assert counts(pool) == (3, 10 - done)
        pool.release_client(tasks[done - 2].result())
    assert [(await task).model for task in tasks] == [str(number) for number in range(10)]
    for task in (tasks[0], tasks[9]):
        pool.release_client(task.result())
    assert counts(pool) == (0, 0)


async def test_a_caller_that_comes_during_a_release_queues_behind_the_waiting_ones() -> None:
    pool = unconnected_pool()
    client = await pool.get_client()
    first = start_get(pool)
    await turns()
    pool.release_client(client)
    last = start_get(pool)
    await turns()
    assert (first.done(), last.done()) == (True, False)
    pool.release_client(await first)
    pool.release_client(await last)


async def test_waiting_sets_no_timer() -> None:
    pool = unconnected_pool()
    client = await pool.get_client()
    waiting = start_get(pool)
    await turns()
    assert asyncio.get_running_loop()._scheduled == []  # type: ignore[attr-defined]  # asyncio's timers
    pool.release_client(client)
    await (await waiting).close()


@pytest.mark.parametrize("model", ["", " ", 5])
async def test_an_invalid_model_name_is_refused_before_waiting(model: Any) -> None:
    pool = unconnected_pool()
    async with pool.client():
        with pytest.raises(LLMValidationError, match="model must be the name of a model"):
            await pool.get_client(model)
        with pytest.raises(LLMValidationError, match="model must be the name of a model"):
            async with pool.client(model):
                pass


# Giving back


async def test_a_block_gives_its_client_back_however_it_is_left() -> None:
    pool = unconnected_pool()

    async def returning() -> None:
        async with pool.client():
            return

    async def raising() -> None:
        async with pool.client():
            raise KeyError

    async def waiting() -> None:
        async with pool.client():
            await asyncio.Event().wait()

    async def releasing() -> None:
        async with pool.client() as client:
            pool.release_client(client)

    async def closing() -> None:
        async with pool.client() as client:
            await client.close()
            await client.close()

    async def as_a_client() -> None:
        async with await pool.get_client():
            assert counts(pool) == (1, 0)

    for leave in (returning, raising, waiting, releasing, closing, as_a_client):
        task = asyncio.create_task(leave())
        await turns()
        assert counts(pool) == (int(leave is waiting), 0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert counts(pool) == (0, 0), leave


async def test_a_second_release_raises_and_frees_nothing() -> None:
    pool = unconnected_pool()
    client = await pool.get_client("m")
    pool.release_client(client)
    other = await pool.get_client()
    with pytest.raises(LLMValidationError, match="model='m'> was already given back; release a client once"):
        pool.release_client(client)
    await client.close()
    assert counts(pool) == (1, 0)
    pool.release_client(other)


async def test_releasing_a_client_of_another_pool_raises() -> None:
    pool, other = unconnected_pool(), unconnected_pool()
    of_the_other = await other.get_client()
    for foreign in (of_the_other, LLMClient(NOWHERE), None):
        with pytest.raises(LLMValidationError, match=r"does not belong to <LLMClientPool .*; release a client that"):
            pool.release_client(foreign)  # type: ignore[arg-type]  # not a client
    assert counts(other) == (1, 0)
    other.release_client(of_the_other)


USES: list[Callable[[LLMClient], Awaitable[Any]]] = [
    lambda client: client.chat_completion(MESSAGES),
    lambda client: client.chat_completion(MESSAGES, stream=True),
    lambda client: client.text_completion("once"),
    lambda client: client.embeddings(["text"]),
    lambda client: client.create_response("Hello"),
    lambda client: client.list_models(),
    lambda client: client.health_check(),
    lambda client: client.server_info(),
    lambda client: client.lmstudio.models(),
]


@pytest.mark.parametrize("use", USES)
async def test_a_client_that_was_given_back_refuses_every_request(
    pool: LLMClientPool, scripted_server: ScriptedServer, use: Callable[[LLMClient], Awaitable[Any]]
) -> None:
    client = await pool.get_client()
    await client.chat_completion(MESSAGES)
    pool.release_client(client)
    sent = len(scripted_server.requests)
    for _ in range(2):
        with pytest.raises(LLMError, match="given back to its pool; get another one with `await pool") as e:
            await use(client)
        assert e.value.context["url"].startswith(scripted_server.api_base)
    assert len(scripted_server.requests) == sent
    assert client.model == "test-model"
    assert client.api_base == scripted_server.api_base


async def test_a_stream_goes_on_after_its_client_was_given_back_and_keeps_its_permit(
    pool: LLMClientPool, scripted_server: ScriptedServer
) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("one two three", gate=gate), answer("four five", gate=gate))
    streams = []
    for _ in range(2):
        async with pool.client() as client:
            streams.append(await opened(client))
    async with pool.client() as client:
        third = asyncio.create_task(client.chat_completion(MESSAGES))
        await turns(10)
        assert len(scripted_server.requests) == 2
        gate.set()
        assert [await read_text(stream) for stream in streams] == ["one two three", "four five"]
        assert (await third)["choices"]
    assert scripted_server.max_in_flight == 2


async def test_a_plain_request_goes_on_after_its_client_was_given_back(
    scripted_server: ScriptedServer, no_waits: list[float]
) -> None:
    async with LLMClientPool(api_base=scripted_server.api_base, api_key="secret-key") as pool:
        scripted_server.script(reply(503, {"error": "busy"}), stall())
        client = await pool.get_client()
        asked = asyncio.create_task(client.chat_completion(MESSAGES))
        await scripted_server.wait_until(lambda: len(scripted_server.requests) == 2)
        pool.release_client(client)
        await turns()
        assert not asked.done()
        asked.cancel()
        await asyncio.wait([asked])

        release = asyncio.Event()

        async def refuse(exchange: Exchange) -> None:
            await release.wait()
            await reply(400, {"error": "bad key secret-key"})(exchange)

        scripted_server.script(refuse)
        client = await pool.get_client()
        asked = asyncio.create_task(client.chat_completion(MESSAGES))
        await scripted_server.wait_until(lambda: len(scripted_server.requests) == 3)
        pool.release_client(client)
        release.set()
        with pytest.raises(LLMResponseError) as caught:
            await asked
        assert "bad key [api_key]" in str(caught.value)


# Cancellation


async def test_a_cancelled_waiter_costs_the_others_nothing() -> None:
    pool = unconnected_pool()
    client = await pool.get_client()
    tasks = [start_get(pool) for _ in range(3)]
    await turns()
    tasks[0].cancel()
    await turns()
    assert (tasks[0].cancelled(), pool.stats().waiting) == (True, 2)
    pool.release_client(client)
    await turns()
    assert (tasks[1].done(), tasks[2].done()) == (True, False)
    await (await tasks[1]).close()
    await (await tasks[2]).close()


async def test_a_client_is_not_handed_to_a_waiter_that_is_being_cancelled() -> None:
    pool = unconnected_pool()
    client = await pool.get_client()
    tasks = [start_get(pool), start_get(pool)]
    await turns()
    tasks[0].cancel()
    # The cancelled task has not run yet.
    pool.release_client(client)
    await turns()
    assert (tasks[0].cancelled(), tasks[1].done()) == (True, True)
    await (await tasks[1]).close()


async def test_waiters_cancelled_in_the_moment_they_get_a_client_pass_it_on() -> None:
    pool = unconnected_pool()
    client = await pool.get_client()
    tasks = [start_get(pool, str(number)) for number in range(4)]
    await turns()
    pool.release_client(client)
    for task in tasks[:3]:
        task.cancel()
    await turns(6)
    assert [task.cancelled() for task in tasks] == [True, True, True, False]
    assert (await tasks[3]).model == "3"
    pool.release_client(await tasks[3])
    assert counts(pool) == (0, 0)


async def test_a_client_whose_last_waiter_is_cancelled_is_given_back() -> None:
    pool = unconnected_pool()
    client = await pool.get_client()
    task = start_get(pool)
    await turns()
    pool.release_client(client)
    task.cancel()
    await asyncio.wait([task])
    assert (task.cancelled(), counts(pool)) == (True, (0, 0))


async def test_a_timeout_around_the_wait_ends_it() -> None:
    pool = unconnected_pool()
    async with pool.client():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await pool.get_client()
        assert counts(pool) == (1, 0)


async def test_a_wait_that_is_closed_without_a_cancellation_passes_its_client_on() -> None:
    pool = unconnected_pool()
    client = await pool.get_client()
    waiting = pool.get_client()
    waiting.send(None)
    pool.release_client(client)
    assert counts(pool) == (1, 0)
    waiting.close()
    assert counts(pool) == (0, 0)


async def test_a_cancellation_at_each_await_of_a_block_leaves_nothing_behind(scripted_server: ScriptedServer) -> None:
    async with LLMClientPool(1, api_base=scripted_server.api_base) as pool:

        async def run() -> None:
            held = await pool.get_client()
            asyncio.get_running_loop().call_soon(pool.release_client, held)
            async with pool.client("a") as client:
                await client.chat_completion(MESSAGES)
                await collect(await client.chat_completion(MESSAGES, stream=True))

        async def after() -> None:
            await turns()
            assert counts(pool) == (0, 0)
            async with pool.client("b") as client:
                assert (await client.chat_completion(MESSAGES))["choices"]

        await cancel_at_each_step(run, after, at_least=5)
    await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


@pytest.mark.parametrize("seed", range(5))
async def test_random_cancellations_lose_no_client_and_mix_up_no_answers(
    scripted_server: ScriptedServer, seed: int
) -> None:
    rng = random.Random(seed)
    scripted_server.default = name_the_model
    async with LLMClientPool(4, api_base=scripted_server.api_base) as pool:

        async def ask(number: int) -> str:
            async with pool.client(f"m{number}") as client:
                assert pool.stats().in_use <= 4
                return await read_text(await opened(client))

        tasks = [asyncio.create_task(ask(number)) for number in range(60)]
        for task in rng.sample(tasks, 40):
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for number, outcome in enumerate(outcomes):
            assert isinstance(outcome, asyncio.CancelledError) or outcome == f"I am m{number}"
        assert sum(isinstance(outcome, str) for outcome in outcomes) >= 20
        assert counts(pool) == (0, 0)
        held = [await pool.get_client() for _ in range(4)]
        for client in held:
            pool.release_client(client)
    # The server may notice only later that a client has left.
    assert scripted_server.max_in_flight <= 4 + len(scripted_server.aborts)


Kind = Literal["come", "release", "drop", "cancel"]
KINDS: tuple[Kind, ...] = ("come", "come", "release", "drop", "cancel")
_steps = st.lists(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9)), max_size=6), max_size=15)


@settings(deadline=None, max_examples=150)
@given(size=st.integers(1, 4), steps=_steps)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_no_client_is_lost_in_any_order_of_gets_releases_drops_and_cancellations(
    size: int, steps: list[list[tuple[Kind, int]]]
) -> None:
    async def run() -> None:
        pool = unconnected_pool(size)
        # The callers in the order in which they came, without those that have ended.
        tasks: list[asyncio.Task[LLMClient]] = []
        for step in steps:
            # All actions of a step happen in one turn of the event loop.
            for kind, number in step:
                if kind == "come":
                    tasks.append(start_get(pool))
                elif tasks:
                    task = tasks[number % len(tasks)]
                    if not task.done() and kind == "cancel":
                        task.cancel()
                    elif task.done() and kind in ("release", "drop"):
                        tasks.remove(task)
                        if kind == "release":
                            pool.release_client(task.result())
                    del task
                assert pool.stats().in_use <= size
            await turns(10)
            tasks = [task for task in tasks if not task.cancelled()]
            out = min(size, len(tasks))
            assert counts(pool) == (out, len(tasks) - out)
            assert [task.done() for task in tasks] == [True] * out + [False] * (len(tasks) - out)
        while tasks:
            pool.release_client(tasks.pop(0).result())
            await turns()
        assert counts(pool) == (0, 0)

    asyncio.run(run())


# Lost clients

DROPPED = "model='lost'> was dropped without being given back to its pool; use `async with pool.client"


async def test_a_dropped_client_warns_and_the_next_waiter_gets_its_slot() -> None:
    pool = unconnected_pool()
    client = await pool.get_client("lost")
    waiting = start_get(pool, "next")
    await turns()
    with pytest.warns(ResourceWarning, match=DROPPED):
        del client
    # The waiter is served later, because a client can be dropped in the middle of anything.
    assert counts(pool) == (0, 1)
    assert (await waiting).model == "next"
    pool.release_client(await waiting)
    assert counts(pool) == (0, 0)


async def test_the_slot_of_a_client_in_a_reference_cycle_is_freed_by_the_garbage_collector() -> None:
    pool = unconnected_pool()
    holders = [await pool.get_client("lost")]

    def lose_the_client_in_a_cycle() -> None:
        cycle: list[Any] = [holders.pop()]
        cycle.append(cycle)
        del cycle
        gc.collect()

    with pytest.warns(ResourceWarning, match=DROPPED):
        lose_the_client_in_a_cycle()
    async with asyncio.timeout(5):
        await (await pool.get_client()).close()


@pytest.mark.parametrize("way", ["dropped", "released"])
async def test_a_client_lost_in_another_thread_wakes_a_waiter_in_the_thread_of_the_loop(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    pool = unconnected_pool()
    holders = [await pool.get_client("lost")]
    waiting = start_get(pool)
    await turns()
    threads: list[int] = []
    serve_waiters = pool._serve_waiters

    def recording_serve_waiters() -> None:
        threads.append(threading.get_ident())
        serve_waiters()

    monkeypatch.setattr(pool, "_serve_waiters", recording_serve_waiters)
    if way == "dropped":
        with pytest.warns(ResourceWarning, match=DROPPED):
            await asyncio.to_thread(holders.clear)
    else:
        await asyncio.to_thread(pool.release_client, holders[0])
    await (await waiting).close()
    assert set(threads) == {threading.get_ident()}
    assert counts(pool) == (0, 0)


def test_a_client_that_outlives_its_loop_can_be_given_back_or_dropped() -> None:
    pool = unconnected_pool(2)

    async def take() -> tuple[LLMClient, LLMClient]:
        return await pool.get_client(), await pool.get_client("lost")

    first, second = asyncio.run(take())
    pool.release_client(first)
    with pytest.warns(ResourceWarning, match=DROPPED):
        del second
    assert counts(pool) == (0, 0)


def test_a_client_whose_constructor_failed_is_dropped_without_a_warning() -> None:
    PooledClient.__new__(PooledClient)


async def test_a_dropped_client_of_a_closed_pool_does_not_warn() -> None:
    pool = unconnected_pool()
    client = await pool.get_client()
    await pool.close()
    del client
    assert counts(pool) == (0, 0)


# Closing


async def test_close_ends_requests_streams_and_waits(pool: LLMClientPool, scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall(), stall(after=HALF))
    plain, streaming = await pool.get_client(), await pool.get_client()
    asked = asyncio.create_task(plain.chat_completion(MESSAGES))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    stream = await opened(streaming)
    for text in ("Hel", "lo"):
        assert text_of(await anext(stream)) == text
    waiting = [start_get(pool) for _ in range(3)]
    await turns()
    await pool.close()
    for task in waiting:
        with pytest.raises(TaskCancelledError, match="the pool was closed during the wait for a client"):
            await task
    with pytest.raises(TaskCancelledError):
        await asked
    with pytest.raises(TaskCancelledError) as caught:
        await read_text(stream)
    assert caught.value.partial["choices"][0]["message"]["content"] == "Hello"
    assert counts(pool) == (2, 0)
    pool.release_client(plain)
    await streaming.close()
    assert counts(pool) == (0, 0)
    await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


async def test_a_closed_pool_and_its_clients_refuse_requests_and_do_not_open_again(
    pool: LLMClientPool, scripted_server: ScriptedServer
) -> None:
    client = await pool.get_client()
    await client.chat_completion(MESSAGES)
    for _ in range(2):
        await pool.close()
    for use in (pool.get_client, pool.__aenter__, lambda: client.chat_completion(MESSAGES), client.list_models):
        with pytest.raises(LLMError, match="the pool is closed; create a new LLMClientPool"):
            await use()
    pool.release_client(client)
    with pytest.raises(LLMValidationError, match="was already given back"):
        pool.release_client(client)
    with pytest.raises(LLMError, match="the pool is closed"):
        await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 1


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_a_cancellation_during_close_stays_a_cancellation(cancel_first: bool) -> None:
    pool = unconnected_pool()
    client = await pool.get_client()
    waiting = start_get(pool)
    await turns()
    if cancel_first:
        waiting.cancel()
    await pool.close()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    pool.release_client(client)


async def test_a_client_handed_out_just_before_close_refuses_requests() -> None:
    pool = unconnected_pool()
    client = await pool.get_client()
    waiting = start_get(pool)
    await turns()
    pool.release_client(client)
    await pool.close()
    with pytest.raises(LLMError, match="the pool is closed"):
        await (await waiting).chat_completion(MESSAGES)


async def test_a_pool_does_not_close_a_transport_that_was_passed_to_it(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("one two", gate=gate))
    async with Transport(scripted_server.api_base, limits=Limits(max_concurrency=1)) as transport:
        async with LLMClientPool(5, transport=transport) as pool:
            client = await pool.get_client()
            stream = await opened(client)
        with pytest.raises(LLMError, match="the pool is closed"):
            await client.chat_completion(MESSAGES)
        gate.set()
        assert await read_text(stream) == "one two"
        assert await LLMClient(transport=transport).health_check()


async def test_an_unused_pool_needs_neither_an_event_loop_nor_closing() -> None:
    await asyncio.to_thread(LLMClientPool, api_base=NOWHERE)


async def test_a_cancellation_at_each_await_of_close_leaves_nothing_open(scripted_server: ScriptedServer) -> None:
    pool = client = None

    async def run() -> None:
        nonlocal pool, client
        pool = LLMClientPool(api_base=scripted_server.api_base)
        client = await pool.get_client()
        await client.chat_completion(MESSAGES)
        await pool.close()

    async def after() -> None:
        assert pool is not None
        await pool.close()
        await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)

    await cancel_at_each_step(run, after, at_least=2)
    await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


# Event loops


async def test_use_in_a_second_live_event_loop_raises() -> None:
    pool = unconnected_pool()
    client = await pool.get_client()
    waiting = start_get(pool)
    await turns()

    def elsewhere() -> None:
        for use in (pool.get_client, pool.close):
            with pytest.raises(LLMError, match="another event loop that is still alive; make one for each event loop"):
                asyncio.run(use())

    await asyncio.to_thread(elsewhere)
    assert counts(pool) == (1, 1)
    pool.release_client(client)
    pool.release_client(await waiting)


def test_a_close_in_the_wrong_event_loop_can_be_repeated_in_the_right_one() -> None:
    with ThreadedServer() as server, asyncio.Runner() as one, asyncio.Runner() as other:
        pool = LLMClientPool(api_base=server.api_base)
        client = one.run(pool.get_client())
        other.run(collecting(client))
        with pytest.raises(LLMError, match="in use in another event loop that is still alive"):
            one.run(pool.close())
        other.run(pool.close())
        pool.release_client(client)


def test_waiters_of_a_closed_event_loop_are_forgotten() -> None:
    pool = unconnected_pool()

    async def wait_forever() -> None:
        await pool.get_client("of the first")

    loop = asyncio.new_event_loop()
    client = loop.run_until_complete(pool.get_client())
    waiting = wait_forever()
    task = loop.create_task(waiting)
    loop.run_until_complete(turns())
    loop.close()
    assert counts(pool) == (1, 1)

    async def go_on() -> None:
        second = start_get(pool, "of the second")
        await turns()
        assert counts(pool) == (1, 1)
        pool.release_client(client)
        assert (await second).model == "of the second"
        await pool.close()
        pool.release_client(await second)

    asyncio.run(go_on())
    assert not task.done()
    # Otherwise asyncio would log that this test has left a task pending, which is its purpose.
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    waiting.close()


def test_a_pool_can_be_used_in_one_event_loop_after_another() -> None:
    with ThreadedServer() as server:
        pool = LLMClientPool(1, api_base=server.api_base)

        async def ask() -> None:
            async with pool.client() as client:
                await client.chat_completion(MESSAGES)
            # asyncio warns about connections that are still open when their event loop is closed.
            await pool._client.close()

        for _ in range(2):
            asyncio.run(ask())
        asyncio.run(pool.close())
        with pytest.raises(LLMError, match="the pool is closed"):
            asyncio.run(ask())


async def test_a_stream_left_in_the_middle_frees_its_permit_for_the_next_client(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script(stall(after=[piece("a")]))
    async with LLMClientPool(1, api_base=scripted_server.api_base) as pool:
        async with pool.client() as client, await opened(client) as stream:
            await anext(stream)
        async with pool.client() as client:
            assert (await client.chat_completion(MESSAGES))["choices"]
    await scripted_server.wait_until(lambda: scripted_server.aborts)
