"""Decodes the JSON of tool calls, and notes what is lost when it becomes Python values.

Two things are lost. 3.10 becomes 3.1, which matters if the number is then converted to a text. And if an object has a
key twice, only the last value remains. msgspec decodes the arguments, because it is strict. But it has no hooks for
integers and objects, so the `json` module reads the text a second time to find these two things.

What the model is told about JSON that is not valid is in `call_arguments`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

_EXACT_TYPES: Final = frozenset({str, bool, int, type(None)})
"""The types of values that Python keeps exactly as they are written in JSON, apart from -0."""


class DuplicateKeyError(ValueError):
    """An object has a key twice, with different values. Choosing one of them would be a guess."""


class WrittenNumber(NamedTuple):
    """A number of a JSON text, as it was written. It equals only a number that was written in the same way."""

    text: str


def _read_object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object with these keys and values. A key may occur several times, but only with the same value."""
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if values[key] != value:
                raise DuplicateKeyError(f"the key {key[:100]!r} occurs twice, with different values")
    return values


decode_written_at: Final = json.JSONDecoder(
    object_pairs_hook=_read_object,
    parse_int=WrittenNumber,
    parse_float=WrittenNumber,
    parse_constant=WrittenNumber,
).raw_decode
"""Decodes the JSON value at a position of a text. Returns it, with each number as a `WrittenNumber`, and its end."""


def write_json(value: Any) -> str:
    """Returns the JSON of a value that `decode_written_at` has decoded, with each number as it was written."""
    if isinstance(value, WrittenNumber):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join([f"{json.dumps(key)}: {write_json(item)}" for key, item in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + ", ".join([write_json(item) for item in value]) + "]"
    return json.dumps(value)


def decode_argument_json(text: str, inexact: set[float]) -> Any:
    """Returns the value of a JSON text.

    Args:
        text: The whole text.
        inexact: Receives the numbers whose text differs from their `repr` in Python, such as 3.10.

    Raises:
        DuplicateKeyError: An object has a key twice, with different values.
        ValueError: The text is not valid JSON, or has a number that is too large.
        RecursionError: The text is nested too deeply.
    """

    def read_float(written: str) -> WrittenNumber:
        if repr(number := float(written)) != written:
            inexact.add(number)
        return WrittenNumber(written)

    def read_int(written: str) -> WrittenNumber:
        if written == "-0":
            inexact.add(0)
        return WrittenNumber(written)

    value = msgspec.json.decode(text)
    # An object with as many keys as colons in its text, and without floats and lists, has lost nothing.
    is_flat = (
        type(value) is dict and text.count(":") == len(value) and _EXACT_TYPES.issuperset(map(type, value.values()))
    )
    if is_flat and "-0" not in text:
        return value
    json.JSONDecoder(object_pairs_hook=_read_object, parse_float=read_float, parse_int=read_int, strict=False).decode(
        text
    )
    return value


def is_nested_deeper(value: Any, levels: int) -> bool:
    """Returns whether the lists and objects of a JSON value are nested more deeply than a limit."""
    containers: list[Any] = [value] if isinstance(value, (list, dict)) else []
    for _ in range(levels):
        containers = [
            item
            for each in containers
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, (list, dict))
        ]
        if not containers:
            return False
    return bool(containers)
