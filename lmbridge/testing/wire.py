"""The part of HTTP/1.1 (RFC 9112) that the test doubles need, without a socket: parsing requests, encoding replies.

The doubles do not use an HTTP library, because it would refuse to send what some tests need: replies that break off,
wrong lengths, and invalid heads.
"""

from __future__ import annotations

import http
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Final

import attrs
import msgspec

MAX_HEAD: Final = 256 * 1024
"""The maximum size of a line, and of all header fields together, in bytes."""
MAX_BODY: Final = 256 * 1024 * 1024
"""The maximum size of the body of a request, in bytes."""
# int() would accept signs, prefixes and underscores as well.
_DIGITS: Final = re.compile(r"[0-9A-Fa-f]+")


class BadRequest(ValueError):  # noqa: N818 - named after the HTTP status 400
    """The received bytes are not an HTTP/1.1 request."""


class Headers(Mapping[str, str]):
    """Header fields with case-insensitive names. Fields of the same name are joined by commas (RFC 9110, 5.3)."""

    def __init__(self, fields: Iterable[tuple[str, str]] = ()) -> None:
        self._fields: dict[str, str] = {}
        for name, value in fields:
            known = self._fields.get(name.lower())
            self._fields[name.lower()] = value if known is None else f"{known}, {value}"

    def __getitem__(self, name: str) -> str:
        return self._fields[name.lower()]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"Headers({self._fields!r})"


@attrs.define(eq=False, kw_only=True)
class RecordedRequest:
    """A request that a `ScriptedServer` has received, and how it ended."""

    method: str
    """The HTTP method in capital letters."""
    path: str
    """The percent-encoded path, without the query."""
    query: str = ""
    """The part of the target after the question mark; empty if there is none."""
    version: str = "HTTP/1.1"
    """The version of HTTP in the request line."""
    headers: Headers = attrs.field(factory=Headers, repr=False)
    """The headers. Their names are case-insensitive."""
    body: bytes = attrs.field(default=b"", repr=False)
    """The body. It is empty if the request has none."""
    connection: int = 1
    """The number of the connection on which the request arrived. The first is 1."""
    aborted: bool = False
    """Whether the client disconnected before the reply was complete."""
    finished: bool = False
    """Whether everything that the behaviour replied was sent. A reply that the behaviour broke off on purpose counts as
    well."""
    refused: bool = False
    """Whether the connection was closed without a reply, because of `ScriptedServer.hang_up_reused`."""

    def __str__(self) -> str:
        state = next((name for name in ("aborted", "finished", "refused") if getattr(self, name)), "unfinished")
        return f"{self.method} {self.path} on connection {self.connection} ({state})"

    @cached_property
    def json(self) -> Any:
        """The parsed body.

        Raises:
            msgspec.DecodeError: The body is not JSON.
        """
        return msgspec.json.decode(self.body)

    @property
    def fields(self) -> dict[str, Any]:
        """The JSON object in the body, or an empty dict if the body is anything else."""
        try:
            parsed = self.json
        except msgspec.DecodeError:
            return {}
        return parsed if isinstance(parsed, dict) else {}

    @property
    def asks_to_close(self) -> bool:
        """Whether the client asks the server to close the connection after the reply."""
        return self.version == "HTTP/1.0" or "close" in self.headers.get("Connection", "").lower()


class RequestParser:
    """Parses requests from bytes, however the bytes are split and however many requests they contain."""

    def __init__(self, connection: int = 1) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._steps = self._parse_request()

    def feed(self, data: bytes) -> None:
        """Adds bytes that have arrived."""
        self._buffer += data

    def next_request(self) -> RecordedRequest | None:
        """Returns the next complete request, or None if more bytes are needed.

        Raises:
            BadRequest: The bytes are not a request. Nothing after them can be parsed.
        """
        try:
            next(self._steps)
        except StopIteration as done:
            self._steps = self._parse_request()
            request: RecordedRequest | None = done.value
            return request
        return None

    # The methods below are generators. They yield when they need more bytes, and return what they have parsed.

    def _parse_request(self) -> Generator[None, None, RecordedRequest]:
        line = b""
        # RFC 9112, 2.2: empty lines before the request line are ignored.
        while not line:
            line = yield from self._read_line()
        method, target, version = _parse_request_line(line)
        headers = yield from self._parse_headers()
        body = yield from self._parse_body(headers)
        path, _, query = target.partition("?")
        return RecordedRequest(
            method=method,
            path=path,
            query=query,
            version=version,
            headers=headers,
            body=body,
            connection=self._connection,
        )

    def _parse_headers(self) -> Generator[None, None, Headers]:
        fields: list[tuple[str, str]] = []
        size = 0
        while line := (yield from self._read_line()):
            name, colon, value = line.decode("latin-1").partition(":")
            size += len(line)
            if not colon or not name or name != name.strip() or size > MAX_HEAD:
                raise BadRequest(f"not a header field: {line[:100]!r}")
            fields.append((name, value.strip()))
        return Headers(fields)

    def _parse_body(self, headers: Headers) -> Generator[None, None, bytes]:
        if headers.get("Transfer-Encoding", "").lower() == "chunked":
            return (yield from self._parse_chunks())
        return (yield from self._read_exactly(_parse_size(headers.get("Content-Length", "0"), base=10)))

    def _parse_chunks(self) -> Generator[None, None, bytes]:
        body = bytearray()
        while True:
            line = yield from self._read_line()
            size = _parse_size(line.partition(b";")[0].strip().decode("latin-1"), base=16)
            if not size:
                break
            body += yield from self._read_exactly(size)
            if (yield from self._read_line()):
                raise BadRequest("a chunk is longer than its announced size")
            if len(body) > MAX_BODY:
                raise BadRequest("the body is too long")
        # Header fields may follow the last chunk.
        yield from self._parse_headers()
        return bytes(body)

    def _read_line(self) -> Generator[None, None, bytes]:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD:
                raise BadRequest("a line is too long")
            yield
        return self._take(end, skip=2)

    def _read_exactly(self, size: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < size:
            yield
        return self._take(size)

    def _take(self, size: int, skip: int = 0) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[: size + skip]
        return taken


def _parse_request_line(line: bytes) -> tuple[str, str, str]:
    parts = line.decode("latin-1").split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise BadRequest(f"not a request line: {line[:100]!r}")
    return parts[0], parts[1], parts[2]


def _parse_size(text: str, *, base: int) -> int:
    try:
        size = int(text, base) if _DIGITS.fullmatch(text) else -1
    except ValueError:
        # The text contains a hexadecimal digit, but should be a decimal number.
        size = -1
    if not 0 <= size <= MAX_BODY:
        raise BadRequest(f"not a valid length: {text[:100]!r}")
    return size


def has_no_body(method: str, status: int) -> bool:
    """Returns whether a reply to this method with this status never has a body (RFC 9112, 6.3)."""
    return method == "HEAD" or status < 200 or status in (204, 304)


def override_fields(defaults: Mapping[str, str], given: Mapping[str, str] | None) -> dict[str, str]:
    """Returns the default header fields merged with the given ones, which replace defaults of the same name."""
    named = Headers((given or {}).items())
    return {name: value for name, value in defaults.items() if name not in named} | dict(given or {})


def encode_head(status: int, fields: Mapping[str, str]) -> bytes:
    """Returns the status line and the header fields of a reply, including the empty line after them."""
    try:
        reason = http.HTTPStatus(status).phrase
    except ValueError:
        # Some servers use statuses that are not registered, such as 529.
        reason = ""
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def to_json(payload: object) -> bytes:
    """Encodes a value as JSON. Mappings need not be dicts."""
    return msgspec.json.encode(payload, enc_hook=dict)


def encode_chunk(data: bytes) -> bytes:
    """Returns one chunk of a chunked body. An empty chunk ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)
