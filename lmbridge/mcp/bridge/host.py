"""Messages over this process's own stdin and stdout, to and from the host that started it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from lmbridge.mcp.servers.stdio import MessageReader, MessageTooLargeError

logger = logging.getLogger("lmbridge.mcp")

_QUEUED: Final = 256
"""Messages that wait to be handled before the host's output is left unread."""
_LAST_WRITES: Final = 1.0
"""Seconds in which what was sent last has to be read."""


@contextmanager
def taken_over() -> Iterator[tuple[int, int]]:
    """Copies of stdin and stdout, that nobody else can read or write: to print goes to stderr meanwhile."""
    reading, writing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    try:
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        yield reading, writing
    finally:
        os.dup2(reading, 0)
        os.dup2(writing, 1)  # the copies stay open: a thread may wait for one until the process ends


class HostLink:
    """Messages to and from the host.

    Each direction has a thread of its own: that works with pipes, files and terminals, leaves their flags as they are,
    and a read that nothing ends does not keep the process from ending.

    Args:
        reading: The file descriptor that is read.
        writing: The one that is written.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self.fault = ""
        """Why nothing is read any more, if that is not because the host has closed its end."""
        self._reading, self._writing = reading, writing
        self._reader = MessageReader()
        self._messages: deque[dict[str, Any]] = deque()
        self._news = asyncio.Event()
        self._is_over = False
        self._has_room = threading.Event()
        self._has_room.set()
        self._outbox: queue.SimpleQueue[tuple[bytes, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._written: asyncio.Future[None] = self._loop.create_future()
        for work in (self._read, self._write):
            threading.Thread(target=work, name="lmbridge-host", daemon=True).start()

    async def receive(self) -> dict[str, Any] | None:
        """The next message, or None when there will be none."""
        while not self._messages:
            if self._is_over:
                return None
            self._news.clear()
            await self._news.wait()
        message = self._messages.popleft()
        self._make_room()
        return message

    async def send(self, message: bytes) -> None:
        """Sends a message; a cancel does not tear it.

        Args:
            message: Its JSON, without a line break.

        Raises:
            ConnectionError: the host does not read any more.
        """
        sent: asyncio.Future[None] = self._loop.create_future()
        self._outbox.put((message + b"\n", sent))
        await sent

    async def close(self) -> None:
        """Waits a moment for what was sent to be read; nothing is received or sent after it."""
        self._end()
        self._outbox.put(None)
        await asyncio.wait({self._written}, timeout=_LAST_WRITES)

    def _end(self, fault: str = "") -> None:
        self.fault = self.fault or fault
        self._is_over = True
        self._news.set()

    # In threads

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone
            while data := os.read(self._reading, 65536):
                self._has_room.wait()
                self._has_room.clear()
                self._tell(partial(self._take, data))
        self._tell(self._end)

    def _write(self) -> None:
        while (item := self._outbox.get()) is not None:
            data, sent = item
            try:
                while data:
                    data = data[os.write(self._writing, data) :]
                self._tell(partial(_settle, sent, None))
            except OSError as exc:
                error = ConnectionError(f"the host does not read any more: {exc}")
                self._tell(partial(_settle, sent, error))
                self._tell(self._end)
        self._tell(partial(_settle, self._written, None))

    def _tell(self, callback: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(callback)

    # In the loop

    def _take(self, data: bytes) -> None:
        if self._is_over:
            return
        heard = self._reader.garbage
        try:
            self._messages += self._reader.feed(data)
        except MessageTooLargeError as exc:
            self._end(str(exc))
        if not heard and self._reader.garbage:
            logger.warning("the host sends what is no message: %r", self._reader.first_garbage[:200])
        self._make_room()
        self._news.set()

    def _make_room(self) -> None:
        if len(self._messages) <= _QUEUED:
            self._has_room.set()


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
