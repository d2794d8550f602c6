"""The transport layer: bytes, sockets, time and retries. It knows no message, no tool and no server's text."""

from lmbridge.transport.calls import Reply, Request
from lmbridge.transport.events import EventStream
from lmbridge.transport.http import Transport
from lmbridge.transport.retry import Verdict
from lmbridge.transport.sse import Event, NamedEvent, SSEDecoder

__all__ = [
    "Event",
    "EventStream",
    "NamedEvent",
    "Reply",
    "Request",
    "SSEDecoder",
    "Transport",
    "Verdict",
]
