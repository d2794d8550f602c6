"""Server-sent events: bytes in, events out. This module uses no socket, no event loop and no clock.

The decoder follows the WHATWG HTML standard, 9.2.6 ("Interpreting an event stream"), with four exceptions that real
servers make necessary:

- If the body ends before the blank line after the last event, `close` returns that event all the same.
- An event with neither data nor a name is skipped, even if it has an empty `data:` line.
- Lines that are not fields are kept in `bare_text`, because llama.cpp's router ends a broken stream with a line such as
  "proxy error: ...".
- A line, or the data of an event, may have at most `max_size` bytes. The events before one that is larger are still
  returned.

Data stay bytes. `lmbridge.client.reply_stream` decodes them, and replaces bytes that are not UTF-8.
`lmbridge.client.responses` makes a `MessageEvent` of each event of a streamed response.
"""

from __future__ import annotations

from typing import Final

import attrs

from lmbridge.errors import LLMStreamError

MAX_EVENT_SIZE: Final = 100 * 2**20
"""The default of `max_size` in bytes, which is far beyond what a server sends on purpose."""
_MAX_BARE_TEXT: Final = 4096
_FIELDS: Final = (b"data:", b"event:", b"id:", b"retry:", b":")
BOM: Final = b"\xef\xbb\xbf"
"""The byte order mark that may be at the beginning of an event stream, or of any other text in UTF-8."""
# Numbers are faster here: for bytes of length 1, `in` first tries to read them as a number, which costs a microsecond.
_CR: Final = ord("\r")
_LF: Final = ord("\n")
_DATA: Final = b"data: "
_BETWEEN_EVENTS: Final = b"\n\n" + _DATA


def begins_event_stream(first: bytes) -> bool | None:
    """Returns whether a body that begins with these bytes is an event stream, or None if more bytes are needed."""
    begun = first.lstrip(BOM + b"\r\n")
    if not begun or any(field.startswith(begun) and field != begun for field in _FIELDS):
        return None
    return begun.startswith(_FIELDS)


@attrs.frozen
class NamedEvent:
    """An event with an `event:` field."""

    name: str
    """The value of the `event:` field."""
    data: bytes
    """The data of the event. Several lines of data are joined by line feeds."""


Event = bytes | NamedEvent
"""An event: a `NamedEvent`, or only its data if it has no name."""


class SSEDecoder:
    """Turns the bytes of an event stream into events, however the bytes are split.

    Several lines of data are joined by line feeds. Comments, `id:` and `retry:` are dropped. So is an event without any
    `data:` line, and an event without a name whose data is empty.

    Args:
        max_size: The most bytes of a line, and of the data of an event.
    """

    __slots__ = (
        "_after_cr",
        "_bare_text",
        "_data",
        "_data_size",
        "_further_data",
        "_max_size",
        "_name",
        "_partial_line",
        "_partial_line_size",
        "_possible_bom",
        "failure",
    )

    def __init__(self, max_size: int = MAX_EVENT_SIZE) -> None:
        self._max_size = max_size
        # The first bytes of the stream as long as they may be a BOM. Afterwards it is None.
        self._possible_bom: bytes | None = b""
        self._after_cr = False
        # The pieces of a line that is not complete yet. They are joined only once, however many there are.
        self._partial_line: list[bytes] = []
        self._partial_line_size = 0
        # The first line of the data of the current event, its further lines, and the size of all of them when joined.
        self._data: bytes | None = None
        self._further_data: list[bytes] = []
        self._data_size = 0
        self._name: str | None = None
        self._bare_text = b""
        self.failure: LLMStreamError | None = None
        """The error that every further call of `feed` and `close` raises, or None. The call in which the error occurred
        has raised it as well, unless that call had events to return."""

    @property
    def bare_text(self) -> str:
        """The lines that are neither fields nor comments, up to 4 KiB of them."""
        return self._bare_text.decode("utf-8", "replace").strip()

    def feed(self, data: bytes) -> list[Event]:
        """Returns the events that these bytes complete.

        Raises:
            LLMStreamError: A line or an event is larger than `max_size`. If there are events before it, these are
                returned, and the error is raised when the method is called again. The rest of the stream cannot be
                read, so every further call raises the error.
        """
        if self.failure is not None:
            raise self.failure
        if self._possible_bom is not None:
            data = self._without_bom(data)
        if self._after_cr or _CR in data:
            data = self._with_line_feeds(data)
        if _LF not in data:
            self._buffer_partial_line(data)
            return []
        if self._partial_line:
            self._partial_line.append(data)
            data = b"".join(self._partial_line)
            self._partial_line.clear()
            self._partial_line_size = 0
        events: list[Event] = []
        try:
            if len(data) > self._max_size:
                rest = self._interpret_lines_of_bounded_size(data, events)
            else:
                rest = self._interpret_blocks(data, events)
            if rest:
                self._buffer_partial_line(rest)
        except LLMStreamError:
            if not events:
                raise
        return events

    def close(self) -> list[Event]:
        """Ends the stream, and returns the last event if the blank line after it is missing.

        Raises:
            LLMStreamError: The error that `feed` would raise if it were called again.
        """
        if self.failure is not None:
            raise self.failure
        lines = [*self._take_possible_bom(), b"".join(self._partial_line), b""]
        self._partial_line.clear()
        events: list[Event] = []
        self._interpret(lines, events)
        return events

    def _interpret_blocks(self, data: bytes, events: list[Event]) -> bytes:
        """Interprets complete lines, appends the events that end in them to `events`, and returns what follows them.

        This is a fast path for bytes in which each event is a single line of data with a blank line after it.
        """
        complete, _, rest = data.rpartition(b"\n\n")
        if self._data is None and self._name is None and complete.startswith(_DATA):
            payloads = complete[len(_DATA) :].split(_BETWEEN_EVENTS)
            # A line feed anywhere else means that the bytes have another form. Counting all line feeds would take ten
            # times as long as looking for one in the joined payloads.
            if _LF not in b"".join(payloads) and _LF not in rest and b"" not in payloads:
                events += payloads
                return rest
        *lines, rest = data.split(b"\n")
        self._interpret(lines, events)
        return rest

    def _interpret_lines_of_bounded_size(self, data: bytes, events: list[Event]) -> bytes:
        """Does what `_interpret_blocks` does for data in which a line may be too large."""
        *lines, rest = data.split(b"\n")
        for number, line in enumerate(lines):
            if len(line) > self._max_size:
                self._interpret(lines[:number], events)
                self._check_size(len(line))
        self._interpret(lines, events)
        return rest

    def _interpret(self, lines: list[bytes], events: list[Event]) -> None:
        """Interprets complete lines, and appends the events that end in them to `events`."""
        for line in lines:
            if line:
                self._interpret_field(line)
            else:
                self._end_event(events)

    def _end_event(self, events: list[Event]) -> None:
        """Ends the current event, and appends it to `events` unless it is one of those that are dropped."""
        data, name = self._data, self._name
        self._data = self._name = None
        if data is None:
            return
        if self._further_data:
            data = b"\n".join([data, *self._further_data])
            self._further_data.clear()
        if name is not None:
            events.append(NamedEvent(name, data))
        elif data:
            events.append(data)

    def _interpret_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            if self._data is None:
                self._data = value
            else:
                size_before = self._data_size if self._further_data else len(self._data)
                self._data_size = size_before + 1 + len(value)
                self._check_size(self._data_size)
                self._further_data.append(value)
        elif name == b"event":
            self._name = value.decode("utf-8", "replace") or None
        elif name not in (b"", b"id", b"retry") and len(self._bare_text) < _MAX_BARE_TEXT:
            self._bare_text += line[: _MAX_BARE_TEXT - len(self._bare_text)] + b"\n"

    def _buffer_partial_line(self, rest: bytes) -> None:
        if rest:
            self._partial_line_size += len(rest)
            self._check_size(self._partial_line_size)
            self._partial_line.append(rest)

    def _check_size(self, size: int) -> None:
        if size > self._max_size:
            self.failure = LLMStreamError(f"the stream contains an event of more than {self._max_size} bytes")
            raise self.failure

    def _without_bom(self, data: bytes) -> bytes:
        if not self._possible_bom and data and data[0] != BOM[0]:
            self._possible_bom = None
            return data
        start = (self._possible_bom or b"") + data
        if len(start) < len(BOM) and BOM.startswith(start):
            self._possible_bom = start
            return b""
        self._possible_bom = None
        return start.removeprefix(BOM)

    def _take_possible_bom(self) -> list[bytes]:
        start, self._possible_bom = self._possible_bom, None
        return [start] if start else []

    def _with_line_feeds(self, data: bytes) -> bytes:
        """Returns the bytes with one LF in place of each line ending.

        A CR at the end of the bytes ends its line at once. If an LF follows in the next bytes, it is dropped.
        """
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if data.endswith(b"\r"):
            self._after_cr = True
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
