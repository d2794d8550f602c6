"""Passes a response on to a client as it arrives, and reads two things from it on the way.

The two things are whether the server reports an error, such as that it has dropped the model, and how many tokens it
has generated. Both are found by searching each part for a word, which costs little; a part is parsed only if the word
is there.

The bytes are not changed, with two exceptions. If the gateway has already begun the response to the client, without
compression, a compressed body is decompressed. And if the server quotes a key of the gateway in an error event, the key
is replaced.

An event stream is passed on by whole lines, because a client cannot use a part of a line. And if the rest of a line
never comes, the client must not take the event that reports the error for a part of that line. If only the empty line
that ends an event is missing, it is added before the error is reported; see `PassingBody.separator`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from lmbridge._tasks import pause_after
from lmbridge.client import failures
from lmbridge.client.error_body import Redact, reports_error
from lmbridge.errors import LLMStreamError
from lmbridge.gateway.redaction import redacted_bytes
from lmbridge.transport import ForwardedResponse
from lmbridge.transport.decompression import BrokenCompression, Decompressor, UnsupportedEncoding, decompressor_for

_LONGEST_LINE: Final = 64 * 1024
"""How many bytes of a line are held back at most until the line has ended."""
_HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that belong to a connection and not to a message (RFC 9110, 7.6.1)."""
_CORS: Final = "access-control-"
"""The beginning of the names of the headers with which a server lets pages of other sites read its responses."""


def end_to_end(headers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yields the headers that are passed on."""
    connection = [value for name, value in headers.items() if name.lower() == "connection"]
    named = {name.strip().lower() for value in connection for name in value.split(",")}
    for name, value in headers.items():
        if name.lower() not in _HOP_BY_HOP and name.lower() not in named:
            yield name, value


def headers_for_client(headers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yields the headers of a response that are passed on.

    The headers of CORS are left out: a server may allow every web page to read its responses, but the gateway does not.
    """
    return (each for each in end_to_end(headers) if not each[0].lower().startswith(_CORS))


def is_event_stream(response: ForwardedResponse) -> bool:
    """Returns whether the body of a response consists of events."""
    return response.headers.get("Content-Type", "").lower().startswith("text/event-stream")


class PassingBody:
    """The body of a response on its way to the client.

    Args:
        response: The response.
        redact: Replaces the gateway's own keys in a text.
        decompresses: Whether the body is decompressed here, because the response to the client has already begun
            without a `Content-Encoding`.
    """

    def __init__(self, response: ForwardedResponse, redact: Redact, *, decompresses: bool = False) -> None:
        self._response = response
        self._redact = redact
        self._encoding = response.headers.get("Content-Encoding")
        self._decompressor = _decompressor(self._encoding) if decompresses else None
        self._is_stream = is_event_stream(response)
        is_plain = (self._encoding or "identity").strip().lower() == "identity"
        self.is_readable: Final = is_plain or self._decompressor is not None
        """Whether the parts that `next_part` returns are not compressed."""
        self._line = b""
        self._last_usage = b""
        self._last_part = b""

    @property
    def can_end_with_event(self) -> bool:
        """Whether the client can read an event that the gateway adds to what has been passed on."""
        return self._is_stream and self.is_readable

    def headers(self) -> list[tuple[str, str]]:
        """Returns the headers of the response that are passed on with this body.

        They have no `Content-Length` if an event may be added to the body, or a key in it may be replaced.
        """
        return [
            (name, value)
            for name, value in headers_for_client(self._response.headers)
            if not (self.can_end_with_event and name.lower() == "content-length")
        ]

    @property
    def separator(self) -> bytes:
        """What has to stand before an added event, so that it is not taken for a part of the event before it."""
        if not self._last_part.endswith((b"\n", b"\r")):
            return b"\n\n" if self._last_part else b""
        *_, last_event = b"\n".join([*self._last_part.splitlines(), b""]).rpartition(b"\n\n")
        # If the last event has only a name so far, the error event continues it and replaces its name.
        return b"\n" if any(line.startswith(b"data") for line in last_event.splitlines()) else b""

    async def next_part(self) -> bytes:
        """Waits for the next part of the body, and returns it. Returns `b""` at the end of the body.

        Raises:
            LLMError: The body broke off, or a time limit has run out.
        """
        while True:
            part = await self._read_part()
            if not part:
                rest, self._line = self._line, b""
                return self._inspect_lines(rest)
            if self._is_stream and self.is_readable:
                if self._line:
                    part = self._line + part
                    self._line = b""
                if not part.endswith((b"\n", b"\r")):
                    end = max(part.rfind(b"\n"), part.rfind(b"\r")) + 1
                    if len(part) - end <= _LONGEST_LINE:
                        part, self._line = part[:end], part[end:]
                part = self._inspect_lines(part)
            if part:
                self._last_part = part
                return part

    async def _read_part(self) -> bytes:
        """Returns the next part of the body, whose last line may be cut off, or `b""` at the end of the body."""
        if self._decompressor is None:
            return await self._response.read()
        try:
            while not (plain := self._decompressor.next_part()):
                part = await self._response.read()
                if not part:
                    self._decompressor.finish()
                    return b""
                self._decompressor.feed(part)
        except BrokenCompression as exc:
            raise LLMStreamError(f"the compressed body of the response is broken: {exc}", exc) from exc
        # A part can become a thousand times as large, so other tasks run between the steps of its decompression.
        await pause_after(len(plain))
        return plain

    def count_events(self, part: bytes) -> int:
        """Returns the number of events in a part of an event stream, which is about the number of tokens in it."""
        return max(1, part.count(b"\n\n")) if self._is_stream else 0

    def tokens(self, whole_body: bytes | None) -> int | None:
        """Returns the number of tokens that the server has generated, or None if it has not reported that.

        Args:
            whole_body: The whole body, decompressed. With None, the parts that `next_part` has returned are used.
        """
        if whole_body is not None:
            return _tokens_in(whole_body)
        found = [tokens for data in _data_lines(self._last_usage) if (tokens := _tokens_in(data)) is not None]
        return found[-1] if found else None

    def _inspect_lines(self, part: bytes) -> bytes:
        """Looks for token counts and errors in whole lines of events, and returns the lines that are passed on."""
        if b'"usage"' in part or b'"timings"' in part:
            self._last_usage = part
        return self._with_redacted_errors(part) if b'"error"' in part else part

    def _with_redacted_errors(self, part: bytes) -> bytes:
        lines = part.splitlines(keepends=True)
        for at, line in enumerate(lines):
            if line.startswith(b"data:") and b'"error"' in line and reports_error(data := line[5:].strip()):
                failures.report_loss(self._response.call, self._response.status, data)
                lines[at] = redacted_bytes(line, self._redact)
        return b"".join(lines)


def begins_with_error(data: bytes) -> bool:
    """Returns whether a body begins with an error, either as plain JSON or as an event.

    If it does, the transport does not count the model as loaded.
    """
    text = data.lstrip()
    if text.startswith(b"event: error"):
        return True
    for line in _data_lines(text):
        # The line may be cut off, so it need not be valid JSON.
        return b'"error"' in line and reports_error(line)
    return text.startswith((b'{"error"', b'{ "error"', b'{"type":"error"', b'{"type": "error"'))


def _data_lines(part: bytes) -> Iterator[bytes]:
    for line in part.splitlines():
        if line.startswith(b"data:"):
            yield line[5:].strip()


class _TokenCounts(msgspec.Struct):
    completion_tokens: int | None = None
    output_tokens: int | None = None


class _Timings(msgspec.Struct):
    predicted_n: int | None = None


class _UsageOfResponse(msgspec.Struct):
    """The object `response` in an event of `/v1/responses`."""

    usage: _TokenCounts | None = None


class _UsageFields(msgspec.Struct):
    """The fields in which servers report the number of tokens: those of OpenAI, Anthropic and llama.cpp."""

    usage: _TokenCounts | None = None
    timings: _Timings | None = None
    response: _UsageOfResponse | None = None


def _tokens_in(data: bytes) -> int | None:
    try:
        reply = msgspec.json.decode(data, type=_UsageFields)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    for usage in (reply.usage, None if reply.response is None else reply.response.usage):
        if usage is not None:
            return usage.output_tokens if usage.completion_tokens is None else usage.completion_tokens
    return None if reply.timings is None else reply.timings.predicted_n


def _decompressor(encoding: str | None) -> Decompressor | None:
    try:
        return decompressor_for(encoding)
    except UnsupportedEncoding:
        return None
