"""Messages over a child's stdin and stdout, within bounds: nothing that a server writes can stall or flood its host."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, Final

import msgspec

from lmbridge.mcp.config.spec import ServerSpec
from lmbridge.mcp.servers.processes import Child
from lmbridge.mcp.servers.results import clean

logger = logging.getLogger("lmbridge.mcp")

LARGEST_MESSAGE: Final = 16 * 2**20
"""Bytes of a message. A larger one would stall the event loop while it is parsed."""
_QUEUED: Final = 256
"""Messages that wait to be handled before a server's output is left unread."""
_KEY: Final = re.compile(r'\{\s*"(?:jsonrpc|id|method|params|result|error)"')
_ESCAPE: Final = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<half>\\u[dD][89a-fA-F]..)|\\.")
_DECODER: Final = json.JSONDecoder()
_ATTEMPTS: Final = 8


class MessageTooLargeError(Exception):
    """A message is larger than is read."""


class MessageReader:
    """Makes messages of bytes, split anywhere.

    Lines that hold no message are skipped and counted; what stands before a message on its line is cut off.
    """

    def __init__(self, largest: int = LARGEST_MESSAGE) -> None:
        self.garbage = 0
        self.first_garbage = b""
        self._largest = largest
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The messages that the next bytes complete.

        Raises:
            MessageTooLargeError: one is larger than is read. The reader is of no use after that.
        """
        searched = len(self._buffer)
        self._buffer += data
        begin = 0
        while (end := self._buffer.find(b"\n", max(begin, searched))) >= 0:
            self._check(end - begin)
            line = bytes(self._buffer[begin:end])
            begin = end + 1
            yield from self._messages(line)
        del self._buffer[:begin]
        self._check(len(self._buffer))

    def _check(self, size: int) -> None:
        if size > self._largest:
            raise MessageTooLargeError(f"it sent a message of more than {self._largest:,} bytes")

    def _messages(self, line: bytes) -> list[dict[str, Any]]:
        if not line.strip():
            return []
        try:
            decoded = msgspec.json.decode(line)
            messages = decoded if isinstance(decoded, list) else [decoded]  # a batch, which 2025-03-26 has
        except (ValueError, RecursionError):
            messages = _salvaged(line)
        if found := [each for each in messages if isinstance(each, dict) and "jsonrpc" in each]:
            return found
        self.garbage += 1
        self.first_garbage = self.first_garbage or line
        return []


def _salvaged(line: bytes) -> list[Any]:
    """The objects of a line that is no JSON as it stands, for a message that is dropped leaves its call without an end.

    There may be text around them, as of a program that prints from two threads; a bad byte, or half of a surrogate
    pair, which JavaScript makes where it cuts a text in an emoji; or NaN, which Python writes.
    """
    text = _ESCAPE.sub(_whole, line.decode(errors="replace"))
    found: list[Any] = []
    end = 0
    for begin in islice((match.start() for match in _KEY.finditer(text)), _ATTEMPTS):
        if begin >= end:
            with suppress(ValueError, RecursionError):
                value, end = _DECODER.raw_decode(text, begin)
                found.append(value)
    return found


def _whole(found: re.Match[str]) -> str:
    return "\\ufffd" if found["half"] else found.group()


class StdioLink:
    """Messages to and from a server's process.

    Args:
        spec: The server.
        on_end: Called once, with the reason in words, when nothing will come any more.
    """

    def __init__(self, spec: ServerSpec, on_end: Callable[[str], None]) -> None:
        self._spec, self._on_end = spec, on_end
        self._reader = MessageReader()
        self._child = Child(self._on_output, self._over)
        self._messages: deque[dict[str, Any]] = deque()
        self._news = asyncio.Event()
        self._is_over = False

    @property
    def pid(self) -> int | None:
        """The number of the process."""
        return self._child.pid

    @property
    def last_words(self) -> str:
        """The last lines of its stderr."""
        return self._spec.redacted(clean(self._child.stderr.text))

    async def start(self) -> None:
        """Starts the process.

        Raises:
            OSError: it cannot be started.
        """
        await self._child.start(self._spec.command, self._spec.args, self._spec.env, self._spec.cwd)

    async def end(self, *, patience: float | None = None) -> None:
        """Ends the process and its group; a cancel waits for that.

        Args:
            patience: Seconds that it has to end by itself.
        """
        self._is_over = True
        self._news.set()
        if self._reader.garbage > 1:
            logger.info("MCP server %r wrote %d lines that are no messages", self._spec.name, self._reader.garbage)
        await (self._child.end() if patience is None else self._child.end(patience=patience))

    async def receive(self) -> dict[str, Any] | None:
        """The next message, or None when there will be none."""
        while not self._messages:
            if self._is_over:
                return None
            self._news.clear()
            await self._news.wait()
        if len(self._messages) == _QUEUED:
            self._child.pause(paused=False)
        return self._messages.popleft()

    async def send(self, message: bytes) -> None:
        """Sends a message.

        Args:
            message: Its JSON, without a line break.

        Raises:
            ConnectionError: the server does not read any more.
        """
        try:
            await self._child.write(message + b"\n")
        except ConnectionError:
            while not self._is_over:  # for a moment, until it is known why
                self._news.clear()
                await self._news.wait()
            raise

    def _on_output(self, data: bytes) -> None:
        if self._is_over:
            return
        heard = self._reader.garbage
        try:
            self._messages += self._reader.feed(data)
        except MessageTooLargeError as exc:
            self._over(str(exc))
        if not heard and self._reader.garbage:
            first = self._spec.redacted(self._reader.first_garbage[:200].decode(errors="replace"))
            logger.warning("MCP server %r writes what is no message to its stdout: %r", self._spec.name, first)
        if len(self._messages) > _QUEUED:
            self._child.pause(paused=True)
        self._news.set()

    def _over(self, reason: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._news.set()
            self._on_end(reason)
