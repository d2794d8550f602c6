"""Sends requests over sockets with aiohttp. This is the only module that imports aiohttp.

aiohttp won over httpx because it takes less time for a chunk of a stream (docs/performance.md), and over asyncio's own
streams because a connection pool, TLS and proxies come with it. It also has four habits that do not suit lmbridge,
and everything that is done about them is in this module:

- *It sends a GET again* when a connection is lost, even if the connection was new. `_ResponseOnConnection` raises
  another exception in place of those that aiohttp reacts to. A middleware could do the same for some microseconds a
  request, and so would the private attribute `ClientSession._retry_connection`.
- *It does not say whether a failed request was sent on a kept connection.* Only then does lmbridge send it again
  silently. `_ResponseOnConnection`, which aiohttp creates for each request because it is the session's
  `response_class`, sees the connection in `start` and remembers which ones have been used. aiohttp's tracing
  (`TraceConfig.on_connection_reuseconn`) reports the same, but calls a dozen coroutines for each request, which
  was a tenth of its time. A subclass of `TCPConnector` would have to override a private method.
- *It forgets the reader of a body with broken chunk framing.* Its compiled parser closes the connection and puts the
  error on the protocol object, where only the reader of a *head* looks, so the reader of the body waits until a time
  limit of minutes runs out. `_AiohttpResponse` therefore watches `response.connection.protocol.closed`, a future that
  aiohttp itself awaits when a session is closed. It has no leading underscore, but it is not documented either, and it
  is the only thing of that kind that lmbridge uses. Its documented alternative is `response.connection.transport`,
  whose `is_closing()` would have to be polled for as long as a stream is silent. `TraceConfig` has no signal for it,
  and `sock_read` is a limit on silence, which may last for minutes. tests/transport/test_session.py shows what happens
  with and without it, with the installed version of aiohttp; `make test-slow` runs it with the oldest as well.
- *It forgets what has arrived when a connection breaks.* Its `StreamReader` raises the exception at once, even if a
  slow reader has left much of the body in the buffer. `_AiohttpResponse.take_arrived` sets the exception aside in order
  to read the rest of the buffer. `StreamReader._read_nowait` would be shorter, but it is private.
"""

from __future__ import annotations

import asyncio
import ssl as ssl_module
import weakref
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import aiohttp
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError

from lmbridge._tasks import mark_exception_retrieved
from lmbridge.transport import faults
from lmbridge.transport.http import ConnectionFailed, HttpRequest, HttpResponse, StaleConnection

KEEPALIVE_SECONDS: Final = 4.0
"""How long an idle connection is kept. LM Studio and llama.cpp close idle connections after 5 seconds."""

AIOHTTP_FAULTS: Final[faults.FaultTable] = (
    (aiohttp.ClientConnectorDNSError, faults.UNKNOWN_HOST),
    (aiohttp.ClientConnectorCertificateError, faults.UNTRUSTED_CERTIFICATE),
    (aiohttp.ClientSSLError, faults.TLS_FAILED),
    (aiohttp.ClientProxyConnectionError, faults.PROXY_UNREACHABLE),
    (aiohttp.ClientConnectorError, faults.NOT_CONNECTED),
    (aiohttp.ServerDisconnectedError, faults.NO_RESPONSE),
    (aiohttp.ClientPayloadError, faults.BROKEN_IN_BODY),
    (aiohttp.ClientResponseError, faults.NOT_HTTP),
    (HttpProcessingError, faults.NOT_HTTP),
    (aiohttp.ClientConnectionError, faults.BROKEN_BEFORE_RESPONSE),
    (OSError, faults.BROKEN_BEFORE_RESPONSE),
    (Exception, faults.NOT_SENT),
)
"""The faults that aiohttp's exceptions stand for until the head of a response has arrived, most specific first."""

# aiohttp raises a ValueError, for example, if a .netrc file has a password for the server and there is an API key too.
_SENDING_ERRORS: Final = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError)
_READING_ERRORS: Final = (aiohttp.ClientError, HttpProcessingError, OSError)
_LOST_CONNECTION_ERRORS: Final = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)


class AiohttpSession:
    """An `HttpSession` that sends requests over sockets, with a pool of connections.

    Create it in the event loop in which it is used.

    Args:
        connection_limit: The most connections that may be open at the same time, or None for no limit.
        ssl: The TLS context for https. By default aiohttp's default context is used.
        trust_env: Whether the proxies and the `.netrc` file of the environment are used.
        proxy: The URL of an HTTP proxy.
        socket_path: The path of a Unix socket to connect to, whatever the host in the URL of a request.
    """

    def __init__(
        self,
        *,
        connection_limit: int | None,
        ssl: ssl_module.SSLContext | None = None,
        trust_env: bool = False,
        proxy: str | None = None,
        socket_path: str | None = None,
    ) -> None:
        self._proxy = proxy
        self._socket_path = socket_path
        self._connection_limit = connection_limit
        self._ssl = ssl
        self._trust_env = trust_env
        self._closed = False
        self._pooled = self._make_session(keep_connections=True)
        self._unpooled: aiohttp.ClientSession | None = None

    async def send(self, request: HttpRequest) -> HttpResponse:
        """Sends a request once; see `HttpSession.send`."""
        try:
            response = await self._session_for(request).request(
                request.method,
                request.url,
                data=request.body,
                headers=request.headers,
                # A redirect would send the key and the prompt to another server.
                allow_redirects=False,
                timeout=_client_timeout(request.connect_timeout),
            )
        except _SENDING_ERRORS as exc:
            failure = self._failure(exc, request)
        except asyncio.CancelledError:
            # When its session is closed, aiohttp cancels requests that wait for a connection or for a name to be
            # resolved.
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            failure = faults.connection_failed(faults.BROKEN_BEFORE_RESPONSE)
        else:
            return _AiohttpResponse(response)
        # Raised outside the `except` clauses, so that aiohttp's exception does not become the `__context__`: it may
        # contain the headers of the request, and these contain the key.
        raise failure

    async def close(self) -> None:
        """Closes all connections; see `HttpSession.close`."""
        self._closed = True
        try:
            await self._pooled.close()
        finally:
            if self._unpooled is not None:
                await self._unpooled.close()

    def abandon(self) -> None:
        """Closes what can be closed without waiting; see `HttpSession.abandon`."""
        self._closed = True
        for session in filter(None, (self._pooled, self._unpooled)):
            connector = session.connector
            # When a detached session is garbage-collected, it does not log "Unclosed client session".
            session.detach()
            if connector is not None:
                _start_closing(connector)

    def _session_for(self, request: HttpRequest) -> aiohttp.ClientSession:
        if not request.fresh_connection:
            return self._pooled
        if self._unpooled is None:
            self._unpooled = self._make_session(keep_connections=False)
        return self._unpooled

    def _make_session(self, *, keep_connections: bool) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=self._make_connector(keep_connections=keep_connections),
            cookie_jar=aiohttp.DummyCookieJar(),
            # By default aiohttp would break off every response after 300 seconds.
            timeout=aiohttp.ClientTimeout(total=None),
            trust_env=self._trust_env,
            proxy=self._proxy,
            response_class=_ResponseOnConnection,
        )

    def _make_connector(self, *, keep_connections: bool) -> aiohttp.BaseConnector:
        # In aiohttp, 0 means "no limit".
        options: dict[str, Any] = {"limit": self._connection_limit or 0}
        options |= {"keepalive_timeout": KEEPALIVE_SECONDS} if keep_connections else {"force_close": True}
        if self._socket_path is not None:
            return aiohttp.UnixConnector(self._socket_path, **options)
        return aiohttp.TCPConnector(ssl=self._ssl or True, **options)

    def _failure(self, exc: Exception, request: HttpRequest) -> ConnectionFailed:
        is_stale = False
        if isinstance(exc, _LostConnection):
            is_stale = exc.was_kept and not self._closed and not _response_had_begun(exc.original)
            exc = exc.original
        if isinstance(exc, aiohttp.ConnectionTimeoutError):
            return ConnectionFailed(faults.timed_out("connect", request.connect_timeout, exc), unsent=True)
        return faults.connection_failed(
            faults.look_up_fault(exc, AIOHTTP_FAULTS),
            _describe_reason(exc),
            # The repr of a ClientResponseError contains the headers of the request, and so the key.
            exc.__cause__ if isinstance(exc, aiohttp.ClientResponseError) else exc,
            kind=StaleConnection if is_stale else ConnectionFailed,
        )


def _start_closing(connector: aiohttp.BaseConnector) -> None:
    """Closes a connector as far as that is possible without waiting for the shutdown of its TLS connections."""
    closing = connector.close().__await__()
    try:
        next(closing)
    except StopIteration:
        return
    closing.close()


class _AiohttpResponse:
    """An `HttpResponse` that aiohttp has begun to receive."""

    __slots__ = ("_connection_closed", "_content", "_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self._response = response
        self._content = response.content
        self._connection_closed: asyncio.Future[None] | None = None
        self._watch_connection()

    async def read_some(self) -> bytes:
        try:
            data = await self._content.readany()
        except _READING_ERRORS as exc:
            failure = self._failure(exc)
        else:
            if not data:
                self._unwatch_connection()
            return data
        if arrived := self.take_arrived():
            return arrived
        raise failure

    def take_arrived(self) -> bytes:
        content = self._content
        if (exc := content.exception()) is None:
            return content.read_nowait()
        content.set_exception(None)  # type: ignore[arg-type]  # `exception` returns None as well
        try:
            return content.read_nowait()
        finally:
            content.set_exception(exc)

    async def read(self) -> bytes:
        try:
            data = await self._response.read()
        except _READING_ERRORS as exc:
            failure = self._failure(exc)
        else:
            self._unwatch_connection()
            return data
        raise failure

    def close(self) -> None:
        self._unwatch_connection()
        self._response.close()

    def _failure(self, exc: Exception) -> ConnectionFailed:
        cause = None if isinstance(exc, aiohttp.ClientResponseError) else exc
        return faults.connection_failed(faults.BROKEN_IN_BODY, cause=cause, status=self.status)

    def _watch_connection(self) -> None:
        """Makes sure that a reader wakes up when the connection is lost; the docstring of the module says why."""
        connection = self._response.connection
        # There is no connection any more if the end of the body arrived together with the head.
        if connection is None or connection.protocol is None:
            return
        self._connection_closed = connection.protocol.closed
        if self._connection_closed is not None:
            # The future outlives this response if the connection is kept, and asyncio logs exceptions that are never
            # retrieved. Removed first, so that a connection has one such callback, and not one for each response.
            self._connection_closed.remove_done_callback(mark_exception_retrieved)
            self._connection_closed.add_done_callback(mark_exception_retrieved)
            self._connection_closed.add_done_callback(self._on_connection_closed)

    def _unwatch_connection(self) -> None:
        if self._connection_closed is not None:
            self._connection_closed.remove_done_callback(self._on_connection_closed)
            self._connection_closed = None

    def _on_connection_closed(self, _closed: asyncio.Future[None]) -> None:
        if not self._content.is_eof():
            self._response.close()


class _ResponseOnConnection(aiohttp.ClientResponse):
    """A response that finds out whether its connection had been used before, in case it turns out to be dead."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        transport = connection.transport
        was_kept = transport in _used_transports
        if transport is not None and not was_kept:
            _used_transports.add(transport)
        try:
            return await super().start(connection)
        except _LOST_CONNECTION_ERRORS as exc:
            raise _LostConnection(exc, was_kept=was_kept) from exc


# One set for all sessions, because aiohttp accepts a class for its responses, and not a function that would know the
# session. The set holds weak references.
_used_transports: Final[weakref.WeakSet[asyncio.BaseTransport]] = weakref.WeakSet()


class _LostConnection(aiohttp.ClientError):
    """Wraps an exception, so that the `except` clause in which aiohttp would send the request again misses it."""

    def __init__(self, original: Exception, *, was_kept: bool) -> None:
        super().__init__(str(original))
        self.original = original
        self.was_kept = was_kept
        """Whether the connection had been used for another request before."""


@lru_cache(maxsize=16)
def _client_timeout(connect: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=connect)


def _response_had_begun(exc: Exception) -> bool:
    """Returns whether a part of the response had arrived. If so, aiohttp has stored it as the exception's message."""
    return isinstance(exc, aiohttp.ServerDisconnectedError) and not isinstance(exc.message, str)


def _describe_reason(exc: Exception) -> str:
    if isinstance(exc, aiohttp.ClientResponseError | HttpProcessingError):
        return exc.message
    # The texts of these two exceptions say nothing that the fault does not say.
    if isinstance(exc, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        return ""
    # A certificate error is a connector error as well, but the oldest aiohttp gives it no `os_error`.
    if isinstance(exc, aiohttp.ClientConnectorCertificateError):
        return faults.describe_os_error(exc.certificate_error)
    return faults.describe_os_error(exc.os_error if isinstance(exc, aiohttp.ClientConnectorError) else exc)
