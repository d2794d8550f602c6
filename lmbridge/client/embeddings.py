"""Embeddings (`/v1/embeddings`).

A reply has exactly one embedding for each input, in the order of the inputs; anything else is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from lmbridge._checks import check_integer, is_integer
from lmbridge.client.api_requests import ServerApi
from lmbridge.client.completion_shape import read_index
from lmbridge.client.input_checks import Text, check_texts
from lmbridge.client.served_model import are_different_models
from lmbridge.errors import LLMError, LLMResponseError, ModelChangedDuringExecutionError
from lmbridge.transport import Reply
from lmbridge.types import Embeddings


async def request_embeddings(server: ServerApi, body: dict[str, Any], batch_size: int | None) -> Embeddings:
    """Sends the request or requests of `LLMClient.embeddings`, and returns their reply."""
    texts = check_texts("input", body["input"])
    check_integer("batch_size", batch_size, optional=True)
    if batch_size is None or len(texts) <= batch_size:
        return await _embed_batch(server, body, 0, len(texts))
    return _merge_batches(await _embed_in_batches(server, body, list(texts), batch_size))


async def _embed_in_batches(server: ServerApi, body: dict[str, Any], texts: list[Text], size: int) -> list[Embeddings]:
    # Batches are sent one after another. A server already computes the texts of one request in parallel, and other
    # requests that are queued get a turn between two batches.
    batches: list[Embeddings] = []
    for start in range(0, len(texts), size):
        batch = texts[start : start + size]
        try:
            batches.append(await _embed_batch(server, {**body, "input": batch}, start, len(batch)))
            _check_comparable(server, batches[0].get("model"), batches[-1].get("model"))
        except LLMError as error:
            error.completed(context={"inputs": f"{start} to {start + len(batch) - 1}"})
            raise
    return batches


async def _embed_batch(server: ServerApi, body: dict[str, Any], first: int, count: int) -> Embeddings:
    """Sends one request for `count` of the inputs.

    Args:
        server: The server.
        body: The body of the request, with the inputs of this batch only.
        first: The position of the batch's first input among all inputs, for errors.
        count: The number of inputs in the batch.
    """
    reply = await server.request(server.build_post("embeddings", "/embeddings", body, body.get("model")))
    value = await server.read_object(reply)
    entries = _sorted_entries(value.get("data"), count)
    if entries is None:
        raise server.unexpected_reply(reply, f"embeddings for {count} input{'' if count == 1 else 's'}")
    server.check_served_model(reply, value)
    for number, entry in enumerate(entries, first):
        if not _is_embedding(entry.get("embedding")):
            raise _invalid_embedding(server, reply, number)
    return cast("Embeddings", {**value, "data": entries})


def _sorted_entries(entries: object, count: int) -> list[dict[str, Any]] | None:
    """Returns the entries sorted by index, or None if there is not exactly one for each input.

    Entries without an index are in the order of the inputs, as they are in the replies of servers that leave it out.
    """
    if not isinstance(entries, list) or len(entries) != count or not all(isinstance(entry, dict) for entry in entries):
        return None
    indices = [_index_of(entry.get("index"), position) for position, entry in enumerate(entries)]
    by_index = {index: {**entry, "index": index} for index, entry in zip(indices, entries, strict=True)}
    return [by_index[index] for index in range(count)] if by_index.keys() == set(range(count)) else None


def _index_of(index: object, position: int) -> object:
    """Returns the index of an entry, which is its position in the reply if the server sends none."""
    return position if index is None else read_index(index)


def _is_embedding(value: object) -> bool:
    """Returns whether a value is an embedding: base64, a list of finite numbers, or one such list for each token.

    Models without pooling return the last form.
    """
    if isinstance(value, str):
        return bool(value)
    if not isinstance(value, list) or not value:
        return False
    if isinstance(value[0], list):
        return all(isinstance(row, list) and row and _is_finite(row) for row in value)
    return _is_finite(value)


def _is_finite(numbers: list[Any]) -> bool:
    # One number that is not finite makes the sum infinite or NaN. A null, which servers send in place of NaN, raises a
    # TypeError, and an integer that does not fit into a float raises an OverflowError.
    try:
        return math.isfinite(sum(numbers))
    except (TypeError, OverflowError):
        return False


def _invalid_embedding(server: ServerApi, reply: Reply, number: int) -> LLMResponseError:
    return server.unexpected_reply(
        reply,
        "embeddings",
        message=f"the embedding of input {number} is not a list of finite numbers",
        hint="the model failed to embed this text; change the text, or use another quantization of the model",
    )


def _check_comparable(server: ServerApi, old: object, new: object) -> None:
    """Checks that the same model embedded two batches, because the vectors of two models cannot be compared.

    Args:
        server: The server, with the client's `model_mismatch`.
        old: The model that the reply to the first batch names.
        new: The model that the reply to a later batch names.

    Raises:
        ModelChangedDuringExecutionError: The models differ, and `model_mismatch` is not "ignore".
    """
    if server.mismatch_policy.ignores_names or not (isinstance(old, str) and isinstance(new, str) and old and new):
        return
    if are_different_models(old, new):
        raise ModelChangedDuringExecutionError(
            f"the first batch was embedded by model {old!r}, but a later one by {new!r}",
            old,
            new,
            hint="the server swapped models between two requests; Limits(max_loaded_models=1) can prevent that",
            context={"operation": "embeddings", "url": f"{server.transport.api_base}/embeddings"},
        )


def _merge_batches(batches: Sequence[Embeddings]) -> Embeddings:
    entries = [entry for batch in batches for entry in batch["data"]]
    for number, entry in enumerate(entries):
        entry["index"] = number
    usage = _sum_usage([batch.get("usage") for batch in batches])
    return {**batches[0], "data": entries, "usage": cast("Any", usage)}


def _sum_usage(usages: Sequence[Any]) -> dict[str, int] | None:
    """Returns the sums of the counts that every batch reports, or None if a batch reports no usage."""
    if not all(isinstance(usage, dict) and usage for usage in usages):
        return None
    shared = [key for key in usages[0] if all(is_integer(usage.get(key)) for usage in usages)]
    return {key: sum(usage[key] for usage in usages) for key in shared}
