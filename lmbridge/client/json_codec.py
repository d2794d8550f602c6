"""Strict encoding of requests as JSON, and lenient decoding of replies.

msgspec does the work, because it is several times faster than `json`, and a stream decodes JSON once for each token. A
reply that msgspec refuses is decoded again with `json`, which accepts NaN and halves of surrogate pairs: servers send
both, and an answer should not be lost because of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from lmbridge.errors import LLMValidationError


def _as_builtin(value: Any) -> Any:
    """Converts a mapping or sequence that msgspec does not know to a dict or a list; msgspec calls it as its hook."""
    if isinstance(value, Mapping) and not isinstance(value, dict):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, list | tuple):
        return list(value)
    raise TypeError(f"JSON has no representation of {type(value).__name__}")


_encode = msgspec.json.Encoder(enc_hook=_as_builtin).encode
decode_strictly: Final[Callable[[bytes | str], Any]] = msgspec.json.Decoder().decode
"""Decodes strict JSON, fast. It raises `ValueError`, or `TypeError` for an argument that is not bytes or a string."""

_DEEPEST_PATH = 50
"""The depth at which the search for a value that cannot be encoded stops, because a list may contain itself."""


def encode_body(body: Mapping[str, Any]) -> bytes:
    """Encodes the body of a request.

    Raises:
        LLMValidationError: The body contains a value that JSON does not have; the text says where.
    """
    try:
        data = _encode(body)
    except (TypeError, ValueError, RecursionError) as exc:
        path, value = _find_unencodable(body)
        kind = "None" if value is None else f"of type {type(value).__name__}"
        raise LLMValidationError(
            f"{path} is {kind}, which cannot be sent as JSON: {exc}",
            exc,
            hint="give strings, numbers, booleans, None, lists and dicts with string keys",
        ) from exc
    # The encoder writes NaN and Infinity as null, without an error.
    if b"null" in data:
        _check_finite(body)
    return data


def decode_json(data: bytes) -> Any:
    """Decodes JSON leniently: NaN, half a surrogate pair, invalid UTF-8 and a byte order mark are accepted.

    An invalid byte becomes U+FFFD.

    Raises:
        ValueError: The data is not JSON. The text does not repeat the data, which may hold a secret.
    """
    try:
        return decode_strictly(data)
    except (ValueError, RecursionError):
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        reason = str(exc)
    # This is raised outside of the `except`, because an exception of `json` contains the whole text.
    raise ValueError(reason)


def _check_finite(body: Mapping[str, Any]) -> None:
    remaining: list[tuple[str, Any]] = [("", body)]
    while remaining:
        for path, value in _children(*remaining.pop()):
            if not isinstance(value, float):
                remaining.append((path, value))
            elif not math.isfinite(value):
                raise LLMValidationError(f"{path} is {value!r}, which JSON does not have", hint="give a finite number")


def _children(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the values in a mapping or sequence, each with its path."""
    if isinstance(value, str | bytes | bytearray):
        return
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield f"{path}[{key!r}]" if path else str(key), child
    elif isinstance(value, Sequence):
        for number, child in enumerate(value):
            yield f"{path}[{number}]", child


def _find_unencodable(value: Any, path: str = "", depth: int = 0) -> tuple[str, Any]:
    """Returns the innermost value that cannot be encoded, with its path."""
    for child_path, child in _children(path, value):
        try:
            _encode(child)
        except (TypeError, ValueError, RecursionError):
            return (child_path, child) if depth > _DEEPEST_PATH else _find_unencodable(child, child_path, depth + 1)
    return path or "the request", value
