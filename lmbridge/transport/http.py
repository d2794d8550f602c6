"""The seam between the transport and HTTP: what a `Transport` needs from whatever sends its requests.

`Transport` decides when a request is sent, how often, and how long it may take. It does not send anything itself: it
asks an `HttpSession`, which knows nothing of models, permits or retries. There are two of them.
`lmbridge.transport.session` sends requests over a socket; `lmbridge.testing.MockTransport` calls a function instead, so
that a program can be tested without a server.

The seam is as narrow as it can be while streams still pass through it: send a request, read its body, close. A single
method that returns a whole reply would be narrower, but nothing could be streamed through it. A wider one, with a
connection pool or with events, would have to be imitated by every double.

All failures cross the seam as `ConnectionFailed`, so that the transport needs no exception class of an HTTP library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import attrs

from lmbridge.errors import LLMError
from lmbridge.transport.retry import Verdict


@attrs.define(kw_only=True, eq=False)
class HttpRequest:
    """A request in the form in which it goes out."""

    method: str
    """The HTTP method in capital letters."""
    url: str
    """The absolute URL."""
    headers: Mapping[str, str] = attrs.field(repr=False)
    """All headers that lmbridge sends, the key included. The session adds what HTTP itself needs, such as `Host`."""
    body: bytes | None = attrs.field(default=None, repr=False)
    """The body, which is JSON, or None for a request without a body."""
    connect_timeout: float | None = None
    """The seconds that connecting may take; None for no limit. All other limits belong to the transport."""
    fresh_connection: bool = False
    """Whether a kept connection must not be used, because the request must not be sent a second time.

    A kept connection may be dead, and only sending a request on it shows that it is.
    """


class HttpResponse(Protocol):
    """A response whose head has been read. Its owner has to read the body to its end, or to close it."""

    @property
    def status(self) -> int:
        """The status code."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers. Names are looked up in any case."""
        ...

    async def read_some(self) -> bytes:
        """Waits until a part of the body has arrived, and returns it; returns nothing at the end of the body.

        Raises:
            ConnectionFailed: The connection broke, or `close` was called.
        """
        ...

    async def read(self) -> bytes:
        """Waits for the end of the body, and returns everything that has not been returned by `read_some`.

        Raises:
            ConnectionFailed: The connection broke, or `close` was called.
        """
        ...

    def close(self) -> None:
        """Closes the connection at once, unless the body has ended. A task that is reading gets `ConnectionFailed`."""
        ...


class HttpSession(Protocol):
    """Sends requests to one server, in one event loop."""

    async def send(self, request: HttpRequest) -> HttpResponse:
        """Sends a request once, and returns the response as soon as its head has been read.

        On cancellation of the caller, the connection is closed.

        Raises:
            ConnectionFailed: No response arrived.
            StaleConnection: No response arrived because a kept connection was dead. The request can be sent again.
        """
        ...

    async def close(self) -> None:
        """Closes all connections. Requests that are waiting for a response fail. Calling it again does nothing."""
        ...

    def abandon(self) -> None:
        """Closes what can be closed without waiting, and says nothing about the rest.

        The transport calls it if it was dropped without being closed, or if its event loop is gone: then nothing can be
        awaited any more, and the transport has warned already.
        """


class ConnectionFailed(Exception):  # noqa: N818 - it is caught by the transport and never reaches a user
    """An attempt that did not get a response, or not all of it.

    Args:
        error: The error for the user, in case this was the last attempt.
        verdict: Whether a further attempt makes sense.
        unsent: Whether the server has certainly not seen any part of the request.
    """

    def __init__(self, error: LLMError, verdict: Verdict = Verdict.FAIL, *, unsent: bool = False) -> None:
        super().__init__(error.message)
        self.error = error
        self.verdict = verdict
        self.unsent = unsent


class StaleConnection(ConnectionFailed):
    """A kept connection turned out to be dead before any byte of a response had arrived."""
