"""Chat completions of a real llama.cpp server.

The tests assert the structure of the answers, because the text of a small model cannot be predicted.
"""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

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
from tests.real.support import GREETING, STORY, busy_slots, until_idle
from tests.support import text_of

pytestmark = pytest.mark.real


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
    # The pieces arrived while the model was generating, not all at once at the end.
    assert len(set(arrivals)) > 10


async def test_a_stream_and_a_plain_call_return_the_same_answer(client: LLMClient) -> None:
    plain = await client.chat_completion(GREETING, max_tokens=20, temperature=0, seed=1)
    stream = await client.chat_completion(
        GREETING, stream=True, max_tokens=20, temperature=0, seed=1, stream_options={"include_usage": True}
    )
    collected = await collect(stream)
    assert collected["choices"] == plain["choices"]
    assert collected["usage"] is not None
    assert plain["usage"] is not None
    assert collected["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    assert set(collected) >= set(plain) - {"timings"}


async def close_it(stream: ChatStream) -> None:
    await stream.aclose()


async def leave_its_context(stream: ChatStream) -> None:
    async with stream:
        pass


async def drop_it(stream: ChatStream) -> None:
    """Does nothing: the caller holds no other reference to the stream."""


async def cancel_its_reader(stream: ChatStream) -> None:
    reader = asyncio.create_task(collect(stream))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


async def run_into_a_timeout(stream: ChatStream) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await collect(stream)


async def throw_into_it(stream: ChatStream) -> None:
    with pytest.raises(KeyError):
        await stream.athrow(KeyError())


@pytest.mark.parametrize(
    "leave", [close_it, leave_its_context, drop_it, cancel_its_reader, run_into_a_timeout, throw_into_it]
)
async def test_leaving_a_stream_early_frees_its_slot(
    local_server: LocalServer, client: LLMClient, leave: Callable[[ChatStream], Awaitable[None]]
) -> None:
    async def start_stream() -> ChatStream:
        stream = await client.chat_completion(STORY, stream=True, max_tokens=3000, ignore_eos=True)
        await anext(stream)
        await anext(stream)
        assert await busy_slots(local_server) == 1
        return stream

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        await leave(await start_stream())
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
async def test_a_prompt_beyond_the_context_raises_context_length_exceeded(client: LLMClient, stream: bool) -> None:
    long = [{"role": "user", "content": "sea " * 6000}]
    with pytest.raises(ContextLengthExceededError, match="shorten the messages") as caught:
        await client.chat_completion(long, stream=stream)
    assert caught.value.prompt_tokens is not None
    assert caught.value.prompt_tokens > 6000
    assert caught.value.context_length == 4096
    assert caught.value.status == 400


async def test_an_unknown_model_raises_model_mismatch(local_server: LocalServer) -> None:
    async with LLMClient(local_server.api_base, "no-such-model", API_KEY, model_mismatch="raise") as client:
        with pytest.raises(ModelMismatchError) as plain:
            await client.chat_completion(GREETING, max_tokens=4)
        with pytest.raises(ModelMismatchError) as streamed:
            await collect(await client.chat_completion(GREETING, max_tokens=4, stream=True))
    for caught in (plain, streamed):
        assert (caught.value.asked, caught.value.served) == ("no-such-model", local_server.model)


@pytest.mark.parametrize(
    ("wrong", "status", "text"),
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
async def test_a_malformed_request_is_refused_and_not_repeated(
    client: LLMClient, wrong: dict[str, Any], status: int, text: str, stream: bool
) -> None:
    with pytest.raises(LLMResponseError, match=text) as caught:
        await client.chat_completion(GREETING, stream=stream, max_tokens=4, **wrong)
    assert caught.value.status == status
    assert caught.value.context["attempts"] == 1


async def test_a_wrong_api_key_raises_an_authentication_error(local_server: LocalServer) -> None:
    async with LLMClient(local_server.api_base, api_key="sk-wrong") as client:
        with pytest.raises(LLMAuthenticationError, match="pass api_key=") as caught:
            await client.chat_completion(GREETING)
    assert "sk-wrong" not in str(caught.value)


async def test_a_server_that_is_gone_raises_a_connection_error(local_server: LocalServer) -> None:
    # The port belonged to a server that has just ended, so no other program listens on it.
    async with LocalServer() as server:
        api_base = server.api_base
    async with LLMClient(api_base, max_retries=0) as client:
        with pytest.raises(LLMConnectionError, match="start the server there"):
            await client.chat_completion(GREETING)
        assert await client.health_check() is False


async def test_a_server_that_dies_mid_stream_raises_an_error_with_the_partial_answer() -> None:
    async with LocalServer() as server, LLMClient(server.api_base, server.model, max_retries=0) as client:
        stream = await client.chat_completion(STORY, stream=True, max_tokens=3000, ignore_eos=True)
        for _ in range(5):
            await anext(stream)
        await server.close()
        with pytest.raises(Exception, match=r"cut off|mid-stream") as caught:
            await collect(stream)
        assert caught.value.partial["choices"][0]["message"]["content"]  # type: ignore[attr-defined]  # either of two classes


async def test_the_server_lists_its_model_and_is_healthy(local_server: LocalServer, client: LLMClient) -> None:
    assert await client.list_models() == [local_server.model]
    assert await client.health_check() is True


@pytest.mark.slow
async def test_sixty_streams_one_after_another_are_complete(client: LLMClient) -> None:
    for _ in range(60):
        reply = await collect(await client.chat_completion(GREETING, stream=True, max_tokens=3, temperature=0))
        assert reply["choices"][0]["finish_reason"] in ("length", "stop")
        assert reply["choices"][0]["message"]["content"]


@pytest.mark.slow
async def test_a_hundred_concurrent_streams_are_complete(client: LLMClient) -> None:
    async def one(number: int) -> str | None:
        messages = [{"role": "user", "content": f"Say {number}."}]
        reply = await collect(await client.chat_completion(messages, stream=True, max_tokens=3))
        return reply["choices"][0]["finish_reason"]

    reasons = await asyncio.gather(*[one(number) for number in range(100)])
    assert set(reasons) <= {"length", "stop"}
    assert client._server.transport.in_flight == 0
