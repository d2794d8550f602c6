"""The file of a `Cassette`: requests, and the parts of their responses as they arrived.

A cassette is one JSON file, so that it can be read, compared in a review and edited by hand. It contains the method,
the URL and the body of each request, but none of its headers, because headers contain keys.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import attrs
import msgspec

from lmbridge.testing.mcp_tape import McpExchange
from lmbridge.transport.headers import secret_pattern, secrets_in
from lmbridge.transport.http_interface import HttpRequest

FORMAT: Final = 1
"""The version of the file format. Each cassette contains the version with which it was written."""
REDACTED: Final = "[redacted]"
"""The text that replaces a secret in a cassette."""
_SECRET_PARAMETER: Final = re.compile(r"key|token|secret|password|auth|sig", re.IGNORECASE)
_SECRET_HEADERS: Final = frozenset(("authorization", "set-cookie", "www-authenticate", "x-api-key"))


class CassetteError(RuntimeError):
    """A cassette has no exchange for a request, or its file cannot be used.

    It is not an `LLMError`, because it is a mistake of the test, which no program should handle.
    """


@attrs.frozen(kw_only=True)
class CassetteRequest:
    """A request in the form in which a cassette stores and compares it: without headers, and with secrets redacted."""

    method: str
    """The HTTP method in capital letters."""
    url: str
    """The absolute URL."""
    body: Any = None
    """The body: a JSON value, a text if it is not JSON, or None if it is empty."""

    @property
    def host(self) -> str:
        """The host and the port of the URL."""
        return urlsplit(self.url).netloc

    @property
    def path(self) -> str:
        """The path of the URL, such as "/v1/chat/completions"."""
        return urlsplit(self.url).path

    @property
    def query(self) -> list[tuple[str, str]]:
        """The query parameters in alphabetical order."""
        return sorted(parse_qsl(urlsplit(self.url).query, keep_blank_values=True))


@attrs.frozen
class RecordedPart:
    """A part of a body, as one read returned it."""

    seconds: float
    """The seconds since the previous part arrived, or since the head of the response if this is the first part."""
    data: bytes
    """The bytes of the part."""


@attrs.define(eq=False, kw_only=True)
class RecordedExchange:
    """A request and its response."""

    request: CassetteRequest
    """The request."""
    status: int
    """The HTTP status of the response."""
    headers: Mapping[str, str]
    """The headers of the response, except those that set cookies or name credentials."""
    seconds: float
    """The seconds until the head of the response arrived."""
    parts: list[RecordedPart] = attrs.field(factory=list)
    """The parts of the body in order."""
    end: Literal["complete", "broken", "left"] = "left"
    """How the body ended: it was complete, the connection broke, or the client left before the end."""


class Redactor:
    """Replaces secrets with "[redacted]".

    Args:
        texts: Texts that are replaced wherever they occur, in addition to the values of secret headers.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)

    def pattern_for(self, request: HttpRequest) -> re.Pattern[str] | None:
        """Returns the pattern that finds the secrets of a request, which its response may quote."""
        return secret_pattern((*self._texts, *secrets_in(request.headers)))

    def redact(self, text: str) -> str:
        """Returns a text without the `texts` of this redactor. It does not look for the secrets of a request."""
        return redacted(text, secret_pattern(self._texts))

    def read(self, request: HttpRequest) -> CassetteRequest:
        """Returns a request in the form in which a cassette stores it."""
        pattern = self.pattern_for(request)
        body = None
        if request.body:
            text = redacted(request.body.decode(errors="replace"), pattern)
            try:
                body = msgspec.json.decode(text)
            except msgspec.DecodeError:
                body = text
        return CassetteRequest(method=request.method, url=redacted(_public_url(request.url), pattern), body=body)


def redacted(text: str, pattern: re.Pattern[str] | None) -> str:
    """Returns a text in which everything that the pattern finds is replaced."""
    return text if pattern is None else pattern.sub(REDACTED, text)


def redacted_parts(parts: Sequence[RecordedPart], pattern: re.Pattern[str] | None) -> list[RecordedPart]:
    """Returns the parts of a body with all secrets replaced. If a secret spans several parts, all become one part."""
    whole = b"".join(part.data for part in parts).decode(errors="surrogateescape")
    if pattern is None or not pattern.search(whole):
        return list(parts)
    each = [
        RecordedPart(part.seconds, _to_bytes(redacted(part.data.decode(errors="surrogateescape"), pattern)))
        for part in parts
    ]
    if not pattern.search(b"".join(part.data for part in each).decode(errors="surrogateescape")):
        return each
    return [RecordedPart(sum(part.seconds for part in parts), _to_bytes(redacted(whole, pattern)))]


def public_headers(headers: Mapping[str, str], pattern: re.Pattern[str] | None) -> dict[str, str]:
    """Returns the headers of a response that a cassette keeps."""
    return {name: redacted(value, pattern) for name, value in headers.items() if name.lower() not in _SECRET_HEADERS}


@attrs.frozen
class Tape:
    """The content of a cassette."""

    exchanges: list[RecordedExchange]
    """The exchanges with model servers."""
    mcp: list[McpExchange]
    """The exchanges with MCP servers."""


def read_cassette(path: Path) -> Tape | None:
    """Reads a cassette. Returns None if the file does not exist.

    Raises:
        CassetteError: The file is not a cassette.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        decoded = msgspec.json.decode(content)
        if decoded["lmbridge_cassette"] != FORMAT:
            raise CassetteError(
                f"{path} has the format {decoded['lmbridge_cassette']!r}, which this version cannot read"
            )
        exchanges = [_exchange_from(each) for each in decoded["exchanges"]]
        return Tape(exchanges, [_mcp_exchange_from(each) for each in decoded.get("mcp", [])])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as exc:
        raise CassetteError(
            f"{path} is not a cassette of lmbridge ({type(exc).__name__}: {exc}); delete it and record it anew"
        ) from exc


def write_cassette(path: Path, tape: Tape) -> None:
    """Writes a cassette. The file is replaced as a whole, so a reader never sees a part of it."""
    content: dict[str, Any] = {
        "lmbridge_cassette": FORMAT,
        "exchanges": [_exchange_to(each) for each in tape.exchanges],
    }
    if tape.mcp:
        content["mcp"] = [_mcp_exchange_to(each) for each in tape.mcp]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
        unfinished.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            unfinished.unlink()
        raise


def _exchange_to(exchange: RecordedExchange) -> dict[str, Any]:
    request = exchange.request
    return {
        "request": {"method": request.method, "url": request.url, "body": request.body},
        "response": {
            "status": exchange.status,
            "headers": dict(exchange.headers),
            "seconds": round(exchange.seconds, 4),
            "parts": [_part_to(part) for part in exchange.parts],
            "end": exchange.end,
        },
    }


def _exchange_from(value: Mapping[str, Any]) -> RecordedExchange:
    response = value["response"]
    if response["end"] not in ("complete", "broken", "left"):
        raise ValueError(f"the end of a response is {response['end']!r}")
    return RecordedExchange(
        request=CassetteRequest(**value["request"]),
        status=response["status"],
        headers=response["headers"],
        seconds=response["seconds"],
        parts=[_part_from(part) for part in response["parts"]],
        end=response["end"],
    )


def _mcp_exchange_to(exchange: McpExchange) -> dict[str, Any]:
    messages = [{"seconds": round(seconds, 4), "message": message} for seconds, message in exchange.messages]
    value = {"server": exchange.server, "method": exchange.method, "params": exchange.params, "messages": messages}
    if exchange.ended is None:
        return value
    seconds, reason = exchange.ended
    return {**value, "ended": {"seconds": round(seconds, 4), "reason": reason}}


def _mcp_exchange_from(value: Mapping[str, Any]) -> McpExchange:
    ended = value.get("ended")
    return McpExchange(
        server=value["server"],
        method=value["method"],
        params=value["params"],
        messages=[(each["seconds"], each["message"]) for each in value["messages"]],
        ended=None if ended is None else (ended["seconds"], ended["reason"]),
    )


def _part_to(part: RecordedPart) -> dict[str, Any]:
    try:
        content = {"text": part.data.decode()}
    except UnicodeDecodeError:
        # A part may end in the middle of a character.
        content = {"base64": base64.b64encode(part.data).decode()}
    return {"seconds": round(part.seconds, 4), **content}


def _part_from(value: Mapping[str, Any]) -> RecordedPart:
    data = value["text"].encode() if "text" in value else base64.b64decode(value["base64"], validate=True)
    return RecordedPart(value["seconds"], data)


def _public_url(url: str) -> str:
    """Returns a URL without the values of query parameters that may be secrets."""
    parts = urlsplit(url)
    if not parts.query:
        return url
    pairs = [
        (name, REDACTED if _SECRET_PARAMETER.search(name) else value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
    ]
    return urlunsplit(parts._replace(query=urlencode(pairs, safe="[]")))


def _to_bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")
