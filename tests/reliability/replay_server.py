"""A server that answers requests with recorded bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from lmbridge.testing.wire import RequestParser, encode_head
from tests.reliability.steps import Script

_UNKNOWN_PATH = b'{"error":{"code":404,"message":"File Not Found","type":"not_found_error"}}'
_CLOSING = b"Connection: close\r\n"


class ReplayServer:
    """Sends the responses of a script, and closes a connection after a response that says so."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        """The method and path of each request so far."""
        self._script: Script[bytes] = Script()
        self._listener: asyncio.Server | None = None
        self._connections: set[_ReplayConnection] = set()

    def begin(self, responses: Iterable[tuple[str, bytes]]) -> None:
        """Answers the next requests with these responses, by method and path."""
        self._script = Script(responses)

    def next_response(self, request: str) -> bytes:
        """Returns the response to a request. A path that the server does not know has a 404."""
        self.requests.append(request)
        response = self._script.next(request)
        if response is not None:
            return response
        fields = {"Content-Type": "application/json", "Content-Length": str(len(_UNKNOWN_PATH)), "Connection": "close"}
        return encode_head(404, fields) + _UNKNOWN_PATH

    @property
    def origin(self) -> str:
        assert self._listener is not None
        return f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: _ReplayConnection(self, self._connections), "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._listener is not None
        self._listener.close()
        for connection in list(self._connections):
            connection.transport.abort()
        await self._listener.wait_closed()


class _ReplayConnection(asyncio.Protocol):
    def __init__(self, server: ReplayServer, connections: set[_ReplayConnection]) -> None:
        self._server = server
        self._connections = connections
        self._parser = RequestParser()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed(data)
        while (request := self._parser.next_request()) is not None:
            response = self._server.next_response(f"{request.method} {request.path}")
            self.transport.write(response)
            if _CLOSING in response.partition(b"\r\n\r\n")[0] + b"\r\n":
                self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
