"""Reads JSON-RPC messages, one per line, from a byte stream: a parser that tolerates bad lines, and a bounded inbox.

Both directions use it: `servers/stdio.py` for what a server writes to its stdout, `bridge/host_link.py` for what the
host writes to our stdin.

The official SDK has a reader too. It is not used for three reasons. It reads lines of any size; a line of 30 MB takes
five seconds of processor time and 240 MB of memory. One byte that is not UTF-8 ends the session or hangs it. And it
loses a message that follows other text on its line.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, Final, Protocol

import msgspec

LARGEST_MESSAGE: Final = 16 * 2**20
"""The maximum size of a message in bytes. Parsing a larger one would block the event loop for too long."""
BACKLOG_LIMIT: Final = 256
"""The number of unhandled messages beyond which reading pauses."""
_MESSAGE_START: Final = re.compile(r'\{\s*"(?:jsonrpc|id|method|params|result|error)"')
_JSON_ESCAPE: Final = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<lone>\\u[dD][89a-fA-F]..)|\\.")
"""An escape in a JSON string: a whole surrogate pair, half of a pair (the group `lone`), or any other escape."""
_SURROGATE_START: Final = re.compile(r"\\u[dD][89a-fA-F]")
_DECODER: Final = json.JSONDecoder()
_ANSWER_ID: Final = re.compile(rb'"id"\s*:\s*(?P<id>\d{1,18})\s*[,}]')
_SEARCHED_FOR_ID: Final = 1000
"""How many bytes at each end of an unreadable line are searched for the id of the request that the line answers."""
METHOD_NOT_FOUND: Final = -32601
"""The code of JSON-RPC for a request whose method the receiver does not offer."""
INTERNAL_ERROR: Final = -32603
"""The code of JSON-RPC for a request that failed because of a problem of the receiver."""
_PARSE_ERROR: Final = -32700
_SALVAGE_ATTEMPTS: Final = 8
"""How many positions in a broken line are tried as the beginning of a message.

Without this limit, a hostile line would cost quadratic time.
"""


class MessageLink(Protocol):
    """A connection over which JSON-RPC messages are received and sent."""

    async def receive(self) -> dict[str, Any] | None:
        """Returns the next message, or None once there will be no more."""
        ...

    async def send(self, message: bytes) -> None:
        """Sends a message, given as its JSON without a line break.

        Raises:
            ConnectionError: The other side no longer reads.
        """
        ...


class MessageTooLargeError(Exception):
    """The other side sent a message that is too large.

    Args:
        largest: The maximum size of a message in bytes.
    """

    def __init__(self, largest: int) -> None:
        super().__init__(f"it sent a message of more than {largest:,} bytes")


class MessageReader:
    """Parses messages from bytes that may be split anywhere.

    A line that contains no message is skipped and counted. Text before or after a message on the same line is cut off.

    Args:
        largest: The maximum size of a message in bytes.
    """

    def __init__(self, largest: int = LARGEST_MESSAGE) -> None:
        self.skipped_lines: int = 0
        """How many lines contained no message."""
        self.first_skipped_line: bytes = b""
        """The first line that contained no message, or an empty string."""
        self._largest = largest
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Yields the messages that the next bytes complete.

        Raises:
            MessageTooLargeError: A message is too large. The reader cannot be used after that.
        """
        searched = len(self._buffer)
        self._buffer += data
        begin = 0
        while (end := self._buffer.find(b"\n", max(begin, searched))) >= 0:
            self._check_size(end - begin)
            line = bytes(self._buffer[begin:end])
            begin = end + 1
            yield from self._parse_line(line)
        del self._buffer[:begin]
        self._check_size(len(self._buffer))

    def end(self) -> list[dict[str, Any]]:
        """Returns the messages in the last line, which has no line break. A message that was cut off is dropped."""
        if len(self._buffer) > self._largest:
            return []
        try:
            decoded = msgspec.json.decode(self._buffer)
        except (ValueError, RecursionError):
            return []
        self._buffer.clear()
        return [each for each in (decoded if isinstance(decoded, list) else [decoded]) if _is_message(each)]

    def _check_size(self, size: int) -> None:
        if size > self._largest:
            raise MessageTooLargeError(self._largest)

    def _parse_line(self, line: bytes) -> list[dict[str, Any]]:
        if not line.strip():
            return []
        if messages := [each for each in parse_json(line) if _is_message(each)]:
            return messages
        self.skipped_lines += 1
        self.first_skipped_line = self.first_skipped_line or line
        return _stand_in_answer(line)


def parse_json(data: bytes) -> list[Any]:
    """Returns the values in a piece of JSON: the items of a list, or else the only value.

    The revision 2025-03-26 of the protocol has batches of messages, which are lists. If the data is not valid JSON, the
    objects in it that can be read are returned.
    """
    try:
        decoded = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return _salvage_objects(data)
    return decoded if isinstance(decoded, list) else [decoded]


def _stand_in_answer(line: bytes) -> list[dict[str, Any]]:
    """Returns an error response in place of an answer that cannot be read, so that its caller does not wait for it.

    The list is empty if the line does not look like an answer with a numeric id.
    """
    ends = line if len(line) <= 2 * _SEARCHED_FOR_ID else line[:_SEARCHED_FOR_ID] + line[-_SEARCHED_FOR_ID:]
    if b'"jsonrpc"' not in ends or b'"method"' in ends or (found := _ANSWER_ID.search(ends)) is None:
        return []
    error = {"code": _PARSE_ERROR, "message": "the answer is not valid JSON, or is nested too deeply"}
    return [{"jsonrpc": "2.0", "id": int(found["id"]), "error": error}]


def _is_message(value: Any) -> bool:
    """Returns whether a decoded value is a message, even if its sender forgot the field `jsonrpc`."""
    if not isinstance(value, dict):
        return False
    return "jsonrpc" in value or ("id" in value and ("result" in value or "error" in value))


def _salvage_objects(line: bytes) -> list[Any]:
    """Returns the objects in a line that is not valid JSON. If they were dropped, calls would wait in vain for replies.

    Such a line occurs when a program prints from two threads, so that other text surrounds the message; when it
    contains a byte that is not UTF-8; when JavaScript has cut a string in the middle of an emoji, which leaves half of
    a surrogate pair; and when Python has written NaN.
    """
    text = line.decode(errors="replace")
    if _MESSAGE_START.search(text) is None:
        return []
    # Going through all escapes of a long text takes seconds, so it is done only if one of them is a surrogate.
    if _SURROGATE_START.search(text) is not None:
        text = _JSON_ESCAPE.sub(_replace_lone_surrogate, text)
    found: list[Any] = []
    end = 0
    for begin in islice((match.start() for match in _MESSAGE_START.finditer(text)), _SALVAGE_ATTEMPTS):
        if begin >= end:
            with suppress(ValueError, RecursionError):
                value, end = _DECODER.raw_decode(text, begin)
                found.append(value)
    return found


def _replace_lone_surrogate(escape: re.Match[str]) -> str:
    return "\\ufffd" if escape["lone"] else escape.group()


class MessageInbox:
    """A bounded queue of messages that have arrived but have not been handled yet.

    The inbox does not read anything itself: its owner feeds it with bytes, pauses reading while `has_room` is False,
    and resumes when `resume_reading` is called.

    Args:
        on_skipped_line: Called with the first line that contains no message; later ones are only counted.
        resume_reading: Called when `has_room` becomes True again.
    """

    def __init__(self, *, on_skipped_line: Callable[[bytes], None], resume_reading: Callable[[], None]) -> None:
        self._on_skipped_line, self._resume_reading = on_skipped_line, resume_reading
        self._reader = MessageReader()
        self._messages: deque[dict[str, Any]] = deque()
        self._changed = asyncio.Event()
        self._closed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def has_room(self) -> bool:
        """Whether the owner should read more."""
        return len(self._messages) <= BACKLOG_LIMIT

    @property
    def skipped_lines(self) -> int:
        """How many lines contained no message."""
        return self._reader.skipped_lines

    @property
    def is_closed(self) -> bool:
        """Whether no more messages will arrive."""
        return self._closed.is_set()

    def feed(self, data: bytes) -> None:
        """Adds the messages that the next bytes complete. A closed inbox ignores the bytes.

        Raises:
            MessageTooLargeError: A message is too large. The messages before it have been added.
        """
        if self.is_closed:
            return
        skipped_before = self._reader.skipped_lines
        try:
            self._messages += self._reader.feed(data)
        finally:
            self._changed.set()
            if not skipped_before and self._reader.skipped_lines:
                self._on_skipped_line(self._reader.first_skipped_line)

    def end(self) -> None:
        """Adds the messages in a last line that has no line break, and closes the inbox."""
        if not self.is_closed:
            self._messages += self._reader.end()
            self.close()

    def close(self) -> None:
        """Closes the inbox: `receive` still returns the messages that have arrived; `feed` ignores further bytes."""
        self._closed.set()
        self._changed.set()

    async def receive(self) -> dict[str, Any] | None:
        """Returns the next message, or None once the inbox is closed and empty.

        Only one task at a time may wait for a message.
        """
        while not self._messages:
            if self.is_closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        message = self._messages.popleft()
        if len(self._messages) == BACKLOG_LIMIT:
            self._resume_reading()
        return message

    async def wait_closed(self) -> None:
        """Waits until no more messages will arrive."""
        await self._closed.wait()
