"""Server-sent events: bytes in, events out. No socket, no loop, no clock.

The field rules are those of the WHATWG HTML standard, 9.2.6 ("Interpreting an event stream"), with four
differences that real servers ask for: an event that the end of the body cut off from its blank line is still
handed out by `close`; an event with neither data nor a name is skipped even if it has an empty `data:` line; lines
that are not a field at all are kept in `stray` (llama.cpp's router ends a broken stream with a bare "proxy error: ..."
line); and lines and events may have at most `max_size` bytes.
"""

from __future__ import annotations

from typing import Final

import attrs

from lmbridge.errors import LLMStreamError

MAX_EVENT_SIZE: Final = 100 * 2**20
_MAX_STRAY: Final = 4096
_FIELDS: Final = (b"data:", b"event:", b"id:", b"retry:", b":")
_BOM: Final = b"\xef\xbb\xbf"


def begins_event_stream(first: bytes) -> bool | None:
    """Returns whether a body that begins with these bytes is an event stream; None if there are too few to decide."""
    begun = first.lstrip(_BOM + b"\r\n")
    if not begun or any(field.startswith(begun) and field != begun for field in _FIELDS):
        return None
    return begun.startswith(_FIELDS)


@attrs.frozen
class NamedEvent:
    """An event with an `event:` field. An event without one is handed out as its bare data."""

    name: str
    data: bytes


Event = bytes | NamedEvent


class SSEDecoder:
    """Turns the bytes of an event stream, cut anywhere, into events.

    Data is handed out as bytes, lines joined by a line feed. Comments, `id:` and `retry:` are dropped, and so are
    events without data.

    Args:
        max_size: The number of bytes that a line, or the data of an event, may have at most.
    """

    __slots__ = ("_after_cr", "_data", "_head", "_max_size", "_more", "_name", "_size", "_stray", "_tail", "_tail_size")

    def __init__(self, max_size: int = MAX_EVENT_SIZE) -> None:
        self._max_size = max_size
        # None once the start of the stream is known not to be a BOM.
        self._head: bytes | None = b""
        self._after_cr = False
        # The pieces of an unfinished line, which are joined once, however many there are.
        self._tail: list[bytes] = []
        self._tail_size = 0
        self._data: bytes | None = None
        # The further lines of data of the event, and the size of all its lines when they are joined.
        self._more: list[bytes] = []
        self._size = 0
        self._name: str | None = None
        self._stray = b""

    @property
    def stray(self) -> str:
        """The lines that were neither a field nor a comment, up to 4 KiB of them."""
        return self._stray.decode("utf-8", "replace").strip()

    def feed(self, data: bytes) -> list[Event]:
        """Returns the events that these bytes complete.

        Raises:
            LLMStreamError: If a line or an event is larger than `max_size`.
        """
        if self._head is not None:
            data = self._without_bom(data)
        if self._after_cr or b"\r" in data:
            data = self._with_line_feeds(data)
        if b"\n" not in data:
            self._keep(data)
            return []
        if self._tail:
            self._tail.append(data)
            data = b"".join(self._tail)
            self._tail.clear()
            self._tail_size = 0
        lines = data.split(b"\n")
        if rest := lines.pop():
            self._keep(rest)
        if len(data) > self._max_size:
            self._check(max(map(len, lines)))
        return self._interpret(lines)

    def close(self) -> list[Event]:
        """Returns the event that the end of the body cut off from its blank line, if there is one."""
        lines = [*self._head_left(), b"".join(self._tail), b""]
        self._tail.clear()
        return self._interpret(lines)

    def _interpret(self, lines: list[bytes]) -> list[Event]:
        events: list[Event] = []
        payload = self._data
        plain = self._name is None and not self._more
        for line in lines:
            if not line:
                if plain:
                    if payload:
                        events.append(payload)
                else:
                    if payload is not None:
                        events.append(self._special(payload))
                    self._name, plain = None, True
                payload = None
            elif line[:6] == b"data: " and payload is None:
                payload = line[6:]
            else:
                self._data = payload
                self._field(line)
                payload = self._data
                plain = self._name is None and not self._more
        self._data = payload
        return events

    def _special(self, payload: bytes) -> Event:
        """Returns an event that has a name or more than one line of data."""
        if self._more:
            payload = b"\n".join([payload, *self._more])
            self._more.clear()
        return payload if self._name is None else NamedEvent(self._name, payload)

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            if self._data is None:
                self._data = value
            else:
                self._size = 1 + len(value) + (self._size if self._more else len(self._data))
                self._check(self._size)
                self._more.append(value)
        elif name == b"event":
            self._name = value.decode("utf-8", "replace") or None
        elif name not in (b"", b"id", b"retry") and len(self._stray) < _MAX_STRAY:
            self._stray += line[: _MAX_STRAY - len(self._stray)] + b"\n"

    def _keep(self, rest: bytes) -> None:
        if rest:
            self._tail_size += len(rest)
            self._check(self._tail_size)
            self._tail.append(rest)

    def _check(self, size: int) -> None:
        if size > self._max_size:
            raise LLMStreamError(f"the stream holds an event of more than {self._max_size} bytes")

    def _without_bom(self, data: bytes) -> bytes:
        if not self._head and data and data[0] != _BOM[0]:
            self._head = None
            return data
        head = (self._head or b"") + data
        if len(head) < len(_BOM) and _BOM.startswith(head):
            self._head = head
            return b""
        self._head = None
        return head.removeprefix(_BOM)

    def _head_left(self) -> list[bytes]:
        head, self._head = self._head, None
        return [head] if head else []

    def _with_line_feeds(self, data: bytes) -> bytes:
        """Returns the bytes with one LF for each line ending. A CR ends its line at once: its LF may never come."""
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if data.endswith(b"\r"):
            self._after_cr = True
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
