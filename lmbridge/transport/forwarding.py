"""Responses that are passed on to another client exactly as the server sent them.

`Transport.forward` treats a request like any other: it waits for a permit, is sent again as long as a further attempt
may succeed, and is repeated while the server is loading. But the bytes of its response are neither decompressed nor
parsed, so that they can be passed on as they arrive, with the status and the headers that belong to them.

A response is handed out when the first part of its body has arrived. Until then nothing has been passed on, so a failed
attempt can be repeated. JSON and event streams are handed out later than that:

- JSON is handed out when it is complete, because a model server sends a whole reply at once at the end of its work, and
  no client should get a part of a reply that breaks off. A body of more than 1 MiB is handed out in parts.
- An event stream is handed out when its answer begins. The comments before it, which servers send while they load a
  model, are held back until then, up to 64 KiB of them. If there are other servers, the stream is handed out when its
  first event is complete: if that event reports an error of this server, another server gets the request.

The limits of `Timeouts` mean the following here. `connect`, `load` and `total` are those of any other request.
`first_byte` limits the time until the response is handed out. `idle` limits the silence between two parts of the body
after that, whatever they contain.
"""

from __future__ import annotations

import asyncio
import math
import warnings
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Final, Self

from lmbridge.errors import LLMError, LLMStreamError
from lmbridge.transport.calls import Call, Reply
from lmbridge.transport.decompression import decompressed_beginning
from lmbridge.transport.events import close_abandoned
from lmbridge.transport.forwarded_beginning import StreamBeginning
from lmbridge.transport.http_interface import ConnectionFailed, HttpResponse
from lmbridge.transport.receive import LONGEST_PRELUDE, error_of_server, note_arrived
from lmbridge.transport.retry import Verdict
from lmbridge.transport.time_limits import Phase

_LARGEST_WHOLE_BODY: Final = 1024 * 1024
"""The most bytes of JSON that are read before the response is handed out."""


class ForwardedResponse:
    """The response to a forwarded request: its status, its headers, and its body as the server sends it.

    It holds the permit of its call until its body has been read to the end, or until it is closed::

        async with await transport.forward(request) as response:
            while part := await response.read():
                ...

    Only one task at a time can read it.

    Args:
        call: The call that the response belongs to.
        status: The HTTP status.
        headers: The headers.
        first: The part of the body that has been read already.
        source: The response of the session, or None if `first` is the whole body.
    """

    __slots__ = (
        "__weakref__",
        "_error",
        "_first",
        "_loop",
        "_source",
        "call",
        "deadline",
        "error_event",
        "headers",
        "owner",
        "status",
        "whole_body",
    )

    def __init__(
        self, call: Call, status: int, headers: Mapping[str, str], first: bytes, source: HttpResponse | None
    ) -> None:
        self.call: Final = call
        """The call that the response belongs to."""
        self.status: Final = status
        """The HTTP status."""
        self.headers: Final = headers
        """The headers as the server sent them. Their names are case-insensitive, and `items()` lists a header as often
        as it was sent."""
        self.whole_body: Final = first if source is None else None
        """The whole body, or None if a part of it has yet to arrive. `read` returns the same bytes."""
        self.error_event: bytes | None = None
        """The data of the first event of a stream, if the event reports an error that concerns only this server, so
        that another server may get the request. It is always None if there is no other server."""
        self.deadline: float = math.inf
        """The deadline of the current read, by the clock of the event loop. It is infinity between two reads."""
        self.owner: object = None
        """The transport of the response, so that it is not garbage-collected, which would close the connection."""
        self._first = first
        self._source = source
        # The error that `abort` was called with.
        self._error: LLMError | None = None
        # None once nothing more is read from the server.
        self._loop: asyncio.AbstractEventLoop | None = None if source is None else call.deadline_timer.loop

    @classmethod
    def from_reply(cls, reply: Reply) -> Self:
        """Returns a response whose status, headers and body are those of a whole reply."""
        return cls(reply.call, reply.status, reply.headers, reply.body, None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    async def read(self) -> bytes:
        """Waits for the next part of the body, and returns it. Returns `b""` at the end of the body.

        On cancellation of the caller, the connection is closed.

        Raises:
            LLMTimeoutError: With phase "idle" or "total".
            LLMStreamError: The connection broke, or the response was closed.
            LLMError: The response was aborted; it is the error that `abort` was called with.
        """
        if self._first:
            first, self._first = self._first, b""
            return first
        if self._source is None:
            return b""
        if self._loop is None:
            raise self._error or self._broken("the response was closed before its end")
        try:
            self._begin_wait(self._loop.time())
            data = await self._source.read_some()
        except ConnectionFailed as failure:
            self.abort(self._error or self._error_from(failure))
        except BaseException as exc:
            # A reader that is cancelled may have lost bytes, so the body cannot go on.
            self._close(type(exc).__name__)
            raise
        else:
            if not data:
                self._finish()
            return data
        finally:
            self.deadline = math.inf
        # Raised outside the `except` clause, so that the failure does not become its `__context__`.
        raise self._error or self._broken("the response was closed before its end")

    def abort(self, error: LLMError | None = None) -> None:
        """Closes the connection and returns the permit at once.

        Does nothing if the body has been read to its end, or if the response is closed already.

        Args:
            error: The error that the current and all later reads raise. By default it is an `LLMStreamError`.
        """
        if self._loop is not None:
            self._error = error
            self._close("closed early" if error is None else type(error).__name__)

    def on_deadline(self) -> None:
        """Ends a read that has taken too long. The deadline timer calls this method."""
        phase: Phase = "total" if self.deadline >= self.call.total_deadline else "idle"
        self.abort(self.call.timed_out(phase))

    def _begin_wait(self, now: float) -> None:
        """Sets the deadline of a read that begins, and records the reading task as the holder of the permit."""
        call, idle = self.call, self.call.request.timeouts.idle
        if now >= call.total_deadline:
            error = call.timed_out("total")
            self.abort(error)
            raise error
        if call.permit is not None:
            call.permit.note_read(now, asyncio.current_task(self._loop))
        self.deadline = call.total_deadline if idle is None else min(now + idle, call.total_deadline)
        call.deadline_timer.wake_at(self.deadline)

    def _finish(self) -> None:
        if self._loop is not None:
            self._loop = self._source = None
            self.call.finish(self.status)

    def _close(self, outcome: str) -> None:
        if self._loop is not None and self._source is not None:
            self._loop = None
            self._source.close()
            self.call.finish(outcome)

    def _error_from(self, failure: ConnectionFailed) -> LLMError:
        cause = failure.error.__cause__
        return self._broken("the connection to the server broke in the middle of the response", cause)

    def _broken(self, message: str, cause: BaseException | None = None) -> LLMStreamError:
        hint = "the server stopped, crashed or was cut off; its own log may say why"
        return LLMStreamError(message, cause, hint=hint, status=self.status, context=self.call.context())

    def __del__(self) -> None:
        # The attribute does not exist if the constructor raised an exception.
        loop, source = getattr(self, "_loop", None), getattr(self, "_source", None)
        if loop is None or source is None:
            return
        self._loop = None
        try:
            close_abandoned(loop, source, self.call)
        finally:
            # The warning comes last, because a filter may turn it into an exception.
            warnings.warn(
                f"unclosed response to {self.call.request.operation}: read it to its end, or use `async with`",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


async def receive_forwarded(call: Call, response: HttpResponse) -> ForwardedResponse:
    """Reads as much of a response as is needed to hand it out; the docstring of the module says how much that is."""
    content_type = response.headers.get("Content-Type", "").lower()
    encoding = response.headers.get("Content-Encoding")
    has_alternatives = call.request.failover is not None
    stream: StreamBeginning | None = None
    wanted = 1
    if content_type.startswith("text/event-stream"):
        stream, wanted = StreamBeginning(encoding, whole_event=has_alternatives), LONGEST_PRELUDE
    elif content_type.startswith("application/json"):
        wanted = _LARGEST_WHOLE_BODY
    parts: list[bytes] = []
    size = 0
    source: HttpResponse | None = response
    try:
        while size < wanted:
            if not (part := await response.read_some()):
                source = None
                break
            parts.append(part)
            size += len(part)
            if stream is not None:
                stream.feed(part)
                if stream.is_found:
                    break
    except BaseException as exc:
        if isinstance(exc, ConnectionFailed) and stream is not None and has_alternatives:
            # Nothing has been handed out, so this is the same as a connection that breaks before the response.
            exc.verdict = Verdict.RETRY
        note_arrived(call, response, parts)
        raise
    first = b"".join(parts)
    readable = decompressed_beginning(first, encoding)
    # A stream that ends without an answer does not show that the model is loaded.
    if stream is None or stream.has_begun or source is not None:
        call.note_first_event(readable, is_stream=stream is not None)
    if source is None:
        call.read_usage = partial(call.request.interpreter.read_usage, readable)
        call.finish(response.status)
    forwarded = ForwardedResponse(call, response.status, response.headers, first, source)
    if stream is not None and stream.first_event is not None:
        forwarded.error_event = error_of_server(call, stream.first_event)
    return forwarded
