"""The older SSE transport: one stream for all messages of the server, and an endpoint that messages are posted to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

from lmbridge._tasks import end_task
from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.jsonrpc import MessageTooLargeError
from lmbridge.mcp.sdk.event_stream import Event
from lmbridge.mcp.sdk.http_client import (
    check_redirect,
    connection_errors,
    is_valid_url,
    read_body,
    read_events,
    sends_events,
)
from lmbridge.mcp.sdk.http_statuses import ERROR_BODY_LIMIT, quote_body, status_hint, status_reason
from lmbridge.mcp.sdk.session_errors import RefusedError, RequestRejectedError, SessionLostError, describe_error

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_END_SECONDS: Final = 2.0
"""How long a stream that is being closed may take to end, in seconds."""
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class SseStream:
    """The event stream of a server, which is read in a separate task.

    Args:
        spec: The server.
        client: The HTTP client.
        deliver: Called with each event except the one that names the endpoint.
        on_end: Called with the reason when the stream ends after it has been opened. It is not called if `open` raises.
    """

    def __init__(
        self,
        spec: ServerSpec,
        client: Any,
        deliver: Callable[[Event], Awaitable[None]],
        on_end: Callable[[SessionLostError], None],
    ) -> None:
        self._spec, self._client, self._deliver, self._on_end = spec, client, deliver, on_end
        self._endpoint: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        self._is_given_up = False

    async def open(self) -> str:
        """Opens the stream, and returns the URL of the endpoint when the server has named it.

        Raises:
            SessionLostError: The stream cannot be opened, or does not begin with the endpoint.
        """
        self._task = asyncio.create_task(self._read())
        try:
            return await self._endpoint
        except BaseException:
            # The caller gets no endpoint, and has nothing that it could close.
            self._is_given_up = True
            await self.close()
            raise

    async def close(self) -> None:
        """Ends the stream."""
        if self._task is not None:
            await end_task(self._task, grace=_END_SECONDS)

    async def _read(self) -> None:
        end = SessionLostError("it closed its event stream")
        failures: tuple[type[Exception], ...] = (*connection_errors(), MessageTooLargeError, RefusedError)
        try:
            async with self._client.stream("GET", self._spec.url, headers={"accept": "text/event-stream"}) as response:
                await self._check(response)
                async with aclosing(read_events(response)) as events:
                    async for event in events:
                        if event.name == "endpoint" and not self._endpoint.done():
                            self._endpoint.set_result(self._endpoint_url(event.data.decode(errors="replace").strip()))
                        else:
                            await self._deliver(event)
        except SessionLostError as exc:
            end = exc
        except failures as exc:
            end = SessionLostError(describe_error(exc))
        except Exception as exc:
            # Otherwise an unforeseen mistake would make every caller wait forever.
            logger.exception("MCP server %r: reading its event stream failed", self._spec.name)
            end = SessionLostError(describe_error(exc))
        if not self._endpoint.done():
            self._endpoint.set_exception(end)
        elif not self._is_given_up:
            self._on_end(end)

    async def _check(self, response: Any) -> None:
        """Raises `RequestRejectedError` if the server has not opened a stream of events."""
        check_redirect(response)
        if response.status_code >= HTTPStatus.BAD_REQUEST:
            words = self._spec.redact(quote_body(await read_body(response, ERROR_BODY_LIMIT)))
            hint = status_hint(response.status_code, self._spec, response.headers.get("www-authenticate", ""))
            raise RequestRejectedError(status_reason(response.status_code), words, hint)
        if not sends_events(response):
            raise RequestRejectedError(
                "it did not answer with a stream of events, so it does not use the SSE transport",
                hint='use "type": "http" in the configuration if it uses streamable HTTP',
            )

    def _endpoint_url(self, named: str) -> str:
        """Returns the URL of the endpoint; raises `SessionLostError` if it is not valid or at another origin."""
        try:
            url = urljoin(self._spec.url, named)
            is_same_origin = _origin(url) == _origin(self._spec.url)
        except ValueError:
            url, is_same_origin = "", False
        if not is_valid_url(url):
            raise SessionLostError(f"it names an endpoint that is not a valid URL, {named!r}")
        if not is_same_origin:
            raise SessionLostError(f"it names an endpoint at another origin, {url}, which is not used")
        return url


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Returns the scheme, the host and the port of a URL; raises `ValueError` if it is not valid."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)
