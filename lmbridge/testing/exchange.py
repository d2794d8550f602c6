"""One request and the means to answer it: what a behaviour is given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from lmbridge.testing import wire
from lmbridge.testing.completions import completion_chunk
from lmbridge.testing.connection import Connection
from lmbridge.testing.wire import Request


class Exchange:
    """A request and its reply, byte by byte.

    What is sent goes to the socket at once, as a packet of its own. A behaviour that returns after `start` without
    `end`, `reset` or `hang_up` has its body ended properly. One that waits or sends when the client leaves is
    cancelled there, unless it awaits `client_left`.

    Attributes:
        request: What is to be answered.
        reply_id: The `id` for the completion.
        model: The model that the request asks for, or else the server's first.
        started: Something was sent.
        streamed: The body goes in chunks.
        ended: Nothing more is to be sent.
        closes: The connection ends with the reply: its head says so, or nothing else ends the body.
    """

    def __init__(
        self,
        request: Request,
        connection: Connection,
        *,
        reply_id: str,
        model: str,
        advertise: Mapping[str, str],
    ) -> None:
        self.request = request
        self.reply_id = reply_id
        self.model = model
        self.started = self.streamed = self.ended = self.closes = False
        self._connection = connection
        self._advertise = advertise
        self._bare = False

    async def start(
        self,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        *,
        content_type: str | None = "text/event-stream",
        chunked: bool = True,
    ) -> None:
        """Send the head.

        Args:
            status: The HTTP status.
            headers: More header fields; they replace those of the same name that would be sent without them.
            content_type: The Content-Type, or None for none.
            chunked: Whether the body goes in chunks. Otherwise it is as long as a Content-Length in `headers` says,
                or, without one, ends with the connection.
        """
        if self.started:
            raise RuntimeError("the reply was started before")
        self._bare = wire.has_no_body(self.request.method, status)
        self.streamed = chunked and not self._bare
        fields = wire.with_own(self._usual(content_type), headers)
        told = wire.Headers(fields.items())
        delimited = self.streamed or self._bare or "Content-Length" in told
        self.closes = not delimited or "close" in told.get("Connection", "").lower()
        await self._write(wire.head(status, fields))

    def _usual(self, content_type: str | None) -> dict[str, str]:
        fields = dict(self._advertise)
        if content_type is not None:
            fields["Content-Type"] = content_type
        if self.streamed:
            fields["Transfer-Encoding"] = "chunked"
        return fields

    async def send(self, data: bytes) -> None:
        """Send bytes of the body: a chunk of their own if it goes in chunks."""
        if not self.started:
            raise RuntimeError("send() before start()")
        if data and not self._bare:  # an empty chunk would end the body
            await self._write(wire.chunk(data) if self.streamed else data)

    async def chunk(self, payload: Mapping[str, Any] | bytes | str) -> None:
        """Send one event, `data: ...` and an empty line; starts a 200 event stream if nothing was sent before.

        Args:
            payload: What follows `data: `; a mapping as JSON.
        """
        if not self.started:
            await self.start()
        await self.send(event(payload))

    async def delta(
        self,
        content: str | None = None,
        *,
        finish_reason: str | None = None,
        model: str | None = None,
        **delta: Any,
    ) -> None:
        """Send one chat.completion.chunk in OpenAI's shape.

        Args:
            content: The delta's content; None leaves it out.
            finish_reason: The choice's.
            model: The chunk's model, if it is to be another than `self.model`.
            **delta: More of the delta, such as `role`, `tool_calls` or `reasoning_content`.
        """
        if content is not None:
            delta["content"] = content
        model = self.model if model is None else model
        await self.chunk(completion_chunk(self.reply_id, model, delta, finish_reason=finish_reason))

    async def done(self) -> None:
        """Send `data: [DONE]`."""
        await self.chunk("[DONE]")

    async def end(self) -> None:
        """End the body properly. The connection stays open for the next request."""
        if self.ended:
            return
        if not self.started:
            raise RuntimeError("no reply was started that could end")
        if self.streamed:
            await self._write(wire.chunk(b""))
        self.ended = True

    async def raw(self, data: bytes) -> None:
        """Send bytes as they are, without any framing."""
        await self._write(data)

    def reset(self) -> None:
        """Break the connection with a RST."""
        self.ended = self.ended or not self._connection.over
        self._connection.reset()

    def hang_up(self) -> None:
        """Close the connection with a FIN, whatever was announced."""
        self.ended = self.ended or not self._connection.over
        self._connection.hang_up()

    async def client_left(self) -> None:
        """Return once the client has closed the connection (half of it is enough).

        The request counts as aborted then. What is sent later fails with a `ConnectionResetError`, which is no
        failure of the behaviour.
        """
        await self._connection.client_left()

    async def _write(self, data: bytes) -> None:
        if self.ended:
            raise RuntimeError("the reply has ended")
        await self._connection.write(data)
        self.started = True  # not before: a behaviour that was cancelled there has sent nothing


Behaviour: TypeAlias = Callable[[Exchange], Awaitable[None]]
"""What to do with a request; an async function is one."""


def event(payload: Mapping[str, Any] | bytes | str) -> bytes:
    """One event of a stream."""
    if isinstance(payload, Mapping):
        payload = wire.to_json(payload)
    return b"data: %b\n\n" % (payload.encode() if isinstance(payload, str) else payload)
