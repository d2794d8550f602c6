"""Headers and query parameters that the user adds to requests: checking, merging and redacting them.

Any header may contain a secret, and its name does not always show that: `X-Api-Key` obviously contains one, but
`X-Tenant` may contain one, too. So the values of nearly all headers that the user passes count as secrets, and are
redacted wherever an error would quote them. The alternative was a list of names that suggest a secret, but such a list
is never complete.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import urlencode

from lmbridge._checks import wrong_type
from lmbridge.errors import LLMValidationError

_HEADERS_HINT: Final = "give a dict with strings, for example {'X-Api-Key': '...'}"
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HTTP_HEADERS: Final = ("content-length", "transfer-encoding", "connection", "host")
"""Headers that the HTTP session sets. With other values, the server could not understand the request."""
_PUBLIC_HEADERS: Final = ("accept", "accept-encoding", "accept-language", "content-type", "user-agent")
"""Headers whose values are not redacted, because they are never secret and often help to understand an error."""
_SHORT_SECRET: Final = 4
"""Secrets with fewer characters are redacted only where they look like a key, because they may be ordinary words."""
_BEFORE_SHORT_KEY: Final = r"(?:(?<=[\"'`=:])|(?<=: )|(?<=[Bb]earer )|(?<=[Kk]ey ))"
_AFTER_SHORT_KEY: Final = r"(?! ?\w)"


def check_headers(name: str, headers: Any) -> dict[str, str]:
    """Returns the headers as a dict if they can be sent. None stands for no headers.

    Raises:
        LLMValidationError: They cannot be sent. The error never quotes a value, because it may be secret.
    """
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise wrong_type(name, "a dict of headers", headers, _HEADERS_HINT)
    for field, value in headers.items():
        if not isinstance(field, str) or not _HEADER_NAME.fullmatch(field):
            raise LLMValidationError(f"{name} has a name that is not valid in HTTP", hint=_HEADERS_HINT)
        if field.lower() in _HTTP_HEADERS:
            raise LLMValidationError(f"{name}[{field!r}] is set by HTTP itself", hint=f"leave {field} out")
        if not isinstance(value, str):
            raise wrong_type(f"{name}[{field!r}]", "a string", value, _HEADERS_HINT)
        if not value.isprintable() or not value.isascii():
            raise LLMValidationError(f"{name}[{field!r}] must be printable ASCII", hint="encode other characters first")
    return dict(headers)


def merge_headers(headers: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Merges two mappings of headers. Those in `more` replace headers of the same name, whatever its case."""
    replaced = {name.lower() for name in more}
    return {name: value for name, value in headers.items() if name.lower() not in replaced} | dict(more)


def secrets_in(headers: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the strings that no error may quote: whole values, and the part after a word such as `Bearer`."""
    values = [value for name, value in headers.items() if name.lower() not in _PUBLIC_HEADERS]
    secrets = {secret for value in values for secret in (value, value.rpartition(" ")[2])}
    # Shorter ones, such as a version, are ordinary words more often than they are keys.
    return tuple(secret for secret in secrets if len(secret) >= _SHORT_SECRET)


def basic_auth(user: str, password: str) -> str:
    """Returns the value of an `Authorization` header with a user and a password."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def secret_pattern(secrets: Iterable[str]) -> re.Pattern[str] | None:
    r"""Returns a pattern that finds secrets in a text, even with JSON escapes such as `\/`, or `\u002B` for a plus.

    A very short secret is found only after a quotation mark, a colon or the like, and only if no word follows it.

    Returns None if there are no secrets.
    """
    found = [_secret_expression(secret) for secret in sorted(set(secrets), key=len, reverse=True) if secret]
    return re.compile("|".join(found)) if found else None


def _secret_expression(secret: str) -> str:
    escaped = "".join(map(_character_expression, secret))
    return f"{_BEFORE_SHORT_KEY}{escaped}{_AFTER_SHORT_KEY}" if len(secret) < _SHORT_SECRET else escaped


def _character_expression(character: str) -> str:
    # Characters beyond U+FFFF are escaped as two surrogates.
    units = character.encode("utf-16-be", "surrogatepass")
    escape = "".join(rf"\\u(?i:{units[at : at + 2].hex()})" for at in range(0, len(units), 2))
    short_escape = re.escape(json.dumps(character)[1:-1])
    return rf"(?:{re.escape(character)}|\\{re.escape(character)}|{short_escape}|{escape})"


def check_query(name: str, query: Any) -> dict[str, Any]:
    """Returns query parameters as a dict if they can be sent, or an empty dict for None.

    A value is a string, a number, a boolean, or a list of these. A parameter with the value None is left out.

    Raises:
        LLMValidationError: The parameters are something else.
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
    """Appends query parameters to a URL."""
    pairs = [
        (name, str(item).lower() if isinstance(item, bool) else item)
        for name, value in query.items()
        for item in (value if isinstance(value, list | tuple) else [value])
        if item is not None
    ]
    return f"{url}?{urlencode(pairs)}" if pairs else url
