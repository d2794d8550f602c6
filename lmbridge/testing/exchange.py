"""`Exchange`: a request together with methods to reply to it. Every behaviour gets one as its argument."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from lmbridge.testing import wire
from lmbridge.testing.completions import completion_chunk
from lmbridge.testing.connection import Connection
from lmbridge.testing.wire import RecordedRequest


class Exchange:
    """A request, and methods that send the reply byte by byte.

    Each call of a sending method sends its bytes immediately and in a separate packet. If a behaviour returns after
    `start` without calling `end`, `reset` or `hang_up`, the body is ended properly. If the client disconnects while a
    behaviour is waiting or sending, the behaviour is cancelled, unless it is awaiting `client_left`. A behaviour that
    calls the methods in the wrong order, or sends something after the end, gets a `RuntimeError`.

    Attributes:
        request: The request.
        reply_id: The `id` of the completion.
        model: The model that the request asks for, or the first model of the server if it names none.
        started: Whether a part of the reply has been sent.
        streamed: Whether the body uses chunked transfer encoding.
        ended: Whether the reply is complete, or the behaviour has closed the connection before that.
        closes: Whether the connection is closed after the reply, because the head of the reply says so, or because the
            body has no other end.
    """

    def __init__(
        self,
        request: RecordedRequest,
        connection: Connection,
        *,
        reply_id: str,
        model: str,
        advertise: Mapping[str, str],
    ) -> None:
        self.request = request
        self.reply_id = reply_id
        self.model = model
        self.started: bool = False
        self.streamed: bool = False
        self.ended: bool = False
        self.closes: bool = False
        self._connection = connection
        self._advertise = advertise
        self._has_no_body = False

    async def start(
        self,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        *,
        content_type: str | None = "text/event-stream",
        chunked: bool = True,
    ) -> None:
        """Sends the head of the reply.

        Args:
            status: The HTTP status.
            headers: Further header fields. They replace default ones of the same name.
            content_type: The Content-Type, or None to send none.
            chunked: Whether the body uses chunked transfer encoding. If it does not, and `headers` has no
                Content-Length, the end of the connection is the end of the body.
        """
        if self.started:
            raise RuntimeError("start() was called twice, or after the reply was started by another method")
        self._has_no_body = wire.has_no_body(self.request.method, status)
        self.streamed = chunked and not self._has_no_body
        fields = wire.override_fields(self._default_fields(content_type), headers)
        sent = wire.Headers(fields.items())
        delimited = self.streamed or self._has_no_body or "Content-Length" in sent
        self.closes = not delimited or "close" in sent.get("Connection", "").lower()
        await self._write(wire.encode_head(status, fields))

    def _default_fields(self, content_type: str | None) -> dict[str, str]:
        fields = dict(self._advertise)
        if content_type is not None:
            fields["Content-Type"] = content_type
        if self.streamed:
            fields["Transfer-Encoding"] = "chunked"
        return fields

    async def send(self, data: bytes) -> None:
        """Sends bytes of the body, in a separate chunk if the body is sent in chunks."""
        if not self.started:
            raise RuntimeError("send() was called before start()")
        # An empty chunk would end the body.
        if data and not self._has_no_body:
            await self._write(wire.encode_chunk(data) if self.streamed else data)

    async def chunk(self, payload: Mapping[str, Any] | bytes | str) -> None:
        """Sends one event, which is `data: ...` and an empty line. Starts an event stream if nothing was sent before.

        Args:
            payload: The data of the event. A mapping is sent as JSON.
        """
        if not self.started:
            await self.start()
        await self.send(encode_event(payload))

    async def delta(
        self,
        content: str | None = None,
        *,
        finish_reason: str | None = None,
        model: str | None = None,
        **delta: Any,
    ) -> None:
        """Sends one `chat.completion.chunk` in the form of OpenAI's API.

        Args:
            content: The content of the delta. With None, the delta has no content.
            finish_reason: The finish reason of the choice.
            model: The name of the model in the chunk. By default it is `self.model`.
            **delta: Further fields of the delta, such as `role`, `tool_calls` or `reasoning_content`.
        """
        if content is not None:
            delta["content"] = content
        model = self.model if model is None else model
        await self.chunk(completion_chunk(self.reply_id, model, delta, finish_reason=finish_reason))

    async def done(self) -> None:
        """Sends `data: [DONE]`."""
        await self.chunk("[DONE]")

    async def end(self) -> None:
        """Ends the body properly. The connection stays open for the next request."""
        if self.ended:
            return
        if not self.started:
            raise RuntimeError("the behaviour sent no reply")
        if self.streamed:
            await self._write(wire.encode_chunk(b""))
        self.ended = True

    async def raw(self, data: bytes) -> None:
        """Sends bytes unchanged, without any framing."""
        await self._write(data)

    def reset(self) -> None:
        """Breaks the connection with a TCP reset."""
        self.ended = self.ended or not self._connection.is_disconnected
        self._connection.reset()

    def hang_up(self) -> None:
        """Closes the connection in the regular way (with a TCP FIN), even if the body is not complete."""
        self.ended = self.ended or not self._connection.is_disconnected
        self._connection.hang_up()

    async def client_left(self) -> None:
        """Waits until the client has closed the connection, or its sending half.

        The request then counts as aborted. If the behaviour sends anything afterwards, a `ConnectionResetError` is
        raised, which does not make the test fail.
        """
        await self._connection.client_left()

    async def _write(self, data: bytes) -> None:
        if self.ended:
            raise RuntimeError("the reply has already ended")
        await self._connection.write(data)
        # This is set after the write, because a behaviour that is cancelled while it waits to write has sent nothing.
        self.started = True


Behaviour: TypeAlias = Callable[[Exchange], Awaitable[None]]
"""An async function that replies to a request."""


def encode_event(payload: Mapping[str, Any] | bytes | str) -> bytes:
    """Returns one event of an event stream as bytes."""
    if isinstance(payload, Mapping):
        payload = wire.to_json(payload)
    return b"data: %b\n\n" % (payload.encode() if isinstance(payload, str) else payload)
