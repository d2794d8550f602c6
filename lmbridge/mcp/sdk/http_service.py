"""Serves our tools over streamable HTTP: the SDK's session manager, behind our own check of who may use it.

The SDK has checks too, but they do not fit. Its check of `Host` needs a list of exact values, which a server that
listens on all addresses of a machine does not know, and its check of tokens requires OAuth. The HTTP server is uvicorn,
because every installation of the SDK includes it. uvicorn's signal handlers are switched off, because the program has
its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, TypeAlias

import attrs

from lmbridge._http_access import HostNames, bearer_token, is_same_key, is_same_origin
from lmbridge._tasks import end_task

MCP_PATH: Final = "/mcp"
"""The path at which hosts reach the tools."""
_CLOSE_SECONDS: Final = 2.0
"""How long connections may take to end when the server is closed, in seconds."""
_IDLE_SECONDS: Final = 1800.0
"""After how many seconds without a request a session is closed. SDK 1.27 would keep it for ever."""
_BACKLOG: Final = 128

_Scope: TypeAlias = MutableMapping[str, Any]
_Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App: TypeAlias = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


@attrs.frozen
class HttpAccess:
    """Decides which requests may use the tools."""

    names: HostNames
    """The names by which the server may be addressed."""
    token: str | None = attrs.field(repr=False)
    """The token that hosts have to send, or None if they need no token."""

    def refusal(self, path: str, headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
        """Returns the status and the text with which a request is refused, or None if it may pass."""
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self.names.accepts(hosts[0]):
            return 403, "the request names a host that this server does not accept; see --allow-host"
        found = {name: value.decode("latin-1") for name, value in headers}
        if b"origin" in found and not is_same_origin(found[b"origin"], hosts[0]):
            return 403, "requests from the pages of other sites are refused"
        if self.token is not None:
            sent = bearer_token(found.get(b"authorization", ""))
            if sent is None or not is_same_key(sent, self.token):
                return 401, f"the token is {'missing' if sent is None else 'wrong'}; send it as `Authorization: Bearer`"
        return None if path == MCP_PATH else (404, f"the tools are at {MCP_PATH}")


@asynccontextmanager
async def serve_http(server: Any, listening: socket.socket, access: HttpAccess) -> AsyncIterator[asyncio.Task[None]]:
    """Serves any number of hosts until the end of the block, when the calls that are still in flight are cancelled.

    Args:
        server: The server that `build_server` returned.
        listening: A socket that is bound to an address. It is closed at the end.
        access: Decides which requests are accepted.

    Yields:
        The task that serves. If it ends before the block does, it has failed.
    """
    import uvicorn
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    sdk_manager: Any = StreamableHTTPSessionManager
    manager = sdk_manager(server, session_idle_timeout=_IDLE_SECONDS)
    app = _GuardedApp(manager.handle_request, access)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(_CLOSE_SECONDS),
    )
    http = Server(config)
    sdk_log = logging.getLogger("mcp.server.streamable_http")
    # Only this filter is removed at the end, because the program or another service may have changed the logger too.
    silence = _Silence()
    serving: asyncio.Task[None] | None = None
    try:
        async with manager.run():
            serving = asyncio.create_task(http.serve(sockets=[listening]))
            try:
                yield serving
            finally:
                app.is_closing = http.should_exit = True
                # SDK 1.x logs an error for each stream that ends because its task group is cancelled.
                sdk_log.addFilter(silence)
    finally:
        sdk_log.removeFilter(silence)
        listening.close()
        if serving is not None:
            await asyncio.wait({serving}, timeout=2 * _CLOSE_SECONDS)
            await end_task(serving, grace=_CLOSE_SECONDS)
        # uvicorn leaves a connection open if its response has not ended in time.
        for connection in list(http.server_state.connections):
            connection.transport.abort()


class _Silence(logging.Filter):
    """Drops every record of a logger."""

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002 - it drops every record
        return False


class _GuardedApp:
    """Passes on the requests that are allowed to use the tools, and refuses all others.

    Args:
        app: The application that answers the allowed requests.
        access: Decides which requests are accepted.
    """

    def __init__(self, app: _App, access: HttpAccess) -> None:
        self._app, self._access = app, access
        self.is_closing: bool = False
        """Whether the sessions are being ended, so that every further request is refused."""

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        refusal = self._access.refusal(scope["path"], scope["headers"])
        if refusal is None and self.is_closing:
            refusal = 503, "the server is about to stop"
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await _refuse(send, *refusal)


async def _refuse(send: _Send, status: int, text: str) -> None:
    body = json.dumps({"error": {"message": text}}).encode()
    headers: Mapping[str, str] = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-content-type-options": "nosniff",
        **({"www-authenticate": "Bearer"} if status == 401 else {}),
    }
    sent_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": sent_headers})
    await send({"type": "http.response.body", "body": body})
