"""Describes the refusal of a request by an HTTP server, and what the user can do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from lmbridge._text import shorten
from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.jsonrpc import parse_json
from lmbridge.mcp.sdk.normalize import describe_refusal, normalize_error

ERROR_BODY_LIMIT: Final = 2**20
"""How many bytes of the body of a refusal are read."""
_LONGEST_WORDS: Final = 300
"""How much of the body of a refusal is quoted, in characters."""
_TITLE: Final = re.compile(r"<title[^>]{0,200}>([^<]{1,300})", re.IGNORECASE)
_SEARCHED_HTML: Final = 20_000
"""How much of a page is searched for its title, in characters."""
_WORD_KEYS: Final = ("message", "error_description", "detail", "title", "reason", "error")
"""The keys under which servers put the reason of a refusal, in the order in which they are tried."""
_CHECK_PATH: Final = "check the path of its URL, which often ends with /mcp, or with /sse for the older transport"
_STATUS_HINTS: Final[Mapping[int, str]] = {
    HTTPStatus.FORBIDDEN: 'it may need a token in "headers", or does not accept this host or origin',
    HTTPStatus.NOT_FOUND: _CHECK_PATH,
    HTTPStatus.METHOD_NOT_ALLOWED: f'its URL does not accept the requests of this transport ("type"); {_CHECK_PATH}',
    HTTPStatus.PROXY_AUTHENTICATION_REQUIRED: "a proxy in front of it wants credentials",
    HTTPStatus.TOO_MANY_REQUESTS: "it limits how often it is called; try again later",
}


def find_error(body: bytes) -> tuple[Any, Mapping[str, Any]] | None:
    """Returns the id and the error of the JSON-RPC error in the body of a response, or None."""
    return _find_error(parse_json(body))


def _find_error(values: list[Any]) -> tuple[Any, Mapping[str, Any]] | None:
    for value in values:
        if isinstance(value, dict) and value.get("error") is not None and ("jsonrpc" in value or "id" in value):
            return value.get("id"), normalize_error(value["error"], set())
    return None


def quote_body(body: bytes) -> str:
    """Returns what a server says in the body of a refusal: its reason, the title of its page, or its text."""
    values = parse_json(body)
    if (found := _find_error(values)) is not None:
        return describe_refusal(found[1])
    for value in values:
        if isinstance(value, dict) and (reason := _find_reason(value)):
            return shorten(reason, _LONGEST_WORDS)
    text = body[: 4 * _SEARCHED_HTML].decode(errors="replace").strip()
    if text.startswith("<"):
        title = _TITLE.search(text[:_SEARCHED_HTML])
        return title.group(1).strip() if title else ""
    return shorten(" ".join(text.split()), _LONGEST_WORDS) if text.isprintable() or "\n" in text else ""


def _find_reason(fields: Mapping[str, Any]) -> str:
    """Returns the reason in an object that is not a JSON-RPC error, or an empty string."""
    if isinstance(nested := fields.get("error"), dict):
        return _find_reason(nested)
    texts = [fields[key].strip() for key in _WORD_KEYS if isinstance(fields.get(key), str)]
    return next(filter(None, texts), "")


def status_reason(status: int) -> str:
    """Returns the reason that a status gives, as a clause about the server."""
    return f"it answered with HTTP status {status}"


def status_hint(status: int, spec: ServerSpec, challenge: str) -> str:
    """Returns what the user can do after a refusal, or an empty string.

    Args:
        status: The HTTP status.
        spec: The server.
        challenge: The value of the header `WWW-Authenticate`, or an empty string.
    """
    if status == HTTPStatus.UNAUTHORIZED:
        return _token_hint(spec, challenge)
    if status == HTTPStatus.FORBIDDEN and spec.headers:
        return 'the credentials in its "headers" lack a permission, or the server does not accept this host or origin'
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "the fault is on its side, and its log may say more"
    return _STATUS_HINTS.get(status, "")


def _token_hint(spec: ServerSpec, challenge: str) -> str:
    if spec.has_changing_headers or spec.client_credentials is not None:
        return "it does not accept the credentials, although they have just been fetched again"
    if any(name.lower() == "authorization" for name in spec.headers):
        return 'the value of "Authorization" in its "headers" is wrong or has expired; put a valid one there'
    offer = '; it offers OAuth, for which lmbridge needs "clientCredentials"'
    oauth = offer if "resource_metadata" in challenge else ""
    return f'give it a token with "headers": {{"Authorization": "Bearer ${{TOKEN}}"}} in the configuration{oauth}'
