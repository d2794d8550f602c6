"""A connection of a client: receives requests, sends bytes, and notices when the client disconnects."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any, Final, cast

from lmbridge.testing.wire import RecordedRequest, RequestParser

# With this value of SO_LINGER, closing a socket sends a TCP reset.
_NO_LINGER: Final = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


def reset_transport(transport: asyncio.WriteTransport) -> None:
    """Breaks a connection with a TCP reset at once."""
    linger = transport.get_extra_info("socket").setsockopt
    linger(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    transport.abort()


class ChangeNotifier:
    """Wakes all tasks that wait for something to change.

    An `asyncio.Condition` cannot be used, because most changes are reported by callbacks, which cannot await its lock.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wakes all waiting tasks."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Waits for the next change."""
        await self._event.wait()

    async def wait_until(self, condition: Callable[[], object]) -> None:
        """Waits until a condition holds. It is evaluated now and at each change."""
        while not condition():
            await self.wait()


class Connection(asyncio.Protocol):
    """A connection and the task that serves it.

    It is an asyncio protocol and not a pair of streams, because it has to notice that the client disconnects while a
    behaviour is waiting for something else. With streams, this would need a read, which could also return the bytes of
    a pipelined request.

    Args:
        number: The number of the connection on its server. The first connection is 1.
        serve: The function that serves the connection. It is started as a task when the socket is connected.
        on_change: A function that is called after every event on the socket.

    Attributes:
        request_count: The number of requests that have been served.
        busy: Whether a request is being served.
        client_disconnected: Whether the client closed or broke the connection before the server did.
        server_disconnected: Whether the server closed the connection.
        socket_closed: Whether the socket is closed.
        task: The task that serves the connection, or None until the socket is connected.
    """

    def __init__(
        self,
        number: int,
        serve: Callable[[Connection], Coroutine[Any, Any, None]],
        on_change: Callable[[], None],
    ) -> None:
        self.number = number
        self.request_count = 0
        self.busy = False
        self.client_disconnected: bool = False
        self.server_disconnected: bool = False
        self.socket_closed: bool = False
        self.task: asyncio.Task[None] | None = None
        self._serve = serve
        self._on_change = on_change
        self._changes = ChangeNotifier()
        self._parser = RequestParser(number)
        self._transport: asyncio.Transport | None = None
        self._unsent = False
        self._watchers = 0

    @property
    def is_disconnected(self) -> bool:
        """Whether nothing more can be sent, because one side has closed the connection."""
        return self.client_disconnected or self.server_disconnected

    @property
    def cancelled(self) -> bool:
        """Whether the task was cancelled, because the client disconnected or the server is being closed."""
        return self.task is not None and self.task.cancelling() > 0

    @property
    def all_bytes_sent(self) -> bool:
        """Whether the kernel has taken all bytes that were written."""
        return not self._unsent

    async def next_request(self) -> RecordedRequest | None:
        """Waits for the next request. Returns None if the connection is closed before one has arrived.

        Raises:
            BadRequest: The client sent bytes that are not an HTTP request.
        """
        while not self.is_disconnected:
            if (request := self._parser.next_request()) is not None:
                return request
            await self._changes.wait()
        return None

    async def write(self, data: bytes) -> None:
        """Sends bytes in a separate packet, after the bytes before them have been sent.

        Raises:
            ConnectionResetError: The client has closed the connection.
            RuntimeError: The server has closed the connection.
        """
        # These two turns of the event loop let a client in the same loop receive the previous piece, so that it gets
        # each piece separately. They come before the write and not after it, so that the caller can record the end of a
        # reply as soon as its last bytes have been written.
        for _ in range(2):
            await asyncio.sleep(0)
        await self.flush()
        if self.client_disconnected:
            raise ConnectionResetError("the client has closed the connection")
        if self.server_disconnected or self._transport is None:
            raise RuntimeError("cannot send: the behaviour has already closed the connection")
        self._transport.write(data)
        self._notify()

    async def flush(self) -> None:
        """Waits until all bytes that were written have been sent, or can no longer be sent."""
        await self._changes.wait_until(lambda: self.all_bytes_sent or self.client_disconnected or self.socket_closed)

    async def client_left(self) -> None:
        """Waits until the client has closed the connection. The waiting task is not cancelled when this happens."""
        self._watchers += 1
        try:
            await self._changes.wait_until(lambda: self.client_disconnected or self.socket_closed)
        finally:
            self._watchers -= 1

    def hang_up(self) -> None:
        """Closes the connection (with a TCP FIN) after all written bytes have been sent."""
        if not self.is_disconnected and self._transport is not None:
            self.server_disconnected = True
            self._transport.close()
            self._notify()

    def reset(self) -> None:
        """Breaks the connection with a TCP reset at once."""
        if not self.is_disconnected and self._transport is not None:
            self.server_disconnected = True
            reset_transport(self._transport)
            self._notify()

    def abandon(self) -> None:
        """Closes the socket and cancels the task at once."""
        self.server_disconnected = True
        if self._transport is not None and not self.socket_closed:
            self._transport.abort()
        if self.task is not None:
            self.task.cancel()

    async def wait_closed(self) -> None:
        """Waits until the socket is closed."""
        await self._changes.wait_until(lambda: self.socket_closed)

    # Methods of asyncio.Protocol. asyncio itself sets TCP_NODELAY on the socket.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Starts the task that serves the connection."""
        self._transport = cast(asyncio.Transport, transport)
        # The server may have been closed after the connection was accepted.
        if self.server_disconnected:
            self._transport.abort()
            return
        # With this limit, asyncio calls `pause_writing` as soon as there are unsent bytes.
        self._transport.set_write_buffer_limits(high=0)
        self.task = asyncio.get_running_loop().create_task(self._serve(self))
        self._notify()

    def data_received(self, data: bytes) -> None:
        """Passes the bytes to the parser."""
        self._parser.feed(data)
        self._notify()

    def eof_received(self) -> None:
        """Records that the client has left: like real servers, this one treats a half-closed connection as closed."""
        self._note_client_left()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        """Records that the socket is closed."""
        self.socket_closed = True
        self._note_client_left()

    def pause_writing(self) -> None:
        """Records that there are written bytes which the kernel has not taken yet."""
        self._unsent = True

    def resume_writing(self) -> None:
        """Records that the kernel has taken all written bytes."""
        self._unsent = False
        self._notify()

    def _note_client_left(self) -> None:
        if not self.is_disconnected:
            self.client_disconnected = True
            if self.busy and not self._watchers and self.task is not None:
                self.task.cancel()
        self._notify()

    def _notify(self) -> None:
        self._changes.notify()
        self._on_change()
