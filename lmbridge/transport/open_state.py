"""The part of a transport that exists while the transport is open, and ends with it.

A transport can be closed and opened again, possibly in another event loop. Everything that belongs to one event loop is
therefore kept in one object, which the transport creates when it opens and drops when it closes.

What happens to a stream that is dropped unclosed is decided in `events`.
"""

from __future__ import annotations

import asyncio
import warnings
import weakref

import attrs

from lmbridge._tasks import LoopGuard, call_in_loop
from lmbridge.errors import TaskCancelledError
from lmbridge.transport.admission import Admission
from lmbridge.transport.calls import Call
from lmbridge.transport.deadline import DeadlineTimer
from lmbridge.transport.events import EventStream
from lmbridge.transport.forwarding import ForwardedResponse
from lmbridge.transport.http_interface import HttpSession
from lmbridge.transport.limit_search import LimitSearch


def _create_loop_guard() -> LoopGuard:
    guard = LoopGuard("this client")
    guard.enter()
    return guard


def _create_future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


def _create_deadline_timer(state: OpenState) -> DeadlineTimer:
    return DeadlineTimer(state.loop, state.streams)


@attrs.define(eq=False)
class OpenState:
    """The part of a transport that exists while the transport is open, and belongs to one event loop."""

    session: HttpSession
    """Sends the requests."""
    admission: Admission
    """Hands out the permits."""
    limit_search: LimitSearch | None = None
    """Asks the server for its limits; None if the limits are fixed."""
    loop: asyncio.AbstractEventLoop = attrs.field(init=False, factory=asyncio.get_running_loop)
    """The event loop in which the transport was opened."""
    loop_guard: LoopGuard = attrs.field(init=False, factory=_create_loop_guard)
    """Raises an error if the transport is used in another event loop."""
    closing: asyncio.Future[None] = attrs.field(init=False, factory=_create_future)
    """A future that is done as soon as the transport begins to close."""
    streams: weakref.WeakSet[EventStream | ForwardedResponse] = attrs.field(init=False, factory=weakref.WeakSet)
    """The open streams and forwarded responses. The references are weak, so that one that was dropped is
    garbage-collected."""
    first_event_tasks: set[asyncio.Task[object]] = attrs.field(init=False, factory=set)
    """The tasks that read the first event of a stream before the user does."""
    requests: int = attrs.field(init=False, default=0)
    """The number of requests that are waiting or in flight. A stream counts only until its response has begun."""
    deadline_timer: DeadlineTimer = attrs.field(
        init=False, default=attrs.Factory(_create_deadline_timer, takes_self=True)
    )
    """The timer that watches the deadlines of all calls and streams."""

    def forget_server(self, *, was_stale: bool = False) -> None:
        """Records that a connection was refused or lost, so another server may be running by now.

        Args:
            was_stale: Whether only a kept connection turned out to be dead.
        """
        if self.limit_search is not None:
            self.limit_search.forget(was_stale=was_stale)

    def adopt(self, stream: EventStream | ForwardedResponse) -> None:
        """Adds a stream to those that `close` ends and whose deadlines are watched.

        If other requests wait for the first event of the stream, this starts a task that reads the event at once.

        Raises:
            TaskCancelledError: The transport was closed while the stream was opened.
        """
        if self.closing.done():
            error = closed_error(stream.call)
            stream.abort(error)
            raise error
        # The body will not be sent again. Dropping it saves memory, because many open streams may have long prompts.
        stream.call.request.body = None
        self.streams.add(stream)
        if isinstance(stream, EventStream) and stream.call.is_first_request:
            self._read_ahead(stream)

    def read_first_events(self) -> None:
        """Starts reading the first events for which other requests have to wait because the limits have changed."""
        for stream in list(self.streams):
            if isinstance(stream, EventStream) and stream.call.is_first_request and stream.is_unread:
                self._read_ahead(stream)

    def _read_ahead(self, stream: EventStream) -> None:
        task = stream.start_reading_ahead()
        self.first_event_tasks.add(task)
        task.add_done_callback(self.first_event_tasks.discard)

    def abandon(self) -> None:
        """Lets the session close what it can without waiting. Any thread may call it.

        An `EventStream` or a `ForwardedResponse` keeps its transport alive, so none is in use when a transport is
        dropped.
        """
        if self.loop.is_closed():
            self.session.abandon()
        else:
            call_in_loop(self.loop, self.session.abandon)

    async def close(self) -> None:
        """Ends all streams, waits and requests, and closes the session.

        On cancellation of the caller, the remaining steps are still taken.
        """
        self.closing.set_result(None)
        for stream in list(self.streams):
            stream.abort(closed_error(stream.call))
        self.admission.fail_waiters(lambda: TaskCancelledError("the client was closed while the request was queued"))
        try:
            if self.limit_search is not None:
                await self.limit_search.close()
        finally:
            try:
                await self.session.close()
                # These tasks end at once, because the session has closed the responses that they read.
                if self.first_event_tasks:
                    await asyncio.wait(self.first_event_tasks)
            finally:
                self.deadline_timer.close()


def closed_error(call: Call) -> TaskCancelledError:
    """Returns the error for a request that is in flight when its transport is closed."""
    return TaskCancelledError("the client was closed before the reply was complete", context=call.context())


def warn_about_closed_loop() -> None:
    """Warns that a transport was still open when its event loop was closed. Its state is lost then."""
    warnings.warn(
        "an lmbridge client was still open when its event loop was closed; close the client in the loop that uses it",
        ResourceWarning,
        stacklevel=4,
    )
