"""Reads the responses to requests: as a stream of events, or as a whole reply.

Of a stream, only the beginning is read here. `EventStream` in `lmbridge.transport.events` reads the rest.

`ServerApi.stream` makes an error of a reply that should have been a stream and is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from lmbridge.transport.calls import Call, Reply
from lmbridge.transport.events import EventStream
from lmbridge.transport.http_interface import ConnectionFailed, HttpResponse
from lmbridge.transport.retry import Verdict
from lmbridge.transport.sse import Event, NamedEvent, SSEDecoder, begins_event_stream

LONGEST_PRELUDE: Final = 64 * 1024
"""The most bytes of an event stream that are read before it is handed out, even if its answer has not begun."""
_UNDECIDED_BYTES: Final = 4096
"""The most bytes that are read to find out whether a body is an event stream. Line feeds alone do not decide it."""
_KEPT_BYTES: Final = 1024**2
"""If more bytes than this have been kept of a broken reply, no further part is kept. An error quotes fewer."""


async def receive_stream(call: Call, response: HttpResponse) -> EventStream | Reply:
    """Returns the event stream in a response. If the response is not one, its whole body is read into a `Reply`."""
    if response.status >= 300:
        return await receive_reply(call, response)
    if response.headers.get("Content-Type", "").lower().startswith("text/event-stream"):
        return EventStream(call, response)
    # The body may still be an event stream that has the wrong Content-Type, or it is something else, such as an error
    # with status 200. The first bytes decide.
    first = b""
    try:
        while (is_stream := begins_event_stream(first)) is None and len(first) < _UNDECIDED_BYTES:
            if not (more := await response.read_some()):
                break
            first += more
    except BaseException:
        note_arrived(call, response, [first])
        raise
    return EventStream(call, response, first) if is_stream else await receive_reply(call, response, first)


async def receive_begun_stream(call: Call, response: HttpResponse) -> EventStream | Reply:
    """Does what `receive_stream` does, but waits for the first event. Until then, another server can get the request.

    Some servers send the head of a response before they have looked at the request. If the first event reports an error
    that concerns only this server, it is returned as a `Reply`. The wait ends after 64 KiB, even without an event.
    """
    if response.status >= 300 or not response.headers.get("Content-Type", "").lower().startswith("text/event-stream"):
        return await receive_stream(call, response)
    decoder = SSEDecoder()
    parts: list[bytes] = []
    size = 0
    events: list[Event] = []
    try:
        while not events and size < LONGEST_PRELUDE and (part := await response.read_some()):
            parts.append(part)
            size += len(part)
            events = decoder.feed(part)
    except ConnectionFailed as failure:
        # Nothing of the answer has arrived, so this is the same as a connection that breaks before the response.
        failure.verdict = Verdict.RETRY
        raise
    if events and (data := error_of_server(call, events[0])) is not None:
        response.close()
        return Reply(call=call, status=response.status, headers=response.headers, body=data)
    return EventStream(call, response, b"".join(parts))


def error_of_server(call: Call, event: Event) -> bytes | None:
    """Returns the data of an event if it reports an error that another server may not have, and None otherwise."""
    data = event.data if isinstance(event, NamedEvent) else event
    interpreter = call.request.interpreter
    return data if interpreter.is_error(data) and interpreter.concerns_server(200, data) else None


def note_arrived(call: Call, response: HttpResponse, parts: Iterable[bytes]) -> None:
    """Keeps the beginning of a reply that has broken off, for the error.

    Call it for any exception, because a time limit ends the read with a cancellation.
    """
    body = b""
    for part in parts:
        if len(body) > _KEPT_BYTES:
            break
        body += part
    call.arrived = Reply(call, response.status, response.headers, body)


async def receive_reply(call: Call, response: HttpResponse, first: bytes = b"") -> Reply:
    """Reads a body to its end. `first` is the part of it that has been read already.

    If that fails, `Call.arrived` holds the part that had arrived.

    Raises:
        LLMResponseError: The body has more bytes than a reply to this call may have.
        ConnectionFailed: The connection broke.
    """
    parts, size = [first], len(first)
    try:
        while part := await response.read_some():
            parts.append(part)
            size += len(part)
            if size > call.max_bytes:
                raise call.too_large(response.status)
    except BaseException:
        note_arrived(call, response, parts)
        raise
    return Reply(call, response.status, response.headers, b"".join(parts))
