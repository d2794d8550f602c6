"""Arguments checked and encoded before anything is sent; JSON of replies decoded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from lmbridge.errors import LLMValidationError


def _as_builtin(value: Any) -> Any:
    """A mapping or a sequence of any other class, as JSON knows it."""
    if isinstance(value, Mapping) and not isinstance(value, dict):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, list | tuple):
        return list(value)
    raise TypeError(f"it has nothing for a {type(value).__name__}")


_encode = msgspec.json.Encoder(enc_hook=_as_builtin).encode
decode_strictly = msgspec.json.Decoder().decode
"""Decodes proper JSON, fast; raises `ValueError`, or `TypeError` for what is no bytes."""
_EXAMPLE = "[{'role': 'user', 'content': 'Hello'}]"
# For `isinstance`, the usual first: the abstract ones take their time.
_MAPPING = (dict, Mapping)
_SEQUENCE = (list, Sequence)
_STRING = (str, bytes, bytearray)
_CONTENT = (str, list, tuple)


class CheckedMessages(list[dict[str, Any]]):
    """Messages that whoever made them has checked: a conversation that grows is not checked anew with each request."""


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Checks that these can be the messages of a chat.

    Raises:
        LLMValidationError: none, or one without a role, or with content that is no text and no parts.
    """
    if type(messages) is CheckedMessages:
        return
    if not isinstance(messages, _SEQUENCE) or isinstance(messages, _STRING):
        raise LLMValidationError(f"messages is {_kind(messages)}", hint=f"give a list of messages, like {_EXAMPLE}")
    if not messages:
        raise LLMValidationError("messages is empty", hint=f"give at least one message, like {_EXAMPLE}")
    for number, message in enumerate(messages):
        if not isinstance(message, _MAPPING):
            raise LLMValidationError(
                f"messages[{number}] is {_kind(message)}", hint=f"give a dict for each message, like {_EXAMPLE}"
            )
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise LLMValidationError(
                f"messages[{number}] has no role", hint="add 'role': 'system', 'user', 'assistant' or 'tool'"
            )
        if content is not None and not isinstance(content, _CONTENT):
            raise LLMValidationError(
                f"messages[{number}]['content'] is {_kind(content)}", hint="give a string, or a list of content parts"
            )


def encode_body(body: Mapping[str, Any]) -> bytes:
    """The body as JSON.

    Raises:
        LLMValidationError: it holds something that JSON does not have; the text says where.
    """
    try:
        data = _encode(body)
    except (TypeError, ValueError, RecursionError) as exc:
        where, value = _culprit(body)
        raise LLMValidationError(
            f"{where} is {_kind(value)}, which cannot be sent as JSON: {exc}",
            exc,
            hint="give strings, numbers, booleans, None, lists and dicts with string keys",
        ) from exc
    if b"null" in data:  # which is also what became of NaN and Infinity
        _check_finite(body)
    return data


def decode_json(data: bytes) -> Any:
    """Decodes JSON, and what servers send for it: NaN, half a surrogate pair, a byte that is no UTF-8, a BOM.

    A bad byte becomes U+FFFD.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return decode_strictly(data)
    except (ValueError, RecursionError):
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        reason = str(exc)
    raise ValueError(reason)  # not chained: json's own exception holds the whole text, and that may hold a secret


def _check_finite(body: Mapping[str, Any]) -> None:
    left: list[tuple[str, Any]] = [("", body)]
    while left:
        for where, value in _parts(*left.pop()):
            if not isinstance(value, float):
                left.append((where, value))
            elif not math.isfinite(value):
                raise LLMValidationError(f"{where} is {value!r}, which JSON does not have", hint="give a finite number")


def _parts(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a value, each behind the path to it."""
    if isinstance(value, str | bytes | bytearray):
        return
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield f"{where}[{key!r}]" if where else str(key), part
    elif isinstance(value, Sequence):
        for number, part in enumerate(value):
            yield f"{where}[{number}]", part


def _culprit(value: Any, where: str = "", depth: int = 0) -> tuple[str, Any]:
    """The path to the innermost part that cannot be encoded, and that part."""
    for path, part in _parts(where, value):
        try:
            _encode(part)
        except (TypeError, ValueError, RecursionError):
            return (path, part) if depth > 50 else _culprit(part, path, depth + 1)
    return where or "the request", value


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
