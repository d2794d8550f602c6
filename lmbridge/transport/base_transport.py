"""`BaseTransport`: what the client layer knows of the transport below it.

There are two implementations. `Transport` sends to one server, and `NodePool` to one of several. A layer above need
not know which of the two it has. If it has to ask each server separately, it uses the transports in `nodes`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lmbridge.transport.calls import Reply, Request
from lmbridge.transport.events import EventStream
from lmbridge.transport.forwarding import ForwardedResponse

if TYPE_CHECKING:
    from lmbridge.transport.stats import ClientStats
    from lmbridge.transport.transport import Transport


class BaseTransport(Protocol):
    """Sends requests to one server, or to one of several, and keeps their schedules."""

    @property
    def api_base(self) -> str:
        """The URL of the server. Those of several servers are separated by commas."""
        ...

    @property
    def nodes(self) -> Sequence[Transport]:
        """The transport of each server."""
        ...

    @property
    def in_flight(self) -> int:
        """The number of generations in flight."""
        ...

    @property
    def queued(self) -> int:
        """The number of generations that are waiting for a permit."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a request or a stream is in flight, or a request is waiting."""
        ...

    @property
    def closing(self) -> asyncio.Future[None] | None:
        """A future that is done once the open transport begins to close; None if the transport is not open."""
        ...

    def owns_url(self, url: str) -> bool:
        """Returns whether a request with this URL goes to a server of this transport."""
        ...

    def stats(self) -> ClientStats:
        """Returns how many requests are in flight and queued now, and how many swaps and retries there were so far."""
        ...

    def redact(self, text: str, headers: Mapping[str, str] | None = None) -> str:
        """Returns the text without the keys, and without the values of the headers."""
        ...

    def request(self, request: Request) -> Coroutine[Any, Any, Reply]:
        """Sends a request, and returns the complete reply, whatever its status."""
        ...

    def stream(self, request: Request) -> Coroutine[Any, Any, EventStream | Reply]:
        """Sends a request for an event stream, and returns the stream, or the reply if it is something else."""
        ...

    async def forward(self, request: Request) -> ForwardedResponse:
        """Sends a request, and returns the response to be passed on unchanged, whatever its status."""
        ...

    async def close(self) -> None:
        """Ends every request and stream with a `TaskCancelledError`, and closes all connections."""
        ...
