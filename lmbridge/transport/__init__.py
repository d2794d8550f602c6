"""The transport layer: bytes, sockets, time, retries and the schedule.

It knows nothing about messages, tools, or what particular servers write in their replies. Where it has to judge a
reply, it calls the functions that the client layer passes in a `Request`.
"""

from lmbridge.transport.base_transport import BaseTransport
from lmbridge.transport.calls import Call, Reply, Request, TokenUsage
from lmbridge.transport.events import EventStream
from lmbridge.transport.forwarding import ForwardedResponse
from lmbridge.transport.interpreter import Interpreter
from lmbridge.transport.retry import Verdict
from lmbridge.transport.sse import Event, NamedEvent, SSEDecoder
from lmbridge.transport.transport import Transport

__all__ = [
    "BaseTransport",
    "Call",
    "Event",
    "EventStream",
    "ForwardedResponse",
    "Interpreter",
    "NamedEvent",
    "Reply",
    "Request",
    "SSEDecoder",
    "TokenUsage",
    "Transport",
    "Verdict",
]
