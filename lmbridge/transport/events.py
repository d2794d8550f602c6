"""Event streams: how events are read, how each read is limited in time, and how connection and permit are returned.

A stream holds a connection and a permit, and the server's model is generating for it. So both are returned at once,
however the reading of a stream ends: at its end, with an error, with the cancellation of a read, with `abort`, or even
with garbage collection.

`client.responses` makes a `MessageEvent` of each event of a streamed response.
"""

from __future__ import annotations

import asyncio
import math
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from lmbridge._tasks import call_in_loop
from lmbridge.errors import LLMConnectionError, LLMError, LLMStreamError
from lmbridge.transport.calls import Call
from lmbridge.transport.deadline import Deadline
from lmbridge.transport.http_interface import ConnectionFailed, HttpResponse
from lmbridge.transport.sse import Event, SSEDecoder
from lmbridge.transport.time_limits import Phase

DRAIN_SECONDS: Final = 0.25
"""The most seconds to wait for the end of the body after the last event. Only a connection whose body has ended can be
used again."""
_DROPPED: Final = "dropped unclosed"
"""How the log describes the end of a stream that was garbage-collected."""


class EventStream:
    """The events of one response. Only one task at a time can read them.

    The stream holds the permit of its call until the body has ended or the connection is closed. Every read has a
    deadline. The call's deadline timer has to watch the stream for that, because a separate timer for each read would
    cost more than the read itself.

    Other requests may be waiting until the first event shows that the model is loaded. Then a task reads that event in
    advance, so that these requests do not depend on when the user reads the stream. The task holds no reference to the
    stream, because that would keep the stream from being garbage-collected. It ends when the connection is closed.

    Args:
        call: The call that the response belongs to.
        response: The response. Its head has been read.
        first: The first bytes of the body, if some have been read already.
    """

    __slots__ = (
        "__weakref__",
        "_awaits_reply",
        "_decoder",
        "_end_deadline",
        "_error",
        "_has_events",
        "_idle_limit",
        "_loop",
        "_read_ahead",
        "_reading",
        "_response",
        "_unread",
        "call",
        "deadline",
        "ended",
        "headers",
        "owner",
        "status",
    )

    def __init__(self, call: Call, response: HttpResponse, first: bytes = b"") -> None:
        self.call: Call = call
        """The call that the response belongs to."""
        self.status: Final = response.status
        """The HTTP status of the response."""
        self.headers: Final[Mapping[str, str]] = response.headers
        """The headers of the response. Their names are case-insensitive."""
        self.ended: bool = False
        """Whether the body has been read to its end."""
        self.deadline: float = math.inf
        """The deadline of the current read, by the clock of the event loop. It is infinity between two reads."""
        self.owner: object = None
        """The transport of the stream, so that it is not garbage-collected, which would close the connection."""
        self._response = response
        # Bytes of the body that the decoder has not been given yet.
        self._unread = first
        self._decoder = SSEDecoder()
        # The error that `abort` was called with.
        self._error: LLMError | None = None
        self._reading = False
        self._idle_limit = call.request.timeouts.idle
        self._has_events = False
        # Whether nothing but the progress of the prompt has arrived.
        self._awaits_reply = True
        self._end_deadline = math.inf
        # None once the stream is closed.
        self._loop: asyncio.AbstractEventLoop | None = call.deadline_timer.loop
        self._read_ahead: asyncio.Task[list[Event] | Exception | None] | None = None

    @property
    def bare_text(self) -> str:
        """The lines of the body that belong to no event and are not comments, up to 4 KiB of them."""
        return self._decoder.bare_text

    @property
    def closed(self) -> bool:
        """Whether the body has ended or the connection was closed, so that no further event can arrive."""
        return self._loop is None

    @property
    def is_unread(self) -> bool:
        """Whether the stream is open, and nothing has read from it or is reading from it."""
        return not (self._reading or self._has_events or self.closed) and self._read_ahead is None

    def start_reading_ahead(self) -> asyncio.Task[list[Event] | Exception | None]:
        """Starts and returns a task that reads the first event. The caller has to await it before the loop ends."""
        self._read_ahead = self.call.deadline_timer.loop.create_task(
            _read_first_events(self.call, self._response, self._decoder, self._unread)
        )
        self._unread = b""
        return self._read_ahead

    def expect_end(self, seconds: float) -> None:
        """Limits the wait for the end of the body, because the reply is complete. Further calls change nothing.

        When the time is over, the connection is closed, and `read` raises an `LLMStreamError`.

        Args:
            seconds: The most seconds to wait.
        """
        if self._end_deadline == math.inf:
            self._end_deadline = self.call.deadline_timer.time() + seconds

    def expect_more(self) -> None:
        """Removes the limit that `expect_end` has set, because the reply goes on."""
        self._end_deadline = math.inf

    async def read(self) -> list[Event]:
        """Waits for further events, and returns them. Returns an empty list at the end of the body.

        If the stream has been closed or the connection has broken, the events that had arrived before are returned
        first. On cancellation of the caller, the stream is closed.

        Raises:
            LLMTimeoutError: With phase "first_byte", "idle" or "total".
            LLMStreamError: The connection broke, an event is too large, or the stream was closed before its end.
            LLMError: The stream was aborted; it is the error that `abort` was called with.
            RuntimeError: Another task is reading the stream.
        """
        if self._loop is None or self._loop.is_closed():
            return self._read_closed()
        if self._reading:
            raise RuntimeError("another task is reading this stream; only one at a time can")
        self._reading = True
        try:
            self._begin_wait(self._loop.time())
            arrived: list[Event] | None = None
            if self._read_ahead is not None:
                arrived = await self._finish_reading_ahead(self._read_ahead)
            else:
                # This is what `_read_events` does, but another coroutine would cost memory for each stream that waits.
                if self._decoder.failure is not None:
                    raise self._decoder.failure
                data = self._unread or await self._response.read_some()
                self._unread = b""
                while data and not (arrived := self._decoder.feed(data)):
                    data = await self._response.read_some()
            if not arrived:
                self._finish()
                return self._decoder.close()
            if self._awaits_reply:
                self._has_events = True
                self._awaits_reply = not self.call.note_events(arrived)
        except (ConnectionFailed, LLMError) as exc:
            self._reading = False
            self.abort(self._error or (exc if isinstance(exc, LLMError) else self._error_from(exc)))
        except BaseException as exc:
            # A reader that is cancelled may have lost events, so the stream cannot go on.
            self._reading = False
            self._close(type(exc).__name__)
            raise
        else:
            return arrived
        finally:
            self._reading = False
            self.deadline = math.inf
        # The read failed because the connection broke, or because another task or the deadline timer called `abort`.
        return self._read_closed()

    def _read_closed(self) -> list[Event]:
        """Returns or raises what `read` does once the stream is closed."""
        if self.ended:
            return []
        if events := self.take_arrived():
            return events
        raise self._error or self._close_early()

    def take_arrived(self) -> list[Event]:
        """Returns the events that had arrived when the stream was closed, and that `read` has not returned yet.

        While a task is reading, the list is empty: that task gets them.
        """
        if self._reading:
            return []
        events: list[Event] = []
        # The list ends before an event that is too large.
        with suppress(LLMStreamError):
            if self._read_ahead is not None and self._read_ahead.done():
                task, self._read_ahead = self._read_ahead, None
                result = [] if task.cancelled() else task.result()
                if not isinstance(result, Exception):
                    events += self._decoder.close() if result is None else result
            unread, self._unread = self._unread, b""
            events += self._decoder.feed(unread)
        return events

    async def drain(self) -> None:
        """Waits briefly for the end of the body, so that the connection can be used again.

        If the end does not arrive within `DRAIN_SECONDS`, the connection is closed.

        On cancellation of the caller, the connection is closed.
        """
        if self._loop is None:
            return
        # If a task is still reading, closing the connection wakes it.
        if self._reading or self._read_ahead is not None or self._loop.is_closed():
            self._close(self.status)
            return
        self._reading = True
        self.deadline = self._end_deadline = self.call.deadline_timer.time() + DRAIN_SECONDS
        self.call.deadline_timer.wake_at(self.deadline)
        try:
            while await self._response.read_some():
                pass
        except ConnectionFailed:
            self._close(self.status)
        except BaseException:
            # The rest of the body was not read, so the connection cannot be used again.
            self._close(self.status)
            raise
        else:
            self._finish()
        finally:
            self._reading = False
            self.deadline = math.inf

    def abort(self, error: LLMError | None = None) -> None:
        """Closes the connection and returns the permit at once. Does nothing if the stream is closed already.

        Args:
            error: The error that the current and all later reads raise. By default it is an `LLMStreamError`.
        """
        if self._loop is not None:
            self._error = error
            self._close("closed early" if error is None else type(error).__name__)

    def _finish(self) -> None:
        if self._loop is not None:
            self.ended = True
            self._loop = None
            try:
                self.call.note_streamed_reply()
            finally:
                self.call.finish(self.status)

    def _close(self, outcome: int | str) -> None:
        if self._loop is not None:
            # A task that is still reading takes what has arrived itself.
            is_read = self._reading or (self._read_ahead is not None and not self._read_ahead.done())
            if not is_read and not self._loop.is_closed():
                self._unread += self._response.take_arrived()
            self._loop = None
            self._response.close()
            self.call.finish(outcome)

    async def _finish_reading_ahead(self, task: asyncio.Task[list[Event] | Exception | None]) -> list[Event] | None:
        # asyncio.wait does not cancel the task if the reader is cancelled. The task ends when the response is closed.
        await asyncio.wait((task,))
        self._read_ahead = None
        if task.cancelled():
            raise self._close_early()
        if isinstance(result := task.result(), Exception):
            raise result
        return result

    # Time limits

    def _begin_wait(self, now: float) -> None:
        """Sets the deadline of a read that begins, and records the reading task as the holder of the permit."""
        call = self.call
        # Checked here as well, because a read never waits if the server is always faster than the reader.
        if now >= call.total_deadline:
            raise call.timed_out("total")
        if call.permit is not None:
            call.permit.note_read(now, asyncio.current_task(call.deadline_timer.loop))
        deadline = call.total_deadline
        if not self._has_events:
            deadline = call.first_byte_deadline
        elif self._idle_limit is not None and now + self._idle_limit < deadline:
            deadline = now + self._idle_limit
        if self._end_deadline < math.inf:
            deadline = min(deadline, self._end_deadline)
        self.deadline = deadline
        call.deadline_timer.wake_at(deadline)

    def on_deadline(self) -> None:
        """Ends a read that has taken too long. The deadline timer calls this method."""
        if self.deadline >= self._end_deadline:
            self._close(self.status)
            return
        phase: Phase = "idle" if self._has_events else "first_byte"
        self.abort(self.call.timed_out("total" if self.deadline >= self.call.total_deadline else phase))

    # Errors

    def _close_early(self) -> LLMStreamError:
        """Closes the stream, and returns the error for reading it afterwards."""
        reason = "" if self._loop is None else ", because the event loop in which it was opened is closed"
        self.abort()
        message = f"the stream was closed before its end{reason}"
        return LLMStreamError(message, status=self.status, context=self.call.context())

    def _error_from(self, failure: ConnectionFailed) -> LLMError:
        error = failure.error
        if not isinstance(error, LLMConnectionError):
            # This happens only with a test double, which may raise any error.
            return error.completed(status=self.status, context=self.call.context())
        return LLMStreamError(
            "the connection broke mid-stream" if error.hint is None else error.message,
            error.__cause__ or error,
            hint=error.hint or "the server stopped, crashed or was cut off; what had arrived is in .partial",
            status=self.status,
            context=self.call.context(),
        )

    # Garbage collection

    def __del__(self) -> None:
        # The attribute does not exist if the constructor raised an exception.
        loop = getattr(self, "_loop", None)
        if loop is None:
            return
        self._loop = None
        try:
            close_abandoned(loop, self._response, self.call)
        finally:
            # The warning comes last, because a filter may turn it into an exception.
            warnings.warn(
                f"unclosed stream of {self.call.request.operation} with model {self.call.request.model!r}:"
                " read it to its end, use `async with`, or call `aclose()`",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


def close_abandoned(loop: asyncio.AbstractEventLoop, response: HttpResponse, call: Call) -> None:
    """Closes the connection of a stream that was dropped unclosed, and returns its permit.

    Both have to happen in the thread of the event loop, but a garbage collection may run in any thread.

    Args:
        loop: The event loop of the stream.
        response: The response that the stream has read.
        call: The call that the response belongs to.
    """
    if loop.is_closed():
        call.log(_DROPPED)
        return
    try:
        is_running_here = asyncio.get_running_loop() is loop
    except RuntimeError:
        is_running_here = False
    if is_running_here:
        _finish_abandoned(response, call)
    else:
        # The garbage collector ran in another thread, or the event loop is not running at the moment.
        call_in_loop(loop, _finish_abandoned, response, call)


def _finish_abandoned(response: HttpResponse, call: Call) -> None:
    response.close()
    call.finish(_DROPPED)


async def _read_events(response: HttpResponse, decoder: SSEDecoder, data: bytes = b"") -> list[Event] | None:
    """Reads until `data` and the bytes after it contain an event. Returns None at the end of the body."""
    if decoder.failure is not None:
        raise decoder.failure
    while True:
        if data and (events := decoder.feed(data)):
            return events
        data = await response.read_some()
        if not data:
            return None


async def _read_first_events(
    call: Call, response: HttpResponse, decoder: SSEDecoder, data: bytes
) -> list[Event] | Exception | None:
    """Reads a body up to its first event, and reports the event to the scheduler.

    An exception is returned instead of raised. If the stream is not read, asyncio would log the exception as never
    retrieved. A done callback that retrieves it does not help if the event loop ends before it is called.

    If the first event is an error, or if none arrives, the permit is returned at once. Other requests are waiting for
    this event, and the user may never read the stream. For the same reason, this task has a deadline of its own.
    """
    try:
        with Deadline(call.deadline_timer, call.first_byte_deadline):
            events = await _read_events(response, decoder, data)
        if events:
            call.note_events(events)
    except TimeoutError as exc:
        response.close()
        return call.attempt_timed_out(exc)
    except Exception as exc:  # noqa: BLE001 - `read` raises it
        return exc
    else:
        return events
    finally:
        if call.is_first_request:
            call.release()
