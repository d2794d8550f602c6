"""Limits that nobody has set: what a client finds out by itself, and learns from generations that are killed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lmbridge import (
    Agent,
    Limits,
    LLMClient,
    LLMClientPool,
    LLMError,
    LLMStreamError,
    LLMValidationError,
    ModelLoadError,
    TaskCancelledError,
    collect,
)
from lmbridge.config import is_near
from lmbridge.testing import (
    Behaviour,
    Exchange,
    OneModelServer,
    ScriptedServer,
    answer,
    hang_up,
    reply,
    sse,
    stall,
)
from lmbridge.transport import Transport, limit_search
from tests.agent.support import asks, calls
from tests.client.test_auto_limits import asked, llama_cpp
from tests.support import HALF, MESSAGES, opened, piece, turns

COMPLETIONS = "/v1/chat/completions"


def lmstudio(server: ScriptedServer, loaded: int = 0) -> None:
    """Makes the server look like LM Studio with some models loaded."""
    entries = [
        {"type": "llm", "key": f"m{n}", "loaded_instances": [{"id": f"m{n}", "config": {}}] if n < loaded else []}
        for n in range(3)
    ]
    listed = [{"id": entry["key"], "object": "model", "owned_by": "organization_owner"} for entry in entries]
    server.on_path("/v1/models", reply(200, {"object": "list", "data": listed}))
    server.on_path("/api/v1/models", reply(200, {"models": entries}))


def limits_of(client: LLMClient) -> Limits:
    """Returns the limits that are in force."""
    (server,) = client.stats().by_server.values()
    return server.limits


async def ask_together(client: LLMClient, count: int = 3) -> None:
    await asyncio.gather(*(client.chat_completion(MESSAGES) for _ in range(count)))


async def until(condition: Callable[[], object]) -> None:
    """Waits for something that no event of the server announces."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


# When the server is asked


async def test_a_client_that_sends_one_request_after_the_other_never_asks(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    for _ in range(3):
        await client.chat_completion(MESSAGES)
        await (await opened(client)).aclose()
    assert set(asked(scripted_server)) == {COMPLETIONS}


async def test_requests_that_come_together_wait_for_one_answer(scripted_server: ScriptedServer) -> None:
    llama_cpp(scripted_server, slots=2)
    async with LLMClient(scripted_server.api_base) as client:
        await ask_together(client, 10)
        await ask_together(client, 10)
        assert limits_of(client) == Limits(max_concurrency=2)
    assert asked(scripted_server) == ["/v1/models", "/props", *[COMPLETIONS] * 20]
    assert scripted_server.max_in_flight == 2


async def test_the_server_is_asked_before_a_second_request_joins_one_in_flight(scripted_server: ScriptedServer) -> None:
    lmstudio(scripted_server)
    gate = asyncio.Event()
    scripted_server.script(answer("first", gate=gate))
    async with LLMClient(scripted_server.api_base, "m0") as client:
        first = asyncio.create_task(client.chat_completion(MESSAGES))
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
        others = [asyncio.create_task(client.chat_completion(MESSAGES, model=model)) for model in ("m0", "m1")]
        await until(lambda: client.stats().queued == 2)
        # Even the request for the same model waits, because the model may still be loading.
        assert asked(scripted_server) == [COMPLETIONS, "/v1/models", "/api/v1/models"]
        gate.set()
        await asyncio.gather(first, *others)
        assert limits_of(client) == Limits(max_concurrency=4, max_loaded_models=1)
    assert scripted_server.max_in_flight == 1


async def test_an_unread_stream_does_not_hold_up_requests_for_its_model(scripted_server: ScriptedServer) -> None:
    lmstudio(scripted_server)
    scripted_server.script(stall(after=HALF))
    async with LLMClient(scripted_server.api_base, "m0", model_mismatch="ignore") as client:
        stream = await client.chat_completion(MESSAGES, stream=True)
        await client.chat_completion(MESSAGES)
        await stream.aclose()


async def test_wrong_arguments_model_lists_and_health_checks_ask_nothing(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    await asyncio.gather(client.list_models(), client.list_models(), client.health_check())
    with pytest.raises(LLMValidationError):
        await client.chat_completion([])
    assert set(asked(scripted_server)) == {"/v1/models"}
    assert len(scripted_server.requests) == 3


@pytest.mark.parametrize("make", [lambda base: LLMClient(base, limits=Limits()), Transport])
async def test_given_limits_and_a_transport_of_ones_own_ask_nothing(
    scripted_server: ScriptedServer, make: Callable[[str], LLMClient | Transport]
) -> None:
    lmstudio(scripted_server)
    made = make(scripted_server.api_base)
    async with made:
        client = made if isinstance(made, LLMClient) else LLMClient(transport=made)
        await ask_together(client)
    assert set(asked(scripted_server)) == {COMPLETIONS}


@pytest.mark.parametrize(
    ("url", "near"),
    [
        ("http://127.0.0.1:1234/v1", True),
        ("http://localhost/v1", True),
        ("http://[::1]:8080/v1", True),
        ("http://192.168.1.20:1234/v1", True),
        ("http://10.0.0.5/v1", True),
        ("http://100.101.102.103/v1", True),
        ("http://[fd00::1]/v1", True),
        ("http://gpu/v1", True),
        ("http://gpu.local:1234/v1", True),
        ("http://host.docker.internal:1234/v1", True),
        ("unix:///run/llm.sock", True),
        ("https://api.openai.com/v1", False),
        ("https://8.8.8.8/v1", False),
        ("https://local.example.com/v1", False),
        ("http://llm.test/v1", False),
    ],
)
def test_servers_of_this_machine_and_of_private_networks_are_near(url: str, near: bool) -> None:
    assert is_near(url) is near


async def test_a_remote_server_is_not_asked_and_keeps_the_defaults(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lmstudio(scripted_server)
    monkeypatch.setattr("lmbridge.client.auto_limits.is_near", lambda _: False)
    async with LLMClient(scripted_server.api_base) as client:
        await ask_together(client)
        assert limits_of(client) == Limits()
    assert set(asked(scripted_server)) == {COMPLETIONS}


# What the answer may be


@pytest.mark.parametrize(
    "behaviour",
    [
        reply(404, {"error": "not here"}),
        reply(401, {"error": {"message": "no", "code": "invalid_api_key"}}),
        reply(500, {"error": "broken"}),
        reply(200, {"data": None}),
        reply(200, {"object": "list", "data": [{"id": "m", "owned_by": 7}]}),
        reply(200, {"object": "list", "data": [{"id": "m", "owned_by": "vllm"}]}),
        reply(200, ["a list"]),
        answer("a completion"),
        reply(200, "<html>", content_type="text/html"),
        hang_up(),
    ],
)
async def test_a_plain_server_keeps_the_defaults_whatever_it_answers(
    scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture, behaviour: Behaviour
) -> None:
    scripted_server.on_path("/v1/models", behaviour)
    gate = asyncio.Event()
    scripted_server.default = answer("Hello", gate=gate)
    async with LLMClient(scripted_server.api_base) as client:
        requests = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(12)]
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 10)
        gate.set()
        await asyncio.gather(*requests)
        await ask_together(client)
    assert asked(scripted_server).count("/v1/models") == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_server_that_does_not_answer_delays_requests_only_for_a_moment(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_search, "SEARCH_PATIENCE", 0.01)
    scripted_server.on_path("/v1/models", stall())
    async with LLMClient(scripted_server.api_base) as client:
        await ask_together(client)
        # The question is still open, but nobody waits for it any longer.
        await ask_together(client)
    assert asked(scripted_server).count("/v1/models") == 1


async def test_an_answer_that_comes_late_is_put_in_force(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_search, "SEARCH_PATIENCE", 0.01)
    gate = asyncio.Event()
    lmstudio(scripted_server, loaded=2)
    listed = scripted_server._by_path["/v1/models"]

    async def slow(exchange: Exchange) -> None:
        await gate.wait()
        await listed(exchange)

    scripted_server.on_path("/v1/models", slow)
    async with LLMClient(scripted_server.api_base) as client:
        await ask_together(client)
        assert limits_of(client) == Limits()
        gate.set()
        await scripted_server.wait_until(lambda: "/api/v1/models" in asked(scripted_server))
        await until(lambda: limits_of(client) != Limits())
        assert limits_of(client) == Limits(max_concurrency=8, max_loaded_models=2)


@pytest.mark.parametrize("steps", range(1, 6))
async def test_a_client_that_was_closed_asks_nothing(scripted_server: ScriptedServer, steps: int) -> None:
    """However far the requests have come, a question does not open the client again."""
    client = LLMClient(scripted_server.api_base)
    requests = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(3)]
    await turns(steps)
    await client.close()
    outcomes = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [TaskCancelledError] * 3
    assert (client._server.transport.closing, asked(scripted_server)) == (None, [])


@pytest.mark.parametrize(("limits", "questions"), [(None, 1), ("auto", 2)])
async def test_a_kept_connection_that_is_dead_is_no_reason_to_ask_again_by_default(
    scripted_server: ScriptedServer, limits: Any, questions: int
) -> None:
    """Some servers close each connection after an answer; they would be asked over and over."""
    llama_cpp(scripted_server)
    async with LLMClient(scripted_server.api_base, limits=limits) as client:
        await ask_together(client)
        scripted_server.script(hang_up())
        await ask_together(client)
        await ask_together(client)
        assert client.stats().retries == 0
    assert asked(scripted_server).count("/v1/models") == questions


@pytest.mark.parametrize("size", [3, 20])
async def test_a_pool_has_as_many_in_flight_as_clients_with_a_plain_server(
    scripted_server: ScriptedServer, size: int
) -> None:
    gate = asyncio.Event()
    scripted_server.default = answer("Hello", gate=gate)
    async with LLMClientPool(size, api_base=scripted_server.api_base) as pool:

        async def ask() -> None:
            async with pool.client() as client:
                await client.chat_completion(MESSAGES)

        requests = [asyncio.create_task(ask()) for _ in range(size + 1)]
        await scripted_server.wait_until(lambda: scripted_server.in_flight == size)
        gate.set()
        await asyncio.gather(*requests)


async def test_a_pool_asks_as_well(scripted_server: ScriptedServer) -> None:
    llama_cpp(scripted_server, slots=8)
    async with LLMClientPool(3, api_base=scripted_server.api_base) as pool, pool.client() as client:
        await ask_together(client)
        assert limits_of(client) == Limits(max_concurrency=3)


# Whole programs


@pytest.mark.parametrize("seed", range(3))
async def test_forty_runs_with_two_models_are_whole_on_a_server_that_holds_one(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    # On a busy machine, the answer may take longer than a user would wait.
    monkeypatch.setattr(limit_search, "SEARCH_PATIENCE", 60)

    async def behave(exchange: Exchange) -> None:
        rounds = sum(message["role"] == "tool" for message in exchange.request.json["messages"])
        await (calls(asks("step", number=rounds)) if rounds < 2 else answer(f"{exchange.model} done"))(exchange)

    async def step(number: int) -> str:
        """Takes a step."""
        return str(number)

    async with OneModelServer(load_seconds=0.01, token_seconds=0, seed=seed) as server:
        server.default = behave
        async with LLMClient(server.api_base) as client:
            agent = Agent(client, tools=[step])
            models = [f"model-{'ab'[number % 2]}" for number in range(40)]
            results = await asyncio.gather(*(agent.run("Go.", model=model) for model in models))
            assert [result.text for result in results] == [f"{model} done" for model in models]
            assert client.stats().evictions == 0
        assert (server.kills, server.double_loads) == ([], 0)
        # A run gives its turn away if its tool takes longer than the answer did, as it may on a busy machine.
        assert server.swaps < 20


# Generations that were killed

Send = Callable[[LLMClient, str], Awaitable[Any]]


async def chat(client: LLMClient, model: str) -> Any:
    return await client.chat_completion(MESSAGES, model=model)


async def chat_stream(client: LLMClient, model: str) -> Any:
    return await collect(await client.chat_completion(MESSAGES, model=model, stream=True))


async def text(client: LLMClient, model: str) -> Any:
    return await client.text_completion("Hello", model=model)


async def text_stream(client: LLMClient, model: str) -> Any:
    return await collect(await client.text_completion("Hello", model=model, stream=True))


async def response(client: LLMClient, model: str) -> Any:
    return await client.create_response("Hello", model=model)


async def response_stream(client: LLMClient, model: str) -> Any:
    return await collect(await client.create_response("Hello", model=model, stream=True))


async def embeddings(client: LLMClient, model: str) -> Any:
    return await client.embeddings(["Hello"], model=model)


PLAIN: list[Send] = [chat, text, response, embeddings]
STREAMED: list[Send] = [chat_stream, text_stream, response_stream]
UNLOADED = {"error": {"message": "Model unloaded."}, "message": "Model unloaded."}
REPLIES = [reply(400, {"error": "Model unloaded."}), reply(500, {"error": {"message": "Model is unloaded."}})]
EVICTIONS = [(send, behaviour) for send in [*PLAIN, *STREAMED] for behaviour in REPLIES]
EVICTIONS += [(send, sse(UNLOADED)) for send in STREAMED]


@pytest.mark.parametrize(("send", "behaviour"), EVICTIONS)
@pytest.mark.parametrize("limits", [None, Limits(), Limits(max_loaded_models=3)])
async def test_a_client_schedules_by_model_after_a_generation_was_killed(
    scripted_server: ScriptedServer,
    no_waits: list[float],
    caplog: pytest.LogCaptureFixture,
    send: Send,
    behaviour: Behaviour,
    limits: Limits | None,
) -> None:
    scripted_server.on_model("a", behaviour)
    async with LLMClient(scripted_server.api_base, limits=limits) as client:
        for _ in range(2):
            with pytest.raises(ModelLoadError):
                await send(client, "a")
        assert limits_of(client).max_loaded_models == 1
        assert (client.stats().evictions, client.stats().by_model["a"].evictions) == (2, 2)
        gate = asyncio.Event()
        scripted_server.script(answer("b", gate=gate))
        first = asyncio.create_task(chat(client, "b"))
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
        other = asyncio.create_task(chat(client, "c"))
        await until(lambda: client.stats().queued == 1)
        gate.set()
        await asyncio.gather(first, other)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "dropped model 'a'" in warnings[0]
    # It is not forgotten when the client opens again.
    assert limits_of(client).max_loaded_models == 1


async def test_after_an_eviction_as_many_models_are_used_as_had_answered(scripted_server: ScriptedServer) -> None:
    async with LLMClient(scripted_server.api_base, limits=Limits(), model_mismatch="ignore") as client:
        gate = asyncio.Event()

        async def killed_later(exchange: Exchange) -> None:
            await exchange.chunk(piece("x"))
            await gate.wait()
            await exchange.chunk(UNLOADED)

        scripted_server.script(stall(after=HALF), killed_later, stall())
        others = [await client.chat_completion(MESSAGES, model="a", stream=True)]
        await anext(others[0])
        killed = await client.chat_completion(MESSAGES, model="b", stream=True)
        await anext(killed)
        loading = asyncio.create_task(client.chat_completion(MESSAGES, model="c"))
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 3)
        gate.set()
        with pytest.raises(ModelLoadError):
            await collect(killed)
        assert limits_of(client).max_loaded_models == 2
        await others[0].aclose()
        loading.cancel()
        await asyncio.wait([loading])


@pytest.mark.parametrize("beside_another", [True, False])
async def test_a_broken_process_of_a_router_counts_only_beside_other_models(
    scripted_server: ScriptedServer, beside_another: bool
) -> None:
    async with LLMClient(scripted_server.api_base, limits=Limits(), model_mismatch="ignore") as client:
        scripted_server.on_model("b", stall(after=HALF))
        other = await client.chat_completion(MESSAGES, model="b", stream=True)
        if not beside_another:
            await other.aclose()
        scripted_server.script(sse(piece("Hi"), "proxy error: Failed to read connection"))
        with pytest.raises(LLMStreamError):
            await chat_stream(client, "a")
        assert client.stats().evictions == beside_another
        assert limits_of(client).max_loaded_models == (1 if beside_another else None)
        await other.aclose()


@pytest.mark.parametrize(
    "behaviour",
    [
        reply(400, {"error": "No models loaded. Please load a model"}),
        reply(500, {"error": "The model has crashed without additional information."}),
        reply(400, {"error": "Model loading was stopped due to insufficient system resources"}),
        reply(404, {"error": "model 'a' not found"}),
        hang_up(),
        sse(piece("Hi")),
    ],
)
async def test_other_errors_are_no_evictions(
    scripted_server: ScriptedServer, no_waits: list[float], behaviour: Behaviour
) -> None:
    scripted_server.on_model("a", behaviour)
    async with LLMClient(scripted_server.api_base, limits=Limits()) as client:
        with pytest.raises(LLMError):
            await chat_stream(client, "a")
        assert (client.stats().evictions, limits_of(client)) == (0, Limits())


async def test_after_the_first_kills_no_further_generation_is_lost() -> None:
    async with (
        OneModelServer(load_seconds=0.01, token_seconds=0.001, endings=["error"]) as server,
        LLMClient(server.api_base, limits=Limits()) as client,
    ):
        models = [f"model-{'ab'[number % 2]}" for number in range(10)]
        first = await asyncio.gather(*(chat_stream(client, model) for model in models), return_exceptions=True)
        assert any(isinstance(result, ModelLoadError) for result in first)
        kills = len(server.kills)
        assert kills == client.stats().evictions
        second = await asyncio.gather(*(chat_stream(client, model) for model in models * 3))
        texts = [each["choices"][0]["message"]["content"] for each in second]
        assert texts == [server.text(model) for model in models * 3]
        assert len(server.kills) == kills
