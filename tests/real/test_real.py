"""The client against a real llama.cpp server. What a small model says is its own: only structure is asserted."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from lmbridge import (
    ChatStream,
    ContextLengthExceededError,
    LLMAuthenticationError,
    LLMClient,
    LLMConnectionError,
    LLMResponseError,
    LocalServer,
    ModelMismatchError,
    collect,
)
from tests.real.conftest import API_KEY
from tests.support import text_of

pytestmark = pytest.mark.real

STORY = [{"role": "user", "content": "Tell me a long story about the sea."}]
GREETING = [{"role": "user", "content": "Say hello."}]


async def busy_slots(server: LocalServer) -> int:
    """How many generations the server says it is working on."""
    origin = server.api_base.removesuffix("/v1")
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{origin}/slots") as response:
        slots = await response.json()
    return sum(slot["is_processing"] for slot in slots)


async def until_idle(server: LocalServer) -> None:
    """Waits until the server works on nothing: what it was asked for would take it many seconds more."""
    async with asyncio.timeout(5):
        while await busy_slots(server):
            await asyncio.sleep(0.02)


async def test_text_arrives_piece_by_piece(client: LLMClient) -> None:
    loop = asyncio.get_running_loop()
    arrivals = []
    text = ""
    async for chunk in await client.chat_completion(STORY, stream=True, max_tokens=60, temperature=0):
        if piece := text_of(chunk):
            text += piece
            arrivals.append(loop.time())
    assert len(arrivals) > 20
    assert len(text.split()) > 10
    assert len(set(arrivals)) > 10  # not all at once


async def test_a_stream_and_a_plain_call_say_the_same(client: LLMClient) -> None:
    plain = await client.chat_completion(GREETING, max_tokens=20, temperature=0, seed=1)
    stream = await client.chat_completion(
        GREETING, stream=True, max_tokens=20, temperature=0, seed=1, stream_options={"include_usage": True}
    )
    folded = await collect(stream)
    assert folded["choices"] == plain["choices"]
    assert folded["usage"] is not None
    assert plain["usage"] is not None
    assert folded["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    assert set(folded) >= set(plain) - {"timings"}


async def closing(stream: ChatStream) -> None:
    await stream.aclose()


async def leaving_its_context(stream: ChatStream) -> None:
    async with stream:
        pass


async def dropping(stream: ChatStream) -> None:
    pass  # the last reference goes with this call


async def cancelling_its_reader(stream: ChatStream) -> None:
    reader = asyncio.create_task(collect(stream))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


async def timing_out(stream: ChatStream) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await collect(stream)


async def throwing_into_it(stream: ChatStream) -> None:
    with pytest.raises(KeyError):
        await stream.athrow(KeyError())


@pytest.mark.parametrize(
    "leave", [closing, leaving_its_context, dropping, cancelling_its_reader, timing_out, throwing_into_it]
)
async def test_leaving_a_stream_early_frees_its_slot(
    local_server: LocalServer, client: LLMClient, leave: Callable[[ChatStream], Awaitable[None]]
) -> None:
    async def begin() -> ChatStream:
        stream = await client.chat_completion(STORY, stream=True, max_tokens=3000, ignore_eos=True)
        await anext(stream)
        await anext(stream)
        assert await busy_slots(local_server) == 1
        return stream

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        await leave(await begin())
        gc.collect()
    assert client._server.transport.in_flight == 0
    await until_idle(local_server)


async def test_closing_the_client_frees_its_slots(local_server: LocalServer, client: LLMClient) -> None:
    streams = [await client.chat_completion(STORY, stream=True, max_tokens=3000, ignore_eos=True) for _ in range(3)]
    for stream in streams:
        await anext(stream)
    await client.close()
    await until_idle(local_server)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_prompt_beyond_the_context_is_a_named_error(client: LLMClient, stream: bool) -> None:
    long = [{"role": "user", "content": "sea " * 6000}]
    with pytest.raises(ContextLengthExceededError, match="shorten the messages") as caught:
        await client.chat_completion(long, stream=stream)
    assert caught.value.prompt_tokens is not None
    assert caught.value.prompt_tokens > 6000
    assert caught.value.context_length == 4096
    assert caught.value.status == 400


async def test_a_model_that_the_server_does_not_have_is_noticed(local_server: LocalServer) -> None:
    async with LLMClient(local_server.api_base, "no-such-model", API_KEY, model_mismatch="raise") as client:
        with pytest.raises(ModelMismatchError) as plain:
            await client.chat_completion(GREETING, max_tokens=4)
        with pytest.raises(ModelMismatchError) as streamed:
            await collect(await client.chat_completion(GREETING, max_tokens=4, stream=True))
    for caught in (plain, streamed):
        assert (caught.value.asked, caught.value.served) == ("no-such-model", local_server.model)


@pytest.mark.parametrize(
    ("wrong", "status", "told"),
    [
        ({"temperature": "hot"}, 400, "temperature"),
        ({"tools": "x"}, 500, "Failed to parse tools"),
        ({"tools": [{"type": "function"}]}, 500, "Failed to parse tools"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "frobnicate"}}}},
            400,
            "frobnicate",
        ),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_malformed_request_is_told_so_once(
    client: LLMClient, wrong: dict[str, Any], status: int, told: str, stream: bool
) -> None:
    with pytest.raises(LLMResponseError, match=told) as caught:
        await client.chat_completion(GREETING, stream=stream, max_tokens=4, **wrong)
    assert caught.value.status == status
    assert caught.value.context["attempts"] == 1  # nor is it asked again


async def test_a_wrong_key_is_a_named_error(local_server: LocalServer) -> None:
    async with LLMClient(local_server.api_base, api_key="sk-wrong") as client:
        with pytest.raises(LLMAuthenticationError, match="pass api_key=") as caught:
            await client.chat_completion(GREETING)
    assert "sk-wrong" not in str(caught.value)


async def test_a_dead_port_is_a_named_error(local_server: LocalServer) -> None:
    # A server of our own that is gone again, not any port.
    async with LocalServer() as server:
        api_base = server.api_base
    async with LLMClient(api_base, max_retries=0) as client:
        with pytest.raises(LLMConnectionError, match="start the server there"):
            await client.chat_completion(GREETING)
        assert await client.health_check() is False


async def test_a_server_that_dies_in_mid_stream_is_an_error_with_what_had_arrived() -> None:
    async with LocalServer() as server, LLMClient(server.api_base, server.model, max_retries=0) as client:
        stream = await client.chat_completion(STORY, stream=True, max_tokens=3000, ignore_eos=True)
        for _ in range(5):
            await anext(stream)
        await server.close()
        with pytest.raises(Exception, match=r"cut off|mid-stream") as caught:
            await collect(stream)
        assert caught.value.partial["choices"][0]["message"]["content"]  # type: ignore[attr-defined]  # of both errors


async def test_models_and_health(local_server: LocalServer, client: LLMClient) -> None:
    assert await client.list_models() == [local_server.model]
    assert await client.health_check() is True


async def test_sixty_streams_in_a_row_are_all_whole(client: LLMClient) -> None:
    for _ in range(60):
        reply = await collect(await client.chat_completion(GREETING, stream=True, max_tokens=3, temperature=0))
        assert reply["choices"][0]["finish_reason"] in ("length", "stop")
        assert reply["choices"][0]["message"]["content"]


async def test_a_hundred_streams_at_a_time_are_all_whole(client: LLMClient) -> None:
    async def one(number: int) -> str | None:
        messages = [{"role": "user", "content": f"Say {number}."}]
        reply = await collect(await client.chat_completion(messages, stream=True, max_tokens=3))
        return reply["choices"][0]["finish_reason"]

    reasons = await asyncio.gather(*[one(number) for number in range(100)])
    assert set(reasons) <= {"length", "stop"}
    assert client._server.transport.in_flight == 0
