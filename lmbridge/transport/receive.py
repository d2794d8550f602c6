"""Reads the responses to requests: as a stream of events, or as a whole reply."""

from __future__ import annotations

from typing import Final

from lmbridge.transport.calls import Call, Reply
from lmbridge.transport.events import EventStream
from lmbridge.transport.http import HttpResponse
from lmbridge.transport.sse import begins_event_stream

_UNDECIDED_BYTES: Final = 4096
"""The most bytes of a body, such as line feeds, that may leave it open whether it is an event stream."""


async def receive_stream(call: Call, response: HttpResponse) -> EventStream | Reply:
    """Returns the event stream in a response. If the response is not one, its whole body is read into a `Reply`."""
    if response.status >= 300:
        return await receive_reply(call, response)
    if response.headers.get("Content-Type", "").lower().startswith("text/event-stream"):
        return EventStream(call, response)
    # The body may still be an event stream that has the wrong Content-Type, or it is something else, such as an error
    # with status 200. The first bytes decide.
    first = b""
    while (is_stream := begins_event_stream(first)) is None and len(first) < _UNDECIDED_BYTES:
        if not (more := await response.read_some()):
            break
        first += more
    return EventStream(call, response, first) if is_stream else await receive_reply(call, response, first)


async def receive_reply(call: Call, response: HttpResponse, first: bytes = b"") -> Reply:
    """Reads a body to its end. `first` is the part of it that has been read already.

    Raises:
        LLMResponseError: It has more bytes than a reply to this call may have.
    """
    parts, size = [first], len(first)
    while part := await response.read_some():
        parts.append(part)
        size += len(part)
        if size > call.max_bytes:
            raise call.too_large(response.status)
    return Reply(call=call, status=response.status, headers=response.headers, body=b"".join(parts))
