"""Finds the JSON value of an answer that has prose around it.

Small models on servers that ignore a schema write "Here you are:" before a value, or explain it afterwards, often with
a Markdown fence around it. If the value is the only one, nothing has to be guessed in order to read it. If there are
several different values, or a piece of a broken one, no value is returned. Then the model can be asked again, whereas a
program could not notice that it was given the wrong value.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NamedTuple

import msgspec

_OPENING: Final = re.compile(r"[{\[]")
_BRACES: Final = re.compile(r"[{}]")
_BEGINS_LIKE_JSON: Final = re.compile(r"""\{\s*["}]|\[\s*["{]""")
"""The beginning of an object or of an array, as opposed to a bracket in a sentence."""
_MOST_PLACES: Final = 500
"""The number of brackets after which the search is given up, so that it never takes long."""
_MOST_WASTED_CHARACTERS: Final = 200_000
"""The most characters that are read after brackets that turn out not to begin JSON. A character counts as often as it
is read. Beyond this number, the search is given up as well."""


class EmbeddedValue(NamedTuple):
    """The only JSON value in a text."""

    text: str
    """The value as it was written."""
    is_last: bool
    """Whether nothing but white space or the end of a Markdown fence follows it."""


def find_only_value(text: str, *, with_arrays: bool) -> EmbeddedValue | None:
    """Returns the JSON object or array in a text, or None unless there is exactly one.

    The same value may occur several times. For a text that is valid JSON as a whole, the result is also None, because
    nothing stands around the value.

    Args:
        text: The text.
        with_arrays: Whether an array without any object can be the value. If not, such arrays count as prose, as the
            "[1]" of a reference does.
    """
    found: dict[str, tuple[int, int]] = {}
    decoder = json.JSONDecoder()
    position, places, wasted = 0, 0, 0
    ends: dict[int, int] | None = None
    while (opening := _OPENING.search(text, position)) is not None:
        places += 1
        if places > _MOST_PLACES:
            return None
        start = opening.start()
        try:
            value, end = decoder.raw_decode(text, start)
        except RecursionError:
            return None
        except ValueError as exc:
            wasted += _failed_at(exc, text) - start
            if wasted > _MOST_WASTED_CHARACTERS:
                return None
            if _BEGINS_LIKE_JSON.match(text, start):
                return None
            # A text in braces is a unit, even if it is not JSON, so a value inside it is not the answer.
            ends = _ends_of_braces(text) if ends is None else ends
            position = ends.get(start, start + 1)
            continue
        position = end
        if isinstance(value, dict) or with_arrays or "{" in text[start:end]:
            found[_canonical(value)] = (start, end)
    if len(found) != 1 or is_json(text):
        return None
    ((start, end),) = found.values()
    return EmbeddedValue(text[start:end], not text[end:].strip().strip("`"))


def _failed_at(exc: ValueError, text: str) -> int:
    """Returns the position up to which a text was read before it turned out not to be JSON."""
    position: int = getattr(exc, "pos", len(text))
    # For a string that does not end, the position is that of its beginning.
    return len(text) if text.startswith('"', position) else position


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def is_json(text: str) -> bool:
    """Returns whether a text is valid JSON as a whole."""
    try:
        msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _ends_of_braces(text: str) -> dict[int, int]:
    """Returns, for each opening brace that is closed again, its position and the position after its closing brace."""
    ends: dict[int, int] = {}
    open_braces: list[int] = []
    for brace in _BRACES.finditer(text):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif open_braces:
            ends[open_braces.pop()] = brace.end()
    return ends
