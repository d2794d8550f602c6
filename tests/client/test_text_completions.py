"""Text completions, plain and streamed, with the same guarantees as chat completions."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from lmbridge import (
    ContextLengthExceededError,
    Limits,
    LLMClient,
    LLMResponseError,
    LLMStreamError,
    LLMTimeoutError,
    LLMValidationError,
    ModelChangedDuringExecutionError,
    ModelLoadError,
    ModelMismatchError,
    TaskCancelledError,
    TextStream,
    Timeouts,
    collect,
)
from lmbridge.testing import ScriptedServer, hang_up, reply, sse, stall
from lmbridge.types import TextCompletion
from tests.support import cancel_at_each_step, in_flight

PROMPT = "The capital of France is"


def text(piece: str, finish_reason: str | None = None, *, index: int = 0, **fields: Any) -> dict[str, Any]:
    """Returns a chunk."""
    choice = {"text": piece, "index": index, "logprobs": None, "finish_reason": finish_reason}
    return {"object": "text_completion", "model": "test-model", "id": "cmpl-1", "choices": [choice], **fields}


def whole(*texts: str, **fields: Any) -> dict[str, Any]:
    """Returns a plain reply."""
    choices = [
        {"text": each, "index": index, "logprobs": None, "finish_reason": "stop"} for index, each in enumerate(texts)
    ]
    return {"object": "text_completion", "model": "test-model", "id": "cmpl-1", "choices": choices, **fields}


HALF = (text(" Pa"), text("ris"))


async def opened(client: LLMClient) -> TextStream:
    return await client.text_completion(PROMPT, stream=True)


async def complete(client: LLMClient, stream: bool) -> TextCompletion:
    """Returns the reply of a plain call, or the collected one of a stream."""
    answer = await client.text_completion(PROMPT, stream=stream)
    return await collect(answer) if isinstance(answer, TextStream) else answer


async def take_one(client: LLMClient) -> None:
    async for _ in await opened(client):
        break


async def read(stream: TextStream) -> str:
    return "".join([choice["text"] async for chunk in stream for choice in chunk["choices"]])


# Plain completions


async def test_the_reply_is_the_dict_that_the_server_sent(scripted_server: ScriptedServer, client: LLMClient) -> None:
    sent = whole(" Paris.", odd={"a": None})
    scripted_server.script(reply(200, sent))
    assert await client.text_completion(PROMPT) == sent


@pytest.mark.parametrize(
    "prompt", ["", PROMPT, [PROMPT, "One,"], (PROMPT, "One,"), [1, 2, 3], [[1, 2], [3]], [PROMPT, [1]]], ids=str
)
async def test_a_prompt_is_sent_unchanged_and_nothing_is_added(
    scripted_server: ScriptedServer, prompt: Any, client: LLMClient
) -> None:
    scripted_server.default = reply(200, whole("a", "b"))
    await client.text_completion(prompt, model="m", max_tokens=5)
    (request,) = scripted_server.requests
    sent = list(prompt) if isinstance(prompt, tuple) else prompt
    assert (request.path, request.json) == ("/v1/completions", {"prompt": sent, "model": "m", "max_tokens": 5})


BAD: list[tuple[Any, str]] = [
    (None, "prompt must be a text or a list of texts, not None; give a string"),
    (5, "prompt must be a text or a list of texts, not int"),
    (b"x", "prompt must be a text or a list of texts, not bytes"),
    ([], "prompt is empty; give at least one text"),
    ([[]], r"prompt\[0\] is an empty list"),
    ([None], r"prompt\[0\] must be a text, not None"),
    (["a", 5], r"prompt\[1\] must be a text, not int"),
    ([True], r"prompt\[0\] must be a text, not bool"),
    ([1, "a"], r"prompt\[1\] must be a token id \(an integer\), not str"),
    ([[1, 2.5]], r"prompt\[0\]\[1\] must be a token id \(an integer\), not float"),
    ({"a": 1}, "prompt must be a text or a list of texts, not dict"),
]


@pytest.mark.parametrize(("prompt", "expected_text"), BAD)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_bad_prompt_is_refused_before_anything_is_sent(
    scripted_server: ScriptedServer, client: LLMClient, prompt: Any, expected_text: str, stream: bool
) -> None:
    with pytest.raises(LLMValidationError, match=expected_text):
        await client.text_completion(prompt, stream=stream)
    assert scripted_server.connections == 0


@pytest.mark.parametrize(
    "body", [{"choices": []}, {"choices": [{"message": {"content": "a"}}]}, {"choices": [None]}, {"data": []}, []]
)
async def test_a_reply_that_is_not_a_text_completion_raises(
    scripted_server: ScriptedServer, client: LLMClient, body: Any
) -> None:
    scripted_server.script(reply(200, body))
    with pytest.raises(LLMResponseError) as caught:
        await client.text_completion(PROMPT)
    assert caught.value.status == 200


async def test_a_prompt_without_an_answer_raises(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(reply(200, whole("a")))
    with pytest.raises(LLMResponseError, match="not text completions of 2 prompts"):
        await client.text_completion([PROMPT, PROMPT])


@pytest.mark.parametrize("stream", [True, False])
async def test_server_errors_raise_the_same_classes_as_for_a_chat(
    scripted_server: ScriptedServer, client: LLMClient, stream: bool
) -> None:
    said = {"error": {"message": "request (40 tokens) exceeds the available context size (16 tokens)"}}
    scripted_server.script(reply(400, said))
    with pytest.raises(ContextLengthExceededError, match="text completion with model 'test-model' at http") as caught:
        await client.text_completion(PROMPT, stream=stream)
    assert (caught.value.prompt_tokens, caught.value.status) == (40, 400)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_is_retried_like_a_chat(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], stream: bool
) -> None:
    good = sse(text(" Paris", "stop"), done=True) if stream else reply(200, whole(" Paris"))
    scripted_server.script(reply(503, {"error": "busy"}), hang_up(), good)
    assert (await complete(client, stream))["choices"][0]["text"] == " Paris"
    assert len(scripted_server.requests) == 3


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_of_another_model_is_noticed(scripted_server: ScriptedServer, stream: bool) -> None:
    scripted_server.script(sse(text("a", "stop"), done=True) if stream else reply(200, whole("a")))
    async with LLMClient(scripted_server.api_base, "other", model_mismatch="raise") as client:
        with pytest.raises(ModelMismatchError) as caught:
            await complete(client, stream)
    assert (caught.value.asked, caught.value.served) == ("other", "test-model")


# Streamed completions


async def test_chunks_are_the_dicts_that_the_server_sent(scripted_server: ScriptedServer, client: LLMClient) -> None:
    sent = [*HALF, text("", "stop", odd=[1]), {"choices": [], "model": "test-model", "usage": {"prompt_tokens": 5}}]
    scripted_server.script(sse(*sent, done=True))
    assert [chunk async for chunk in await opened(client)] == sent


async def test_collect_returns_the_plain_reply(scripted_server: ScriptedServer, client: LLMClient) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    scripted_server.script(sse(*HALF, text("", "stop"), text("", choices=[], usage=usage), done=True))
    reply = await collect(await opened(client))
    assert reply == whole(" Paris", usage=usage)


async def test_collect_accepts_other_iterables_of_chunks() -> None:
    async def chunks() -> AsyncGenerator[Any, None]:
        for each in (*HALF, text("", "stop")):
            yield each

    assert await collect(chunks()) == whole(" Paris", usage=None)


async def test_logprobs_are_joined(scripted_server: ScriptedServer, client: LLMClient) -> None:
    pieces = []
    for token in (" Pa", "ris"):
        piece = text(token)
        piece["choices"][0]["logprobs"] = {"tokens": [token], "token_logprobs": [-0.5]}
        pieces.append(piece)
    scripted_server.script(sse(*pieces, text("", "stop"), done=True))
    (choice,) = (await collect(await opened(client)))["choices"]
    assert choice["logprobs"] == {"tokens": [" Pa", "ris"], "token_logprobs": [-0.5, -0.5]}


@pytest.mark.parametrize(("prompt", "n"), [([PROMPT, "x"], None), (PROMPT, 2), ([[1, 2], [3]], 1)])
async def test_a_stream_has_n_answers_for_each_prompt(
    scripted_server: ScriptedServer, client: LLMClient, prompt: Any, n: int | None
) -> None:
    params: dict[str, Any] = {} if n is None else {"n": n}
    first = (text("a"), text("", "stop"))
    scripted_server.script(sse(*first, text("b", index=1), text("", "stop", index=1)), sse(*first))
    reply = await collect(await client.text_completion(prompt, stream=True, **params))
    assert [choice["text"] for choice in reply["choices"]] == ["a", "b"]
    with pytest.raises(LLMStreamError, match="cut off") as caught:
        await read(await client.text_completion(prompt, stream=True, **params))
    assert caught.value.partial["choices"][0]["text"] == "a"


async def test_the_null_that_llama_cpp_sends_before_several_answers_is_skipped(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sse("data: null\n\n", text("a", "stop"), text("b", "stop", index=1), done=True))
    reply = await collect(await client.text_completion([PROMPT, "x"], stream=True))
    assert [choice["text"] for choice in reply["choices"]] == ["a", "b"]


async def test_the_model_may_change_before_the_answer_or_if_model_mismatch_is_ignore(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sse(text("", model="proxy"), text("a"), text("b", "stop"), done=True))
    assert await read(await opened(client)) == "ab"
    scripted_server.script(sse(text("a"), text("b", "stop", model="other"), done=True))
    async with LLMClient(scripted_server.api_base, "test-model", model_mismatch="ignore") as indifferent:
        assert await read(await opened(indifferent)) == "ab"


async def test_an_answer_may_be_empty(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse(text("", "length"), done=True))
    assert (await collect(await opened(client)))["choices"][0]["text"] == ""


@pytest.mark.parametrize(
    ("events", "error", "expected_text"),
    [
        (HALF, LLMStreamError, "cut off: it ended without"),
        ((*HALF, {"error": {"message": "model crashed"}}), ModelLoadError, "model crashed"),
        ((*HALF, "event: error\ndata: gone\n\n"), LLMStreamError, "the server ended the stream: gone"),
        ((*HALF, "proxy error: gone\n\n"), LLMStreamError, "the server ended the stream: proxy error: gone"),
        ((*HALF, text("x", model="other")), ModelChangedDuringExecutionError, "went on with 'other'"),
        ((*HALF, text("x", choices=[{"text": 5}])), LLMStreamError, "a chunk of an unknown shape"),
        ((*HALF, text("x", choices=7)), LLMStreamError, "a chunk of an unknown shape"),
        ((*HALF, "data: 7\n\n"), LLMStreamError, "the server ended the stream: 7"),
    ],
)
async def test_an_incomplete_stream_raises_with_the_partial_reply(
    scripted_server: ScriptedServer, client: LLMClient, events: Any, error: type[Exception], expected_text: str
) -> None:
    scripted_server.script(sse(*events))
    stream = await opened(client)
    with pytest.raises(error, match=expected_text) as caught:
        await read(stream)
    partial = getattr(caught.value, "partial", None)
    assert partial is not None
    assert (partial["object"], partial["choices"][0]["text"]) == ("text_completion", " Paris")
    assert partial["choices"][0]["finish_reason"] is None
    assert in_flight(client) == 0


async def test_a_stream_without_any_answer_raises(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse({"choices": [{"index": 0, "finish_reason": "stop"}]}, done=True))
    with pytest.raises(LLMStreamError, match="without any part of an answer"):
        await collect(await opened(client))


async def test_a_long_gap_between_events_is_an_idle_timeout(scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall(after=HALF))
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(idle=0.05)) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await read(await opened(client))
    assert caught.value.phase == "idle"
    assert caught.value.partial["choices"][0]["text"] == " Paris"


async def test_the_reader_of_a_stream_that_another_task_closes_gets_an_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))
    stream = await opened(client)
    await anext(stream)
    await anext(stream)
    reader = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    await stream.aclose()
    with pytest.raises(TaskCancelledError) as caught:
        await reader
    assert caught.value.partial["choices"][0]["text"] == " Paris"
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_dropping_an_open_stream_warns_and_closes_its_connection(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))
    with pytest.warns(ResourceWarning, match="unclosed stream of text completion with model 'test-model'"):
        await take_one(client)
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


@pytest.mark.parametrize("stream", [True, False])
async def test_cancelling_at_any_step_leaves_nothing_behind(
    scripted_server: ScriptedServer, no_waits: list[float], stream: bool
) -> None:
    good = sse(*HALF, text("", "stop"), done=True) if stream else reply(200, whole(" Paris"))
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:

        async def run() -> None:
            scripted_server._script.clear()
            scripted_server.script(reply(503, {"error": "busy"}), good)
            await complete(client, stream)

        async def after() -> None:
            assert in_flight(client) == 0
            scripted_server._script.clear()
            scripted_server.script(reply(200, whole("a")))
            assert (await client.text_completion(PROMPT))["choices"]

        await cancel_at_each_step(run, after, at_least=3)
