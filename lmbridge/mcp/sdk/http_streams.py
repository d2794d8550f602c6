"""`EventStreams`: the streams of events that a client on HTTP opens with GET.

There are two kinds. A stream of the first kind carries messages that belong to no request. A stream of the second kind
continues the response to a request: the server may end such a response early, after it has announced with `retry:` or
an event id when and from where the client should continue.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from http import HTTPStatus
from typing import Any, Final

import attrs

from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.jsonrpc import MessageTooLargeError
from lmbridge.mcp.sdk.event_stream import Event
from lmbridge.mcp.sdk.http_client import connection_errors, pause_before_retry, read_events, sends_events
from lmbridge.mcp.sdk.http_statuses import status_reason
from lmbridge.mcp.sdk.session_errors import RefusedError, SessionLostError, describe_error

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_MOST_FAILED_OPENINGS: Final = 3
"""How many attempts to open a stream again may fail in succession."""
_UNNAMED_STREAM_SECONDS: Final = 5.0
"""How long a stream that is opened again without an event id may take to deliver the answer, in seconds."""
_ACCEPTS_EVENTS: Final = {"accept": "text/event-stream"}


@attrs.define(eq=False)
class StreamPosition:
    """The position in the events of a server from which a stream is resumed."""

    last_id: str | None = None
    """The id of the last event, or None if the server has not given any."""
    retry: int | None = None
    """The time before the next attempt in milliseconds, or None if the server has not named it."""

    @property
    def is_given(self) -> bool:
        """Whether the server has said that the stream can be opened again."""
        return self.last_id is not None or self.retry is not None

    def update(self, event: Event) -> None:
        """Remembers the id and the retry time of an event."""
        self.last_id = event.id or self.last_id
        self.retry = self.retry if event.retry is None else event.retry


class EventStreams:
    """Opens streams of events, and opens them again after they have ended or broken.

    Args:
        spec: The server.
        client: The HTTP client, which the caller closes.
        headers: Returns all headers of a request, given its `accept` header and further ones.
        report: Called with the kind and the description of something that the protocol does not allow.
    """

    def __init__(
        self,
        spec: ServerSpec,
        client: Any,
        headers: Callable[[Mapping[str, str], Mapping[str, str]], dict[str, str]],
        report: Callable[[str, str], None],
    ) -> None:
        self._spec, self._client, self._headers, self._report = spec, client, headers, report
        self._connection_errors = connection_errors()
        self.is_listening: bool = False
        """Whether the stream of messages that belong to no request is open."""

    async def listen(self, deliver: Callable[[Event], Awaitable[None]]) -> None:
        """Receives messages that belong to no request, until the server refuses the stream or several attempts fail.

        Args:
            deliver: Called with each event.
        """
        position = StreamPosition()
        failures = empty_streams = 0
        while failures < _MOST_FAILED_OPENINGS:
            empty_streams += 1
            try:
                async with self._open(position.last_id) as response:
                    self.is_listening, failures = True, 0
                    async with aclosing(read_events(response)) as events:
                        async for event in events:
                            position.update(event)
                            empty_streams = 0 if event.data else empty_streams
                            await deliver(event)
            except (RefusedError, SessionLostError):
                return
            except MessageTooLargeError as exc:
                self._report("a message that is too large", str(exc))
                failures += 1
            except self._connection_errors:
                failures += 1
            finally:
                self.is_listening = False
            await pause_before_retry(position.retry, empty_streams)

    async def resume(
        self, position: StreamPosition, read: Callable[[Any], Awaitable[None]], is_answered: Callable[[], bool]
    ) -> None:
        """Opens the stream of a request again and again, until the answer has arrived or the attempts have failed.

        Args:
            position: Where the stream is resumed; `read` updates it. If the server has given neither an id nor a retry
                time, nothing happens.
            read: Reads a response that has just been opened.
            is_answered: Returns whether the answer has arrived.
        """
        broken: tuple[type[Exception], ...] = (RefusedError, SessionLostError, *self._connection_errors)
        failures = 0
        while failures < _MOST_FAILED_OPENINGS and not is_answered() and position.is_given:
            await pause_before_retry(position.retry)
            # Without an id, the server may open a different stream, and that stream may stay open for ever.
            is_unnamed = position.last_id is None
            try:
                async with (
                    asyncio.timeout(_UNNAMED_STREAM_SECONDS if is_unnamed else None),
                    self._open(position.last_id) as resumed,
                ):
                    await read(resumed)
                failures = failures + 1 if is_unnamed else 0
            except TimeoutError:
                return
            except broken as exc:
                self.log_broken_stream(exc)
                failures += 1

    def log_broken_stream(self, error: Exception) -> None:
        """Logs that a stream broke, at level DEBUG because the stream may be opened again."""
        reason = self._spec.redact(describe_error(error))
        logger.debug("MCP server %r: a stream of events broke: %s", self._spec.name, reason)

    @asynccontextmanager
    async def _open(self, last_id: str | None) -> AsyncIterator[Any]:
        """Opens a stream of events, at its beginning or after an event.

        Raises:
            RefusedError: The server does not offer the stream.
        """
        extra = {} if last_id is None else {"last-event-id": last_id}
        headers = self._headers(_ACCEPTS_EVENTS, extra)
        async with self._client.stream("GET", self._spec.url, headers=headers) as response:
            if response.status_code != HTTPStatus.OK or not sends_events(response):
                raise RefusedError(status_reason(response.status_code))
            yield response
