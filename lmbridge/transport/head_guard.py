"""Limits what a server sends besides the body of a response, whatever parses it.

aiohttp limits the length of each line and, in newer versions, the number of headers. But a server may also send "100
Continue", empty lines, an extension of a chunk, or the zeros of a chunk's size forever, and nobody would notice. So all
bytes are counted here, between the transport and aiohttp's protocol, and nothing of the parser has to be known. An
asyncio transport can change its protocol at any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

HEAD_BYTES: Final = 64 * 1024
"""The most bytes that may arrive until the head of a response is complete, interim responses (1xx) included.

It is also the most bytes of chunk sizes, their extensions and trailers that may arrive one after the other.
"""


class _Guard(asyncio.Protocol):
    """Receives what arrives on a connection in place of aiohttp's protocol, and passes it on, until it is detached.

    Args:
        transport: The transport of the connection, or None if there is none any more.
        error: The exception for a server that exceeds the limit. aiohttp's protocol gets it as the reason why the
            connection was lost.
    """

    def __init__(self, transport: asyncio.BaseTransport | None, error: Exception) -> None:
        self.failure: BaseException | None = None
        """Why the connection was closed, if aiohttp does not say it to the reader of the body."""
        self._error = error
        self._transport: Any = None
        self.protocol: Any = None
        """The protocol of aiohttp, or None if there is no connection any more."""
        # A TLS transport that is closing has forgotten its protocol.
        if transport is not None and not transport.is_closing():
            self._transport = transport
            protocol: Any = transport.get_protocol()
            # One guard takes the place of another: that for the body, and that for a request through a proxy, whose
            # answer was limited in case that it is asked for a tunnel.
            self.protocol = protocol.protocol if isinstance(protocol, _Guard) else protocol
            transport.set_protocol(self)

    def detach(self) -> None:
        """Lets aiohttp receive everything that arrives from now on, unless another guard has taken the place."""
        transport, self._transport = self._transport, None
        if transport is not None and not transport.is_closing() and transport.get_protocol() is self:
            transport.set_protocol(self.protocol)

    def _on_limit(self) -> None:
        # The transports of uvloop are not instances of asyncio.Transport.
        if self._transport is not None:
            self.failure = self._error
            self._transport.abort()

    def eof_received(self) -> bool | None:
        """Passes on to aiohttp that the server sends nothing more."""
        result: bool | None = self.protocol.eof_received()
        return result

    def connection_lost(self, exc: Exception | None) -> None:
        """Passes on to aiohttp that the connection is closed."""
        self.protocol.connection_lost(self.failure or exc)

    def pause_writing(self) -> None:
        """Makes aiohttp stop writing the request for now."""
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        """Makes aiohttp write again."""
        self.protocol.resume_writing()


class HeadGuard(_Guard):
    """Closes a connection on which the head of a response takes too many bytes.

    When it is detached, aiohttp has parsed the head. So whether bytes belong to the head is known only after the task
    that waits for it has had a chance to run: bytes beyond the limit are held back for one turn of the event loop.
    """

    def __init__(self, transport: asyncio.BaseTransport | None, error: Exception) -> None:
        super().__init__(transport, error)
        self._room = HEAD_BYTES
        self._held_back = bytearray()

    @property
    def has_received(self) -> bool:
        """Whether a part of the response has arrived."""
        return self._room < HEAD_BYTES

    def detach(self) -> None:
        """Passes on what was held back, and lets aiohttp or the next guard receive what arrives from now on."""
        transport = self._transport
        super().detach()
        if transport is not None and self._held_back and self.failure is None:
            receiver = self.protocol if transport.is_closing() else transport.get_protocol()
            receiver.data_received(bytes(self._held_back))

    def data_received(self, data: bytes) -> None:
        """Passes on what is within the limit, and holds the rest back until it is known to belong to the body."""
        if self.failure is not None:
            return
        room, self._room = self._room, max(0, self._room - len(data))
        if room:
            self.protocol.data_received(data if len(data) <= room else data[:room])
        if len(data) > room:
            if not self._held_back:
                asyncio.get_running_loop().call_soon(self._on_limit)
            self._held_back += data[room:]


class FramingGuard(_Guard):
    """Closes a connection on which too many bytes arrive without a part of the body.

    What arrives and does not lengthen the body is the size of a chunk, an extension of it, or a trailer.

    Args:
        transport: The transport of the connection, or None if there is none any more.
        error: The exception for a server that exceeds the limit.
        body_size: Returns how many bytes of the body aiohttp has received.
    """

    def __init__(self, transport: asyncio.BaseTransport | None, error: Exception, body_size: Callable[[], int]) -> None:
        super().__init__(transport, error)
        self._body_size = body_size
        self._last_size = body_size()
        self._framing_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Passes on what arrived, and counts it unless a part of the body was in it."""
        self.protocol.data_received(data)
        size = self._body_size()
        if size != self._last_size:
            self._last_size = size
            self._framing_bytes = 0
            return
        self._framing_bytes += len(data)
        if self._framing_bytes > HEAD_BYTES:
            self._on_limit()

    def connection_lost(self, exc: Exception | None) -> None:
        """Passes on to aiohttp that the connection is closed, and remembers the error of its parser.

        aiohttp keeps that error for the reader of the next head, and replaces it when the connection is closed.
        """
        parser_error = self.protocol.exception()
        super().connection_lost(exc)
        self.failure: BaseException | None = self.failure or parser_error
