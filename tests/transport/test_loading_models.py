"""A model that is not known to be loaded: its first request goes alone."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lmbridge import (
    ChatStream,
    Limits,
    LLMClient,
    LLMError,
    LLMTimeoutError,
    ModelLoadError,
    ModelMismatchError,
    ModelStats,
    Timeouts,
    Transport,
)
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, reply, sse, stall
from lmbridge.transport import EventStream
from tests.support import MESSAGES, in_flight, opened, piece, read_text, turns


def client_for_one_model(server: ScriptedServer) -> LLMClient:
    return LLMClient(server.api_base, "m", limits=Limits(max_loaded_models=1), max_retries=0, model_mismatch="raise")


async def test_other_requests_follow_the_first_event_even_if_it_is_not_read(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()

    async def first(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(b": ping\n\n")
        await gate.wait()
        await exchange.chunk(piece("Hel", model="m"))
        await exchange.client_left()

    scripted_server.script(first)
    async with client_for_one_model(scripted_server) as client:
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


async def test_events_that_were_read_ahead_are_read_once_and_in_order(scripted_server: ScriptedServer) -> None:
    scripted_server.script(sse(piece("Hel", model="m"), piece("lo", model="m", finish_reason="stop"), done=True))
    async with client_for_one_model(scripted_server) as client:
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
    async with client_for_one_model(scripted_server) as client:
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


async def test_an_eviction_in_a_stream_marks_the_model_as_unloaded_and_has_a_hint(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script(sse(piece("Hel", model="m"), {"error": "Model unloaded"}, done=False), stall())
    async with client_for_one_model(scripted_server) as client:
        with pytest.raises(ModelLoadError, match=r"Limits\(max_loaded_models=1\)"):
            await read_text(await opened(client))
        tasks = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(2)]
        await scripted_server.wait_until(lambda: len(scripted_server.requests) == 2)
        await turns(20)
        assert (in_flight(client), client.stats().queued) == (1, 1)
        tasks[0].cancel()
        await tasks[1]


async def test_a_task_that_would_wait_for_its_own_stream_of_another_model_fails_at_once(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script(stall(after=[piece("Hel", model="m")]))
    async with client_for_one_model(scripted_server) as client:
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


async def fail_in_the_first_event(exchange: Exchange) -> None:
    """A stream whose first event is an error."""
    await exchange.start()
    await exchange.send(b'event: error\ndata: {"error": {"message": "Failed to load model"}}\n\n')
    await exchange.end()


@pytest.mark.parametrize(
    "failing",
    [
        fail_in_the_first_event,
        sse({"error": "Failed to load model"}),
        reply(200, {"error": "Failed to load model"}),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_after_a_first_answer_that_is_an_error_the_next_request_goes_alone(
    scripted_server: ScriptedServer, failing: Behaviour, stream: bool
) -> None:
    scripted_server.default = failing
    async with client_for_one_model(scripted_server) as client:

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
async def test_requests_that_wait_for_a_first_event_go_on_if_it_never_comes(
    scripted_server: ScriptedServer, failing: Behaviour
) -> None:
    scripted_server.script(failing)
    async with client_for_one_model(scripted_server) as client:
        loader = await opened(client)  # and not read
        await client.chat_completion(MESSAGES)
        assert in_flight(client) == 0
        with pytest.raises(LLMError):
            await read_text(loader)
    assert client.stats().by_model == {"m": ModelStats()}


async def test_requests_that_wait_for_a_first_event_go_on_if_it_takes_too_long(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_reading_ahead = EventStream.start_reading_ahead

    def start_late(stream: EventStream) -> Any:
        # The head has arrived in time, whatever the machine is doing, and the time limit is nearly over.
        stream.call.first_byte_deadline -= 60
        return start_reading_ahead(stream)

    monkeypatch.setattr(EventStream, "start_reading_ahead", start_late)
    scripted_server.script(stall(after=[": ping\n\n"]))
    async with client_for_one_model(scripted_server) as client:
        loader = await opened(client.with_options(timeout=Timeouts(first_byte=60)))  # and not read
        await client.chat_completion(MESSAGES)
        await scripted_server.wait_until(lambda: scripted_server.aborts)
        with pytest.raises(LLMTimeoutError) as caught:
            await read_text(loader)
        assert caught.value.phase == "first_byte"
        assert in_flight(client) == 0
    assert client.stats().by_model == {"m": ModelStats()}
