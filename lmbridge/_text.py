"""Texts that are too long to quote in full, or that cannot be encoded.

Every layer quotes texts of servers, models and tools in errors, and every layer passes such texts on. A quotation must
not flood an error message, and a text that is passed on must be valid UTF-8. Both are ensured here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final, TypeVar

import msgspec

_T = TypeVar("_T")

_EXCERPT_CHARACTERS: Final = 500
"""The number of characters of a reply that an error quotes."""

_QUOTED_BYTES: Final = 250_000
"""The number of bytes at the beginning of a body that an error keeps."""
_LONGEST_SECRET: Final = 10_000
"""The number of characters at the end of a text that was cut off in which half of a secret may be left."""

_NAMES_COMPARED: Final = 10_000
"""The most names that `close_matches` looks at."""
_NAME_CHARACTERS: Final = 100
"""The most characters of a name that `close_matches` compares. Longer names are never close."""
_COMPARISON_BUDGET: Final = 300_000
"""The most pairs of characters that `close_matches` compares, which takes about 50 ms at worst."""
_COMPARISON_OVERHEAD: Final = 200
"""The pairs of characters that could be compared in the time that each name takes whatever its length."""


def shorten(text: str, limit: int) -> str:
    """Returns a text, or its first `limit` characters followed by "..." if it is longer."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def excerpt(text: str, body_size: int = 0) -> str:
    """Shortens a reply for an error: returns the whole text, or its first 500 characters and its length.

    Args:
        text: The text.
        body_size: The number of bytes of the body that the text is a part of, to be named in place of the length.
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
    # A secret that was cut in two is not found, so the end is left out.
    return readable if len(head) == len(text) else readable[:-_LONGEST_SECRET]


def close_matches(name: str, names: Iterable[str]) -> list[str]:
    """Returns up to three names that are similar to a name whatever their case, the most similar one first.

    The work is limited, because a server may list any number of models. Of a long list, names that have the beginning
    of the name in them are compared first.
    """
    # Imported here because it is not needed until something is missing.
    import difflib  # noqa: PLC0415

    asked = name[:_NAME_CHARACTERS].casefold()
    looked_at = (each for each in islice(names, _NAMES_COMPARED) if len(each) <= _NAME_CHARACTERS)
    by_folded_name = {each.casefold(): each for each in looked_at}
    candidates = []
    budget = _COMPARISON_BUDGET
    for folded in sorted(by_folded_name, key=lambda folded: asked[:3] not in folded):
        budget -= len(folded) * len(asked) + _COMPARISON_OVERHEAD
        if budget < 0:
            break
        candidates.append(folded)
    return [by_folded_name[each] for each in difflib.get_close_matches(asked, candidates)]


def join_surrogates(text: str) -> str:
    """Returns a text whose surrogate pairs are joined, and in which a half without the other is a question mark."""
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
    try:
        msgspec.json.encode(value)
    except UnicodeEncodeError:
        joined = json.loads(json.dumps(value))
        replaced: _T = json.loads(json.dumps(joined, ensure_ascii=False).encode("utf-8", "replace"))
        return replaced
    return value
