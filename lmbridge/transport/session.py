"""Sends requests over sockets with aiohttp. This is the only module that imports aiohttp.

aiohttp won over httpx because it takes less time for a chunk of a stream (docs/performance.md), and over asyncio's own
streams because a connection pool, TLS and proxies come with it. It also has some habits that do not suit lmbridge,
and everything that is done about them is in this module:

- *It sends a GET again* when a connection is lost, even if the connection was new. `_ResponseOnConnection` raises
  another exception in place of those that aiohttp reacts to. A middleware could do the same, but would cost some
  microseconds for each request. The attribute `ClientSession._retry_connection` would do as well, but is private.
- *It does not say whether a failed request was sent on a kept connection.* lmbridge has to know, because it sends the
  request again silently only in that case. So `_ResponseOnConnection` is the `response_class` of the session: aiohttp
  creates one for each request, and passes the connection to its `start`. The guard of the connection remembers whether
  the connection has been used.
  aiohttp's tracing (`TraceConfig.on_connection_reuseconn`) reports the same, but calls a dozen coroutines for each
  request, which took a tenth of the time of a request. A subclass of `TCPConnector` would have to override a private
  method.
- *It limits each line of a response's head, but not the whole head, nor what stands between two parts of a body.* A
  server may send "100 Continue" or an extension of a chunk forever. So a `ConnectionGuard` stands between each
  connection and aiohttp. The answer of a proxy to `CONNECT` is read before anything public is called, so `_Connector`
  overrides a private method for it; a test notices if that method is no longer called.
- *It decompresses without a limit*, or without noticing that the end is missing. So
  `lmbridge.transport.decompression` decompresses in its place.
- *It limits connecting, but not the resolution of a name.* `_Resolver` does.
- *It looks up a proxy in the environment even if its connector uses a SOCKS proxy*, which it then asks for a connection
  to that other proxy. `_RequestThroughSocks` ignores what was found. Without `trust_env` nothing is looked up, but
  neither is the `.netrc` file.
- *It forgets the reader of a body with broken chunk framing.* Its compiled parser closes the connection, and stores the
  error in the protocol object, where only the reader of a *head* looks. The reader of the body would wait until a time
  limit of minutes runs out. The `ConnectionGuard` therefore informs `_AiohttpResponse` that the connection was lost.
  `response.connection.protocol.closed` would do the same, but is not documented, and costs a future and two callbacks
  for each connection. tests/transport/test_session.py shows what happens with and without it, with the installed
  version of aiohttp; `make test-slow` runs it with the oldest as well.
- *It raises the same exception object for all responses that were closed while they were read.* Python adds the frames
  of each reader to the traceback of this object, so everything that a reader refers to would be kept until the program
  ends. `_unshared` empties the traceback, and gives each response a separate exception.
- *It forgets what has arrived when a connection breaks.* Its `StreamReader` raises the exception at once, even if a
  slow reader has left much of the body in the buffer. `_AiohttpResponse.take_arrived` sets the exception aside in order
  to read the rest of the buffer. `StreamReader._read_nowait` would be shorter, but it is private.

A session belongs to one event loop. What happens in another one, or when that loop is closed, is decided by `OpenState`
and `Transport`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl as ssl_module
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import aiohttp
from aiohttp import hdrs
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError
from aiohttp.http_exceptions import LineTooLong

from lmbridge.config import environment_proxy
from lmbridge.transport import faults, socks
from lmbridge.transport.decompression import (
    ACCEPTED_ENCODINGS,
    BrokenCompression,
    Decompressor,
    UnsupportedEncoding,
    decompressor_for,
)
from lmbridge.transport.head_guard import ConnectionGuard, guard_of
from lmbridge.transport.http_interface import ConnectionFailed, HttpRequest, HttpResponse, StaleConnection
from lmbridge.transport.interception import interceptors
from lmbridge.transport.time_limits import timed_out

_Error = TypeVar("_Error", bound=BaseException)

KEEPALIVE_SECONDS: Final = 4.0
"""The seconds for which an idle connection is kept. LM Studio and llama.cpp close idle connections after 5 seconds."""

_MOST_LINE_BYTES: Final = 1024**2
"""The most bytes of a line of HTTP that aiohttp parses."""
_MOST_PARTS_AT_ONCE: Final = 16
"""The most parts of a body, of 256 KiB each, that are decompressed in one step when its connection has broken."""
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
# While a connection is being lost, there is a moment at which aiohttp raises RuntimeError("Connection closed.").
_READING_ERRORS: Final = (aiohttp.ClientError, HttpProcessingError, OSError, RuntimeError)
_LOST_CONNECTION_ERRORS: Final = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)

EXTRA_CONNECTIONS: Final = 2
"""The number of connections beyond `max_concurrency`. They are for requests that do not need a permit, such as health
checks."""


class AiohttpSession:
    """An `HttpSession` that sends requests over sockets, with a pool of connections.

    Create it in the event loop in which it is used.

    Args:
        max_concurrency: The most generations that are in flight at the same time, which limits the number of
            connections; see `EXTRA_CONNECTIONS`. None means that their number is not limited.
        ssl: The TLS context for https. By default aiohttp's default context is used.
        trust_env: Whether the proxies and the `.netrc` file of the environment are used.
        proxy: The URL of an HTTP or SOCKS proxy. It takes precedence over the proxies of the environment.
        socket_path: The path of a Unix socket to connect to, whatever the host in the URL of a request.
    """

    def __init__(
        self,
        *,
        max_concurrency: int | None,
        ssl: ssl_module.SSLContext | None = None,
        trust_env: bool = False,
        proxy: str | None = None,
        socket_path: str | None = None,
    ) -> None:
        self._socks_proxy = proxy if socks.is_socks(proxy) else None
        self._socks_errors = () if self._socks_proxy is None else socks.socks_errors()
        # The HTTP proxy that aiohttp uses for each request. A SOCKS proxy is given to the connector instead.
        self._proxy = proxy if self._socks_proxy is None else None
        self._socket_path = socket_path
        # Requests wait in the scheduler, not in the connection pool.
        self._connection_limit = 0 if max_concurrency is None else max_concurrency + EXTRA_CONNECTIONS
        self._ssl = ssl
        self._trust_env = trust_env
        self._closed = False
        self._pooled = self._make_session(keep_connections=True)
        self._unpooled: aiohttp.ClientSession | None = None

    def send(self, request: HttpRequest) -> Coroutine[Any, Any, HttpResponse]:
        """Sends a request once; see `HttpSession.send`."""
        # This is not a coroutine function, because each layer of coroutines costs time whenever the request waits.
        return interceptors[-1](request, self._send) if interceptors else self._send(request)

    async def _send(self, request: HttpRequest) -> HttpResponse:
        _connect_timeout.set(request.connect_timeout)
        try:
            response = await self._session_for(request).request(
                request.method,
                request.url,
                data=request.body,
                headers=request.headers,
                # A redirect would send the key and the prompt to another server.
                allow_redirects=False,
                timeout=self._timeout(request),
            )
        except _SENDING_ERRORS as exc:
            failure = self._failure(exc, request)
        except self._socks_errors as exc:
            failure = socks.failure_of(exc, request.connect_timeout)
        except asyncio.CancelledError:
            # When its session is closed, aiohttp cancels requests that wait for a connection or for a name to be
            # resolved.
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            failure = faults.connection_failed(faults.BROKEN_BEFORE_RESPONSE)
        else:
            return _open_response(response, request)
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

    def _timeout(self, request: HttpRequest) -> aiohttp.ClientTimeout:
        # `sock_connect` does not cover the proxy's answer to CONNECT. `connect` does, but it also covers the wait for a
        # pooled connection, so it is set only for tunnels.
        tunnels = (self._proxy is not None or self._trust_env) and self._has_tunnel(request)
        return _client_timeout(request.connect_timeout, tunnels)

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
            headers={"Accept-Encoding": ACCEPTED_ENCODINGS},
            auto_decompress=False,
            # These limits are so high that the guards notice a head that is too long before aiohttp's parser does. The
            # guards always report it, and the parser hides it in some places.
            max_line_size=_MOST_LINE_BYTES,
            max_field_size=_MOST_LINE_BYTES,
            request_class=aiohttp.ClientRequest if self._socks_proxy is None else _RequestThroughSocks,
            response_class=_ResponseOnConnection,
        )

    def _make_connector(self, *, keep_connections: bool) -> aiohttp.BaseConnector:
        # In aiohttp, 0 means "no limit".
        options: dict[str, Any] = {"limit": self._connection_limit}
        options |= {"keepalive_timeout": KEEPALIVE_SECONDS} if keep_connections else {"force_close": True}
        if self._socket_path is not None:
            return aiohttp.UnixConnector(self._socket_path, **options)
        if self._socks_proxy is not None:
            connector: aiohttp.BaseConnector = socks.make_connector(self._socks_proxy, ssl=self._ssl or True, **options)
            return connector
        return _Connector(ssl=self._ssl or True, resolver=_Resolver(), **options)

    def _failure(self, exc: Exception, request: HttpRequest) -> ConnectionFailed:
        is_stale = False
        # aiohttp raises the same classes while it connects through a proxy.
        was_sent = isinstance(exc, _LostConnection)
        if isinstance(exc, _LostConnection):
            is_stale = exc.may_be_stale and not self._closed and not _response_had_begun(exc.original)
            exc = exc.original
        if isinstance(exc, aiohttp.ConnectionTimeoutError):
            name_error = _find_cause(exc, _NameTimeoutError)
            step = "resolve" if name_error is not None else "proxy" if self._has_tunnel(request) else None
            error = timed_out("connect", request.connect_timeout, name_error or exc, step=step)
            return ConnectionFailed(error, unsent=True)
        return faults.connection_failed(
            self._fault(exc, request, was_sent=was_sent),
            _describe_reason(exc),
            # The repr of a ClientResponseError contains the headers of the request, and so the key.
            exc.__cause__ if isinstance(exc, aiohttp.ClientResponseError) else exc,
            kind=StaleConnection if is_stale else ConnectionFailed,
        )

    def _fault(self, exc: Exception, request: HttpRequest, *, was_sent: bool) -> faults.Fault:
        """Returns the fault that an exception stands for, which its reason determines, or else its class."""
        if isinstance(exc, aiohttp.ClientHttpProxyError):
            return faults.proxy_refusal(exc.status)
        if isinstance(exc, _TunnelHeadTooLarge):
            return faults.blamed_on_proxy(faults.HEAD_TOO_LARGE, unsent=True)
        if isinstance(exc, _HeadTooLarge):
            return faults.HEAD_TOO_LARGE
        tls_error = _find_cause(exc, ssl_module.SSLError)
        fault = faults.look_up_fault(exc, AIOHTTP_FAULTS) if tls_error is None else faults.tls_fault(tls_error)
        if fault is faults.NOT_HTTP:
            fault = _protocol_fault(exc)
        if self._is_about_proxy(exc, request, was_sent=was_sent):
            return faults.blamed_on_proxy(fault, unsent=self._has_tunnel(request))
        return faults.seen_through_proxy(fault) if self._has_tunnel(request) else fault

    def _is_about_proxy(self, exc: Exception, request: HttpRequest, *, was_sent: bool) -> bool:
        """Returns whether the proxy, or the connection to it, caused an exception, and not the server behind it."""
        if not self._has_proxy(request):
            return False
        url = urlsplit(request.url)
        if isinstance(exc, aiohttp.ClientConnectorError):
            port = url.port or (443 if url.scheme == "https" else 80)
            return exc.host != url.hostname or exc.port != port
        if isinstance(exc, aiohttp.ClientResponseError):
            return url.scheme == "http" or exc.request_info.method == "CONNECT"
        # Without TLS, the client is connected only to the proxy, which forwards its requests.
        return url.scheme == "http" or (isinstance(exc, _LOST_CONNECTION_ERRORS) and not was_sent)

    def _has_proxy(self, request: HttpRequest) -> bool:
        """Returns whether aiohttp sends a request to an HTTP proxy."""
        if self._socket_path is not None or self._socks_proxy is not None:
            return False
        return self._proxy is not None or (self._trust_env and environment_proxy(request.url) is not None)

    def _has_tunnel(self, request: HttpRequest) -> bool:
        """Returns whether the proxy has to open a connection to the server (`CONNECT`)."""
        return request.url.startswith("https:") and self._has_proxy(request)


def _start_closing(connector: aiohttp.BaseConnector) -> None:
    """Closes a connector as far as that is possible without waiting for the shutdown of its TLS connections."""
    closing = connector.close().__await__()
    try:
        next(closing)
    except StopIteration:
        return
    closing.close()


def _open_response(response: aiohttp.ClientResponse, request: HttpRequest) -> HttpResponse:
    """Returns a response whose body can be read.

    Raises:
        ConnectionFailed: The body is compressed or transferred in a way that is not supported.
    """
    transfer_coding = response.headers.get(hdrs.TRANSFER_ENCODING, "chunked")
    # aiohttp reads a body with any other coding until the connection ends, as if it were not encoded.
    if transfer_coding.strip().lower() not in ("chunked", "identity"):
        response.close()
        raise faults.connection_failed(
            faults.NOT_HTTP, "its Transfer-Encoding is not 'chunked'", status=response.status
        )
    content_encoding = response.headers.get(hdrs.CONTENT_ENCODING)
    if content_encoding is None or request.keeps_compression:
        return _AiohttpResponse(response, None)
    try:
        return _AiohttpResponse(response, decompressor_for(content_encoding))
    except UnsupportedEncoding as exc:
        response.close()
        raise faults.unsupported_encoding(str(exc), response.status) from None


class _AiohttpResponse:
    """An `HttpResponse` that aiohttp has begun to receive."""

    __slots__ = ("_content", "_decompressor", "_guard", "_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse, decompressor: Decompressor | None) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self._response = response
        self._content = response.content
        self._decompressor = decompressor
        # A library that replaces aiohttp's responses in tests, such as aioresponses, creates plain ones.
        self._guard = response.guard if isinstance(response, _ResponseOnConnection) else guard_of(None)
        # The connection is gone if the end of the body arrived together with the head.
        if response.connection is not None:
            self._guard.watch(self)

    def read_some(self) -> Coroutine[Any, Any, bytes]:
        # This is not a coroutine function: it is called for every chunk, and each layer of coroutines costs time.
        return self._read_raw() if self._decompressor is None else self._read_decompressed(self._decompressor)

    async def _read_raw(self) -> bytes:
        try:
            data = await self._content.readany()
        except _READING_ERRORS as exc:
            failure = self._failure(_unshared(exc))
        else:
            if not data:
                self._guard.unwatch(self)
            return data
        if arrived := self._take_raw():
            return arrived
        raise failure

    def take_arrived(self) -> bytes:
        if self._decompressor is None:
            return self._take_raw()
        self._decompressor.feed(self._take_raw())
        parts: list[bytes] = []
        with suppress(BrokenCompression):
            while len(parts) < _MOST_PARTS_AT_ONCE and (part := self._decompressor.next_part()):
                parts.append(part)
        return b"".join(parts)

    def _take_raw(self) -> bytes:
        content = self._content
        if (exc := content.exception()) is None:
            return content.read_nowait()
        content.set_exception(None)  # type: ignore[arg-type]  # `exception` returns None as well
        try:
            return content.read_nowait()
        finally:
            content.set_exception(exc)

    async def _read_decompressed(self, decompressor: Decompressor) -> bytes:
        # There may be many parts without a wait for the network between them, and other tasks must not starve. This is
        # done first, so that a cancellation loses no part.
        await asyncio.sleep(0)
        try:
            while not (part := decompressor.next_part()):
                data = await self._read_raw()
                if not data:
                    decompressor.finish()
                    return b""
                decompressor.feed(data)
        except BrokenCompression as exc:
            raise faults.connection_failed(
                faults.BROKEN_COMPRESSION, str(exc), exc.__cause__, status=self.status
            ) from None
        return part

    def close(self) -> None:
        self._guard.unwatch(self)
        self._response.close()

    def _failure(self, exc: Exception) -> ConnectionFailed:
        cause = None if isinstance(exc, aiohttp.ClientResponseError) else exc
        reason = self._guard.failure or exc
        parser_error = _find_cause(reason, HttpProcessingError)
        fault = faults.NOT_HTTP if parser_error is None else _protocol_fault(parser_error)
        if isinstance(reason, _TooMuchFraming):
            fault = faults.TOO_MUCH_FRAMING
        elif fault is faults.NOT_HTTP:
            fault = faults.BROKEN_IN_BODY
        return faults.connection_failed(fault, cause=cause, status=self.status)

    def on_connection_lost(self) -> None:
        """Wakes a reader that aiohttp has forgotten; the docstring of the module explains this."""
        if not self._content.is_eof():
            self._response.close()


class _RequestThroughSocks(aiohttp.ClientRequest):
    """A request whose connector uses a SOCKS proxy, so that a proxy of the environment does not apply to it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "proxy": None, "proxy_auth": None})


class _ResponseOnConnection(aiohttp.ClientResponse):
    """A response that limits its head and its framing, and finds out whether its connection had been used before.

    A used connection may have been dead before the request was sent. Then the request can be sent again.
    """

    guard: ConnectionGuard
    """The guard of the connection."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        self.guard = guard = guard_of(connection.transport)
        was_kept = guard.note_request()
        guard.limit_head(_HeadTooLarge)
        try:
            await super().start(connection)
            if "chunked" in self.headers.get(hdrs.TRANSFER_ENCODING, "").lower() and not self.content.is_eof():
                guard.limit_framing(self.content, _TooMuchFraming)
        except _LOST_CONNECTION_ERRORS as exc:
            raise _LostConnection(exc, may_be_stale=was_kept and not guard.has_received) from exc
        finally:
            guard.end_head()
        return self


class _Connector(aiohttp.TCPConnector):
    """A connector that limits the head with which a proxy answers a request for a tunnel."""

    async def _create_direct_connection(self, *args: Any, **options: Any) -> Any:
        transport, protocol = await super()._create_direct_connection(*args, **options)
        if options.get("client_error") is aiohttp.ClientProxyConnectionError:
            # The guard ends with the handshake of TLS, or with the request to a server without TLS.
            guard_of(transport).limit_head(_TunnelHeadTooLarge)
        return transport, protocol


class _HeadTooLarge(aiohttp.ClientError):
    """The head of a response has more than `MAX_BYTES_WITHOUT_BODY`."""


class _TunnelHeadTooLarge(_HeadTooLarge):
    """The head of a proxy's answer to `CONNECT` has more than `MAX_BYTES_WITHOUT_BODY`."""


class _TooMuchFraming(aiohttp.ClientError):
    """More than `MAX_BYTES_WITHOUT_BODY` arrived without a part of the body."""


class _NameTimeoutError(TimeoutError):
    """A host name was not resolved in time."""


class _Resolver(AbstractResolver):
    """Resolves names within the time that a connection may take.

    Requests that wait for the same name share one resolution. The first of them determines its time limit.
    """

    def __init__(self) -> None:
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        limit = _connect_timeout.get()
        try:
            async with asyncio.timeout(limit):
                return await self._resolver.resolve(host, port, family)
        except TimeoutError as exc:
            raise _NameTimeoutError(f"{host} was not resolved within {limit} s") from exc

    async def close(self) -> None:
        await self._resolver.close()


# aiohttp resolves names in a separate task, which inherits the context of the first task that asks for the name.
_connect_timeout: Final[ContextVar[float | None]] = ContextVar("_connect_timeout", default=None)


class _LostConnection(aiohttp.ClientError):
    """Wraps an exception, so that the `except` clause in which aiohttp would send the request again misses it."""

    def __init__(self, original: Exception, *, may_be_stale: bool) -> None:
        super().__init__(str(original))
        self.original = original
        self.may_be_stale = may_be_stale
        """Whether the connection had been used for another request before, and nothing arrived for this one."""


@lru_cache(maxsize=16)
def _client_timeout(connect: float | None, tunnels: bool = False) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=connect, connect=connect if tunnels else None)


def _response_had_begun(exc: Exception) -> bool:
    """Returns whether a part of the response had arrived. If so, aiohttp has stored it as the exception's message."""
    return isinstance(exc, aiohttp.ServerDisconnectedError) and not isinstance(exc.message, str)


def _unshared(exc: Exception) -> Exception:
    """Returns a copy of the exception that aiohttp shares between all responses, and any other exception unchanged."""
    if type(exc) is not aiohttp.ClientConnectionError:
        return exc
    # The shared object must not keep the frames of those who read this response.
    exc.__traceback__ = exc.__context__ = None
    return aiohttp.ClientConnectionError(*exc.args)


def _find_cause(exc: BaseException | None, kind: type[_Error]) -> _Error | None:
    """Returns the exception of a certain class that caused an exception, directly or not.

    aiohttp's own subclasses of Python's exceptions do not count, because they lack the attributes of these.
    """
    while exc is not None and (not isinstance(exc, kind) or isinstance(exc, aiohttp.ClientError)):
        exc = exc.__cause__
    return exc


def _protocol_fault(exc: Exception) -> faults.Fault:
    """Returns the fault for an answer that aiohttp refused to parse."""
    if _find_cause(exc, LineTooLong) is not None:
        return faults.HEAD_TOO_LARGE
    text = _describe_reason(exc).lower()
    # aiohttp has no exception class for this.
    if "too many headers" in text or "too many trailers" in text:
        return faults.TOO_MANY_HEADERS
    # A TLS server answers a request that is not TLS with an alert, whose bytes aiohttp quotes.
    return faults.TLS_IN_PLACE_OF_HTTP if r"\x15\x03" in text else faults.NOT_HTTP


def _describe_reason(exc: Exception) -> str:
    if isinstance(exc, aiohttp.ClientHttpProxyError):
        return f"status {exc.status} {exc.message}".strip()
    if isinstance(exc, aiohttp.ClientResponseError | HttpProcessingError):
        # The message has several lines, with a mark under the byte that was not expected.
        return " ".join(exc.message.split()).removesuffix(" ^")
    # The texts of these exceptions say nothing that the fault does not say.
    if isinstance(exc, _HeadTooLarge | aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        return ""
    if (tls_error := _find_cause(exc, ssl_module.SSLError)) is not None:
        return faults.describe_os_error(tls_error)
    # aiohttp 3.13 does not set `os_error` in this subclass of `ClientConnectorError`.
    if isinstance(exc, aiohttp.ClientConnectorCertificateError):
        return faults.describe_os_error(exc.certificate_error)
    return faults.describe_os_error(exc.os_error if isinstance(exc, aiohttp.ClientConnectorError) else exc)
