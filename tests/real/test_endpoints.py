"""Text completions, embeddings and responses of a real llama.cpp server.

The tests assert the structure of the answers, because the text of a small model cannot be predicted.
"""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import base64
import importlib.util
import math
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import (
    ContextLengthExceededError,
    LLMClient,
    LLMResponseError,
    LocalServer,
    collect,
)
from tests.real.support import until_idle

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"temperature": 0, "seed": 1, "max_tokens": 8}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def embedding_server() -> AsyncIterator[LocalServer]:
    """Starts an embedded server that returns embeddings."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs lmbridge[local]")
    async with LocalServer(n_ctx=2048, n_parallel=2, embeddings=True) as server:
        yield server


@pytest_asyncio.fixture
async def embedder(embedding_server: LocalServer) -> AsyncIterator[LLMClient]:
    """Connects a client to the embedding server."""
    async with LLMClient(embedding_server.api_base, embedding_server.model, model_mismatch="raise") as client:
        yield client


# Text completions


async def test_a_streamed_text_completion_equals_the_plain_one(client: LLMClient) -> None:
    plain = await client.text_completion(PROMPT, **GREEDY)
    options = {"include_usage": True}
    collected = await collect(await client.text_completion(PROMPT, stream=True, stream_options=options, **GREEDY))
    assert collected["choices"] == plain["choices"]
    assert collected["object"] == plain["object"]
    assert collected["usage"] is not None
    assert collected["usage"]["completion_tokens"] == 8
    assert set(collected) >= set(plain) - {"timings"}


@pytest.mark.parametrize("n", [1, 2])
async def test_several_prompts_get_one_choice_each_streamed_or_not(client: LLMClient, n: int) -> None:
    prompts: list[str | list[int]] = [PROMPT, [504, 260, 253]]
    plain = await client.text_completion(prompts, n=n, **GREEDY)
    collected = await collect(await client.text_completion(prompts, n=n, stream=True, **GREEDY))
    assert [choice["index"] for choice in collected["choices"]] == list(range(2 * n))
    assert all(choice["text"] and choice["finish_reason"] == "length" for choice in collected["choices"])
    assert collected["choices"][0]["text"] == plain["choices"][0]["text"]


async def test_leaving_a_text_stream_stops_the_generation(client: LLMClient, local_server: LocalServer) -> None:
    async with await client.text_completion("Once upon a time", stream=True, max_tokens=2000) as stream:
        await anext(stream)
    await until_idle(local_server)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_prompt_that_is_too_long_raises_context_length_exceeded(client: LLMClient, stream: bool) -> None:
    with pytest.raises(ContextLengthExceededError) as caught:
        await client.text_completion("word " * 20_000, stream=stream)
    assert (caught.value.prompt_tokens or 0) > 8000


# Embeddings


async def test_embeddings_do_not_depend_on_the_batch_size(embedder: LLMClient) -> None:
    texts = ["a cat", "the stock market", "a kitten", "share prices", "a dog"]
    whole = await embedder.embeddings(texts)
    split = await embedder.embeddings(texts, batch_size=2)
    assert [entry["index"] for entry in split["data"]] == [0, 1, 2, 3, 4]
    assert split["usage"] == whole["usage"]
    for one, other in zip(whole["data"], split["data"], strict=True):
        assert one["embedding"] == pytest.approx(other["embedding"], abs=0.02)
        assert math.fsum(number * number for number in one["embedding"]) == pytest.approx(1, abs=1e-3)


async def test_base64_embeddings_contain_the_same_numbers(embedder: LLMClient) -> None:
    floats = (await embedder.embeddings("a cat"))["data"][0]["embedding"]
    packed = base64.b64decode((await embedder.embeddings("a cat", encoding_format="base64"))["data"][0]["embedding"])
    assert struct.unpack(f"<{len(floats)}f", packed) == pytest.approx(floats, abs=1e-5)


async def test_token_ids_can_be_embedded(embedder: LLMClient) -> None:
    assert len((await embedder.embeddings([[1, 2], [3]]))["data"]) == 2
    assert len((await embedder.embeddings([1, 2, 3]))["data"]) == 1


async def test_a_text_that_is_too_long_to_embed_raises_without_a_retry(embedder: LLMClient) -> None:
    with pytest.raises(LLMResponseError, match=r"too large to process.*1 attempt") as caught:
        await embedder.embeddings(["short", "short", "word " * 1500], batch_size=2)
    assert caught.value.context["inputs"] == "2 to 2"


async def test_a_server_without_embeddings_raises_its_own_message(client: LLMClient) -> None:
    with pytest.raises(LLMResponseError, match="does not support embeddings") as caught:
        await client.embeddings("a")
    assert caught.value.status == 501


# Responses


async def test_a_streamed_response_equals_the_plain_one(client: LLMClient) -> None:
    options: dict[str, Any] = {"temperature": 0, "seed": 1, "max_output_tokens": 12}
    plain = await client.create_response("Say hello.", **options)
    stream = await client.create_response("Say hello.", stream=True, **options)
    events = [event async for event in stream]
    assert events[0].event.type == events[0].data["type"] == "response.created"
    assert events[-1].event.type == "response.completed"
    deltas = [data["delta"] for _, data in events if data["type"] == "response.output_text.delta"]
    assert len(deltas) > 5
    collected = await collect(stream)
    assert collected["output"][0]["content"] == plain["output"][0]["content"]
    assert collected["output"][0]["content"][0]["text"] == "".join(deltas)
    assert (collected["status"], plain["status"]) == ("completed", "completed")
    assert collected["usage"] is not None
    assert collected["usage"]["output_tokens"] == 12


async def test_the_partial_response_contains_the_text_of_the_deltas(
    client: LLMClient, local_server: LocalServer
) -> None:
    stream = await client.create_response("Tell me a long story about the sea.", stream=True, max_output_tokens=1500)
    deltas: list[str] = []
    async for _, data in stream:
        if data["type"] == "response.output_text.delta":
            deltas.append(data["delta"])
        if len(deltas) == 10:
            break
    await stream.aclose()
    await until_idle(local_server)
    with pytest.raises(Exception, match="the stream was closed before its end") as caught:
        await anext(stream)
    (item,) = getattr(caught.value, "partial")["output"]  # noqa: B009 - the error may have any class
    assert item["content"] == [{"type": "output_text", "text": "".join(deltas)}]
    assert item["status"] == "in_progress"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_tool_of_the_responses_api_is_called(client: LLMClient, stream: bool) -> None:
    answer = await client.create_response(
        [{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],
        tool_choice="required",
        temperature=0,
        max_output_tokens=100,
        stream=stream,
    )
    response = answer if isinstance(answer, dict) else await collect(answer)
    (call,) = [item for item in response["output"] if item["type"] == "function_call"]
    assert call["name"] == "get_weather"
    assert call["arguments"].startswith("{")


async def test_a_previous_response_id_is_refused(client: LLMClient) -> None:
    with pytest.raises(LLMResponseError, match="does not support 'previous_response_id'"):
        await client.create_response("And then?", previous_response_id="resp_1")


@pytest.mark.parametrize("stream", [True, False])
async def test_an_input_that_is_too_long_raises_context_length_exceeded(client: LLMClient, stream: bool) -> None:
    with pytest.raises(ContextLengthExceededError):
        await client.create_response("word " * 20_000, stream=stream)
