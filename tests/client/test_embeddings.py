"""Embeddings: there is one for each text, in the order of the texts, or an error."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lmbridge import (
    Limits,
    LLMClient,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    LLMValidationError,
    ModelChangedDuringExecutionError,
    ModelMismatchError,
)
from lmbridge.testing import Exchange, ScriptedServer, hang_up, reply
from tests.support import MESSAGES, cancel_at_each_step, in_flight


def body(*vectors: Any, order: Any = None, **fields: Any) -> dict[str, Any]:
    """Returns a reply."""
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    if order is not None:
        data = [data[index] for index in order]
    usage = {"prompt_tokens": len(vectors), "total_tokens": len(vectors)}
    return {"object": "list", "model": "test-model", "data": data, "usage": usage, **fields}


async def embed_lengths(exchange: Exchange) -> None:
    """Replies with the length of each text as its embedding, last text first."""
    texts = exchange.request.json["input"]
    vectors = [[float(len(text)), 1.0] for text in texts]
    await reply(200, body(*vectors, order=range(len(texts) - 1, -1, -1)))(exchange)


async def test_the_reply_is_the_dict_that_the_server_sent(scripted_server: ScriptedServer, client: LLMClient) -> None:
    sent = body([0.5, -1, 2.0], odd={"a": None})
    scripted_server.script(reply(200, sent))
    assert await client.embeddings("a") == sent
    (request,) = scripted_server.requests
    assert (request.path, request.json) == ("/v1/embeddings", {"input": "a", "model": "test-model"})


async def test_embeddings_are_sorted_in_the_order_of_the_texts(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(reply(200, body([0.0], [1.0], [2.0], order=(2, 0, 1))))
    data = (await client.embeddings(["a", "b", "c"]))["data"]
    assert [(entry["index"], entry["embedding"]) for entry in data] == [(0, [0.0]), (1, [1.0]), (2, [2.0])]


@pytest.mark.parametrize("given", [[1, 2], [[1, 2], [3]], ["a", [1]], ("a", "b")], ids=str)
async def test_token_ids_are_sent_unchanged(scripted_server: ScriptedServer, client: LLMClient, given: Any) -> None:
    scripted_server.script(reply(200, body(*[[1.0]] * (1 if isinstance(given[0], int) else 2))))
    await client.embeddings(given, dimensions=1)
    assert scripted_server.requests[0].json == {"input": list(given), "model": "test-model", "dimensions": 1}


async def test_base64_is_returned_unchanged(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(reply(200, body("AACAPw==", "AAAAQA==", order=(1, 0))))
    data = (await client.embeddings(["a", "b"], encoding_format="base64"))["data"]
    assert [entry["embedding"] for entry in data] == ["AACAPw==", "AAAAQA=="]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": ""}, "input is an empty string; leave it out"),
    ({"input": ["a", ""]}, r"input\[1\] is an empty string"),
    ({"input": []}, "input is empty; give at least one text"),
    ({"input": ["a", []]}, r"input\[1\] is an empty list"),
    ({"input": None}, "input must be a text or a list of texts, not None"),
    ({"input": ["a", None]}, r"input\[1\] must be a text, not None"),
    ({"input": ["a"] * 5 + [""], "batch_size": 2}, r"input\[5\] is an empty string"),
    ({"input": "a", "batch_size": 0}, "batch_size must be an integer of at least 1 or None, not 0"),
    ({"input": "a", "batch_size": True}, "batch_size must be .*, not True"),
    ({"input": "a", "batch_size": 2.0}, "batch_size must be .*, not 2.0"),
    ({"input": "a", "model": ""}, "model must be .*, not ''"),
]


@pytest.mark.parametrize(("arguments", "expected_text"), BAD)
async def test_bad_input_is_refused_before_anything_is_sent(
    scripted_server: ScriptedServer, client: LLMClient, arguments: dict[str, Any], expected_text: str
) -> None:
    with pytest.raises(LLMValidationError, match=expected_text):
        await client.embeddings(**arguments)
    assert scripted_server.connections == 0


@pytest.mark.parametrize(
    "fields", [[{}, {}], [{"index": None}, {"index": None}], [{"index": 0}, {}], [{}, {"index": 1}]]
)
async def test_embeddings_without_an_index_are_in_the_order_of_the_texts(
    scripted_server: ScriptedServer, client: LLMClient, fields: list[dict[str, Any]]
) -> None:
    first, second = fields
    scripted_server.script(reply(200, body(data=[{**first, "embedding": [1.0]}, {**second, "embedding": [2.0]}])))
    data = (await client.embeddings(["a", "b"]))["data"]
    assert [(entry["index"], entry["embedding"]) for entry in data] == [(0, [1.0]), (1, [2.0])]


@pytest.mark.parametrize("indices", [("1", "0"), (1.0, 0.0)])
async def test_an_index_may_be_a_string_or_a_float(
    scripted_server: ScriptedServer, client: LLMClient, indices: tuple[Any, Any]
) -> None:
    data = [{"index": index, "embedding": [float(index)]} for index in indices]
    scripted_server.script(reply(200, body(data=data)))
    read = (await client.embeddings(["a", "b"]))["data"]
    assert [(entry["index"], entry["embedding"]) for entry in read] == [(0, [0.0]), (1, [1.0])]


INCOMPLETE: list[Any] = [
    body([1.0]),
    body([1.0], [1.0], [1.0]),
    body([1.0], [1.0], order=(0, 0)),
    body([1.0], [1.0], order=(0, 1, 1)),
    body(),
    body(data=None),
    body(data=[{"embedding": [1.0]}, {"index": 0, "embedding": [1.0]}]),
    body(data=[{"index": -1, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}]),
    body(data=[{"index": "a", "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}]),
    body(data=[{"index": [0], "embedding": [1.0]}, {"index": 1, "embedding": [1.0]}]),
    body(data=[{"index": 0.5, "embedding": [1.0]}, {"index": 1, "embedding": [1.0]}]),
    body(data=[{"embedding": [1.0]}, None]),
    body(data=[{"index": 0, "embedding": [1.0]}, {"index": 2, "embedding": [1.0]}]),
    body(data=[{"index": True, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}]),
    body(data=[[1.0], [1.0]]),
    {"embeddings": [[1.0], [1.0]]},
]


@pytest.mark.parametrize("sent", INCOMPLETE)
async def test_a_reply_without_exactly_one_embedding_for_each_text_raises(
    scripted_server: ScriptedServer, client: LLMClient, sent: Any
) -> None:
    scripted_server.script(reply(200, sent))
    with pytest.raises(LLMResponseError, match="something that is not embeddings for 2 inputs") as caught:
        await client.embeddings(["a", "b"])
    assert caught.value.status == 200


@pytest.mark.parametrize(
    "vector",
    [
        "[1.0, null]",
        "[NaN, 1.0]",
        "[1.0, Infinity]",
        "null",
        "[]",
        '""',
        '["1"]',
        "[[1.0], []]",
        "[[null]]",
        "{}",
        f"[{10**400}]",
    ],
)
async def test_an_embedding_that_is_not_a_list_of_finite_numbers_raises(
    scripted_server: ScriptedServer, client: LLMClient, vector: str
) -> None:
    sent = f'{{"data": [{{"index": 0, "embedding": [1.0]}}, {{"index": 1, "embedding": {vector}}}]}}'
    scripted_server.script(reply(200, sent, content_type="application/json"))
    with pytest.raises(LLMResponseError, match="the embedding of input 1 is not a list of finite numbers") as caught:
        await client.embeddings(["a", "b"])
    assert (caught.value.status, caught.value.body) == (200, sent)
    assert str(caught.value).startswith("embeddings with model 'test-model' at http")


async def test_errors_and_retries_are_the_same_as_for_a_chat(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float]
) -> None:
    scripted_server.script(reply(503, {"error": "busy"}), hang_up(), reply(200, body([1.0])))
    assert (await client.embeddings("a"))["data"][0]["embedding"] == [1.0]
    scripted_server.script(reply(429, {"error": "slow down"}, headers={"Retry-After": "100"}))
    with pytest.raises(LLMRateLimitError) as caught:
        await client.embeddings("a")
    assert caught.value.retry_after == 100
    assert len(scripted_server.requests) == 4


async def test_an_answer_of_another_model_is_noticed(scripted_server: ScriptedServer) -> None:
    scripted_server.script(reply(200, body([1.0])))
    async with LLMClient(scripted_server.api_base, "other", model_mismatch="raise") as client:
        with pytest.raises(ModelMismatchError):
            await client.embeddings("a")


# Batches


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100])
async def test_batches_are_merged_into_one_reply_in_the_order_of_the_texts(
    scripted_server: ScriptedServer, client: LLMClient, size: int
) -> None:
    scripted_server.default = embed_lengths
    texts = ["x" * length for length in (3, 1, 4, 1, 5, 9, 2)]
    merged = await client.embeddings(texts, batch_size=size, dimensions=2)
    assert merged["data"] == [
        {"object": "embedding", "index": index, "embedding": [float(len(text)), 1.0]}
        for index, text in enumerate(texts)
    ]
    assert merged["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert (merged["model"], merged["object"]) == ("test-model", "list")
    sent = [request.json["input"] for request in scripted_server.requests]
    assert sent == [texts[start : start + size] for start in range(0, 7, size)]
    assert {request.json["dimensions"] for request in scripted_server.requests} == {2}
    assert scripted_server.max_in_flight == 1


async def test_one_text_is_never_split(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = reply(200, body([1.0]))
    await client.embeddings("a text", batch_size=1)
    await client.embeddings([1, 2, 3], batch_size=1)
    assert [request.json["input"] for request in scripted_server.requests] == ["a text", [1, 2, 3]]


@pytest.mark.parametrize("usage", [None, {}])
async def test_usage_is_none_if_one_batch_has_none(
    scripted_server: ScriptedServer, client: LLMClient, usage: Any
) -> None:
    scripted_server.script(reply(200, body([1.0])), reply(200, body([1.0], usage=usage)))
    assert (await client.embeddings(["a", "b"], batch_size=1))["usage"] is None


async def test_usage_has_the_counts_that_every_batch_reports(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(
        reply(200, body([1.0], usage={"prompt_tokens": 2, "total_tokens": 2, "cost": 0.5})),
        reply(200, body([1.0], usage={"prompt_tokens": 3})),
    )
    assert (await client.embeddings(["a", "b"], batch_size=1))["usage"] == {"prompt_tokens": 5}


async def test_a_failing_batch_fails_the_whole_and_the_error_says_which_it_was(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(reply(200, body([1.0], [1.0])), reply(400, {"error": "too long"}))
    with pytest.raises(LLMResponseError, match="too long") as caught:
        await client.embeddings(["a", "b", "c", "d", "e"], batch_size=2)
    assert caught.value.context["inputs"] == "2 to 3"
    assert len(scripted_server.requests) == 2
    scripted_server.script(reply(200, body([1.0], [1.0])), reply(200, body([1.0], [None])))
    with pytest.raises(LLMResponseError, match="the embedding of input 3 is not"):
        await client.embeddings(["a", "b", "c", "d", "e"], batch_size=2)


async def test_batches_of_two_models_are_never_merged(scripted_server: ScriptedServer) -> None:
    scripted_server.script(reply(200, body([1.0])), reply(200, body([1.0], model="other")))
    async with LLMClient(scripted_server.api_base) as client:
        with pytest.raises(ModelChangedDuringExecutionError, match="embeddings at http") as caught:
            await client.embeddings(["a", "b", "c"], batch_size=1)
    assert (caught.value.old_model, caught.value.new_model) == ("test-model", "other")


@pytest.mark.parametrize(
    ("mode", "second"), [("warn", "test-model:2"), ("warn", "test-model@q4_k_m"), ("raise", ""), ("ignore", "other")]
)
async def test_batches_are_merged_if_their_models_are_the_same_or_do_not_matter(
    scripted_server: ScriptedServer, mode: Any, second: str
) -> None:
    scripted_server.script(reply(200, body([1.0])), reply(200, body([2.0], model=second)))
    async with LLMClient(scripted_server.api_base, model_mismatch=mode) as client:
        merged = await client.embeddings(["a", "b"], batch_size=1)
    assert [each["embedding"] for each in merged["data"]] == [[1.0], [2.0]]


async def test_other_requests_get_a_turn_between_two_batches(scripted_server: ScriptedServer) -> None:
    first = asyncio.Event()

    async def held(exchange: Exchange) -> None:
        await first.wait()
        await embed_lengths(exchange)

    scripted_server.on_path("/v1/embeddings", held)
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:
        many = asyncio.create_task(client.embeddings(["a", "b", "c"], batch_size=1))
        await scripted_server.wait_until(lambda: scripted_server.in_flight)
        chat = asyncio.create_task(client.chat_completion(MESSAGES))
        await asyncio.sleep(0)
        first.set()
        await asyncio.gather(many, chat)
    assert [request.path.rpartition("/")[2] for request in scripted_server.requests] == [
        *("embeddings", "completions"),
        *("embeddings", "embeddings"),
    ]


async def test_changing_the_list_during_the_request_has_no_effect(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    texts = ["a", "bb", "ccc"]

    async def change(exchange: Exchange) -> None:
        texts.clear()
        await embed_lengths(exchange)

    scripted_server.default = change
    merged = await client.embeddings(texts, batch_size=1)
    assert [entry["embedding"][0] for entry in merged["data"]] == [1, 2, 3]


async def test_cancelling_at_any_step_leaves_nothing_behind(
    scripted_server: ScriptedServer, no_waits: list[float]
) -> None:
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:

        async def run() -> None:
            scripted_server._script.clear()
            scripted_server.script(embed_lengths, reply(503, {"error": "busy"}), embed_lengths, embed_lengths)
            await client.embeddings(["a", "b", "c"], batch_size=1)

        async def after() -> None:
            assert in_flight(client) == 0
            scripted_server._script.clear()
            scripted_server.script(embed_lengths)
            assert (await client.embeddings(["a"]))["data"]

        await cancel_at_each_step(run, after, at_least=6)


async def test_closing_the_client_ends_the_request(scripted_server: ScriptedServer, client: LLMClient) -> None:
    gate = asyncio.Event()

    async def held(_exchange: Exchange) -> None:
        await gate.wait()

    scripted_server.script(embed_lengths, held)
    many = asyncio.create_task(client.embeddings(["a", "b", "c"], batch_size=1))
    await scripted_server.wait_until(lambda: len(scripted_server.requests) == 2)
    await client.close()
    with pytest.raises(LLMError, match="the client was closed before the reply was complete"):
        await many
