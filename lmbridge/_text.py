"""Texts that are too long to quote in full, or that cannot be encoded.

Every layer quotes texts of servers, models and tools in errors, and every layer passes such texts on. A quotation must
not flood an error message, and a text that is passed on must be valid UTF-8. Both are ensured here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

_T = TypeVar("_T")

_EXCERPT_CHARACTERS: Final = 500
"""The number of characters of a reply that an error quotes."""

_LARGE_JSON: Final = 100_000
"""The number of bytes beyond which JSON is written without spaces."""
_QUOTED_BYTES: Final = 250_000
"""The number of bytes at the beginning of a body that an error keeps."""
_LONGEST_SECRET: Final = 10_000
"""The number of characters that are removed from the end of a text that was cut, because the cut may have divided a
secret."""


def shorten(text: str, limit: int) -> str:
    """Returns a text, or its first `limit` characters followed by "..." if it is longer."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def excerpt(text: str, body_size: int = 0) -> str:
    """Shortens a reply for an error: returns the whole text, or its first 500 characters and its length.

    Args:
        text: The text.
        body_size: The number of bytes of the body that the text is a part of. If it is given, the result names it
            instead of the length of the text.
    """
    if len(text) <= _EXCERPT_CHARACTERS:
        return text
    length = f"from a body of {body_size} bytes" if body_size else f"{len(text)} characters"
    return f"{shorten(text, _EXCERPT_CHARACTERS)} ({length})"


def redacted_beginning(text: bytes | str, redact: Callable[[str], str]) -> str:
    """Returns a text without secrets: the whole text, or its beginning if it has more than 250,000 bytes.

    The search for secrets takes time for every character, and the text of a server may be of any size.

    Args:
        text: The text, or its bytes.
        redact: Removes the secrets from a text.
    """
    head = text[:_QUOTED_BYTES]
    readable = redact(head if isinstance(head, str) else head.decode("utf-8", "replace"))
    # `redact` does not find a secret that was cut in two, so the end is left out.
    return readable if len(head) == len(text) else readable[:-_LONGEST_SECRET]


def json_for_model(value: object) -> str:
    """Returns a JSON value as JSON: with a space after each comma and colon, or without spaces if it is large.

    For large values, msgspec is used, because `json` is so slow that it would hold up the event loop.

    Raises:
        TypeError, ValueError, RecursionError: JSON cannot express the value, or it is nested too deeply.
    """
    try:
        encoded = msgspec.json.encode(value)
        if len(encoded) > _LARGE_JSON:
            return encoded.decode()
    except UnicodeEncodeError:
        # It holds half of a surrogate pair, which `json` accepts.
        pass
    return json.dumps(value, ensure_ascii=False)


def join_surrogates(text: str) -> str:
    """Returns a text in which surrogate pairs are joined, and a question mark replaces each lone half of a pair."""
    # For a text in ASCII, this costs nothing.
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return joined.encode("utf-8", "replace").decode()
    return text


def replace_lone_surrogates(value: _T) -> _T:
    r"""Returns a string, or another JSON value, whose texts can all be encoded as UTF-8.

    A model whose output is cut inside an emoji, or a tool written in JavaScript, may produce half of a surrogate pair,
    such as "\ud83d". Such a half cannot be sent in a request. If its other half follows, for example because the two
    arrived in different chunks, they are joined into the character that they stand for. Otherwise it becomes a question
    mark.
    """
    if not has_lone_surrogates(value):
        return value
    joined = json.loads(json.dumps(value))
    replaced: _T = json.loads(json.dumps(joined, ensure_ascii=False).encode("utf-8", "replace"))
    return replaced


def has_lone_surrogates(value: object) -> bool:
    """Returns whether a string, or another JSON value, has a text that cannot be encoded as UTF-8."""
    try:
        msgspec.json.encode(value)
    except UnicodeEncodeError:
        return True
    return False
