"""Texts that are too long to quote in full, or that cannot be encoded.

Every layer quotes texts of servers, models and tools in errors, and every layer passes such texts on. A quotation must
not flood an error message, and a text that is passed on must be valid UTF-8. Both are ensured here.
"""

from __future__ import annotations

import json
from typing import Final, TypeVar

import msgspec

_T = TypeVar("_T")

_EXCERPT_CHARACTERS: Final = 500
"""The number of characters of a reply that an error quotes."""


def shorten(text: str, limit: int) -> str:
    """Returns a text, or its first `limit` characters followed by "..." if it is longer."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def excerpt(text: str) -> str:
    """Shortens a reply for an error: returns the whole text, or its first 500 characters and its length."""
    if len(text) <= _EXCERPT_CHARACTERS:
        return text
    return f"{shorten(text, _EXCERPT_CHARACTERS)} ({len(text)} characters)"


def replace_lone_surrogates(value: _T) -> _T:
    r"""Returns a string, or another JSON value, whose texts can all be encoded as UTF-8.

    A model whose output is cut inside an emoji, or a tool written in JavaScript, may produce half of a surrogate pair,
    such as "\ud83d". Such a half cannot be sent in a request. If its other half follows, for example because the two
    arrived in different chunks, they are joined into the character that they stand for. Otherwise it becomes a question
    mark.
    """
    try:
        msgspec.json.encode(value)
    except UnicodeEncodeError:
        joined = json.loads(json.dumps(value))
        replaced: _T = json.loads(json.dumps(joined, ensure_ascii=False).encode("utf-8", "replace"))
        return replaced
    return value
