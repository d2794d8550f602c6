"""Turns the result of a tool into text for the model.

msgspec knows most types that functions return: dataclasses, attrs classes, dates, UUIDs, decimals, enums and sets. The
others are converted here. They are recognized by their methods and not by their classes, so that pydantic and numpy
need not be imported. A result that JSON cannot represent is an error. The alternative was its `repr`, but a `repr` may
leave out a part of the data, and the model would take it for the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from pathlib import PurePath
from typing import Any, Final

import msgspec

from lmbridge._text import replace_lone_surrogates
from lmbridge.errors import ToolError

_BINARY_TYPES: Final = (bytes, bytearray, memoryview)


def result_as_text(result: Any) -> str:
    """Returns a string unchanged, bytes as the text that they encode, and any other result as JSON.

    Raises:
        ToolError: The result cannot be represented in JSON.
    """
    if isinstance(result, str):
        # An instance of a subclass becomes a plain string. For a string enum, this is its value.
        return str.__str__(result)
    try:
        plain = as_plain_json(result)
        return plain if isinstance(result, _BINARY_TYPES) else msgspec.json.encode(plain).decode()
    except (TypeError, ValueError, RecursionError) as exc:
        # The lines of msgspec's message before its last one explain how to extend msgspec.
        reason = str(exc).rpartition("\n")[2]
        raise ToolError(f"it ran, but its result ({type(result).__name__}) is not JSON: {reason}", exc) from exc


def truncate_output(text: str, limit: int) -> str:
    """Returns the text, or its beginning and end around a note that says how many characters were omitted.

    Half a surrogate pair, which no request can contain, becomes a question mark.

    Args:
        text: The output of a tool.
        limit: The number of characters of the text that are kept.
    """
    if len(text) > limit:
        tail = limit // 2
        omitted = len(text) - limit
        text = f"{text[: limit - tail]}\n[... {omitted} characters omitted]\n{text[len(text) - tail :]}"
    return replace_lone_surrogates(text)


def as_plain_json(value: Any) -> Any:
    """Returns a value as strings, numbers, booleans, None, lists and dicts.

    Raises:
        TypeError: The value contains an object that JSON cannot represent.
        ValueError: The value contains bytes that are not text.
        RecursionError: The value contains itself.
    """
    plain = msgspec.to_builtins(value, builtin_types=_BINARY_TYPES, str_keys=True, enc_hook=_convert)
    return _without_bytes(plain)


def _convert(value: Any) -> Any:
    """Converts an object of a type that msgspec does not know to one of a type that it knows.

    Raises:
        TypeError: JSON cannot represent the object.
    """
    if not isinstance(value, type):
        if _is_model(value):
            return _dump_model(value)
        if isinstance(value, PurePath):
            return str(value)
        # Arrays and scalars of numpy and similar libraries. Some scalars return themselves.
        if callable(to_list := getattr(value, "tolist", None)) and type(plain := to_list()) is not type(value):
            return plain
        for type_ in (str, int, float):
            if isinstance(value, type_):
                return type_(value)
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, Sequence | AbstractSet | ValuesView):
            return list(value)
    raise TypeError(f"it contains an object of type {type(value).__name__}, which JSON does not have")


def _is_model(value: Any) -> bool:
    """Returns whether a value is a model of pydantic, in its version 2 or 1."""
    return hasattr(value, "model_dump") or all(hasattr(value, name) for name in ("json", "dict", "parse_raw"))


def _dump_model(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    return msgspec.json.decode(value.json()) if dump is None else dump(mode="json")


def _without_bytes(value: Any) -> Any:
    """Returns a value in which bytes are replaced by the text that they encode.

    Raises:
        ValueError: The bytes are not text.
    """
    if isinstance(value, _BINARY_TYPES):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            raise ValueError("it contains bytes that are not text in UTF-8") from None
    if isinstance(value, dict):
        return {key: _without_bytes(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_without_bytes(each) for each in value]
    return value
