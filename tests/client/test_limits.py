"""`limits="auto"`, `client.stats()`, and what makes a model cold again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lmbridge import (
    ChatStream,
    ClientStats,
    Limits,
    LLMClient,
    LLMClientPool,
    LLMConnectionError,
    LLMError,
    LLMTimeoutError,
    LLMValidationError,
    ModelInfo,
    ModelLoadError,
    ModelMismatchError,
    ModelStats,
    ServerInfo,
    TaskCancelledError,
    Transport,
)
from lmbridge.client.auto import limits_of
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, hang_up, reply, sse, stall
from tests.support import HALF, MESSAGES, in_flight, opened, piece, read_text, turns

PROPS = {"total_slots": 2, "default_generation_settings": {"n_ctx": 4096}, "build_info": "b1-x"}
LISTED = {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "llamacpp"}]}


def llama_cpp(server: ScriptedServer, slots: int = 2) -> None:
    """Makes the server look like llama.cpp."""
    server.on_path("/v1/models", reply(200, LISTED))
    server.on_path("/props", reply(200, {**PROPS, "total_slots": slots}))


def asked(server: ScriptedServer) -> list[str]:
    return [request.path for request in server.requests]


# What the server says


def model(name: str, *, loaded: bool = True, embeds: bool = False) -> ModelInfo:
    return ModelInfo(id=name, loaded=loaded, slots=6 if loaded else None, embeds=embeds)


@pytest.mark.parametrize(
    ("info", "limits"),
    [
        (ServerInfo(kind="llama.cpp", slots=3), Limits(max_concurrency=3)),
        (ServerInfo(kind="llama.cpp"), Limits()),
        (ServerInfo(kind="llama.cpp", max_loaded_models=2), Limits(max_concurrency=8, max_loaded_models=2)),
        (ServerInfo(kind="llama.cpp", slots=1, max_loaded_models=2), Limits(max_concurrency=2, max_loaded_models=2)),
        (ServerInfo(kind="lmstudio"), Limits(max_concurrency=4, max_loaded_models=1)),
        (
            ServerInfo(kind="lmstudio", slots=6, models=(model("a"), model("b", loaded=False))),
            Limits(max_concurrency=6, max_loaded_models=1),
        ),
        (
            ServerInfo(kind="lmstudio", slots=6, models=(model("a"), model("b"), model("c", embeds=True))),
            Limits(max_concurrency=12, max_loaded_models=2),
        ),
        (ServerInfo(kind="ollama"), Limits()),
        (ServerInfo(kind="vllm"), Limits()),
        (ServerInfo(kind="unknown"), Limits()),
    ],
)
def test_the_limits_are_what_the_server_can_do(info: ServerInfo, limits: Limits) -> None:
    assert limits_of(info) == limits


@pytest.mark.parametrize("limits", ["automatic", "", 4, {"max_concurrency": 4}])
def test_limits_that_are_none_are_refused(limits: Any) -> None:
    with pytest.raises(LLMValidationError, match=r"limits must be an instance of Limits or None, not .*auto"):
        LLMClient(limits=limits)
    with pytest.raises(LLMValidationError, match=r"limits must be an instance of Limits or None, not .*auto"):
        LLMClientPool(limits=limits)


async def test_the_server_is_asked_once_however_many_requests_come_at_once(scripted_server: ScriptedServer) -> None:
    llama_cpp(scripted_server)
    async with LLMClient(scripted_server.api_base, "m", limits="auto") as client:
        await asyncio.gather(*[client.chat_completion(MESSAGES) for _ in range(10)])
        await client.chat_completion(MESSAGES)
        assert client._server.transport.limits == Limits(max_concurrency=2)
    assert asked(scripted_server)[:2] == ["/v1/models", "/props"]
    assert asked(scripted_server)[2:] == ["/v1/chat/completions"] * 11


async def test_what_the_server_says_is_kept_to(scripted_server: ScriptedServer) -> None:
    llama_cpp(scripted_server)
    scripted_server.on_path("/v1/chat/completions", stall(after=HALF))
    async with LLMClient(scripted_server.api_base, "m", limits="auto") as client:
        streams = [await opened(client), await opened(client)]
        third = asyncio.create_task(opened(client))
        await scripted_server.wait_until(lambda: client.stats().queued == 1)
        assert in_flight(client) == 2
        await streams[0].aclose()
        streams.append(await third)
        for stream in streams:
            await stream.aclose()


async def test_a_pool_has_no_more_in_flight_than_its_size_whatever_the_server_can_do(
    scripted_server: ScriptedServer,
) -> None:
    llama_cpp(scripted_server, slots=8)
    async with LLMClientPool(3, api_base=scripted_server.api_base, limits="auto") as pool, pool.client("m") as client:
        await client.chat_completion(MESSAGES)
        assert client._server.transport.limits == Limits(max_concurrency=3)


async def test_the_server_is_asked_again_after_the_connection_was_lost(
    scripted_server: ScriptedServer, no_waits: list[float]
) -> None:
    llama_cpp(scripted_server)
    async with LLMClient(scripted_server.api_base, "m", limits="auto") as client:
        await client.chat_completion(MESSAGES)
        scripted_server.script(hang_up(), hang_up(), hang_up(), hang_up())
        with pytest.raises(LLMConnectionError):
            await client.chat_completion(MESSAGES)
        llama_cpp(scripted_server, slots=7)
        await client.chat_completion(MESSAGES)
        assert client._server.transport.limits == Limits(max_concurrency=7)
    assert asked(scripted_server).count("/props") == 2


async def test_a_server_that_does_not_tell_is_used_all_the_same_and_asked_again(
    scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    scripted_server.on_path("/v1/models", reply(500, {"error": "broken"}))
    async with LLMClient(scripted_server.api_base, "m", limits="auto") as client:
        await client.chat_completion(MESSAGES)
        assert client._server.transport.limits == Limits()
        llama_cpp(scripted_server)
        await client.chat_completion(MESSAGES)
        assert client._server.transport.limits == Limits(max_concurrency=2)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        line for line in caplog.messages if "the server's limits are not known" in line and "broken" in line
    ]
    assert "the server's limits are not known" in caplog.text


async def test_a_server_that_answers_without_telling_is_asked_once(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", reply(404, {"error": "not here"}))
    async with LLMClient(scripted_server.api_base, "m", limits="auto") as client:
        for _ in range(3):
            await client.chat_completion(MESSAGES)
    assert asked(scripted_server).count("/v1/models") == 1


async def test_who_is_cancelled_while_the_server_is_asked_leaves_it_to_the_others(
    scripted_server: ScriptedServer,
) -> None:
    gate = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        await gate.wait()
        await reply(200, LISTED)(exchange)

    llama_cpp(scripted_server)
    scripted_server.on_path("/v1/models", slow)
    async with LLMClient(scripted_server.api_base, "m", limits="auto") as client:
        first, second = (asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(2))
        await scripted_server.wait_until(lambda: scripted_server.requests)
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        gate.set()
        await second
    assert asked(scripted_server).count("/v1/models") == 1


async def test_closing_ends_the_asking_too(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", stall())
    client = LLMClient(scripted_server.api_base, "m", limits="auto")
    waiting = asyncio.create_task(client.chat_completion(MESSAGES))
    await scripted_server.wait_until(lambda: scripted_server.requests)
    await client.close()
    with pytest.raises(TaskCancelledError):
        await waiting
    assert not [task for task in asyncio.all_tasks() if "Transport" in repr(task.get_coro())]


async def test_a_close_that_is_cancelled_during_the_asking_has_closed_all_the_same(
    scripted_server: ScriptedServer,
) -> None:
    client = LLMClient(scripted_server.api_base, "m", limits="auto")
    scripted_server.script(stall(after=[piece("Hel", model="m")]))
    stream = await opened(client)
    scripted_server.script(hang_up())
    with pytest.raises(LLMConnectionError):
        await client.lmstudio.load("x")  # it may be another server now
    scripted_server.on_path("/v1/models", stall())
    seen = len(scripted_server.requests)
    waiting = asyncio.create_task(client.chat_completion(MESSAGES))
    await scripted_server.wait_until(lambda: len(scripted_server.requests) > seen)
    closing = asyncio.create_task(client.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing, waiting])
    assert closing.cancelled()
    with pytest.raises(TaskCancelledError):
        await waiting
    with pytest.raises(TaskCancelledError):
        await read_text(stream)
    await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


# What is going on


async def test_stats_tell_what_is_in_flight_waits_was_swapped_and_repeated(
    scripted_server: ScriptedServer, no_waits: list[float]
) -> None:
    client = LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=2, max_loaded_models=1))
    assert client.stats() == ClientStats(in_flight=0, queued=0, swaps=0, retries=0, by_model={})
    scripted_server.script(reply(503, {"error": "busy"}), answer("a"), stall(after=[piece("b", model="b")]))
    async with client:
        await client.chat_completion(MESSAGES, model="a")
        stream = await client.chat_completion(MESSAGES, model="b", stream=True)
        await anext(stream)
        waiting = asyncio.create_task(client.chat_completion(MESSAGES, model="a"))
        await turns()
        assert client.stats() == ClientStats(
            in_flight=1,
            queued=1,
            swaps=1,
            retries=1,
            by_model={"a": ModelStats(queued=1, retries=1), "b": ModelStats(in_flight=1, swaps=1)},
        )
        await stream.aclose()
        await waiting
    assert client.stats().swaps == 2


# A model that is not known to be loaded


def one_at_a_time(server: ScriptedServer) -> LLMClient:
    return LLMClient(server.api_base, "m", limits=Limits(max_loaded_models=1), max_retries=0, model_mismatch="raise")


async def test_the_others_follow_when_the_first_event_is_there_read_or_not(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()

    async def first(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(b": ping\n\n")
        await gate.wait()
        await exchange.chunk(piece("Hel", model="m"))
        await exchange.client_left()

    scripted_server.script(first)
    async with one_at_a_time(scripted_server) as client:
        loader = await opened(client)  # and not read
        others = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(3)]
        await turns(20)
        assert client.stats().queued == 3
        gate.set()
        await asyncio.gather(*others)
        assert len(scripted_server.requests) == 4
        chunk = await anext(loader)
        assert chunk["choices"][0]["delta"]["content"] == "Hel"
        await loader.aclose()


async def test_what_came_before_anyone_read_is_read_once_and_whole(scripted_server: ScriptedServer) -> None:
    scripted_server.script(sse(piece("Hel", model="m"), piece("lo", model="m", finish_reason="stop"), done=True))
    async with one_at_a_time(scripted_server) as client:
        loader = await opened(client)
        await client.chat_completion(MESSAGES)
        assert await read_text(loader) == "Hello"


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        (reply(500, {"error": "the model has crashed"}), ModelLoadError),
        (reply(200, {"error": "Model unloaded"}), ModelLoadError),
        (answer("hello", model="other"), ModelMismatchError),
    ],
)
async def test_after_an_eviction_or_a_mismatch_the_next_request_goes_alone(
    scripted_server: ScriptedServer, failing: Any, error: type[Exception]
) -> None:
    async with one_at_a_time(scripted_server) as client:
        await client.chat_completion(MESSAGES)
        scripted_server.script(failing, stall())
        with pytest.raises(error):
            await client.chat_completion(MESSAGES)
        tasks = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(3)]
        await scripted_server.wait_until(lambda: len(scripted_server.requests) == 3)
        await turns(20)
        assert (in_flight(client), client.stats().queued) == (1, 2)
        tasks[0].cancel()
        await asyncio.wait([tasks[0]])
        await asyncio.gather(*tasks[1:])


async def test_an_eviction_in_a_stream_makes_the_model_cold_and_says_how_to_be_safe(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script(sse(piece("Hel", model="m"), {"error": "Model unloaded"}, done=False), stall())
    async with one_at_a_time(scripted_server) as client:
        with pytest.raises(ModelLoadError, match=r"Limits\(max_loaded_models=1\)"):
            await read_text(await opened(client))
        tasks = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(2)]
        await scripted_server.wait_until(lambda: len(scripted_server.requests) == 2)
        await turns(20)
        assert (in_flight(client), client.stats().queued) == (1, 1)
        tasks[0].cancel()
        await tasks[1]


async def test_a_task_that_would_wait_for_its_own_stream_of_another_model_is_told_at_once(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script(stall(after=[piece("Hel", model="m")]))
    async with one_at_a_time(scripted_server) as client:
        stream = await opened(client)
        await anext(stream)
        with pytest.raises(LLMTimeoutError, match=r"for streams that its own task holds open") as caught:
            await client.chat_completion(MESSAGES, model="other")
        assert caught.value.phase == "queue"
        await stream.aclose()
        await client.chat_completion(MESSAGES, model="other")


async def test_clients_of_one_transport_share_its_schedule(scripted_server: ScriptedServer) -> None:
    transport = Transport(scripted_server.api_base, limits=Limits(max_loaded_models=1))
    scripted_server.script(stall(after=[piece("Hel", model="a")]))
    async with (
        transport,
        LLMClient(model="a", transport=transport) as a,
        LLMClient(model="b", transport=transport) as b,
    ):
        stream = await opened(a)
        await anext(stream)
        other = asyncio.create_task(b.chat_completion(MESSAGES))
        await turns(20)
        assert a.stats().queued == b.stats().queued == 1
        await stream.aclose()
        await other


async def failed_start(exchange: Exchange) -> None:
    """A stream whose first event is an error."""
    await exchange.start()
    await exchange.send(b'event: error\ndata: {"error": {"message": "Failed to load model"}}\n\n')
    await exchange.end()


@pytest.mark.parametrize(
    "failing",
    [
        failed_start,
        sse({"error": "Failed to load model"}),
        reply(200, {"error": "Failed to load model"}),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_after_a_first_answer_that_is_an_error_the_next_request_goes_alone(
    scripted_server: ScriptedServer, failing: Behaviour, stream: bool
) -> None:
    scripted_server.default = failing
    async with one_at_a_time(scripted_server) as client:

        async def ask() -> None:
            reply = await client.chat_completion(MESSAGES, stream=stream)
            if isinstance(reply, ChatStream):
                await read_text(reply)

        results = await asyncio.gather(*[ask() for _ in range(6)], return_exceptions=True)
    assert all(isinstance(result, LLMError) for result in results)
    assert scripted_server.max_in_flight == 1


@pytest.mark.parametrize(
    "failing",
    [sse(": ping\n\n", end=False), sse(": ping\n\n"), sse(": ping\n\n", {"error": "Failed to load model"})],
    ids=["cut", "empty", "error"],
)
async def test_who_waits_for_a_first_event_that_never_comes_goes_on_though_nobody_reads(
    scripted_server: ScriptedServer, failing: Behaviour
) -> None:
    scripted_server.script(failing)
    async with one_at_a_time(scripted_server) as client:
        loader = await opened(client)  # and not read
        await client.chat_completion(MESSAGES)
        assert in_flight(client) == 0
        with pytest.raises(LLMError):
            await read_text(loader)
    assert client.stats().by_model == {"m": ModelStats()}
