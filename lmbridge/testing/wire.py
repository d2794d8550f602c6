"""HTTP/1.1 as far as a test double needs it, without a socket: bytes to requests, replies to bytes (RFC 9112)."""

from __future__ import annotations

import http
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Final

import attrs
import msgspec

MAX_HEAD: Final = 256 * 1024
MAX_BODY: Final = 256 * 1024 * 1024
_DIGITS: Final = re.compile(r"[0-9A-Fa-f]+")  # int() takes signs, prefixes and underscores as well


class BadRequest(ValueError):  # noqa: N818 - the name of the status that answers it
    """What arrived is no HTTP/1.1 request."""


class Headers(Mapping[str, str]):
    """Header fields by name, in any case; fields of one name are joined by a comma (RFC 9110, 5.3)."""

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
class Request:
    """A request as it arrived, and what became of it."""

    method: str
    path: str
    """As on the wire, percent-encoded, without the query."""
    query: str = ""
    version: str = "HTTP/1.1"
    headers: Headers = attrs.field(factory=Headers, repr=False)
    body: bytes = attrs.field(default=b"", repr=False)
    connection: int = 1
    """The number of the connection that it came on; the first is 1."""
    aborted: bool = False
    """The client left before the reply was whole."""
    finished: bool = False
    """All of the reply was sent; of one that is cut on purpose, all there was to be."""
    refused: bool = False
    """Closed without a byte of reply, as `ScriptedServer.hang_up_reused` asked for."""

    def __str__(self) -> str:
        state = next((name for name in ("aborted", "finished", "refused") if getattr(self, name)), "unfinished")
        return f"{self.method} {self.path} on connection {self.connection} ({state})"

    @cached_property
    def json(self) -> Any:
        """The body, parsed.

        Raises:
            msgspec.DecodeError: It is no JSON.
        """
        return msgspec.json.decode(self.body)

    @property
    def fields(self) -> dict[str, Any]:
        """The body's JSON object; empty if the body is anything else."""
        try:
            parsed = self.json
        except msgspec.DecodeError:
            return {}
        return parsed if isinstance(parsed, dict) else {}

    @property
    def asks_to_close(self) -> bool:
        """Whether the connection is to end with the reply."""
        return self.version == "HTTP/1.0" or "close" in self.headers.get("Connection", "").lower()


class RequestParser:
    """Bytes in, requests out, however the bytes are cut and however many requests they hold."""

    def __init__(self, connection: int = 1) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._steps = self._request()

    def feed(self, data: bytes) -> None:
        """Take bytes as they arrived."""
        self._buffer += data

    def next_request(self) -> Request | None:
        """The next whole request, or None until more bytes are fed.

        Raises:
            BadRequest: The bytes are no request; nothing after them can be understood.
        """
        try:
            next(self._steps)
        except StopIteration as done:
            self._steps = self._request()
            request: Request | None = done.value
            return request
        return None

    # Generators that pause at `yield` until there are more bytes.

    def _request(self) -> Generator[None, None, Request]:
        line = b""
        while not line:  # RFC 9112, 2.2: ignore empty lines before the request line
            line = yield from self._line()
        method, target, version = _request_line(line)
        headers = yield from self._headers()
        body = yield from self._body(headers)
        path, _, query = target.partition("?")
        return Request(
            method=method,
            path=path,
            query=query,
            version=version,
            headers=headers,
            body=body,
            connection=self._connection,
        )

    def _headers(self) -> Generator[None, None, Headers]:
        fields: list[tuple[str, str]] = []
        size = 0
        while line := (yield from self._line()):
            name, colon, value = line.decode("latin-1").partition(":")
            size += len(line)
            if not colon or not name or name != name.strip() or size > MAX_HEAD:
                raise BadRequest(f"no header field: {line[:100]!r}")
            fields.append((name, value.strip()))
        return Headers(fields)

    def _body(self, headers: Headers) -> Generator[None, None, bytes]:
        if headers.get("Transfer-Encoding", "").lower() == "chunked":
            return (yield from self._chunks())
        return (yield from self._exactly(_size(headers.get("Content-Length", "0"), base=10)))

    def _chunks(self) -> Generator[None, None, bytes]:
        body = bytearray()
        while True:
            line = yield from self._line()
            size = _size(line.partition(b";")[0].strip().decode("latin-1"), base=16)
            if not size:
                break
            body += yield from self._exactly(size)
            if (yield from self._line()):
                raise BadRequest("a chunk is longer than it says")
            if len(body) > MAX_BODY:
                raise BadRequest("the body is too long")
        yield from self._headers()  # the trailer
        return bytes(body)

    def _line(self) -> Generator[None, None, bytes]:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD:
                raise BadRequest("a line without an end")
            yield
        return self._take(end, skip=2)

    def _exactly(self, size: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < size:
            yield
        return self._take(size)

    def _take(self, size: int, skip: int = 0) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[: size + skip]
        return taken


def _request_line(line: bytes) -> tuple[str, str, str]:
    parts = line.decode("latin-1").split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise BadRequest(f"no request line: {line[:100]!r}")
    return parts[0], parts[1], parts[2]


def _size(text: str, *, base: int) -> int:
    try:
        size = int(text, base) if _DIGITS.fullmatch(text) else -1
    except ValueError:  # a hexadecimal digit where decimal ones belong
        size = -1
    if not 0 <= size <= MAX_BODY:
        raise BadRequest(f"no length to read: {text[:100]!r}")
    return size


def has_no_body(method: str, status: int) -> bool:
    """Whether a reply ends with its head, whatever that announces (RFC 9112, 6.3)."""
    return method == "HEAD" or status < 200 or status in (204, 304)


def with_own(usual: Mapping[str, str], own: Mapping[str, str] | None) -> dict[str, str]:
    """Header fields, those of our own instead of the usual ones of the same name."""
    named = Headers((own or {}).items())
    return {name: value for name, value in usual.items() if name not in named} | dict(own or {})


def head(status: int, fields: Mapping[str, str]) -> bytes:
    """The status line and the header fields of a reply, up to and with the empty line."""
    try:
        reason = http.HTTPStatus(status).phrase
    except ValueError:  # servers make up their own, such as 529
        reason = ""
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def to_json(payload: object) -> bytes:
    """JSON, of mappings that are no dict as well."""
    return msgspec.json.encode(payload, enc_hook=dict)


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body; an empty one ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)
