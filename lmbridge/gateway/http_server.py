"""The HTTP side of the gateway. This is the only module of the gateway that imports aiohttp.

It reads requests and writes responses, and knows nothing about models. A request is an `IncomingRequest`, which the
gateway answers; when its client leaves, the task that answers it is cancelled.

aiohttp's `Application` with its router and middlewares is not used: there are a dozen fixed paths, and every request is
checked in the same way. What aiohttp does not limit is limited here: how long a client may take to send the body of a
request, and how long it may leave a response unread. The time limit for the head of a request is aiohttp's
`keepalive_timeout`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

from aiohttp import web
from aiohttp.http import HttpProcessingError

from lmbridge._http_access import bracketed
from lmbridge._tasks import settle
from lmbridge.gateway.gateway_errors import Problem
from lmbridge.gateway.request_fields import body_too_large
from lmbridge.transport.deadline import DeadlineTimer

logger: logging.Logger = logging.getLogger("lmbridge.gateway")

# aiohttp's own logger would quote what it cannot parse, and that may be a key.
_connection_logger: logging.Logger = logging.getLogger("lmbridge.gateway.connections")
_connection_logger.addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
)

_BACKLOG: Final = 1024
_SHUTDOWN_SECONDS: Final = 1.0
"""How many seconds requests may take to end after the gateway has closed its upstream connections."""
_JSON_HEADERS: Final = {
    "Content-Type": "application/json",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

Headers = Iterable[tuple[str, str]]
"""The names and values of the headers of a response."""
RequestHandler = Callable[["IncomingRequest"], Awaitable[None]]
"""An async function that answers a request."""


class IncomingRequest:
    """One request of a client, and the response to it.

    Args:
        request: The request.
        timer: The timer that ends writes to clients that do not read.
        client_seconds: How many seconds the client may pause while it sends or reads.
    """

    __slots__ = ("__weakref__", "_client_seconds", "_request", "_response", "_timer", "deadline")

    def __init__(self, request: web.BaseRequest, timer: DeadlineTimer, client_seconds: float) -> None:
        self._request = request
        self._response: web.StreamResponse | None = None
        self._timer = timer
        self._client_seconds = client_seconds
        self.deadline: float = math.inf
        """The time by which the client has to read what is being written to it; infinity between two writes."""

    @property
    def method(self) -> str:
        """The HTTP method."""
        return self._request.method

    @property
    def path(self) -> str:
        """The path as the client has sent it, without the query."""
        return self._request.rel_url.raw_path

    @property
    def query(self) -> Mapping[str, list[str]]:
        """The parameters of the query, each with all its values."""
        parameters = self._request.query
        return {name: parameters.getall(name) for name in parameters}

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the request. Names are case-insensitive, and `items()` yields repeated headers separately."""
        return self._request.headers

    @property
    def address(self) -> str:
        """The address of the client."""
        return self._request.remote or "unknown"

    @property
    def has_begun(self) -> bool:
        """True once the response has begun."""
        return self._response is not None

    async def read_body(self, max_bytes: int) -> bytes:
        """Reads the body of the request to its end.

        Raises:
            Problem: The body is too large or broken, or the client has stopped sending it.
        """
        length = self._request.content_length
        if length is not None and length > max_bytes:
            raise body_too_large(max_bytes)
        if self._request.headers.get("Expect", "").lower() == "100-continue":
            await self._request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            # The response itself has not begun.
            self._request.writer.output_size = 0
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(None) as limit:
                loop = asyncio.get_running_loop()
                while True:
                    limit.reschedule(loop.time() + self._client_seconds)
                    part = await self._request.content.readany()
                    if not part:
                        return b"".join(parts)
                    parts.append(part)
                    size += len(part)
                    if size > max_bytes:
                        raise body_too_large(max_bytes)
        except TimeoutError as exc:
            message = f"no more of the body arrived within {self._client_seconds:g} s"
            raise Problem(408, message, code="request_timeout") from exc
        except web.RequestPayloadError as exc:
            raise Problem(400, "the body of the request is broken", code="invalid_body") from exc

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Sends a whole response."""
        response = web.Response(status=status, body=body, headers=list(headers))
        self._response = response
        await self._send(response.prepare(self._request))
        await self.finish()

    async def respond_json(self, value: object, status: int = 200) -> None:
        """Sends a whole response of JSON. Its headers forbid browsers to cache it or to treat it as another type."""
        await self.respond(status, _JSON_HEADERS.items(), json.dumps(value).encode())

    async def begin(self, status: int, headers: Headers) -> None:
        """Sends the head of a response whose body follows in parts."""
        response = web.StreamResponse(status=status, headers=list(headers))
        self._response = response
        await self._send(response.prepare(self._request))

    def write(self, data: bytes) -> Awaitable[None]:
        """Sends a part of the body."""
        # This is not a coroutine function: it is called for every chunk, and each layer of coroutines costs time.
        return self._send(self.begun_response().write(data))

    async def finish(self) -> None:
        """Sends the end of the response.

        The sending has a time limit, because aiohttp would wait forever for a client that does not read.
        """
        await self._send(self.begun_response().write_eof())

    def abort(self) -> None:
        """Breaks the connection, so that the client does not mistake what has arrived for the whole response."""
        if self._request.transport is not None:
            self._request.transport.abort()

    def on_deadline(self) -> None:
        """Breaks the connection to a client that does not read. The timer calls this method."""
        text = "%s has not read its response for %g s, so its connection is closed"
        logger.warning(text, self.address, self._client_seconds)
        self.abort()

    def begun_response(self) -> web.StreamResponse:
        """Returns the response, which must have begun.

        Raises:
            RuntimeError: The response has not begun.
        """
        if self._response is None:
            raise RuntimeError("the response has not begun")
        return self._response

    async def _send(self, sending: Awaitable[object]) -> None:
        self.deadline = self._timer.time() + self._client_seconds
        self._timer.wake_at(self.deadline)
        try:
            await sending
        finally:
            self.deadline = math.inf


class HttpServer:
    """Accepts connections, and calls a function that answers each request.

    Args:
        answer: An async function that answers an `IncomingRequest`.
        client_seconds: How many seconds a client may pause while it sends or reads.
    """

    def __init__(self, answer: RequestHandler, *, client_seconds: float) -> None:
        self._answer = answer
        self._client_seconds = client_seconds
        self._incoming: set[IncomingRequest] = set()
        self._timer = DeadlineTimer(asyncio.get_running_loop(), self._incoming)
        self._runner = web.ServerRunner(
            web.Server(
                self._handle,
                handler_cancellation=True,
                auto_decompress=False,
                access_log=None,
                logger=_connection_logger,
                keepalive_timeout=client_seconds,
            ),
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        self._site: web.TCPSite | None = None

    async def listen(self, host: str, port: int) -> int:
        """Begins to accept connections, and returns the port.

        On cancellation of the caller, it waits until the address is known, and then stops listening.

        Raises:
            OSError: The server cannot listen on the address.
        """
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, host, port, backlog=_BACKLOG)
        try:
            # If this step were cancelled, asyncio would lose the socket on which it has just begun to listen.
            await settle(self._site.start())
        except BaseException:
            await self._runner.cleanup()
            raise
        bound = self._runner.addresses[0]
        return int(bound[1])

    async def close(self) -> None:
        """Ends all requests, and closes all connections."""
        await self._runner.cleanup()
        self._timer.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        incoming = IncomingRequest(request, self._timer, self._client_seconds)
        self._incoming.add(incoming)
        try:
            await self._answer(incoming)
        except ConnectionError:
            # The client has left. aiohttp would log this exception as an error of the gateway, with a traceback.
            incoming.abort()
            if not incoming.has_begun:
                return web.Response(status=400)
        finally:
            self._incoming.discard(incoming)
        return incoming.begun_response()


def origin_of(host: str, port: int) -> str:
    """Returns the URL at which a program on the same machine reaches a server."""
    with contextlib.suppress(OSError):
        # 0.0.0.0 stands for all addresses of the machine, so a program cannot connect to it.
        if socket.inet_pton(socket.AF_INET, host) == bytes(4):
            host = "127.0.0.1"
    return f"http://{bracketed('::1' if host == '::' else host)}:{port}"
