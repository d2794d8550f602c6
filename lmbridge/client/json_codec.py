"""Strict encoding of requests as JSON, and lenient decoding of replies.

msgspec does the work, because it is several times faster than `json`, and a stream decodes JSON once for each token. A
reply that msgspec refuses is decoded again with `json`, which accepts NaN and halves of surrogate pairs: servers send
both, and an answer should not be lost because of them.
"""

from __future__ import annotations

import json
import math
from collections import UserString
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from lmbridge._text import replace_lone_surrogates, shorten
from lmbridge.client.input_checks import CheckedList
from lmbridge.errors import LLMValidationError

_encode = msgspec.json.Encoder().encode
decode_strictly: Final[Callable[[bytes | str], Any]] = msgspec.json.Decoder().decode
"""Decodes strict JSON, fast. It raises `ValueError`, or `TypeError` for an argument that is not bytes or a string."""

_FLAT_TYPES: Final = frozenset({str, int, bool, type(None), CheckedList})
"""The classes of values that can be sent as they are, without a check of their contents."""
_DEEPEST_BODY: Final = 200
"""How deep lists and dicts may be nested in a body. A list that contains itself exceeds any limit."""
_QUOTED_KEY_CHARACTERS: Final = 50
"""The number of characters of a wrong key that the error quotes."""
_QUOTED_PATH_CHARACTERS: Final = 100
"""The number of characters of the path to a wrong value that the error quotes."""
_HINT: Final = "give strings, numbers, booleans, None, lists and dicts with string keys"
_CONVERSIONS: Final = (
    ("__members__", "give its .value"),
    ("model_dump", "call its model_dump(mode='json')"),
    ("tolist", "call its tolist()"),
    ("isoformat", "call its isoformat()"),
    ("as_integer_ratio", "convert it with float() or str()"),
    ("decode", "decode it to a string, or encode it as base64"),
    ("isdisjoint", "convert it with list()"),
    ("__attrs_attrs__", "convert it with attrs.asdict()"),
    ("__dataclass_fields__", "convert it with dataclasses.asdict()"),
    ("__fspath__", "convert it with str()"),
    ("hex", "convert it with str()"),
)
"""How to convert the instances of a class with a certain attribute. The first one that the class has decides."""


def encode_body(body: Mapping[str, Any]) -> bytes:
    """Encodes the body of a request.

    Instances of subclasses of str, int and float are sent as plain texts and numbers, and any mapping or sequence as an
    object or array. msgspec would also encode dates, decimals, bytes, sets and other objects, in forms that the caller
    has not chosen. They are refused instead.

    Raises:
        LLMValidationError: The body contains a value that JSON does not have; the error says where.
    """
    try:
        # A body that contains itself cannot be encoded, so the check that follows always ends.
        data = _encode(body)
        if _is_plain(body):
            return data
    except (TypeError, ValueError, RecursionError):
        # It holds a value that msgspec refuses, half of a surrogate pair, or itself.
        pass
    try:
        return _encode(_as_plain(body, "", 0))
    except RecursionError as exc:
        raise LLMValidationError("the request is nested too deeply", exc, hint=_HINT) from exc


def _is_plain(body: Mapping[str, Any]) -> bool:
    """Returns whether a body consists only of dicts, lists, strings and finite numbers, and of no subclass of these.

    This is the fast path of a request. The body must not contain itself.
    """
    if type(body) is not dict:
        return False
    containers: list[Any] = [body]
    # The list grows in the loop.
    for container in containers:
        values = container
        if type(container) is dict:
            for key in container:
                if type(key) is not str:
                    return False
            values = container.values()
        for value in values:
            kind = type(value)
            if kind in _FLAT_TYPES:
                continue
            if kind is dict or kind is list:
                containers.append(value)
            elif kind is not float or not math.isfinite(value):
                return False
    return True


def _as_plain(value: Any, path: str, depth: int) -> Any:
    """Returns a value as plain JSON types, in the form that `_is_plain` accepts.

    Args:
        value: The value.
        path: Its place in the body, such as "messages[0].content".
        depth: The number of lists and dicts around it.

    Raises:
        LLMValidationError: JSON does not have the value, or something in it.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | UserString):
        return _as_text(value, path)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        number = float.__float__(value)
        if not math.isfinite(number):
            raise LLMValidationError(f"{path} is {number!r}, which JSON does not have", hint="give a finite number")
        return number
    if depth > _DEEPEST_BODY and isinstance(value, Mapping | Sequence):
        raise _unsendable_error(value, path, "it is nested too deeply, or contains itself")
    if isinstance(value, Mapping):
        plain: dict[str, Any] = {}
        for key, child in value.items():
            name = _as_key(key, value, path)
            if name in plain:
                raise _unsendable_error(value, path, f"it has the key {name!r} twice, as a string and as a number")
            plain[name] = _as_plain(child, _path_of(path, name), depth + 1)
        return plain
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_as_plain(child, f"{path}[{number}]", depth + 1) for number, child in enumerate(value)]
    raise _unsendable_error(value, path)


def _as_text(value: str | UserString, path: str) -> str:
    text = str.__str__(value) if isinstance(value, str) else str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        # A program may have put the two halves of a pair together from two chunks. Joined, they are a valid text.
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        try:
            joined.encode()
        except UnicodeEncodeError as exc:
            half = joined[exc.start]
            raise _unsendable_error(
                value, path, f"it has half of a surrogate pair, {half!r}, at index {exc.start}"
            ) from exc
        return joined
    return text


def _as_key(key: object, value: object, path: str) -> str:
    if isinstance(key, str):
        return _as_text(key, path)
    # Token ids are the keys of `logit_bias`.
    if isinstance(key, int) and not isinstance(key, bool):
        return int.__repr__(key)
    raise _unsendable_error(value, path, f"its key {shorten(repr(key), _QUOTED_KEY_CHARACTERS)} is not a string")


def _path_of(path: str, key: str) -> str:
    if not path:
        return key
    return f"{path}.{key}" if key.isidentifier() else f"{path}[{key!r}]"


def _unsendable_error(value: object, path: str, reason: str | None = None) -> LLMValidationError:
    # The path to a list that contains itself repeats the same index.
    place = shorten(path, _QUOTED_PATH_CHARACTERS) or "the request"
    if reason is not None:
        return LLMValidationError(f"{place} cannot be sent as JSON: {reason}", hint=_HINT)
    conversion = next((hint for name, hint in _CONVERSIONS if hasattr(type(value), name)), _HINT)
    kind = type(value).__name__
    return LLMValidationError(f"{place} is of type {kind}, which cannot be sent as JSON", hint=conversion)


def decode_json(data: bytes) -> Any:
    """Decodes JSON leniently: NaN, half a surrogate pair, invalid UTF-8 and a byte order mark are accepted.

    An invalid byte becomes U+FFFD.

    Raises:
        ValueError: The data is not JSON. The error does not repeat the data, which may hold a secret.
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


def decode_whole_characters(data: bytes) -> Any:
    """Does what `decode_json` does, but replaces each lone half of a surrogate pair by a question mark.

    Raises:
        ValueError: The data is not JSON.
    """
    try:
        # msgspec refuses such halves, so the text need not be searched for them.
        return decode_strictly(data)
    except (ValueError, RecursionError):
        return replace_lone_surrogates(decode_json(data))
