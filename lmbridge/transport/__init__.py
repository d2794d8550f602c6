"""The transport layer: bytes, sockets, time, retries and the schedule.

It knows nothing about messages, tools, or the texts of particular servers. What it has to know about a reply, it is
given by the client layer in a `Request`.
"""

from lmbridge.transport.calls import Call, Reply, Request, TokenUsage
from lmbridge.transport.events import EventStream
from lmbridge.transport.retry import Verdict
from lmbridge.transport.sse import Event, NamedEvent, SSEDecoder
from lmbridge.transport.transport import Transport

__all__ = [
    "Call",
    "Event",
    "EventStream",
    "NamedEvent",
    "Reply",
    "Request",
    "SSEDecoder",
    "TokenUsage",
    "Transport",
    "Verdict",
]
