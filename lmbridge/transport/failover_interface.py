"""How a request leaves a server for another one: the seam between a `Transport` and the `NodePool` above it.

The transport of a server repeats a failed request by itself, and holds the permit in the meantime. If there are other
servers, the pool may want the request back. So the pool passes a `Failover` with the request, and the transport reports
each failed attempt to it. If the `Failover` raises `MovedToAnotherServer`, the transport gives the request up. A
transport whose requests have no `Failover` works as if there were no other server.

The alternative was a pool that allows each transport a single attempt, and repeats requests itself. Such a pool would
have to duplicate what the transport knows about retries, and would return the permit at a server that is still loading
the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lmbridge.transport.calls import Call, Reply
    from lmbridge.transport.events import EventStream
    from lmbridge.transport.forwarding import ForwardedResponse
    from lmbridge.transport.http_interface import ConnectionFailed


class Failover(Protocol):
    """Decides whether a request is given to another server after an attempt at one server has failed."""

    @property
    def attempts(self) -> int:
        """How often the request was sent to other servers before."""
        ...

    @property
    def retries(self) -> int:
        """How many of these attempts count as retries."""
        ...

    @property
    def seconds(self) -> float:
        """The seconds that the request has spent at other servers, without the time in their queues."""
        ...

    @property
    def tried(self) -> Sequence[str]:
        """The servers that have failed so far, each with the reason."""
        ...

    def on_admission(self, call: Call) -> None:
        """Called when the request has its permit, before it is sent.

        Raises:
            MovedToAnotherServer: The server has failed while the request was waiting for the permit.
        """
        ...

    def on_failure(self, call: Call, failure: ConnectionFailed, reason: str) -> None:
        """Called when an attempt got no reply.

        Args:
            call: The call.
            failure: What went wrong.
            reason: What went wrong, in words and without secrets.

        Raises:
            MovedToAnotherServer: Another server gets the request.
        """
        ...

    def on_error_reply(self, call: Call, reply: Reply) -> None:
        """Called when the status of a reply is an error.

        Raises:
            MovedToAnotherServer: Another server gets the request.
        """
        ...

    def on_answer(self, call: Call, answer: Reply | EventStream | ForwardedResponse) -> None:
        """Called when no further attempt will be made at this server, before the call is finished.

        Raises:
            MovedToAnotherServer: The answer shows that this server cannot serve the request, and another server gets
                it.
        """
        ...


class MovedToAnotherServer(Exception):  # noqa: N818 - it is caught by the pool and never reaches a user
    """The request is taken away from a server, and the pool chooses the server that gets it next.

    Args:
        wait: The seconds to wait before the next attempt.
    """

    def __init__(self, wait: float = 0.0) -> None:
        super().__init__()
        self.wait = wait
