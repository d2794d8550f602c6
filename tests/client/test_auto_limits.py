"""`limits="auto"`: the client asks the server how much it can do at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lmbridge import (
    Limits,
    LLMClient,
    LLMClientPool,
    LLMConnectionError,
    LLMValidationError,
    ModelInfo,
    ServerInfo,
    TaskCancelledError,
)
from lmbridge.client.auto_limits import limits_of
from lmbridge.testing import Exchange, ScriptedServer, hang_up, reply, stall
from tests.support import HALF, MESSAGES, in_flight, opened, piece, read_text

PROPS = {"total_slots": 2, "default_generation_settings": {"n_ctx": 4096}, "build_info": "b1-x"}


LISTED = {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "llamacpp"}]}


def llama_cpp(server: ScriptedServer, slots: int = 2) -> None:
    """Makes the server look like llama.cpp."""
    server.on_path("/v1/models", reply(200, LISTED))
    server.on_path("/props", reply(200, {**PROPS, "total_slots": slots}))


def asked(server: ScriptedServer) -> list[str]:
    return [request.path for request in server.requests]


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
def test_limits_that_cannot_be_used_are_refused(limits: Any) -> None:
    with pytest.raises(
        LLMValidationError, match=r"limits must be an instance of Limits or None, not .*(auto|Limits\()"
    ):
        LLMClient(limits=limits)
    with pytest.raises(
        LLMValidationError, match=r"limits must be an instance of Limits or None, not .*(auto|Limits\()"
    ):
        LLMClientPool(limits=limits)


async def test_the_server_is_asked_once_however_many_requests_come_at_once(scripted_server: ScriptedServer) -> None:
    llama_cpp(scripted_server)
    async with LLMClient(scripted_server.api_base, "m", limits="auto") as client:
        await asyncio.gather(*[client.chat_completion(MESSAGES) for _ in range(10)])
        await client.chat_completion(MESSAGES)
        assert client._server.transport.nodes[0].limits == Limits(max_concurrency=2)
    assert asked(scripted_server)[:2] == ["/v1/models", "/props"]
    assert asked(scripted_server)[2:] == ["/v1/chat/completions"] * 11


async def test_the_limits_of_the_server_are_kept(scripted_server: ScriptedServer) -> None:
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
        assert client._server.transport.nodes[0].limits == Limits(max_concurrency=3)


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
        assert client._server.transport.nodes[0].limits == Limits(max_concurrency=7)
    assert asked(scripted_server).count("/props") == 2


async def test_a_server_that_fails_to_say_is_used_nevertheless_and_asked_again(
    scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    scripted_server.on_path("/v1/models", reply(500, {"error": "broken"}))
    async with LLMClient(scripted_server.api_base, "m", limits="auto") as client:
        await client.chat_completion(MESSAGES)
        assert client._server.transport.nodes[0].limits == Limits()
        llama_cpp(scripted_server)
        await client.chat_completion(MESSAGES)
        assert client._server.transport.nodes[0].limits == Limits(max_concurrency=2)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        line for line in caplog.messages if "the server did not report its limits" in line and "broken" in line
    ]
    assert "the server did not report its limits" in caplog.text


async def test_a_server_that_refuses_to_say_is_asked_once(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", reply(404, {"error": "not here"}))
    async with LLMClient(scripted_server.api_base, "m", limits="auto") as client:
        for _ in range(3):
            await client.chat_completion(MESSAGES)
    assert asked(scripted_server).count("/v1/models") == 1


async def test_a_cancelled_request_does_not_end_the_question_for_others(
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


async def test_closing_ends_the_question(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", stall())
    client = LLMClient(scripted_server.api_base, "m", limits="auto")
    waiting = asyncio.create_task(client.chat_completion(MESSAGES))
    await scripted_server.wait_until(lambda: scripted_server.requests)
    await client.close()
    with pytest.raises(TaskCancelledError):
        await waiting
    assert not [task for task in asyncio.all_tasks() if "Transport" in repr(task.get_coro())]


async def test_a_close_that_is_cancelled_during_the_question_has_closed_everything(
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
