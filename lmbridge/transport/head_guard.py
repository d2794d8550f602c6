"""Limits the head of a response, whatever parses it.

aiohttp limits the length of each line and, in newer versions, the number of headers. But a server may also send "100
Continue", or empty lines, forever. The number of all bytes is limited here, between the transport and the protocol, so
that nothing of the parser has to be known. An asyncio transport can change its protocol at any time.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

HEAD_BYTES: Final = 64 * 1024
"""The most bytes that may arrive until the head of a response is complete, interim responses (1xx) included."""


class HeadGuard(asyncio.Protocol):
    """Closes a connection on which the head of a response takes too many bytes.

    It receives what arrives in place of aiohttp's protocol, and passes it on, until `detach` is called. When that is
    called, aiohttp has parsed the head. So whether bytes belong to the head is known only after the task that waits for
    it has had a chance to run: bytes beyond the limit are held back for one turn of the event loop.

    Args:
        transport: The transport of the connection, or None if there is none any more.
    """

    def __init__(self, transport: asyncio.BaseTransport | None) -> None:
        self.is_exceeded: bool = False
        """Whether the head was too large, so that the connection was closed."""
        self._transport: Any = None
        self._room = HEAD_BYTES
        self._held_back = bytearray()
        # A TLS transport that is closing has forgotten its protocol.
        if transport is not None and not transport.is_closing():
            self._transport = transport
            self._protocol: Any = transport.get_protocol()
            transport.set_protocol(self)

    def detach(self) -> None:
        """Lets aiohttp receive everything that arrives from now on."""
        transport, self._transport = self._transport, None
        if transport is None:
            return
        if not transport.is_closing():
            transport.set_protocol(self._protocol)
        if self._held_back and not self.is_exceeded:
            self._protocol.data_received(bytes(self._held_back))

    def data_received(self, data: bytes) -> None:
        """Passes on what is within the limit, and holds the rest back until it is known to belong to the body."""
        if self.is_exceeded:
            return
        room, self._room = self._room, max(0, self._room - len(data))
        if room:
            self._protocol.data_received(data if len(data) <= room else data[:room])
        if len(data) > room:
            if not self._held_back:
                asyncio.get_running_loop().call_soon(self._on_limit)
            self._held_back += data[room:]

    def _on_limit(self) -> None:
        # The transports of uvloop are not instances of asyncio.Transport.
        if self._transport is not None:
            self.is_exceeded = True
            self._transport.abort()

    def eof_received(self) -> bool | None:
        """Passes on to aiohttp that the server sends nothing more."""
        result: bool | None = self._protocol.eof_received()
        return result

    def connection_lost(self, exc: Exception | None) -> None:
        """Passes on to aiohttp that the connection is closed."""
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        """Makes aiohttp stop writing the request for now."""
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Makes aiohttp write again."""
        self._protocol.resume_writing()
