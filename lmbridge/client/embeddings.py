"""Embeddings (`/v1/embeddings`): in the order of the inputs, and all of them or an error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from lmbridge._checks import check_integer
from lmbridge.client.inputs import Text, checked_texts
from lmbridge.client.server_api import ServerApi
from lmbridge.errors import LLMError, LLMResponseError, ModelChangedDuringExecutionError
from lmbridge.transport import Reply
from lmbridge.types import Embeddings


async def embed(server: ServerApi, body: dict[str, Any], batch_size: int | None) -> Embeddings:
    """Asks for the embeddings of some texts; see `LLMClient.embeddings`."""
    texts = checked_texts("input", body["input"])
    check_integer("batch_size", batch_size, optional=True)
    if batch_size is None or len(texts) <= batch_size:
        return await _ask(server, body, 0, len(texts))
    return _merged(await _ask_for_batches(server, body, list(texts), batch_size))


async def _ask_for_batches(server: ServerApi, body: dict[str, Any], texts: list[Text], size: int) -> list[Embeddings]:
    # One after another: a server computes the texts of one request side by side already, and whoever else waits in
    # the queue gets a turn between two of them.
    batches: list[Embeddings] = []
    for start in range(0, len(texts), size):
        batch = texts[start : start + size]
        try:
            batches.append(await _ask(server, {**body, "input": batch}, start, len(batch)))
            _check_same_model(server, batches[0].get("model"), batches[-1].get("model"))
        except LLMError as error:
            error.completed(context={"inputs": f"{start} to {start + len(batch) - 1}"})
            raise
    return batches


async def _ask(server: ServerApi, body: dict[str, Any], first: int, count: int) -> Embeddings:
    """One request; its inputs have the numbers from `first` on."""
    reply = await server.request(server.build_post("embeddings", "/embeddings", body, body.get("model")))
    value = server.json_object(reply)
    entries = _in_order(value.get("data"), count)
    if entries is None:
        raise server.unexpected_reply(reply, f"embeddings for {count} input{'' if count == 1 else 's'}")
    server.check_served_model(reply, value)
    for number, entry in enumerate(entries, first):
        if not _is_embedding(entry.get("embedding")):
            raise _no_embedding(server, reply, number)
    return cast("Embeddings", {**value, "data": entries})


def _in_order(entries: object, count: int) -> list[dict[str, Any]] | None:
    """The entries by their index; None if they are not one for each input."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return None
    by_index = {entry.get("index"): entry for entry in entries if type(entry.get("index")) is int}
    if len(entries) != count or by_index.keys() != set(range(count)):
        return None
    return [by_index[index] for index in range(count)]


def _is_embedding(value: object) -> bool:
    """Whether it is base64, or finite numbers, or, of a model without pooling, such numbers for each token."""
    if isinstance(value, str):
        return bool(value)
    if not isinstance(value, list) or not value:
        return False
    if isinstance(value[0], list):
        return all(isinstance(row, list) and row and _is_finite(row) for row in value)
    return _is_finite(value)


def _is_finite(numbers: list[Any]) -> bool:
    try:
        return math.isfinite(sum(numbers))  # one that is not makes the sum so, too
    except (TypeError, OverflowError):  # null, where the server had NaN; a whole number that no float holds
        return False


def _no_embedding(server: ServerApi, reply: Reply, number: int) -> LLMResponseError:
    return server.unexpected_reply(
        reply,
        "embeddings",
        message=f"the embedding of input {number} is not a list of finite numbers",
        hint="the model computed none for that text; another text, or another quantization of the model, may work",
    )


def _check_same_model(server: ServerApi, old: str | None, new: str | None) -> None:
    """Vectors of two models must not stand side by side."""
    if old and new and old != new:
        raise ModelChangedDuringExecutionError(
            f"the first batch was embedded by model {old!r}, a later one by {new!r}",
            old,
            new,
            hint="the server swapped models meanwhile; send requests for different models one after another",
            context={"operation": "embeddings", "url": f"{server.transport.api_base}/embeddings"},
        )


def _merged(batches: Sequence[Embeddings]) -> Embeddings:
    entries = [entry for batch in batches for entry in batch["data"]]
    for number, entry in enumerate(entries):
        entry["index"] = number
    return {**batches[0], "data": entries, "usage": cast("Any", _sum([batch.get("usage") for batch in batches]))}


def _sum(usages: Sequence[Any]) -> dict[str, int] | None:
    """The counts that every batch tells, added up; None if one tells nothing."""
    if not all(isinstance(usage, dict) and usage for usage in usages):
        return None
    known = [key for key in usages[0] if all(type(usage.get(key)) is int for usage in usages)]
    return {key: sum(usage[key] for usage in usages) for key in known}
