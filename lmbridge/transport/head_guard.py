"""Limits how much a server may send besides the bodies of its responses, whichever parser reads it.

aiohttp limits the length of each line and, in newer versions, the number of headers. But a server may also send "100
Continue", empty lines, an extension of a chunk, or the zeros of a chunk's size forever, without being noticed. So all
bytes are counted here, between asyncio's transport and aiohttp's protocol, without depending on the parser. This works
because an asyncio transport can change its protocol at any time.

The guard stays for as long as the connection is open. A guard for each response would be simpler. But it would have to
be put in place and removed twice, for the head and for the body, which took a tenth of the time of a request.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any, Final, Protocol

MAX_BYTES_WITHOUT_BODY: Final = 64 * 1024
"""The most bytes that may arrive until the head of a response is complete, interim responses (1xx) included.

It is also the most bytes of chunk sizes, chunk extensions and trailers that may arrive without a part of the body.
"""


class Body(Protocol):
    """The body of a response, as aiohttp receives it."""

    @property
    def total_bytes(self) -> int:
        """How many bytes of the body have been received."""
        ...


class Watcher(Protocol):
    """An object that has to know when a connection is lost."""

    def on_connection_lost(self) -> None:
        """Called once, after aiohttp has been informed."""


class ConnectionGuard(asyncio.Protocol):
    """Receives what arrives on a connection in place of aiohttp's protocol, and passes it on.

    It closes the connection if the head of a response takes too many bytes, or if too many bytes arrive without a part
    of the body. Use `guard_of` to get the guard of a connection.

    Args:
        transport: The transport of the connection, or None after it was lost.
        protocol: The protocol of aiohttp, or None after the connection was lost.
        was_used: Whether a request has been sent on the connection before.
    """

    __slots__ = (
        "_body",
        "_body_size",
        "_error",
        "_held_back",
        "_room",
        "_transport",
        "_was_used",
        "_watcher",
        "failure",
        "protocol",
    )

    def __init__(self, transport: asyncio.BaseTransport | None, protocol: Any, *, was_used: bool = False) -> None:
        self.failure: BaseException | None = None
        """Why the connection was closed, if aiohttp does not report it to the reader of the body."""
        self.protocol: Any = protocol
        """The protocol of aiohttp, or None once the connection is lost."""
        self._was_used = was_used
        self._watcher: Watcher | None = None
        # The transports of uvloop are not instances of asyncio.Transport.
        self._transport: Any = transport
        # The bytes that may still arrive, or None if what arrives is not limited.
        self._room: int | None = None
        self._error: type[Exception] = Exception
        # The body whose framing is limited, and the bytes of it that had arrived before.
        self._body: Body | None = None
        self._body_size = 0
        # The bytes beyond the limit on a head, until it is known whether they belong to the body.
        self._held_back = b""

    def note_request(self) -> bool:
        """Records that a request is sent on the connection, and returns whether one had been sent on it before."""
        was_used, self._was_used = self._was_used, True
        if not was_used and self._transport is not None:
            _used_transports.add(self._transport)
        return was_used

    def limit_head(self, error: type[Exception]) -> None:
        """Limits what arrives until `end_head` is called.

        Bytes beyond the limit need not belong to the head: the head may be complete, and the task that waits for it may
        not have run since then. So these bytes are held back for one turn of the event loop. If `end_head` has not been
        called by then, the connection is closed.

        Args:
            error: The class of the exception for a server that exceeds the limit. aiohttp's protocol gets it as the
                reason why the connection was lost.
        """
        self._room, self._error, self._body, self._watcher = MAX_BYTES_WITHOUT_BODY, error, None, None

    @property
    def has_received(self) -> bool:
        """Whether a part of the head has arrived."""
        return self._room is not None and self._room < MAX_BYTES_WITHOUT_BODY

    def end_head(self) -> None:
        """Ends the limit on the head, which is complete or will never be, and passes on what was held back."""
        if self._body is None:
            self._room = None
        if self._held_back and self.failure is None:
            data, self._held_back = self._held_back, b""
            self.data_received(data)

    def limit_framing(self, body: Body, error: type[Exception]) -> None:
        """Limits the bytes that arrive without adding to the body: sizes and extensions of chunks, and trailers.

        Args:
            body: The body, which arrives in chunks.
            error: The class of the exception for a server that exceeds the limit.
        """
        self._room, self._error, self._body, self._body_size = MAX_BYTES_WITHOUT_BODY, error, body, body.total_bytes

    def watch(self, watcher: Watcher) -> None:
        """Makes the guard call a watcher when the connection is lost, unless the next head begins before that."""
        if self._transport is None:
            # The connection is being lost, or has been lost already.
            asyncio.get_running_loop().call_soon(watcher.on_connection_lost)
        else:
            self._watcher = watcher

    def unwatch(self, watcher: Watcher) -> None:
        """Ends the limit on framing, and forgets the watcher, unless the connection has a new one."""
        if self._watcher is watcher:
            self._room = self._body = self._watcher = None

    def data_received(self, data: bytes) -> None:
        """Passes the bytes on if they are within the limits."""
        if self._room is None:
            self.protocol.data_received(data)
        elif self._body is not None:
            self._receive_body(self._body, self._room, data)
        elif self.failure is None:
            self._receive_head(self._room, data)

    def _receive_head(self, room: int, data: bytes) -> None:
        self._room = max(0, room - len(data))
        if room:
            self.protocol.data_received(data if len(data) <= room else data[:room])
        if len(data) > room:
            if not self._held_back:
                asyncio.get_running_loop().call_soon(self._on_long_head)
            self._held_back += data[room:]

    def _on_long_head(self) -> None:
        if self._held_back:
            self._abort()

    def _receive_body(self, body: Body, room: int, data: bytes) -> None:
        self.protocol.data_received(data)
        size = body.total_bytes
        if size != self._body_size:
            self._body_size, self._room = size, MAX_BYTES_WITHOUT_BODY
            return
        self._room = room - len(data)
        if self._room < 0:
            self._abort()

    def _abort(self) -> None:
        if self._transport is not None:
            self.failure = self._error()
            self._transport.abort()

    def eof_received(self) -> bool | None:
        """Passes on to aiohttp that the server sends nothing more."""
        result: bool | None = self.protocol.eof_received()
        return result

    def connection_lost(self, exc: Exception | None) -> None:
        """Passes on to aiohttp that the connection is closed, and remembers the error of its parser.

        aiohttp keeps that error for the reader of the next head, and replaces it when the connection is closed.
        """
        parser_error = None if self._body is None else self.protocol.exception()
        self.protocol.connection_lost(self.failure or exc)
        self.failure = self.failure or parser_error
        watcher, self._transport, self._watcher = self._watcher, None, None
        if watcher is not None:
            watcher.on_connection_lost()

    def pause_writing(self) -> None:
        """Makes aiohttp stop writing the request for now."""
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        """Makes aiohttp write again."""
        self.protocol.resume_writing()


def guard_of(transport: asyncio.BaseTransport | None) -> ConnectionGuard:
    """Returns the guard of a connection. The first call for the connection puts it in place."""
    # A TLS transport that is closing has forgotten its protocol.
    if transport is None or transport.is_closing():
        return ConnectionGuard(None, None, was_used=transport in _used_transports)
    with_protocol: Any = transport
    protocol = with_protocol.get_protocol()
    if isinstance(protocol, ConnectionGuard):
        return protocol
    guard = ConnectionGuard(transport, protocol)
    with_protocol.set_protocol(guard)
    return guard


# The transports of the connections on which a request has been sent, as weak references. They are remembered apart from
# the guards, because the guard of a transport that is closing cannot be found any more.
_used_transports: Final[weakref.WeakSet[asyncio.BaseTransport]] = weakref.WeakSet()
