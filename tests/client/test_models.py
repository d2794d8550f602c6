"""`ModelValidator`: what is cached and for how long, shared requests, names of models, closing, event loops."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import (
    CacheStats,
    LLMClient,
    LLMConnectionError,
    LLMError,
    LLMResponseError,
    LLMValidationError,
    ModelNotFoundError,
    ModelValidator,
    TaskCancelledError,
)
from lmbridge.testing import Behaviour, Exchange, MockTransport, ScriptedServer, hang_up, reply, stall
from tests.support import assert_linear, cancel_at_each_step

MODELS = "/v1/models"


class Clock:
    """A timer that stands still until a test sets it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """A reply with a list of models that is sent when `opened` is set."""

    def __init__(self, *models: str) -> None:
        self.models = models
        self.opened = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        await self.opened.wait()
        await reply(200, {"data": [{"id": model} for model in self.models]})(exchange)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest_asyncio.fixture
async def validator(scripted_server: ScriptedServer, clock: Clock) -> AsyncIterator[ModelValidator]:
    async with ModelValidator(scripted_server.api_base, timer=clock) as validator:
        yield validator


def own_tasks() -> set[asyncio.Task[Any]]:
    """Returns the running tasks that the validator has started."""
    return {task for task in asyncio.all_tasks() if "ModelValidator" in repr(task.get_coro())}


async def start_callers(
    validator: ModelValidator, server: ScriptedServer, callers: int, requests: int = 1
) -> list[asyncio.Task[list[str]]]:
    """Starts callers, and waits until the server has received that many requests."""
    tasks = [asyncio.create_task(validator.get_available_models()) for _ in range(callers)]
    await server.wait_until(lambda: len(server.requests) == requests)
    return tasks


# The cache


async def test_a_list_is_requested_once(scripted_server: ScriptedServer, validator: ModelValidator) -> None:
    scripted_server.models = ["a", "b"]
    for _ in range(3):
        assert await validator.get_available_models() == ["a", "b"]
    assert len(scripted_server.requests) == 1
    assert validator.cache_stats() == CacheStats(hits=2, misses=1, expirations=0, size=1, maxsize=100, ttl=600)


async def test_the_cache_of_a_new_validator_is_empty() -> None:
    stats = ModelValidator(ttl=5, maxsize=3).cache_stats()
    assert stats == CacheStats(hits=0, misses=0, expirations=0, size=0, maxsize=3, ttl=5)


async def test_each_caller_gets_a_list_of_its_own(validator: ModelValidator) -> None:
    for _ in range(2):
        models = await validator.get_available_models()
        assert models == ["test-model"]
        models.clear()


async def test_a_list_is_cached_for_ttl_seconds(
    scripted_server: ScriptedServer, validator: ModelValidator, clock: Clock
) -> None:
    await validator.get_available_models()
    scripted_server.models = ["new"]
    clock.now += 599.9
    assert await validator.get_available_models() == ["test-model"]
    clock.now += 0.1
    assert await validator.get_available_models() == ["new"]
    stats = validator.cache_stats()
    assert (stats.hits, stats.misses, stats.expirations, stats.size) == (1, 2, 1, 1)


async def test_an_expired_list_is_counted_once(validator: ModelValidator, clock: Clock) -> None:
    await validator.get_available_models()
    clock.now += 600
    for _ in range(2):
        assert (validator.cache_stats().size, validator.cache_stats().expirations) == (0, 1)
    await validator.get_available_models()
    assert validator.cache_stats().expirations == 1


async def test_the_time_of_a_list_starts_at_its_arrival(
    scripted_server: ScriptedServer, validator: ModelValidator, clock: Clock
) -> None:
    gate = Gate("a")
    scripted_server.on_path(MODELS, gate)
    (caller,) = await start_callers(validator, scripted_server, 1)
    clock.now += 400
    gate.opened.set()
    await caller
    clock.now += 400
    assert await validator.get_available_models() == ["a"]
    assert len(scripted_server.requests) == 1


async def test_every_list_that_expires_is_counted(scripted_server: ScriptedServer) -> None:
    # Each time that the clock is read, it is a second later.
    ticks = iter(range(1_000_000))
    async with ScriptedServer() as other, LLMClient(scripted_server.api_base) as client:
        validator = ModelValidator(client=client, ttl=3, timer=lambda: next(ticks))
        for number in range(60):
            client.api_base = other.api_base if number % 3 else scripted_server.api_base
            await validator.get_available_models()
        stats = validator.cache_stats()
        assert stats.misses == len(scripted_server.requests + other.requests) == stats.expirations + stats.size


async def test_invalidate_drops_all_lists(scripted_server: ScriptedServer, validator: ModelValidator) -> None:
    await validator.get_available_models()
    scripted_server.models = ["new"]
    validator.invalidate()
    assert validator.cache_stats().size == 0
    assert await validator.get_available_models() == ["new"]
    assert validator.cache_stats().expirations == 0


async def test_a_list_requested_before_invalidate_is_not_cached(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    old, new = Gate("old"), Gate("new")
    scripted_server.on_path(MODELS, old)
    before = await start_callers(validator, scripted_server, 2)
    validator.invalidate()
    scripted_server.on_path(MODELS, new)
    after = await start_callers(validator, scripted_server, 2, requests=2)
    new.opened.set()
    assert await asyncio.gather(*after) == [["new"], ["new"]]
    old.opened.set()
    assert await asyncio.gather(*before) == [["old"], ["old"]]
    assert await validator.get_available_models() == ["new"]
    assert len(scripted_server.requests) == 2


async def test_each_server_has_its_own_list(scripted_server: ScriptedServer, clock: Clock) -> None:
    async with ScriptedServer(["other"]) as other, LLMClient(scripted_server.api_base) as client:
        validator = ModelValidator(client=client, timer=clock)
        for _ in range(2):
            client.api_base = scripted_server.api_base
            assert await validator.get_available_models() == ["test-model"]
            client.api_base = other.api_base
            assert await validator.get_available_models() == ["other"]
        assert (len(scripted_server.requests), len(other.requests)) == (1, 1)
        clock.now += 600
        assert await validator.get_available_models() == ["other"]
        assert (validator.cache_stats().expirations, validator.cache_stats().size) == (2, 1)


async def test_a_list_dropped_because_of_maxsize_is_not_counted_as_expired(scripted_server: ScriptedServer) -> None:
    async with ScriptedServer() as other, LLMClient(scripted_server.api_base) as client:
        validator = ModelValidator(client=client, maxsize=1)
        for server in (scripted_server, other, scripted_server):
            client.api_base = server.api_base
            await validator.get_available_models()
        stats = validator.cache_stats()
        assert (stats.misses, stats.expirations, stats.size, stats.maxsize) == (3, 0, 1, 1)


async def test_a_list_requested_while_api_base_is_set_is_cached_for_neither_server(
    scripted_server: ScriptedServer,
) -> None:
    gate = Gate("old")
    scripted_server.on_path(MODELS, gate)
    async with ScriptedServer(["other"]) as other, LLMClient(scripted_server.api_base) as client:
        validator = ModelValidator(client=client)
        (before,) = await start_callers(validator, scripted_server, 1)
        client.api_base = other.api_base
        assert await validator.get_available_models() == ["other"]
        gate.opened.set()
        assert await before == ["old"]
        assert await validator.get_available_models() == ["other"]
        assert validator.cache_stats().size == 1


async def test_setting_api_base_right_after_a_call_caches_nothing_wrong_for_the_old_server(
    scripted_server: ScriptedServer,
) -> None:
    async with ScriptedServer(["other"]) as other, LLMClient(scripted_server.api_base) as client:
        validator = ModelValidator(client=client)
        asked = asyncio.create_task(validator.get_available_models())
        asyncio.get_running_loop().call_soon(setattr, client, "api_base", other.api_base)
        await asked
        client.api_base = scripted_server.api_base
        assert await validator.get_available_models() == ["test-model"]


# Failures


@pytest.mark.usefixtures("no_waits")
async def test_a_failure_is_raised_by_all_waiting_callers_and_is_not_cached(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    scripted_server.on_path(MODELS, reply(500, {"error": "broken"}))
    results = await asyncio.gather(*[validator.get_available_models() for _ in range(3)], return_exceptions=True)
    assert [type(result) for result in results] == [LLMResponseError] * 3
    failed = len(scripted_server.requests)
    scripted_server.on_path(MODELS, reply(200, {"data": [{"id": "back"}]}))
    assert await validator.get_available_models() == ["back"]
    assert len(scripted_server.requests) == failed + 1
    stats = validator.cache_stats()
    assert (stats.hits, stats.misses, stats.size) == (0, 4, 1)


async def test_a_reply_that_is_not_a_list_of_models_is_not_cached(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    scripted_server.on_path(MODELS, reply(200, {"data": [{"name": "a"}]}))
    for _ in range(2):
        with pytest.raises(LLMResponseError, match="not a list of models"):
            await validator.get_available_models()
    assert validator.cache_stats().size == 0


@pytest.mark.usefixtures("no_waits")
async def test_a_failed_second_request_is_not_reported_as_model_not_found(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    await validator.get_available_models()
    scripted_server.on_path(MODELS, hang_up())
    with pytest.raises(LLMConnectionError):
        await validator.validate_model("new")
    assert await validator.get_available_models() == ["test-model"]


# Shared requests


async def test_concurrent_callers_share_one_request(scripted_server: ScriptedServer, validator: ModelValidator) -> None:
    results = await asyncio.gather(*[validator.get_available_models() for _ in range(50)])
    assert results == [["test-model"]] * 50
    assert len({id(result) for result in results}) == 50
    assert len(scripted_server.requests) == 1
    assert (validator.cache_stats().hits, validator.cache_stats().misses) == (0, 50)


@pytest.mark.parametrize("cancelled", [0, 1, 2])
async def test_a_cancelled_caller_does_not_fail_the_others(
    scripted_server: ScriptedServer, validator: ModelValidator, cancelled: int
) -> None:
    gate = Gate("a")
    scripted_server.on_path(MODELS, gate)
    callers = await start_callers(validator, scripted_server, 3)
    callers[cancelled].cancel()
    await asyncio.wait([callers[cancelled]])
    assert callers.pop(cancelled).cancelled()
    gate.opened.set()
    assert await asyncio.gather(*callers) == [["a"], ["a"]]
    assert len(scripted_server.requests) == 1
    assert not scripted_server.aborts


async def test_the_request_is_cancelled_with_its_last_caller(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    scripted_server.on_path(MODELS, stall())
    callers = await start_callers(validator, scripted_server, 3)
    for caller in callers:
        caller.cancel()
        await asyncio.wait([caller])
        assert caller.cancelled()
    assert not own_tasks()
    await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 1)


async def test_a_request_that_is_being_cancelled_is_not_shared(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    scripted_server.on_path(MODELS, stall())
    (caller,) = await start_callers(validator, scripted_server, 1)
    scripted_server.on_path(MODELS, reply(200, {"data": [{"id": "a"}]}))
    caller.cancel()
    # After one turn of the event loop, the caller has cancelled the request, but the request has not ended yet.
    await asyncio.sleep(0)
    assert own_tasks()
    assert await validator.get_available_models() == ["a"]


async def test_a_timeout_around_a_call_ends_its_request(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    scripted_server.on_path(MODELS, stall())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await validator.get_available_models()
    assert not own_tasks()


async def test_a_cancellation_at_each_await_of_a_call_leaves_no_task_behind(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    async def ask() -> None:
        validator.invalidate()
        await validator.validate_model("test-model")

    async def check() -> None:
        assert not own_tasks()

    await cancel_at_each_step(ask, check, at_least=1)
    assert await validator.get_available_models() == ["test-model"]


class SlowToCancelClient(LLMClient):
    """A client whose requests, when they are cancelled, go on until `released` is set and then fail."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.cancelled, self.released = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def list_models(self, **options: Any) -> list[str]:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
            await self.released.wait()
            raise LLMConnectionError("broken")


async def test_a_cancelled_caller_waits_until_its_request_has_ended() -> None:
    client = SlowToCancelClient()
    caller = asyncio.create_task(ModelValidator(client=client).get_available_models())
    await client.asked.wait()
    caller.cancel()
    await client.cancelled.wait()
    assert not caller.done()
    client.released.set()
    await asyncio.wait([caller])
    assert caller.cancelled()
    assert not own_tasks()


async def test_a_second_cancellation_ends_that_wait_and_asyncio_logs_nothing() -> None:
    logged: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
    client = SlowToCancelClient()
    caller = asyncio.create_task(ModelValidator(client=client).get_available_models())
    await client.asked.wait()
    caller.cancel()
    await client.cancelled.wait()
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()
    (request,) = own_tasks()
    client.released.set()
    await asyncio.wait([request])
    del caller, request
    gc.collect()
    assert logged == []


# Names of models


@pytest.mark.parametrize("model", ["a", "org/a-1.5", "a:8", "a:latest", "a@q4_k_m", "a@q4_k_m:2", "Ä"])
async def test_the_whole_id_is_compared(scripted_server: ScriptedServer, validator: ModelValidator, model: str) -> None:
    scripted_server.models = ["b", model]
    assert await validator.validate_model(model) == model


@pytest.mark.parametrize(
    ("asked", "listed", "found"),
    [
        ("a", ["b", "a@q4_k_m"], "a@q4_k_m"),
        ("a", ["a@q4_k_m", "a"], "a"),
        ("a", ["a@q4_k_m", "a@q8_0"], "a"),
        ("a:2", ["a:2@q4"], "a:2@q4"),
        ("a", ["a:8b", "a:latest"], "a:latest"),
        ("a", ["a:latest", "a"], "a"),
    ],
)
async def test_a_name_stands_for_its_quantization_and_for_its_latest_tag(
    scripted_server: ScriptedServer, validator: ModelValidator, asked: str, listed: list[str], found: str
) -> None:
    scripted_server.models = listed
    assert await validator.validate_model(asked) == found


@pytest.mark.parametrize(
    ("asked", "listed"),
    [
        ("a", "a:8"),
        ("a:8", "a"),
        ("a:latest", "a"),
        ("a:8", "a:latest"),
        ("a@q4", "a"),
        ("a@q4", "a@q8"),
        ("a", "ab@q4"),
        ("a", "A"),
        ("a", "a@"),
        ("a ", "a"),
    ],
)
async def test_a_name_does_not_stand_for_other_ids(
    scripted_server: ScriptedServer, validator: ModelValidator, asked: str, listed: str
) -> None:
    scripted_server.models = [listed]
    with pytest.raises(ModelNotFoundError):
        await validator.validate_model(asked)


async def test_model_not_found_lists_the_models_and_close_matches(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    scripted_server.models = ["qwen3-4b", "gemma-3"]
    with pytest.raises(ModelNotFoundError) as caught:
        await validator.validate_model("qwen3-4")
    error = caught.value
    assert (error.model_name, error.available_models) == ("qwen3-4", ["qwen3-4b", "gemma-3"])
    assert str(error) == (
        f"model look-up at {scripted_server.api_base}: model 'qwen3-4' not found (did you mean 'qwen3-4b'?); the server"
        " has: qwen3-4b, gemma-3; load or download it on the server, or ask for a model that the server has"
    )
    # A list that has just been requested is not requested again.
    assert len(scripted_server.requests) == 1


async def test_a_model_in_the_cached_list_is_found_without_a_request(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    await validator.get_available_models()
    scripted_server.models = []
    assert await validator.validate_model("test-model") == "test-model"
    assert (validator.cache_stats().hits, validator.cache_stats().misses) == (1, 1)


async def test_a_model_missing_from_the_cached_list_is_looked_up_afresh(
    scripted_server: ScriptedServer, validator: ModelValidator, clock: Clock
) -> None:
    await validator.get_available_models()
    scripted_server.models = ["test-model", "new"]
    clock.now += 500
    assert await validator.validate_model("new") == "new"
    clock.now += 500
    # The new list has replaced the cached one.
    assert await validator.get_available_models() == ["test-model", "new"]
    assert len(scripted_server.requests) == 2
    stats = validator.cache_stats()
    assert (stats.hits, stats.misses, stats.expirations) == (1, 2, 0)


async def test_a_model_is_not_looked_up_in_a_list_that_is_too_old(
    scripted_server: ScriptedServer, validator: ModelValidator, clock: Clock
) -> None:
    await validator.validate_model("test-model")
    scripted_server.models = ["new"]
    clock.now += 600
    with pytest.raises(ModelNotFoundError):
        await validator.validate_model("test-model")
    assert (validator.cache_stats().hits, validator.cache_stats().expirations) == (0, 1)


async def test_model_not_found_is_not_cached(scripted_server: ScriptedServer, validator: ModelValidator) -> None:
    with pytest.raises(ModelNotFoundError):
        await validator.validate_model("new")
    scripted_server.models = ["new"]
    assert await validator.validate_model("new") == "new"


async def test_concurrent_second_requests_are_shared(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    await validator.get_available_models()
    looks = [validator.validate_model(name) for name in ("a", "b", "test-model") * 5]
    results = await asyncio.gather(*looks, return_exceptions=True)
    assert [type(result) for result in results] == [ModelNotFoundError, ModelNotFoundError, str] * 5
    assert len(scripted_server.requests) == 2


async def test_a_server_without_models_has_an_empty_list(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    scripted_server.models = []
    assert await validator.get_available_models() == []
    assert await validator.get_available_models() == []
    assert len(scripted_server.requests) == 1
    with pytest.raises(ModelNotFoundError, match="model 'a' not found; load or download it"):
        await validator.validate_model("a")


@pytest.mark.parametrize("name", ["", "  ", None, 3, ["test-model"], b"test-model"])
async def test_an_invalid_name_is_refused_before_anything_is_sent(
    scripted_server: ScriptedServer, validator: ModelValidator, name: Any
) -> None:
    with pytest.raises(LLMValidationError, match=r"model must be .*; get_available_models\(\) returns") as caught:
        await validator.validate_model(name)
    assert not isinstance(caught.value, ModelNotFoundError)
    assert not scripted_server.requests


# Closing


async def test_close_ends_a_request_in_progress(scripted_server: ScriptedServer, validator: ModelValidator) -> None:
    scripted_server.on_path(MODELS, stall())
    callers = await start_callers(validator, scripted_server, 2)
    await validator.close()
    assert not own_tasks()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(result) for result in results] == [TaskCancelledError] * 2
    assert str(results[0]) == f"model list at {scripted_server.api_base}: the validator was closed during the request"
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_close_waits_until_the_request_has_ended() -> None:
    client = SlowToCancelClient()
    validator = ModelValidator(client=client)
    caller = asyncio.create_task(validator.get_available_models())
    await client.asked.wait()
    closing = asyncio.create_task(validator.close())
    await client.cancelled.wait()
    assert not closing.done()
    client.released.set()
    await closing
    assert not own_tasks()
    with pytest.raises(LLMConnectionError):
        await caller


async def test_a_cancelled_close_still_closes_the_client(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise idle connections could be closed because of their age.
    monkeypatch.setattr("lmbridge.transport.session.KEEPALIVE_SECONDS", 60)
    gate = Gate()
    scripted_server.on_path(MODELS, gate)
    validator = ModelValidator(scripted_server.api_base)
    callers = await start_callers(validator, scripted_server, 1)
    validator.invalidate()
    scripted_server.on_path(MODELS, stall())
    callers += await start_callers(validator, scripted_server, 1, requests=2)
    gate.opened.set()
    # There is an idle connection, too.
    await callers[0]
    closing = asyncio.create_task(validator.close())
    asyncio.get_running_loop().call_soon(closing.cancel)
    await asyncio.wait([closing, callers[1]])
    assert closing.cancelled()
    await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


async def test_a_closed_validator_opens_again_and_can_be_closed_twice(scripted_server: ScriptedServer) -> None:
    validator = ModelValidator(scripted_server.api_base)
    await validator.close()
    for _ in range(2):
        validator.invalidate()
        assert await validator.get_available_models() == ["test-model"]
        await validator.close()
        await validator.close()
        await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


async def test_a_client_that_was_passed_stays_open(scripted_server: ScriptedServer, client: LLMClient) -> None:
    async with ModelValidator(client=client) as validator:
        await validator.get_available_models()
    await client.list_models()
    assert [request.connection for request in scripted_server.requests] == [1, 1]


async def test_a_request_of_a_client_that_was_passed_ends_when_the_validator_is_closed(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path(MODELS, stall())
    async with ModelValidator(client=client) as validator:
        (caller,) = await start_callers(validator, scripted_server, 1)
    with pytest.raises(TaskCancelledError):
        await caller
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_closing_the_client_ends_the_request(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.on_path(MODELS, stall())
    validator = ModelValidator(client=client)
    (caller,) = await start_callers(validator, scripted_server, 1)
    await client.close()
    with pytest.raises(TaskCancelledError, match="the client was closed"):
        await caller


async def test_a_cancellation_at_each_await_of_close_leaves_nothing_open(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path(MODELS, stall())
    validator = ModelValidator(scripted_server.api_base)
    callers: list[asyncio.Task[list[str]]] = []

    async def close() -> None:
        callers[:] = [asyncio.create_task(validator.get_available_models())]
        seen = len(scripted_server.requests)
        await scripted_server.wait_until(lambda: len(scripted_server.requests) > seen)
        await validator.close()

    async def check() -> None:
        await validator.close()
        results = await asyncio.gather(*callers, return_exceptions=True)
        assert [type(result) for result in results] == [TaskCancelledError]
        assert not own_tasks()

    await cancel_at_each_step(close, check, at_least=2)
    await check()


# Event loops


async def run_in_another_loop(make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Returns the result of a coroutine in another event loop, in a thread, while this loop is alive."""
    return await asyncio.to_thread(lambda: asyncio.run(make()))


async def test_a_request_is_not_shared_between_event_loops(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    gate = Gate("a")
    scripted_server.on_path(MODELS, gate)
    (caller,) = await start_callers(validator, scripted_server, 1)
    with pytest.raises(LLMError, match="this client is in use in another event loop"):
        await run_in_another_loop(validator.get_available_models)
    gate.opened.set()
    assert await caller == ["a"]
    assert await run_in_another_loop(validator.get_available_models) == ["a"]


async def test_close_does_not_end_requests_of_another_event_loop(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    gate = Gate("a")
    scripted_server.on_path(MODELS, gate)
    validator = ModelValidator(client=client)
    (caller,) = await start_callers(validator, scripted_server, 1)
    await run_in_another_loop(validator.close)
    gate.opened.set()
    assert await caller == ["a"]


# Loaded models


def lm_studio(*loaded: str) -> Behaviour:
    """Answers with LM Studio's own list, in which these models are loaded."""
    models: list[dict[str, Any]] = [
        {"type": "llm", "key": name, "loaded_instances": [{"id": name, "config": {}}] if name in loaded else []}
        for name in ("a", "b@q4_k_m")
    ]
    return reply(200, {"models": models})


async def test_loaded_models_are_distinguished_from_downloaded_ones_and_not_cached(
    scripted_server: ScriptedServer, validator: ModelValidator
) -> None:
    scripted_server.models = ["a", "b@q4_k_m"]
    for loaded in (["a"], ["a", "b@q4_k_m"], []):
        scripted_server.on_path("/api/v1/models", lm_studio(*loaded))
        assert await validator.get_loaded_models() == loaded
        assert await validator.get_available_models() == ["a", "b@q4_k_m"]
    stats = validator.cache_stats()
    assert (stats.hits, stats.misses) == (2, 1)


async def test_loaded_models_are_none_if_the_server_does_not_report_them(validator: ModelValidator) -> None:
    assert await validator.get_loaded_models() is None


@pytest.mark.usefixtures("no_waits")
async def test_asking_an_unreachable_server_for_its_loaded_models_raises() -> None:
    async with ModelValidator("http://127.0.0.1:1") as validator:
        with pytest.raises(LLMConnectionError):
            await validator.get_loaded_models()


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ttl": 0}, "ttl must be a positive number of seconds, not 0"),
        ({"ttl": -1}, "ttl must be .*, not -1"),
        ({"ttl": True}, "ttl must be .*, not True"),
        ({"ttl": None}, "ttl must be .*, not None"),
        ({"ttl": float("nan")}, "ttl must be .*, not nan"),
        ({"ttl": float("inf")}, "ttl must be .*, not inf"),
        ({"maxsize": 0}, "maxsize must be an integer of at least 1, not 0"),
        ({"maxsize": 1.5}, r"maxsize must be .*, not 1\.5"),
        ({"maxsize": True}, "maxsize must be .*, not True"),
        ({"timer": 3}, "timer must be a function, not 3"),
        ({"client": "http://127.0.0.1:1"}, "client must be an LLMClient or None, not 'http"),
        ({"api_base": "nonsense"}, "api_base 'nonsense'"),
        ({"api_base": "http://127.0.0.1:1", "client": LLMClient("http://127.0.0.1:1")}, "api_base cannot be combined"),
    ],
)
def test_an_invalid_argument_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LLMValidationError, match=message):
        ModelValidator(**options)


def test_repr_names_the_server() -> None:
    assert repr(ModelValidator("http://127.0.0.1:1")) == "<ModelValidator http://127.0.0.1:1/v1>"


def test_the_default_server_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMBRIDGE_API_BASE", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9/v1" in repr(ModelValidator())


# Long lists


@pytest.mark.slow
@pytest.mark.parametrize("ask", ["list", "info", "known", "unknown"])
def test_the_time_for_a_long_list_of_models_does_not_grow_faster_than_the_list(ask: str) -> None:
    async def read(size: int) -> None:
        models = {"data": [{"id": f"org/model-{number}", "owned_by": "vllm"} for number in range(size)]}
        transport = MockTransport(lambda request: models if request.path == MODELS else {"version": "1"})
        async with LLMClient(transport=transport) as client, ModelValidator(client=client) as validator:
            if ask == "list":
                assert len(await client.list_models()) == size
            elif ask == "info":
                assert len((await client.server_info()).models) == size
            elif ask == "known":
                await validator.validate_model(f"org/model-{size - 1}")
            else:
                with pytest.raises(ModelNotFoundError) as caught:
                    await validator.validate_model("org/modle-1")
                assert len(caught.value.available_models) == size
                assert "did you mean 'org/model-" in str(caught.value)

    assert_linear(lambda size: asyncio.run(read(size)), 1_000)
