"""`SentRequest`: a request to a server and its outcome, shared by the code that sends it and by `MessageExchange`.

Our code calls the SDK, which creates the message, gives it an id, and passes it to `MessageExchange`. The exchange
finds the `SentRequest` of the calling code through a context variable, which the tasks of the SDK inherit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import attrs

ProgressCallback = Callable[[float, float | None, str | None], None]
"""Called with the progress of a call: the amount done, the total if it is known, and a message if there is one."""


@attrs.frozen
class CallListener:
    """Functions that are called with what happens during a call."""

    on_progress: ProgressCallback
    """Called with the progress of the call."""
    on_question: Callable[[bool], None]
    """Called with True when the server asks the user a question, and with False when that is over."""


@attrs.define(eq=False)
class SentRequest:
    """A request to a server, and its outcome."""

    method: str
    """The method of the request."""
    listener: CallListener | None = None
    """Called with what happens during the request."""
    sdk_id: Any = None
    """The id that the SDK gave the request, or None if it has not been sent."""
    result: dict[str, Any] | None = None
    """The result as the protocol specifies it, once it has arrived."""
    failure: Exception | None = None
    """The error that the caller gets, if the server refused the request or did not answer it."""
    meta: Mapping[str, str] = attrs.field(factory=dict)
    """Metadata that is added to the request, such as the context of a trace (SEP-414)."""
    on_sent: Callable[[Any], None] | None = None
    """Called with the id under which the request is sent, each time that it is sent."""

    def note_question(self, *, is_open: bool) -> None:
        """Reports to the listener that a question to the user is open, or no longer is."""
        if self.listener is not None:
            self.listener.on_question(is_open)


_current_request: Final[ContextVar[SentRequest | None]] = ContextVar("current_request", default=None)


@contextmanager
def track_request(method: str, listener: CallListener | None = None) -> Iterator[SentRequest]:
    """Yields a `SentRequest` that stands for the request of this method that the task sends within the block."""
    request = SentRequest(method, listener)
    token = _current_request.set(request)
    try:
        yield request
    finally:
        _current_request.reset(token)


def current_request(method: str) -> SentRequest:
    """Returns what `track_request` yielded for this task and method, or else a new `SentRequest`."""
    request = _current_request.get()
    return SentRequest(method) if request is None or request.method != method else request
