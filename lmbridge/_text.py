"""Texts that are too long to quote in full, or that cannot be encoded.

Every layer quotes what a server, a model or a tool wrote, and every layer passes such texts on. Both need the same
care in each place, so it is taken here.
"""

from __future__ import annotations

import json
from typing import Final, TypeVar

import msgspec

_T = TypeVar("_T")

_EXCERPT_CHARACTERS: Final = 500


def shorten(text: str, limit: int) -> str:
    """Returns a text, or its first `limit` characters followed by "..." if it is longer."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def excerpt(text: str) -> str:
    """Returns what an error quotes of a reply: the text, or its first 500 characters and how long it is."""
    if len(text) <= _EXCERPT_CHARACTERS:
        return text
    return f"{shorten(text, _EXCERPT_CHARACTERS)} ({len(text)} characters)"


def replace_lone_surrogates(value: _T) -> _T:
    r"""Returns a string, or another JSON value, whose texts can all be encoded as UTF-8.

    A model whose output is cut inside an emoji, or a tool written in JavaScript, produces half of a surrogate pair,
    such as "\ud83d". No request can hold it. Two halves that arrived in two chunks are joined into the character that
    they stand for; a half that has lost its partner becomes a question mark.
    """
    try:
        msgspec.json.encode(value)
    except UnicodeEncodeError:
        joined = json.loads(json.dumps(value))
        replaced: _T = json.loads(json.dumps(joined, ensure_ascii=False).encode("utf-8", "replace"))
        return replaced
    return value
