"""The HTTP client that MCP servers are reached with, and how the bodies of its responses are read.

The client is that of the installed SDK: httpx2 for 2.x, httpx for 1.x. Their interfaces are the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from importlib import import_module
from typing import Any, Final

from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.jsonrpc import MessageTooLargeError
from lmbridge.mcp.sdk.event_stream import Event, EventReader
from lmbridge.mcp.sdk.http_auth import FetchHeaders, make_auth
from lmbridge.mcp.sdk.package import is_v2
from lmbridge.mcp.sdk.session_errors import RefusedError, RequestLostError, RequestRejectedError

_CONNECT_TIMEOUT: Final = 30.0
"""The time limit for opening a connection, and for writing a request, in seconds."""
_RETRY_MILLISECONDS: Final = 1000
"""After how long a stream that has ended is opened again, if the server does not say."""
_SHORTEST_RETRY_MILLISECONDS: Final = 10
_ENCODINGS: Final = ("gzip", "deflate")
"""The compressions that are asked for, whatever else the HTTP client could decompress."""


def make_http_client(spec: ServerSpec, fetch_headers: FetchHeaders | None = None) -> Any:
    """Returns an HTTP client that does not follow redirects and does not use proxies from the environment.

    The function should be called in a thread, because it reads certificates from the disk.

    Args:
        spec: The server.
        fetch_headers: Returns the current values of headers that change over time; None if the server has none.
    """
    httpx = _load_httpx()
    return httpx.AsyncClient(
        headers={"accept-encoding": ", ".join(_ENCODINGS), **spec.headers},
        auth=make_auth(httpx, spec, fetch_headers),
        # Reading has no timeout: each call has its own time limit, and an event stream may be silent for hours.
        timeout=httpx.Timeout(_CONNECT_TIMEOUT, read=None, pool=None),
        limits=httpx.Limits(max_connections=None),
        follow_redirects=False,
        trust_env=False,
    )


def connection_errors() -> tuple[type[Exception], ...]:
    """Returns the classes of the errors that mean that a connection has failed."""
    httpx = _load_httpx()
    return (httpx.HTTPError, httpx.StreamError, OSError)


def unsent_errors() -> tuple[type[Exception], ...]:
    """Returns the classes of the errors that mean that a request has not been sent."""
    httpx = _load_httpx()
    return (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)


def is_valid_url(url: str) -> bool:
    """Returns whether the HTTP client can send a request to a URL."""
    httpx = _load_httpx()
    try:
        return bool(httpx.URL(url).host)
    except (httpx.InvalidURL, ValueError):
        return False


def _load_httpx() -> Any:
    return import_module("httpx2" if is_v2() else "httpx")


def sends_events(response: Any) -> bool:
    """Returns whether the body of a response is a stream of events."""
    kind: str = response.headers.get("content-type", "")
    return kind.lower().startswith("text/event-stream")


def check_redirect(response: Any) -> None:
    """Raises an error if a response is a redirect, because following it could send secret headers to another server.

    Raises:
        RequestLostError: The request may have run, because the redirect points to its outcome (303).
        RequestRejectedError: It is any other redirect, so the request has not run.
    """
    if response.is_redirect:
        reason = f"it redirects to {response.headers.get('location')}, which is not followed"
        if response.status_code == HTTPStatus.SEE_OTHER:
            raise RequestLostError(reason)
        raise RequestRejectedError(reason, hint="if that is the server you mean, give that URL in the configuration")


def _check_encoding(response: Any) -> None:
    """Raises `RefusedError` if a body is compressed in a way that was not asked for.

    The HTTP client would decompress every format that it supports. With gzip, a received piece of 64 KiB expands to
    64 MiB at most before the size limit ends the response; with other formats, the expansion has no bound.
    """
    encodings = {each.strip().lower() for each in response.headers.get("content-encoding", "").split(",")}
    if unknown := encodings - {"", "identity", *_ENCODINGS}:
        raise RefusedError(f"it compressed its answer as {', '.join(sorted(unknown))}, which was not asked for")
    if response.headers.get("content-encoding", "").count(","):
        raise RefusedError("it compressed its answer more than once, which was not asked for")


async def read_body(response: Any, limit: int) -> bytes:
    """Returns the body of a response.

    Raises:
        RefusedError: The body has a compression that was not asked for.
        MessageTooLargeError: The body has more than `limit` bytes.
    """
    _check_encoding(response)
    body = bytearray()
    async with aclosing(response.aiter_bytes()) as pieces:
        async for piece in pieces:
            body += piece
            if len(body) > limit:
                raise MessageTooLargeError(limit)
    return bytes(body)


async def read_events(response: Any) -> AsyncGenerator[Event, None]:
    """Yields the events of a response. The generator has to be closed, for example by `contextlib.aclosing`.

    Raises:
        RefusedError: The stream has a compression that was not asked for.
        MessageTooLargeError: An event is too large.
    """
    _check_encoding(response)
    reader = EventReader()
    async with aclosing(response.aiter_bytes()) as pieces:
        async for piece in pieces:
            for event in reader.feed(piece):
                yield event


async def pause_before_retry(milliseconds: int | None, empty_streams: int = 0) -> None:
    """Waits until a stream may be opened again.

    Args:
        milliseconds: The time that the server has named, or None.
        empty_streams: How many streams in succession have ended without data. The minimum pause doubles with each.
    """
    shortest = min(_SHORTEST_RETRY_MILLISECONDS << min(empty_streams, 10), _RETRY_MILLISECONDS)
    pause = _RETRY_MILLISECONDS if milliseconds is None else max(milliseconds, shortest)
    await asyncio.sleep(pause / 1000)
