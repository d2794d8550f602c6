"""Replies in the form of OpenAI's API, as plain dicts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

CREATED: Final = 1_767_225_600
"""The `created` time of every reply. It is fixed (2026-01-01), so that replies are the same in every run."""
_FRAGMENT_LENGTH: Final = 8
"""The number of characters of the arguments of a tool call that one delta carries."""


def completion(
    reply_id: str,
    model: str,
    message: Mapping[str, Any],
    *,
    finish_reason: str | None,
    usage: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns a whole chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    return {**_head(reply_id, model, "chat.completion"), "choices": [choice], "usage": dict(usage)}


def completion_chunk(
    reply_id: str, model: str, delta: Mapping[str, Any], *, finish_reason: str | None = None
) -> dict[str, Any]:
    """Returns one chunk of a streamed chat completion."""
    choice = {"index": 0, "delta": dict(delta), "finish_reason": finish_reason}
    return {**_head(reply_id, model, "chat.completion.chunk"), "choices": [choice]}


def usage_chunk(reply_id: str, model: str, usage: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the chunk without choices that ends a stream if the request has `stream_options.include_usage`."""
    return {**_head(reply_id, model, "chat.completion.chunk"), "choices": [], "usage": dict(usage)}


def model_list(models: list[str], owner: str = "lmbridge.testing") -> dict[str, Any]:
    """Returns the reply to `GET /v1/models`."""
    data = [{"id": model, "object": "model", "owned_by": owner} for model in models]
    return {"object": "list", "data": data}


def error_body(message: str, kind: str) -> dict[str, Any]:
    """Returns the body of an error reply."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def split_words(text: str) -> list[str]:
    """Splits a text into its words, each with the space before it."""
    return re.findall(r"\s*\S+|\s+", text)


def message_deltas(
    reasoning: str, contents: Iterable[str], tool_calls: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yields the deltas of a streamed message: its role, its reasoning in words, its contents and its tool calls."""
    yield {"role": "assistant", "content": None}
    for piece in split_words(reasoning):
        yield {"reasoning_content": piece}
    for piece in contents:
        yield {"content": piece}
    for index, call in enumerate(tool_calls):
        for part in _call_parts(index, call):
            yield {"tool_calls": [part]}


def usage_of(contents: list[str]) -> dict[str, Any]:
    """Returns the usage of a reply in which each piece of the content is a token."""
    tokens = len(contents)
    return {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}


def _head(reply_id: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": reply_id, "object": kind, "created": CREATED, "model": model}


def _call_parts(index: int, call: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a tool call in the parts that a stream sends: first the name, then fragments of the arguments."""
    function = call.get("function") or {}
    arguments = function.get("arguments") or ""
    yield {"index": index, **call, "function": {**function, "arguments": ""}}
    for start in range(0, len(arguments), _FRAGMENT_LENGTH):
        yield {"index": index, "function": {"arguments": arguments[start : start + _FRAGMENT_LENGTH]}}
