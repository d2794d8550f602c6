"""One client's socket: requests in, bytes out, and when the client left."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any, Final, cast

from lmbridge.testing.wire import Request, RequestParser

_NO_LINGER: Final = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


class Bell:
    """Wakes everyone who waits for something to change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Something changed."""
        self._event.set()
        self._event = asyncio.Event()

    async def rung(self) -> None:
        """Return at the next ring."""
        await self._event.wait()

    async def wait_until(self, condition: Callable[[], object]) -> None:
        """Return as soon as the condition holds; it is looked at again at each ring."""
        while not condition():
            await self.rung()


class Connection(asyncio.Protocol):
    """A connection and the one task that serves it.

    A protocol and not a pair of streams, since it has to see the client leave while a behaviour waits for something
    else, and must not take the bytes of a pipelined request for that.

    Args:
        number: Which connection of its server this is; the first is 1.
        serve: Started as a task once the socket is there.
        changed: Called after everything that happens on the socket.
    """

    def __init__(
        self,
        number: int,
        serve: Callable[[Connection], Coroutine[Any, Any, None]],
        changed: Callable[[], None],
    ) -> None:
        self.number = number
        self.served = 0
        self.busy = False
        self.left = False
        self.hung_up = False
        self.lost = False
        self.task: asyncio.Task[None] | None = None
        self._serve = serve
        self._changed = changed
        self._bell = Bell()
        self._parser = RequestParser(number)
        self._transport: asyncio.Transport | None = None
        self._unsent = False
        self._watchers = 0

    @property
    def over(self) -> bool:
        """Whether nothing more can be sent: the client left, or the server hung up."""
        return self.left or self.hung_up

    @property
    def cancelled(self) -> bool:
        """Whether the task was cancelled: because the client left, or the server is being closed."""
        return self.task is not None and self.task.cancelling() > 0

    @property
    def sent(self) -> bool:
        """Whether all that was written is with the kernel."""
        return not self._unsent

    async def next_request(self) -> Request | None:
        """The next request, or None once the connection is over.

        Raises:
            BadRequest: The client sent something else.
        """
        while not self.over:
            if (request := self._parser.next_request()) is not None:
                return request
            await self._bell.rung()
        return None

    async def write(self, data: bytes) -> None:
        """Send bytes as a packet of their own, once those before them are sent.

        Raises:
            ConnectionResetError: The client has left.
            RuntimeError: The server has hung up.
        """
        # In one turn the loop sees what was sent before, in the next a client in this loop reads it: so it gets each
        # piece by itself. Before the write and not after it, so that nothing comes between the last bytes of a reply
        # and the note that it is whole.
        for _ in range(2):
            await asyncio.sleep(0)
        await self.flush()
        if self.left:
            raise ConnectionResetError("the client has left")
        if self.hung_up or self._transport is None:
            raise RuntimeError("the connection was closed by the script before")
        self._transport.write(data)
        self._ring()

    async def flush(self) -> None:
        """Return once all that was written is sent, or can no longer be."""
        await self._bell.wait_until(lambda: self.sent or self.left or self.lost)

    async def client_left(self) -> None:
        """Return once the client has closed the connection; who awaits this is not cancelled by it."""
        self._watchers += 1
        try:
            await self._bell.wait_until(lambda: self.left or self.lost)
        finally:
            self._watchers -= 1

    def hang_up(self) -> None:
        """FIN, after what was written."""
        if not self.over and self._transport is not None:
            self.hung_up = True
            self._transport.close()
            self._ring()

    def reset(self) -> None:
        """RST, at once."""
        if not self.over and self._transport is not None:
            self.hung_up = True
            linger = self._transport.get_extra_info("socket").setsockopt
            linger(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self._transport.abort()
            self._ring()

    def abandon(self) -> None:
        """Close the socket and cancel the task, whatever they are at."""
        self.hung_up = True
        if self._transport is not None and not self.lost:
            self._transport.abort()
        if self.task is not None:
            self.task.cancel()

    async def wait_closed(self) -> None:
        """Return once the socket is closed."""
        await self._bell.wait_until(lambda: self.lost)

    # What asyncio calls. It has set TCP_NODELAY by then (see `loop.create_server`).

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start to serve."""
        self._transport = cast(asyncio.Transport, transport)
        if self.hung_up:  # the server was closed between accept and here
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=0)  # so that a pause is: not all of it is sent
        self.task = asyncio.get_running_loop().create_task(self._serve(self))
        self._ring()

    def data_received(self, data: bytes) -> None:
        """Keep it for `next_request`."""
        self._parser.feed(data)
        self._ring()

    def eof_received(self) -> None:
        """Take it for leaving, as the servers do; the transport closes itself."""
        self._leave()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        """Note that the socket is closed."""
        self.lost = True
        self._leave()

    def pause_writing(self) -> None:
        """Note that bytes wait for the client to read."""
        self._unsent = True

    def resume_writing(self) -> None:
        """Note that none do."""
        self._unsent = False
        self._ring()

    def _leave(self) -> None:
        if not self.over:
            self.left = True
            if self.busy and not self._watchers and self.task is not None:
                self.task.cancel()
        self._ring()

    def _ring(self) -> None:
        self._bell.ring()
        self._changed()
