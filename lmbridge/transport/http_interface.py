"""The interface between the transport and HTTP: what a `Transport` needs in order to send its requests.

A `Transport` decides when and how often a request is sent, and how long it may take. The sending itself is left to an
`HttpSession`, which knows nothing about models, permits or retries. There are two implementations:
`lmbridge.transport.session` sends requests over a socket, and `lmbridge.testing.MockTransport` calls a function
instead, so that a program can be tested without a server.

The interface is as narrow as streaming allows: send a request, read the body of the response, close. A single method
that returns a complete reply would be narrower, but could not stream. A wider interface, for example with a connection
pool or with parsed events, would be more work for every implementation.

All failures cross the seam as `ConnectionFailed`, so that the transport needs no exception class of an HTTP library.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any, Protocol

import attrs

from lmbridge.errors import LLMError
from lmbridge.transport.retry import Verdict


@attrs.define(eq=False)
class HttpRequest:
    """A request in the form in which a session sends it."""

    method: str
    """The HTTP method in capital letters."""
    url: str
    """The absolute URL."""
    headers: Mapping[str, str] = attrs.field(repr=False)
    """All headers that lmbridge sets, including the key. The session adds those that HTTP requires, such as `Host`."""
    body: bytes | None = attrs.field(default=None, repr=False)
    """The body, or None if the request has no body. It is JSON, which is compressed if a client of the gateway has sent
    it so."""
    connect_timeout: float | None = None
    """The most seconds that connecting may take, or None for no limit. The transport enforces all other time limits."""
    fresh_connection: bool = False
    """Whether the request must be sent on a new connection, because it must not be sent a second time.

    A kept connection may be dead, and this shows only after a request has been sent on it.
    """
    keeps_compression: bool = False
    """Whether the body of the response is handed out as the server sends it, even if it is compressed."""


class HttpResponse(Protocol):
    """A response whose head has been read. Its owner has to read the body to its end, or to close it."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers. Their names are case-insensitive."""
        ...

    def read_some(self) -> Coroutine[Any, Any, bytes]:
        """Waits for the next part of the body, and returns it. Returns `b""` at the end of the body.

        If the connection has broken, what had arrived before is returned first.

        Raises:
            ConnectionFailed: The connection broke, or `close` was called.
        """
        ...

    def take_arrived(self) -> bytes:
        """Returns the part of the body that has arrived and that `read_some` has not returned yet, without waiting.

        It may be called after the connection has broken, but not after `close`, nor while another task is reading.
        """
        ...

    def close(self) -> None:
        """Closes the connection at once, unless the body has ended. A task that is reading gets `ConnectionFailed`."""
        ...


class HttpSession(Protocol):
    """Sends requests to one server, in one event loop."""

    def send(self, request: HttpRequest) -> Coroutine[Any, Any, HttpResponse]:
        """Sends a request once, and returns the response as soon as its head has been read.

        On cancellation of the caller, the connection is closed.

        Raises:
            ConnectionFailed: No response arrived.
            StaleConnection: No response arrived because a kept connection was dead. The request can be sent again.
        """
        ...

    async def close(self) -> None:
        """Closes all connections, so that requests in flight fail. Calling it again does nothing."""
        ...

    def abandon(self) -> None:
        """Closes what can be closed without waiting, and does not warn about the rest.

        A transport calls this method if it was dropped without being closed, or if its event loop has been closed.
        Nothing can be awaited then, and the transport has already issued a warning.
        """


class ConnectionFailed(Exception):  # noqa: N818 - it is caught by the transport and never reaches a user
    """No response arrived, or only a part of it.

    Args:
        error: The error for the user, in case this was the last attempt.
        verdict: Whether a further attempt makes sense.
        unsent: Whether it is certain that the server has not seen any part of the request.
        blames_server: Whether the server may be the cause, so that another server should get the next requests. It is
            False if the request itself is the cause.
    """

    def __init__(
        self, error: LLMError, verdict: Verdict = Verdict.FAIL, *, unsent: bool = False, blames_server: bool = True
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.verdict = verdict
        self.unsent = unsent
        self.blames_server = blames_server


class StaleConnection(ConnectionFailed):
    """A kept connection turned out to be dead before any byte of a response had arrived."""
