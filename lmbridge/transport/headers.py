"""Headers that the caller adds to requests: their checks, how they are merged, and which of their values are secret.

A header may hold a key, and lmbridge cannot know which one does: `X-Api-Key` is obvious, `X-Tenant` is not. So the
values of all headers that the caller gives count as secret, and are replaced wherever an error would repeat them. The
alternative, a list of names that sound secret, would miss the one that matters.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import urlencode

from lmbridge._checks import wrong_type
from lmbridge.errors import LLMValidationError

_HEADERS_HINT: Final = "give a dict with strings, for example {'X-Api-Key': '...'}"
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FRAMING: Final = ("content-length", "transfer-encoding", "connection", "host")
"""Headers that belong to HTTP itself. Another value would break the connection."""
_PUBLIC: Final = ("accept", "accept-encoding", "accept-language", "content-type", "user-agent")
"""Headers whose values are never secret, and would be missed in errors."""
_SHORTEST_SECRET: Final = 4
"""The number of characters from which a value is hidden. A shorter one would be found in every second word."""


def check_headers(name: str, headers: Any) -> dict[str, str]:
    """Accepts a mapping of header names to values that HTTP can carry, and None for no headers.

    Raises:
        LLMValidationError: It is something else. The error never repeats a value, because it may be secret.
    """
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise wrong_type(name, "a dict of headers", headers, _HEADERS_HINT)
    for field, value in headers.items():
        if not isinstance(field, str) or not _TOKEN.fullmatch(field):
            raise LLMValidationError(f"{name} has a name that is not valid in HTTP", hint=_HEADERS_HINT)
        if field.lower() in _FRAMING:
            raise LLMValidationError(f"{name}[{field!r}] is set by HTTP itself", hint=f"leave {field} out")
        if not isinstance(value, str):
            raise wrong_type(f"{name}[{field!r}]", "a string", value, _HEADERS_HINT)
        if not value.isprintable() or not value.isascii():
            raise LLMValidationError(f"{name}[{field!r}] must be printable ASCII", hint="encode other characters first")
    return dict(headers)


def merge_headers(headers: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Returns all headers; of two with the same name, in whatever case, the second one."""
    replaced = {name.lower() for name in more}
    return {name: value for name, value in headers.items() if name.lower() not in replaced} | dict(more)


def secrets_in(headers: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the texts of headers that no error may repeat: whole values, and the key behind a word like `Bearer`."""
    values = [value for name, value in headers.items() if name.lower() not in _PUBLIC]
    return tuple({secret for value in values for secret in (value, value.rpartition(" ")[2])})


def basic_auth(user: str, password: str) -> str:
    """Returns the value of an `Authorization` header with a user and a password."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def secret_pattern(secrets: Iterable[str]) -> re.Pattern[str] | None:
    r"""Returns a pattern that finds secrets in a text, also as JSON may write them: with `\/`, or `\u002B` for a plus.

    Returns None if there is no secret that is long enough.
    """
    found = [
        "".join(rf"(?:{re.escape(c)}|\\{re.escape(c)}|\\u00(?i:{ord(c):02x}))" for c in secret)
        for secret in sorted(set(secrets), key=len, reverse=True)
        if len(secret) >= _SHORTEST_SECRET
    ]
    return re.compile("|".join(found)) if found else None


def check_query(name: str, query: Any) -> dict[str, Any]:
    """Accepts a mapping of names to strings, numbers, booleans, None (left out) and lists of these.

    Raises:
        LLMValidationError: It is something else.
    """
    if query is None:
        return {}
    hint = "give a dict, for example {'api-version': '2024-10-21'}"
    if not isinstance(query, Mapping):
        raise wrong_type(name, "a dict of query parameters", query, hint)
    for field, value in query.items():
        items = value if isinstance(value, list | tuple) else [value]
        if not isinstance(field, str) or not all(item is None or isinstance(item, str | int | float) for item in items):
            raise wrong_type(f"{name}[{field!r}]", "a string, a number, a boolean or a list of these", value, hint)
    return dict(query)


def add_query(url: str, query: Mapping[str, Any]) -> str:
    """Returns a URL with query parameters behind it."""
    pairs = [
        (name, str(item).lower() if isinstance(item, bool) else item)
        for name, value in query.items()
        for item in (value if isinstance(value, list | tuple) else [value])
        if item is not None
    ]
    return f"{url}?{urlencode(pairs)}" if pairs else url
