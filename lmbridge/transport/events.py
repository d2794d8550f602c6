"""An event stream under way: its events are read, its waits are limited, and its connection is never left open.

A stream holds a permit and a connection, and a model is generating behind it. So each way in which a stream can be
left gives both back at once: its end, an error, a cancelled read, `abort`, and even its garbage collection.
"""

from __future__ import annotations

import asyncio
import math
import warnings
from typing import Final

from lmbridge._tasks import mark_exception_retrieved
from lmbridge.errors import LLMConnectionError, LLMError, LLMStreamError
from lmbridge.transport.calls import Call
from lmbridge.transport.faults import Phase
from lmbridge.transport.http import ConnectionFailed, HttpResponse
from lmbridge.transport.sse import Event, SSEDecoder

DRAIN: Final = 0.25
"""The seconds to wait, after the last event of a stream, for the end of its body. Then its connection can be kept."""


class EventStream:
    """The events of one response. Only one task at a time can read them.

    The stream holds the permit of its call until the body has ended or the connection is closed. The deadline timer of
    the call has to watch it: a stream has a limit for every wait, and a timer for each of them would cost more than
    the reading.

    If other requests wait until the first event shows that the model is loaded, that event is read ahead by a task, so
    that they need not wait for somebody to read the stream. The task holds no reference to the stream, which could not
    be garbage-collected otherwise. It ends by itself when the connection is closed.

    Args:
        call: The call that the response belongs to.
        response: The response, of which the head has been read.
        first: The bytes of the body that have been read already.
    """

    __slots__ = (
        "__weakref__",
        "_decoder",
        "_fault",
        "_first",
        "_has_events",
        "_idle",
        "_loop",
        "_read_ahead",
        "_reading",
        "_response",
        "call",
        "ended",
        "status",
        "when",
    )

    def __init__(self, call: Call, response: HttpResponse, first: bytes = b"") -> None:
        self.call: Call = call
        self.status: Final = response.status
        """The status of the response."""
        self.ended: bool = False
        """Whether the body has been read to its end."""
        self.when: float = math.inf
        """The deadline of the wait that is going on, by the clock of the event loop."""
        self._response = response
        self._first = first
        self._decoder = SSEDecoder()
        self._fault: LLMError | None = None
        self._reading = False
        self._idle = call.request.timeouts.idle
        self._has_events = False
        # None as soon as the stream is closed.
        self._loop: asyncio.AbstractEventLoop | None = call.deadline_timer.loop
        self._read_ahead: asyncio.Task[list[Event] | None] | None = None

    @property
    def stray(self) -> str:
        """The lines of the body that are neither events nor comments, up to 4 KiB of them."""
        return self._decoder.stray

    @property
    def closed(self) -> bool:
        """Whether nothing more will come, because the body has ended or the stream was aborted."""
        return self._loop is None

    def start_reading_ahead(self) -> asyncio.Task[list[Event] | None]:
        """Starts to read the first event in a task, and returns the task. Its owner awaits it before the loop ends."""
        self._read_ahead = self.call.deadline_timer.loop.create_task(
            _read_first_events(self.call, self._response, self._decoder, self._first)
        )
        # The exception is raised by `read`, if the stream is read at all.
        self._read_ahead.add_done_callback(mark_exception_retrieved)
        self._first = b""
        return self._read_ahead

    async def read(self) -> list[Event]:
        """Waits for further events, and returns them; returns none at the end of the body.

        On cancellation of the caller, the stream is closed.

        Raises:
            LLMTimeoutError: With phase "first_byte", "idle" or "total".
            LLMStreamError: The connection broke, or an event is too large.
            LLMError: The error that was passed to `abort`.
        """
        if self._fault is not None:
            raise self._fault
        if self._loop is None or self._loop.is_closed():
            if self.ended:
                return []
            raise self._given_up()
        if self._reading:
            raise RuntimeError("another task is reading this stream; only one at a time can")
        self._reading = True
        try:
            self._begin_wait(self._loop.time())
            if self._read_ahead is not None:
                events = await self._finish_reading_ahead(self._read_ahead)
            else:
                first, self._first = self._first, b""
                events = await _read_events(self._response, self._decoder, first)
            if events is None:
                self._end()
                return self._decoder.close()
            if not self._has_events:
                self._has_events = True
                self.call.note_first_event(events[0])
        except ConnectionFailed as failure:
            self.abort(self._fault or self._broken(failure))
        except BaseException as exc:
            self._close(type(exc).__name__)
            raise
        else:
            return events
        finally:
            self._reading = False
            self.when = math.inf
        # Either the connection broke, or another task or the deadline timer has aborted the stream and so the read.
        raise self._fault or self._given_up()

    async def drain(self) -> None:
        """Waits a bounded moment for the end of the body, and gives up the connection if it does not come.

        On cancellation of the caller, the connection is closed.
        """
        if self._loop is None:
            return
        # A task that is still reading is woken by the closing.
        if self._reading or self._read_ahead is not None or self._loop.is_closed():
            self._close(self.status)
            return
        self._reading = True
        try:
            async with asyncio.timeout(DRAIN):
                while await self._response.read_some():
                    pass
        except (ConnectionFailed, TimeoutError):
            self._close(self.status)
        except BaseException:
            self._close(self.status)
            raise
        else:
            self._end()
        finally:
            self._reading = False

    def abort(self, fault: LLMError | None = None) -> None:
        """Closes the connection and returns the permit, at once. Calling it again does nothing.

        Args:
            fault: The error that a reader gets, now or later. Default: an `LLMStreamError`.
        """
        if self._loop is not None:
            self._fault = fault
            self._close("closed early" if fault is None else type(fault).__name__)

    def _end(self) -> None:
        if self._loop is not None:
            self.ended = True
            self._loop = None
            self.call.finish(self.status)

    def _close(self, outcome: int | str) -> None:
        if self._loop is not None:
            self._loop = None
            self._response.close()
            self.call.finish(outcome)

    async def _finish_reading_ahead(self, task: asyncio.Task[list[Event] | None]) -> list[Event] | None:
        # asyncio.wait leaves the task alone if the reader is cancelled; the closing of the response ends it.
        await asyncio.wait((task,))
        self._read_ahead = None
        if task.cancelled():
            raise self._given_up()
        return task.result()

    # Time

    def _begin_wait(self, now: float) -> None:
        """Sets the deadline of the wait that begins, and records which task waits."""
        call = self.call
        # Checked here as well, because a read never waits if the server is always faster than the reader.
        if now >= call.total_deadline:
            raise call.timed_out("total")
        if call.permit is not None:
            call.permit.note_read(now, asyncio.current_task(call.deadline_timer.loop))
        if not self._has_events:
            self.when = call.first_byte_deadline
        elif self._idle is None:
            self.when = call.total_deadline
        else:
            self.when = min(now + self._idle, call.total_deadline)
        call.deadline_timer.wake_at(self.when)

    def on_deadline(self) -> None:
        """Ends the wait that has taken too long; the deadline timer calls it."""
        phase: Phase = "idle" if self._has_events else "first_byte"
        self.abort(self.call.timed_out("total" if self.when >= self.call.total_deadline else phase))

    # Errors

    def _given_up(self) -> LLMStreamError:
        why = "" if self._loop is None else ": the event loop that it was opened in is closed"
        self.abort()
        return LLMStreamError(f"the stream was given up{why}", status=self.status, context=self.call.context())

    def _broken(self, failure: ConnectionFailed) -> LLMError:
        error = failure.error
        if not isinstance(error, LLMConnectionError):
            # Only a test double fails in other ways than by its connection.
            return error.completed(status=self.status, context=self.call.context())
        return LLMStreamError(
            "the connection broke in mid-stream",
            error.__cause__ or error,
            hint="the server stopped, crashed or was cut off; what had arrived is in .partial",
            status=self.status,
            context=self.call.context(),
        )

    # Garbage collection

    def __del__(self) -> None:
        # The attribute is missing if the constructor failed.
        loop = getattr(self, "_loop", None)
        if loop is None:
            return
        try:
            self._abandon(loop)
        finally:
            # Last, because the warning may be turned into an error.
            warnings.warn(
                f"unclosed stream of {self.call.request.operation} with model {self.call.request.model!r}:"
                " read it to its end, or leave it by `async with` or `aclose()`",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def _abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Closes the connection and returns the permit, in the thread of the event loop."""
        if loop.is_closed():
            self.call.log("dropped unclosed")
            return
        try:
            is_running_here = asyncio.get_running_loop() is loop
        except RuntimeError:
            is_running_here = False
        self._loop = None
        if is_running_here:
            _close_abandoned(self._response, self.call)
        else:
            # Collected in another thread, or between two runs of the loop.
            loop.call_soon_threadsafe(_close_abandoned, self._response, self.call)


def _close_abandoned(response: HttpResponse, call: Call) -> None:
    response.close()
    call.finish("dropped unclosed")


async def _read_events(response: HttpResponse, decoder: SSEDecoder, data: bytes = b"") -> list[Event] | None:
    """Returns the next events of a body, of which `data` was read before; None at its end."""
    while True:
        if data and (events := decoder.feed(data)):
            return events
        data = await response.read_some()
        if not data:
            return None


async def _read_first_events(
    call: Call, response: HttpResponse, decoder: SSEDecoder, data: bytes
) -> list[Event] | None:
    """Reads up to the first event, and reports it to the scheduler.

    If the first event is an error, or does not come, the permit is returned: other requests wait for an event that will
    not come, and a reader may never appear.
    """
    try:
        events = await _read_events(response, decoder, data)
        if events:
            call.note_first_event(events[0])
        return events
    finally:
        if call.is_first_request:
            call.release()
