"""Exchanges messages with the MCP host over this process's stdin and stdout.

One thread reads and another one writes. The alternative, asyncio's pipe transports, fails when stdin or stdout is a
regular file, and puts the descriptors into non-blocking mode, which the host and the children of this process share. A
daemon thread works with pipes, files and terminals, and a read that never returns does not keep the process alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from lmbridge.mcp.jsonrpc import MessageInbox, MessageTooLargeError

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_FLUSH_SECONDS: Final = 1.0
"""How long `close` waits for the host to read the last messages, in seconds."""
_LOGGED_BYTES: Final = 200
"""How much of a line that contains no message is shown in the log, in bytes."""


@contextmanager
def take_over_stdio() -> Iterator[tuple[int, int]]:
    """Yields private copies of stdin and stdout, so that nothing else can read or write the host's messages.

    Inside the block, stdin is empty, and everything that this process and its children write to stdout, for example
    with `print`, goes to stderr instead.
    """
    reading, writing = os.dup(0), os.dup(1)
    empty = os.open(os.devnull, os.O_RDONLY)
    try:
        os.dup2(empty, 0)
        os.close(empty)
        os.dup2(2, 1)
        yield reading, writing
    finally:
        os.dup2(reading, 0)
        os.dup2(writing, 1)
        # The copies stay open, because a thread may be blocked on one of them until the process ends.


class HostLink:
    """A connection to the host that reads and writes JSON-RPC messages, one on each line.

    Args:
        reading: The file descriptor to read from.
        writing: The file descriptor to write to.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self.fault: str = ""
        """The error that stopped the reading, in words; empty if the host closed its end."""
        self._reading, self._writing = reading, writing
        self._is_write_end_broken = False
        self._has_room = threading.Event()
        self._has_room.set()
        self._inbox = MessageInbox(on_skipped_line=self._log_skipped_line, resume_reading=self._has_room.set)
        self._outbox: queue.SimpleQueue[tuple[bytes, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._all_written: asyncio.Future[None] = self._loop.create_future()
        for work in (self._read, self._write):
            threading.Thread(target=work, name="lmbridge-host", daemon=True).start()

    @property
    def can_host_read(self) -> bool:
        """Whether the host can still read what is sent. For a file, which has no reader, it is always True."""
        # Windows does not have `poll`. There, a host that has left is noticed only when a message cannot be sent.
        if self._is_write_end_broken or not hasattr(select, "poll"):
            return not self._is_write_end_broken
        poll = select.poll()
        # Errors and hang-ups are reported even if no event is asked for.
        poll.register(self._writing, 0)
        return not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))

    async def receive(self) -> dict[str, Any] | None:
        """Returns the next message, or None once there will be no more."""
        return await self._inbox.receive()

    async def send(self, message: bytes) -> None:
        """Sends a message. It is written as a whole even if the caller is cancelled.

        Args:
            message: The JSON of the message, without a line break.

        Raises:
            ConnectionError: The host no longer reads.
        """
        sent: asyncio.Future[None] = self._loop.create_future()
        self._outbox.put((message + b"\n", sent))
        await sent

    async def close(self) -> None:
        """Waits up to a second for the last messages to be written; afterwards nothing is received or sent."""
        self._stop_receiving()
        self._outbox.put(None)
        await asyncio.wait({self._all_written}, timeout=_FLUSH_SECONDS)

    def _stop_receiving(self, fault: str = "") -> None:
        self.fault = self.fault or fault
        self._inbox.close()

    # The following methods run in the two threads.

    def _read(self) -> None:
        # Reading from a terminal that has been closed raises OSError, which also means that the input has ended.
        with contextlib.suppress(OSError):
            while data := os.read(self._reading, 65536):
                self._has_room.wait()
                self._has_room.clear()
                self._call_in_loop(partial(self._accept, data))
        # `printf` and files often leave the last line without a line break.
        self._call_in_loop(partial(self._accept, b"\n"))
        self._call_in_loop(self._stop_receiving)

    def _write(self) -> None:
        while (item := self._outbox.get()) is not None:
            data, sent = item
            try:
                while data:
                    data = data[os.write(self._writing, data) :]
                self._call_in_loop(partial(_complete_future, sent, None))
            except OSError as exc:
                error = ConnectionError(f"the host no longer reads from this process: {exc}")
                self._is_write_end_broken = True
                self._call_in_loop(partial(_complete_future, sent, error))
                self._call_in_loop(self._stop_receiving)
        self._call_in_loop(partial(_complete_future, self._all_written, None))

    def _call_in_loop(self, callback: Callable[[], None]) -> None:
        # The loop raises RuntimeError once it is closed, when no task is left that could be waiting.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    # The following methods run in the event loop.

    def _accept(self, data: bytes) -> None:
        if self._inbox.is_closed:
            return
        try:
            self._inbox.feed(data)
        except MessageTooLargeError as exc:
            self._stop_receiving(str(exc))
        if self._inbox.has_room:
            self._has_room.set()

    def _log_skipped_line(self, line: bytes) -> None:
        logger.warning(
            "skipped a line from the host that is not a JSON-RPC message (later ones are not logged): %r",
            line[:_LOGGED_BYTES],
        )


def _complete_future(future: asyncio.Future[None], error: Exception | None) -> None:
    """Completes a future with an error or with None, unless its waiter has been cancelled."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
