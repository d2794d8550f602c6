"""An event stream under way: read, timed, closed, and never left behind."""

from __future__ import annotations

import asyncio
import math
import warnings
from typing import Final, Protocol

from lmbridge.errors import LLMError, LLMStreamError
from lmbridge.transport.calls import Call, Phase
from lmbridge.transport.sse import Event, SSEDecoder

DRAIN: Final = 0.25
"""Seconds to wait, after a stream's last event, for the end of its body: then its connection can be used again."""


class Body(Protocol):
    """The bytes of a response (aiohttp's `StreamReader`)."""

    async def readany(self) -> bytes:
        """What has arrived, at least one byte; nothing at the end."""

    def read_nowait(self) -> bytes:
        """What has arrived, if anything."""

    def at_eof(self) -> bool:
        """Whether all has been read."""


class Response(Protocol):
    """What is left to be read, and the way to stop it (aiohttp's `ClientResponse`)."""

    status: int

    @property
    def content(self) -> Body:
        """The body."""

    def close(self) -> None:
        """Closes the connection now; a reader that waits is woken with an error."""


class EventStream:
    """The events of one response, for one reader at a time.

    It holds its call's permit until the body has ended or the connection is closed. Its call's deadline timer must know
    it, for its limits: a read costs no timer of its own.

    Args:
        call: The request that it answers.
        response: Its response, head read.
        broken: What the body raises if the connection breaks; `OSError` is among it.
        first: Bytes of the body that were read already.
    """

    __slots__ = (
        "__weakref__",
        "_broken",
        "_content",
        "_decoder",
        "_event_seen",
        "_fault",
        "_first",
        "_idle",
        "_loop",
        "_reading",
        "_response",
        "call",
        "ended",
        "status",
        "when",
    )

    def __init__(self, call: Call, response: Response, broken: tuple[type[Exception], ...], first: bytes = b"") -> None:
        self.call = call
        self.status: Final = response.status
        self.ended = False
        """Whether the body has been read to its end."""
        self._response = response
        self._content = response.content
        self._broken = broken
        self._first = first
        self._decoder = SSEDecoder()
        self._fault: LLMError | None = None
        self._reading = False
        self._idle = call.request.timeouts.idle
        self._event_seen = False
        self.when = math.inf
        """The deadline of the wait that is going on."""
        self._loop: asyncio.AbstractEventLoop | None = call.deadline_timer.loop  # None once it is closed

    @property
    def stray(self) -> str:
        """What the body held beside events and comments."""
        return self._decoder.stray

    @property
    def closed(self) -> bool:
        """Whether nothing more will come: it ended, or it was aborted."""
        return self._loop is None

    async def read(self) -> list[Event]:
        """The next events, at least one; an empty list if the body has ended.

        Raises:
            LLMTimeoutError: phase "first_byte", "idle" or "total".
            LLMStreamError: the connection broke, or an event is too large.
            LLMError: the one that it was aborted with.
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
            self._expect(self._loop.time())
            while True:
                data, self._first = self._first, b""
                if not data:
                    data = await self._content.readany()
                    data = data if self._event_seen else self._begin(data)
                if not data:
                    self._end()
                    return self._decoder.close()
                if events := self._decoder.feed(data):
                    self._event_seen = True
                    self.call.note_first_event(events[0])
                    return events
        except BaseException as exc:
            self.abort()
            if isinstance(exc, LLMError) or not isinstance(exc, self._broken):
                raise  # first, because our own timeouts are OSErrors as well
            if self._fault is not None:
                raise self._fault from None  # that exception is only the sound of our own closing
            raise self._cut(exc) from exc
        finally:
            self._reading = False
            self.when = math.inf

    def _begin(self, data: bytes) -> bytes:
        """The bytes of the first event, for which somebody waits; what came with it is left for later.

        Only what the network brings is cut, and once: cutting off one comment after the other would take time by the
        square of their number.
        """
        end = data.find(b"\n\n") + 2
        if end < 2:
            return data
        self._first = data[end:]
        return data[:end]

    def look(self) -> bool:
        """Sees whether the first event has arrived, though nobody may be reading; tells whether to look again later.

        What arrived is kept for the reader. If it is an error, or nothing will come, the permit is given back: others
        wait for what has failed.
        """
        if self._loop is None or self._event_seen or self.call.permit is None or not self.call.permit.is_first_request:
            return False
        if self._reading:
            return not self._content.at_eof()
        try:
            self._first += self._content.read_nowait()
            events = SSEDecoder().feed(self._first)
        except (LLMError, *self._broken):  # type: ignore[misc]  # it is a tuple of classes
            self.call.release()  # the reader will meet it
            return False
        if events:
            self.call.note_first_event(events[0])
        elif not self._content.at_eof():
            return True
        if self.call.permit.is_first_request:
            self.call.release()
        return False

    async def drain(self) -> None:
        """Waits a bounded moment for the end of the body, and gives up the connection if it does not come."""
        if self._loop is None:
            return
        if self._reading or self._loop.is_closed():  # by another task: it is woken by the closing
            self.abort()
            return
        self._reading = True
        try:
            if not self._content.at_eof():
                async with asyncio.timeout(DRAIN):
                    while await self._content.readany():
                        pass
        except self._broken:  # a TimeoutError is an OSError
            self.abort()
        except BaseException:
            self.abort()
            raise
        else:
            self._end()
        finally:
            self._reading = False

    def abort(self, fault: LLMError | None = None) -> None:
        """Closes the connection and gives the permit back, now. A reader, now or later, gets `fault`."""
        if self._loop is not None:
            self._fault = fault
            self._response.close()
            self._finish()

    def _end(self) -> None:
        if self._loop is not None:
            self.ended = True
            self._finish()

    def _finish(self) -> None:
        self._loop = None
        self.call.release()

    # Time

    def _expect(self, now: float) -> None:
        """Sets the deadline for the wait that begins, and notes who waits."""
        call = self.call
        if now >= call.total_deadline:  # also where there is always something to read, and no wait to time
            raise call.timed_out("total")
        if call.permit is not None:
            call.permit.note_read(now, asyncio.current_task(call.deadline_timer.loop))
        if not self._event_seen:
            self.when = call.when
        elif self._idle is None:
            self.when = call.total_deadline
        else:
            self.when = min(now + self._idle, call.total_deadline)
        call.deadline_timer.wake_at(self.when)

    def on_deadline(self) -> None:
        """The wait has been too long."""
        phase: Phase = "idle" if self._event_seen else "first_byte"
        self.abort(self.call.timed_out("total" if self.when >= self.call.total_deadline else phase))

    def _given_up(self) -> LLMStreamError:
        why = "" if self._loop is None else ": the event loop that it was opened in is closed"
        self.abort()
        return LLMStreamError(f"the stream was given up{why}", status=self.status, context=self.call.context())

    def _cut(self, exc: BaseException) -> LLMStreamError:
        return LLMStreamError(
            "the connection broke in mid-stream",
            exc,
            hint="the server stopped, crashed or was cut off; what had arrived is in .partial",
            status=self.status,
            context=self.call.context(),
        )

    def __del__(self) -> None:
        loop = getattr(self, "_loop", None)  # it may not have come that far
        if loop is None:
            return
        try:
            self._abandon(loop)
        finally:  # last, because it may be an error
            warnings.warn(
                f"unclosed stream of {self.call.request.operation} with model {self.call.request.model!r}:"
                " read it to its end, or leave it by `async with` or `aclose()`",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def _abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Closes the connection and gives the permit back, in the loop's own thread."""
        if loop.is_closed():
            return
        try:
            here = asyncio.get_running_loop() is loop
        except RuntimeError:
            here = False
        self._loop = None
        if here:
            _abandon(self._response, self.call)
        else:  # collected in another thread, or between two runs of the loop
            loop.call_soon_threadsafe(_abandon, self._response, self.call)


def _abandon(response: Response, call: Call) -> None:
    response.close()
    call.release()
