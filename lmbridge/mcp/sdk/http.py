"""Opens streams to a server on HTTP, over streamable HTTP or the older SSE transport.

The SDK implements the protocol. This module gives it an HTTP client that sends the configured headers to the server's
origin and nowhere else, and that inspects the responses. Inspecting them is necessary for three reasons: the SDK's
errors do not name the HTTP status, SDK 2.x keeps using a session that the server has forgotten, and SDK 1.x waits for
ever for a reply if the HTTP response has ended without it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any, Final

from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.sdk.package import is_v2
from lmbridge.mcp.sdk.streams import MessageTap, ReadStream, Streams, WriteStream

_CONNECT_TIMEOUT: Final = 30.0
"""The time limit for opening a connection, and for writing a request, in seconds."""
_REPLY_AFTER_END_SECONDS: Final = 1.0
"""How long a call may still wait for its reply after the HTTP response has ended, in seconds."""


@asynccontextmanager
async def open_http_streams(spec: ServerSpec, tap: MessageTap) -> AsyncIterator[Streams]:
    """Yields the two streams that the SDK needs, for a server on HTTP."""
    from mcp.client.sse import sse_client
    from mcp.client.streamable_http import streamable_http_client

    # The client is created in a thread, because that reads certificates from the disk.
    client = await asyncio.to_thread(_make_client, spec, tap)
    open_sse: Any = sse_client
    if spec.transport == "sse":
        opened = open_sse(spec.url, sse_read_timeout=None, httpx_client_factory=lambda **_: client)
        async with opened as (reading, writing, *_):
            yield _wrap_streams(reading, writing, tap)
    else:
        opened = streamable_http_client(spec.url, http_client=client)
        async with client, opened as (reading, writing, *_):
            yield _wrap_streams(reading, writing, tap)


def _wrap_streams(reading: Any, writing: Any, tap: MessageTap) -> Streams:
    return ReadStream(reading.receive, tap, reading.aclose), WriteStream(writing.send, writing.aclose)


def _make_client(spec: ServerSpec, tap: MessageTap) -> Any:
    """Returns an HTTP client that does not follow redirects and does not use proxies from the environment."""
    httpx: Any = import_module("httpx2" if is_v2() else "httpx")

    async def inspect_response(response: Any) -> None:
        if response.is_redirect:
            tap.http_problem = f"it redirects to {response.headers.get('location')}, which is not followed"
            raise httpx.TransportError(tap.http_problem)
        is_post = response.request.method == "POST"
        if is_post or spec.transport == "sse":
            is_error = response.status_code >= 400
            tap.http_problem = f"it answered with HTTP status {response.status_code}" if is_error else ""
            tap.is_session_unknown |= response.status_code == 404 and "mcp-session-id" in response.request.headers
        if is_post and spec.transport == "http" and not is_v2():
            _interrupt_call_after_response(response, tap)

    return httpx.AsyncClient(
        headers=dict(spec.headers),
        # There is no read timeout: each call has its own time limit, and an event stream may be silent for any time.
        timeout=httpx.Timeout(_CONNECT_TIMEOUT, read=None),
        follow_redirects=False,
        trust_env=False,
        event_hooks={"response": [inspect_response]},
    )


def _interrupt_call_after_response(response: Any, tap: MessageTap) -> None:
    """Makes a call fail if its HTTP response ends without the reply, for which SDK 1.x would wait for ever."""
    request_id = json.loads(response.request.content).get("id")
    close = response.aclose

    async def close_and_interrupt() -> None:
        await close()
        asyncio.get_running_loop().call_later(_REPLY_AFTER_END_SECONDS, tap.interrupt_call, request_id)

    if request_id is not None:
        response.aclose = close_and_interrupt
