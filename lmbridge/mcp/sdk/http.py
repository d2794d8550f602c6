"""`HttpConnection`: exchanges messages with a server on HTTP, over streamable HTTP or the older SSE transport.

The SDK implements both transports, but lmbridge does not use them, for three reasons. First, the two major versions of
the SDK differ in how they treat a refusal, a session that the server has forgotten, and a response that ends without
the reply; in some of these cases they wait forever, or go on using a dead session. Second, they replace what the server
said with their own text. Third, they reject an answer with a wrong id, although the HTTP response in which it arrives
shows which request it belongs to.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import attrs
import msgspec

from lmbridge._jsonrpc_ids import is_answer, read_id
from lmbridge._tasks import end_task
from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.jsonrpc import BACKLOG_LIMIT, LARGEST_MESSAGE, MessageTooLargeError, parse_json
from lmbridge.mcp.sdk.event_stream import Event
from lmbridge.mcp.sdk.forgotten_sessions import (
    SESSION_STATUSES,
    error_words,
    is_suspicious,
    names_unknown_session,
    shows_forgotten,
)
from lmbridge.mcp.sdk.http_auth import FetchHeaders
from lmbridge.mcp.sdk.http_client import (
    check_redirect,
    connection_errors,
    make_http_client,
    read_body,
    read_events,
    sends_events,
    unsent_errors,
)
from lmbridge.mcp.sdk.http_statuses import ERROR_BODY_LIMIT, find_error, quote_body, status_hint, status_reason
from lmbridge.mcp.sdk.http_streams import EventStreams, StreamPosition
from lmbridge.mcp.sdk.message_filter import REMEMBERED_REQUESTS, new_request_id
from lmbridge.mcp.sdk.package import FIRST_STATELESS_PROTOCOL
from lmbridge.mcp.sdk.session_errors import (
    RefusedError,
    RequestLostError,
    RequestRejectedError,
    SessionForgottenError,
    SessionLostError,
    describe_error,
)
from lmbridge.mcp.sdk.sse_transport import SseStream
from lmbridge.mcp.sdk.streams import FailedRequest

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_REPLY_AFTER_END_SECONDS: Final = 1.0
"""How long a call may still wait for its reply after the HTTP response has ended, in seconds. Some servers send it in
another stream."""
_CLOSE_SECONDS: Final = 2.0
"""How long the server may take to confirm the end of the session, in seconds."""
_PING_SECONDS: Final = 5.0
"""How long the server may take to show that it knows the session, in seconds."""
_ENDPOINT_SECONDS: Final = 10.0
"""How long a server may take to name its endpoint, when the older transport is tried, in seconds."""
_QUOTED_BYTES: Final = 200
"""How much of a body that is not a message is reported, in bytes."""
_HEADER_VALUE: Final = re.compile("[!-~]{1,100}")
"""A protocol revision that can be sent as a header."""
_OPENING_METHODS: Final = ("initialize", "server/discover")
"""The requests that open a session."""
_NOT_SSE_STATUSES: Final = (
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.PROXY_AUTHENTICATION_REQUIRED,
    HTTPStatus.TOO_MANY_REQUESTS,
)
"""The client errors after which the SSE transport is not tried, because an SSE server would answer the same."""
_NO_EVENT_ID: Final = 'it ended its answer with "retry:" but gave no event id, so the rest cannot be asked for'
_REPLY_CUT_OFF: Final = "its answer broke off"
_MAY_HAVE_RUN: Final = ", and the tool may have run"
_FORGOTTEN: Final = "the server no longer knows the session"
_ACCEPTS_ALL: Final = {"accept": "application/json, text/event-stream", "content-type": "application/json"}


@attrs.define(eq=False)
class _PendingReply:
    """What has arrived in the responses to a request."""

    request: dict[str, Any]
    """The request."""
    is_answered: bool = False
    """Whether the answer has been delivered."""
    misaddressed: dict[str, Any] | None = None
    """An answer with an id that no request has, or None. It is used if no answer with the right id arrives."""
    position: StreamPosition = attrs.field(factory=StreamPosition)
    """Where the stream of events is resumed if it ends before the answer."""


@asynccontextmanager
async def open_http_connection(
    spec: ServerSpec,
    report: Callable[[str, str], None],
    on_lost: Callable[[str], None],
    fetch_headers: FetchHeaders | None = None,
) -> AsyncIterator[HttpConnection]:
    """Opens a connection to a server on HTTP, and closes it at the end of the block.

    Args:
        spec: The server.
        report: Called with the kind and the description of something that the protocol does not allow.
        on_lost: Called with the reason when the stream of the older SSE transport ends.
        fetch_headers: Returns the current values of headers that change over time; None if the server has none.
    """
    # The client is created in a thread, because that reads certificates from the disk.
    client = await asyncio.to_thread(make_http_client, spec, fetch_headers)
    async with client:
        connection = HttpConnection(spec, client, report, on_lost)
        try:
            if spec.transport == "sse":
                await connection.open_sse()
            yield connection
        finally:
            await connection.close()


class HttpConnection:
    """A `ClientConnection` to a server on HTTP.

    Args:
        spec: The server.
        client: The HTTP client, which the caller closes.
        report: Called with the kind and the description of something that the protocol does not allow.
        on_lost: Called with the reason when the stream of the older SSE transport ends.
    """

    def __init__(
        self, spec: ServerSpec, client: Any, report: Callable[[str, str], None], on_lost: Callable[[str], None]
    ) -> None:
        self._spec, self._client, self._report, self._on_lost = spec, client, report, on_lost
        self._connection_errors = connection_errors()
        self._arrived: asyncio.Queue[Any] = asyncio.Queue(BACKLOG_LIMIT)
        self._tasks: set[asyncio.Task[None]] = set()
        self._requests: dict[Any, asyncio.Task[None]] = {}
        self._finished: deque[Any] = deque(maxlen=REMEMBERED_REQUESTS)
        self._modern_requests: set[Any] = set()
        self._session_id = self._protocol = ""
        self._sse_endpoint = ""
        self._sse_stream: SseStream | None = None
        self._listening: asyncio.Task[None] | None = None
        self._streams = EventStreams(spec, client, self._headers, report)
        self.end: SessionLostError | None = None
        """Why the connection can no longer be used, or None."""

    async def receive(self) -> Any:
        """Returns the next message or `FailedRequest`, or None once the connection has ended."""
        if self.end is not None and self._arrived.empty():
            return None
        return await self._arrived.get()

    async def send(self, message: dict[str, Any], headers: Mapping[str, str]) -> None:
        """Sends a message. It returns before a request is answered, and raises nothing.

        Args:
            message: The message.
            headers: The HTTP headers that the protocol requires for this message.
        """
        method = message.get("method")
        if method is not None and "id" in message:
            if headers.get("mcp-protocol-version", "") >= FIRST_STATELESS_PROTOCOL:
                self._modern_requests.add(message["id"])
            task = self._start(self._post_request(message, headers))
            self._requests[message["id"]] = task
            # A callback notes the end of the task, because the coroutine never runs if the task is cancelled before its
            # first step.
            task.add_done_callback(partial(self._on_request_over, message["id"]))
        elif method == "notifications/cancelled":
            await self._cancel(message, headers)
        else:
            await self._post_notification(message, headers)
            if method == "notifications/initialized" and self._session_id and not self._sse_endpoint:
                self._listening = self._start(self._streams.listen(self._deliver_event))

    async def close(self) -> None:
        """Ends the session and all requests."""
        try:
            if self._sse_stream is not None:
                await self._sse_stream.close()
        finally:
            if self._tasks:
                # Cancelling the future that gathers them cancels all of them at once.
                await end_task(asyncio.gather(*self._tasks, return_exceptions=True), grace=_CLOSE_SECONDS)
        if self._session_id and self.end is None:
            with suppress(SessionLostError, *self._connection_errors):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._client.delete(self._spec.url, headers=self._headers(_ACCEPTS_ALL, {}))

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _headers(self, accepts: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
        headers = {**accepts, **extra}
        if self._session_id:
            headers["mcp-session-id"] = self._session_id
        # The SDK may have been given another revision than the server named; see `normalize_handshake`.
        if self._protocol:
            headers["mcp-protocol-version"] = self._protocol
        return headers

    def _lose(self, end: SessionLostError) -> None:
        """Ends the connection: `receive` returns None once the messages that have arrived are handled."""
        if self.end is None:
            self.end = end
            # If the queue is full, None need not be added: `receive` looks at `end` once the queue is empty.
            with suppress(asyncio.QueueFull):
                self._arrived.put_nowait(None)

    async def _fail(self, request_id: Any, failure: Exception) -> None:
        await self._arrived.put(FailedRequest(request_id, failure))

    # Requests and notifications.

    @asynccontextmanager
    async def _post(self, message: Mapping[str, Any], headers: Mapping[str, str]) -> AsyncIterator[Any]:
        """Posts a message and yields the response, whose body has not been read."""
        url = self._sse_endpoint or self._spec.url
        body = msgspec.json.encode(message)
        sent = self._headers(_ACCEPTS_ALL, headers)
        if message.get("method") in _OPENING_METHODS:
            sent.pop("mcp-session-id", None)
        async with self._client.stream("POST", url, content=body, headers=sent) as response:
            check_redirect(response)
            yield response

    async def _post_request(self, message: dict[str, Any], headers: Mapping[str, str]) -> None:
        request_id = message["id"]
        try:
            async with self._post(message, headers) as response:
                await self._handle_response(message, headers, response)
        except RequestRejectedError as exc:
            await self._fail(request_id, exc)
            if not isinstance(exc, SessionForgottenError):
                self._lose(exc)
        except MessageTooLargeError as exc:
            await self._fail(request_id, RefusedError(f"{exc}{_after_call(message)}"))
        except (RefusedError, SessionLostError) as exc:
            await self._fail(request_id, exc)
        except self._connection_errors as exc:
            await self._on_broken_connection(message, exc)
        except Exception as exc:
            # Otherwise an unforeseen mistake would make the caller wait forever.
            logger.exception("MCP server %r: reading an answer failed", self._spec.name)
            await self._fail(request_id, RefusedError(f"{describe_error(exc)}{_after_call(message)}"))

    def _on_request_over(self, request_id: Any, _task: asyncio.Task[None]) -> None:
        self._requests.pop(request_id, None)
        self._finished.append(request_id)
        self._modern_requests.discard(request_id)

    async def _on_broken_connection(self, message: dict[str, Any], error: Exception) -> None:
        """Fails a request whose connection broke. Requests on other connections go on."""
        reason = describe_error(error)
        if message["method"] in _OPENING_METHODS:
            # Otherwise the SDK would try to open the session in another way.
            self._lose(SessionLostError(reason))
        elif isinstance(error, unsent_errors()):
            await self._fail(message["id"], SessionForgottenError(f"it cannot be reached: {reason}"))
        else:
            await self._fail(message["id"], RequestLostError(reason))

    async def _post_notification(self, message: dict[str, Any], headers: Mapping[str, str]) -> None:
        """Posts a notification or a reply. A failure is only reported, because no caller waits for the outcome."""
        kind = "a refusal of a notification or reply"
        try:
            async with self._post(message, headers) as response:
                if response.status_code >= HTTPStatus.BAD_REQUEST:
                    self._report(kind, str(response.status_code))
        except SessionLostError as exc:
            self._report(kind, str(exc))
        # An HTTP client raises errors of several unrelated classes for a URL or a header that cannot be sent.
        except Exception as exc:  # noqa: BLE001 - the SDK would end the session
            self._report("no response to a notification or reply", describe_error(exc))

    async def _cancel(self, message: dict[str, Any], headers: Mapping[str, str]) -> None:
        """Cancels a request at the server, and stops waiting for its response."""
        request_id = message["params"]["requestId"]
        is_modern = request_id in self._modern_requests
        task = self._requests.get(request_id)
        try:
            if not is_modern:
                await self._post_notification(message, headers)
        finally:
            if task is not None:
                task.cancel()

    # Responses.

    async def _handle_response(self, message: dict[str, Any], headers: Mapping[str, str], response: Any) -> None:
        request_id, method = message["id"], message["method"]
        if response.status_code >= HTTPStatus.BAD_REQUEST:
            await self._handle_refusal(message, headers, response)
            return
        if self._sse_endpoint:
            return
        if method == "initialize":
            self._session_id = response.headers.get("mcp-session-id") or ""
        reply = _PendingReply(message)
        if sends_events(response):
            await self._read_reply_stream(response, reply)
        else:
            await self._read_reply_body(response, reply)
        if not reply.is_answered:
            await asyncio.sleep(_REPLY_AFTER_END_SECONDS if self._streams.is_listening else 0)
            is_unnamed = reply.position.last_id is None and reply.position.retry is not None
            reason = _NO_EVENT_ID if is_unnamed else _REPLY_CUT_OFF
            await self._fail(request_id, RefusedError(f"{reason}{_after_call(message)}"))

    async def _read_reply_body(self, response: Any, reply: _PendingReply) -> None:
        body = await read_body(response, LARGEST_MESSAGE)
        if not body.strip():
            return
        values = parse_json(body)
        if len(values) != 1 or not isinstance(values[0], dict):
            self._report("a response whose body is not one message", body[:_QUOTED_BYTES].decode(errors="replace"))
        if any(isinstance(value, dict) for value in values):
            await self._deliver_all(values, reply)
            await self._accept_misaddressed(reply)
            return
        words = quote_body(body[:ERROR_BODY_LIMIT])
        kind = response.headers.get("content-type", "").partition(";")[0].lower()
        raise RefusedError(
            f"it answered with {kind or 'something'} that is not a JSON-RPC message"
            + (f": {words}" if words else "")
            + "; check the path of its URL"
        )

    async def _read_reply_stream(self, response: Any, reply: _PendingReply) -> None:
        """Reads a stream of events until the reply has arrived, or the stream has ended and is not opened again."""
        try:
            await self._read_events(response, reply)
        except self._connection_errors as exc:
            self._streams.log_broken_stream(exc)
        await self._accept_misaddressed(reply)
        await self._streams.resume(
            reply.position, lambda resumed: self._read_events(resumed, reply), lambda: reply.is_answered
        )

    async def _read_events(self, response: Any, reply: _PendingReply) -> None:
        """Delivers the messages of a stream of events until the reply to a request has arrived."""
        async with aclosing(read_events(response)) as events:
            async for event in events:
                reply.position.update(event)
                await self._deliver_all(self._read_event(event), reply)
                if reply.is_answered:
                    return

    def _read_event(self, event: Event) -> list[Any]:
        """Returns the messages in an event."""
        if event.name != "message" or not event.data:
            return []
        if not (values := parse_json(event.data)):
            self._report("an event that is not a message", event.data[:_QUOTED_BYTES].decode(errors="replace"))
        return values

    async def _deliver_all(self, values: list[Any], reply: _PendingReply) -> None:
        """Delivers the messages that arrived in the response to a request, except answers to other requests."""
        for value in values:
            if not isinstance(value, dict) or not is_answer(value):
                await self._deliver(value)
                continue
            answered_id = read_id(value.get("id"))
            if answered_id == read_id(reply.request["id"]):
                if not reply.is_answered:
                    await self._deliver_answer(value, reply)
            elif answered_id in self._requests:
                self._report("an answer to another request than the one that was posted", str(answered_id))
            elif answered_id not in self._finished and reply.misaddressed is None:
                reply.misaddressed = value

    async def _deliver_answer(self, answer: dict[str, Any], reply: _PendingReply) -> None:
        request, is_opening = reply.request, reply.request["method"] == "initialize"
        if self._means_unknown_session(answer, request) and await self._has_forgotten_session():
            raise SessionForgottenError(_FORGOTTEN, self._spec.redact(error_words(answer["error"])))
        reply.is_answered = True
        if is_opening and isinstance(result := answer.get("result"), dict):
            named = str(result.get("protocolVersion") or "")
            self._protocol = named if _HEADER_VALUE.fullmatch(named) else ""
        await self._arrived.put(answer)

    async def _accept_misaddressed(self, reply: _PendingReply) -> None:
        """Takes an answer with an unknown id as the answer to the request, if its response contained no other."""
        if not reply.is_answered and reply.misaddressed is not None:
            self._report("an answer with a wrong id", str(reply.misaddressed.get("id")))
            await self._deliver_answer({**reply.misaddressed, "id": reply.request["id"]}, reply)

    # Refusals, and sessions that the server has forgotten.

    async def _handle_refusal(self, message: dict[str, Any], headers: Mapping[str, str], response: Any) -> None:
        status = response.status_code
        try:
            body = await read_body(response, ERROR_BODY_LIMIT)
        except MessageTooLargeError:
            body = b""
        found = find_error(body)
        can_be_sse = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
        can_be_sse = can_be_sse and status not in _NOT_SSE_STATUSES and not self._sse_endpoint
        if message["method"] == "initialize" and can_be_sse and await self._try_sse():
            await self._post_request(message, headers)
            return
        if self._is_in_session(message):
            if status == HTTPStatus.NOT_FOUND and found is None:
                raise SessionForgottenError(_FORGOTTEN, self._spec.redact(quote_body(body)))
            if is_suspicious(found, message["id"], status) and await self._has_forgotten_session():
                raise SessionForgottenError(_FORGOTTEN, self._spec.redact(quote_body(body)))
        if found is not None and status not in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            await self._arrived.put({"jsonrpc": "2.0", "id": message["id"], "error": found[1]})
            return
        words = self._spec.redact(quote_body(body))
        reason = status_reason(status)
        hint = status_hint(status, self._spec, response.headers.get("www-authenticate", ""))
        if status == HTTPStatus.UNAUTHORIZED or message["method"] in _OPENING_METHODS:
            if message["method"] == "server/discover":
                # The SDK then tries the handshake of the older revisions.
                raise RefusedError(reason)
            raise RequestRejectedError(reason, words, hint)
        parts = [f"{reason}: {words}" if words else reason, hint]
        raise RefusedError("; ".join(filter(None, parts)))

    def _is_in_session(self, message: Mapping[str, Any]) -> bool:
        return bool(self._session_id) and message["method"] not in _OPENING_METHODS

    def _means_unknown_session(self, answer: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
        """Returns whether an answer to a request within a session says that the server does not know the session."""
        error = answer.get("error")
        is_in_session = self._is_in_session(request) and request["method"] != "ping"
        return is_in_session and error is not None and names_unknown_session(error)

    async def _has_forgotten_session(self) -> bool:
        """Returns whether the server refuses a ping because it does not know the session.

        Any other outcome, such as a refusal because the server is busy, counts as False: the request before the ping
        may have run.
        """
        ping_id = new_request_id()
        ping = {"jsonrpc": "2.0", "id": ping_id, "method": "ping"}
        with suppress(MessageTooLargeError, SessionLostError, *self._connection_errors):
            async with asyncio.timeout(_PING_SECONDS), self._post(ping, {}) as response:
                is_refused: bool = response.status_code >= HTTPStatus.BAD_REQUEST
                if is_refused and response.status_code not in SESSION_STATUSES:
                    return False
                if sends_events(response):
                    async with aclosing(read_events(response)) as events:
                        async for event in events:
                            if (forgotten := shows_forgotten(parse_json(event.data), ping_id)) is not None:
                                return forgotten
                    return is_refused
                forgotten = shows_forgotten(parse_json(await read_body(response, ERROR_BODY_LIMIT)), ping_id)
                return is_refused if forgotten is None else forgotten
        return False

    # Messages that the server sends on its own initiative.

    async def _deliver_event(self, event: Event) -> None:
        for value in self._read_event(event):
            await self._deliver(value)

    async def _deliver(self, value: Any) -> None:
        if isinstance(value, dict):
            await self._arrived.put(value)
        else:
            self._report("a message that is not an object", str(value))

    # The older SSE transport.

    async def open_sse(self) -> None:
        """Opens the stream of the older SSE transport, and waits until the server has named its endpoint.

        Raises:
            SessionLostError: The stream cannot be opened, or does not begin with the endpoint.
        """
        self._sse_stream = SseStream(self._spec, self._client, self._deliver_event, self._on_sse_end)
        self._sse_endpoint = await self._sse_stream.open()

    def _on_sse_end(self, end: SessionLostError) -> None:
        self._lose(end)
        self._on_lost(str(end))

    async def _try_sse(self) -> bool:
        """Opens the older SSE transport at the URL, and returns whether the server uses it."""
        try:
            async with asyncio.timeout(_ENDPOINT_SECONDS):
                await self.open_sse()
        except (TimeoutError, SessionLostError) as exc:
            logger.debug("MCP server %r does not use the SSE transport either: %s", self._spec.name, exc)
            return False
        logger.info("MCP server %r uses the older SSE transport", self._spec.name)
        return True


def _after_call(request: Mapping[str, Any]) -> str:
    """Returns the end of an error text: that the tool may have run if the request was a call, otherwise nothing."""
    return _MAY_HAVE_RUN if request["method"] == "tools/call" else ""
