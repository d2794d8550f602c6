"""Server-sent events of MCP servers: bytes in, events with their ids and retry times out.

The decoder of `lmbridge.transport` is not used, because it drops these two fields, which LLM servers do not use.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from lmbridge.mcp.jsonrpc import LARGEST_MESSAGE, MessageTooLargeError


@attrs.define
class Event:
    """An event of a stream."""

    name: str = "message"
    """The value of the field `event`."""
    data: bytes = b""
    """The lines of data, joined by line feeds. It is empty if the event only has an id or a retry time."""
    id: str | None = None
    """The id of the event, from which the stream can be resumed; None if it has none."""
    retry: int | None = None
    """After how many milliseconds the client should reconnect if the stream ends; None if the event does not say."""


class EventReader:
    """Parses events from bytes that may be split anywhere.

    Args:
        largest: The maximum size of a line, and of the data of an event with its line breaks, in bytes.
    """

    def __init__(self, largest: int = LARGEST_MESSAGE) -> None:
        self._largest = largest
        self._pieces: list[bytes] = []
        self._pieces_size = 0
        self._event = Event()
        self._data: list[bytes] = []
        self._data_size = 0
        self._is_first_line = True
        self._ends_with_return = False

    def feed(self, data: bytes) -> Iterator[Event]:
        """Yields the events that the next bytes complete.

        Raises:
            MessageTooLargeError: A line or an event is too large.
        """
        if self._ends_with_return and data:
            # The carriage return has ended its line already, and this is the rest of the same line break.
            data, self._ends_with_return = data.removeprefix(b"\n"), False
        if not data:
            return
        self._ends_with_return = data.endswith(b"\r")
        *lines, rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._pieces.append(line)
            whole = b"".join(self._pieces)
            self._pieces, self._pieces_size = [], 0
            yield from self._read_line(whole)
        if rest:
            self._pieces.append(rest)
            self._pieces_size += len(rest)
            self._check_size(self._pieces_size)

    def _check_size(self, size: int) -> None:
        if size > self._largest:
            raise MessageTooLargeError(self._largest)

    def _read_line(self, line: bytes) -> Iterator[Event]:
        if self._is_first_line:
            self._is_first_line = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            if self._data or self._event != Event():
                self._event.data = b"\n".join(self._data)
                yield self._event
            self._event, self._data, self._data_size = Event(), [], 0
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
            self._data_size += len(value) + 1
            self._check_size(self._data_size)
        elif field == b"event":
            self._event.name = value.decode(errors="replace") or "message"
        elif field == b"id" and b"\0" not in value:
            self._event.id = value.decode(errors="replace")
        elif field == b"retry" and value.isdigit():
            # Python refuses to convert numbers of thousands of digits.
            self._event.retry = int(value[:9])
