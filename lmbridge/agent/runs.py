"""A run: its task, the handle to it, and the streams of its events."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Final, Self

from lmbridge.agent.cancel import OwnTask
from lmbridge.agent.channel import Channel
from lmbridge.agent.events import RunEvent, RunFinished
from lmbridge.agent.history import History
from lmbridge.agent.loop import Loop
from lmbridge.agent.record import Record
from lmbridge.agent.result import ENDINGS, RunResult, StopReason
from lmbridge.agent.settings import Settings
from lmbridge.agent.source import Source
from lmbridge.agent.switching import Admission, Ticket
from lmbridge.agent.toolset import Equip, Toolset
from lmbridge.errors import LLMError, MaxRoundsExceededError, TaskCancelledError

# A ticket and not the run: sockets and timers keep the context that they were made in, and would keep all of the run.
current_ticket: Final[ContextVar[Ticket | None]] = ContextVar("lmbridge_run", default=None)
"""That of the run whose tool is running, if one is."""


_running: Final[set[RunHandle]] = set()
"""The runs in flight: asyncio itself does not keep its tasks."""


class RunHandle:
    """A run that goes on by itself: what `agent.start` returns.

    It goes on whether anybody waits for it, listens to it, or keeps the handle.
    """

    def __init__(
        self,
        model: str | None,
        *,
        source: Source,
        admission: Admission,
        settings: Settings,
        equip: Equip,
        history: History,
        is_muted: bool = False,
    ) -> None:
        asyncio.get_running_loop()  # or raises, before there is a coroutine that nobody awaits
        self.id: Final = os.urandom(16).hex()
        self._has_begun = False
        self._beginning: asyncio.Future[None] | None = None  # for who waits for it
        self._source = source
        self._admission = admission
        self._settings = settings
        self._equip = equip
        self._record = Record(history)
        self._channel: Channel[RunEvent] = Channel(is_muted=is_muted)
        self.ticket: Final = Ticket(asked=model, parent=current_ticket.get(), cancel=self._cancel)
        self._stop_reason: StopReason = "running"
        self._task = OwnTask(self._main(), name=f"lmbridge-run-{self.id}", complete=self._complete)
        self._task.add_done_callback(self._close)
        _running.add(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} model={self._record.model!r} {self.stop_reason}>"

    @property
    def stop_reason(self) -> StopReason:
        """Why it ended, or "running"."""
        return self._stop_reason

    @property
    def done(self) -> bool:
        """Whether it has ended, in whichever way."""
        return self._task.done

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of the conversation so far: valid at any moment, to be gone on with later."""
        return self._record.history.snapshot(ended=self.done)

    @property
    def partial(self) -> RunResult:
        """The run so far, also while it goes on; `stop_reason` is "running" then."""
        return self._record.result(self._stop_reason)

    def cancel(self) -> bool:
        """Cancels the run, without waiting for its end; `await handle.result()` waits, and raises.

        Returns:
            False if it had ended before.
        """
        return self._cancel(TaskCancelledError("the run was cancelled by its handle"))

    def events(self) -> RunStream:
        """What the run tells from now on. Leaving it detaches, and the run goes on."""
        return RunStream(self, owns=False)

    async def result(self) -> RunResult:
        """Waits for the end of the run. Cancelled meanwhile, it cancels the run and waits for it.

        Raises:
            TaskCancelledError: the run was cancelled.
            MaxRoundsExceededError: it used up its rounds.
            LLMError: it failed; `.partial` is the run so far.
        """
        if self._is_current():
            raise LLMError("a run cannot wait for itself", hint="wait for it outside of its own tools")
        await self._task.wait()
        return self._task.outcome()

    # Inside

    async def begun(self) -> None:
        """Waits until it has its tools, or has ended."""
        if not self._has_begun:
            self._beginning = self._beginning or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._beginning)

    def _begin(self) -> None:
        self._has_begun = True
        if self._beginning is not None and not self._beginning.done():
            self._beginning.set_result(None)

    def _cancel(self, error: TaskCancelledError) -> bool:
        return self._task.cancel(error)

    async def _leave(self, error: TaskCancelledError) -> None:
        """Cancels the run and waits for its end, unless it is one of its own tools that does so."""
        if self._is_current():
            self._cancel(error)
        else:
            await self._task.end(error)

    def _is_current(self) -> bool:
        """Whether this is called by one of its own tools."""
        ticket = current_ticket.get()
        return ticket is not None and (ticket is self.ticket or self.ticket in ticket.ancestors())

    async def _main(self) -> RunResult:
        current_ticket.set(self.ticket)
        try:
            stop = await self._within_time()
            self._task.check()  # something on the way may have swallowed the cancel
        except asyncio.CancelledError as error:
            self._stop_reason = "cancelled" if self._task.stopping else "error"
            if self._task.stopping:
                raise
            raise LLMError(
                "the run was not cancelled, but something that it waited for",
                error,
                hint="look for what `approve`, a provider of tools, or the client awaits",
                context={"operation": "agent run", "model": self._record.model},
                partial=self.partial,
            ) from error
        except Exception as error:  # noted, not kept: whatever ended the run goes on
            self._stop_reason = "error"
            if isinstance(error, LLMError):
                error.partial = self.partial
            raise
        self._stop_reason = stop
        result = self.partial
        if stop == "max_rounds":
            raise MaxRoundsExceededError(
                f"the run did not come to an answer within {result.rounds} rounds",
                result=result,
                hint=f"{ENDINGS['max_rounds'][1]}; what it did is in .result",
                context={"operation": "agent run", "model": result.model},
            )
        self._channel.put_last(RunFinished(result))
        return result

    async def _within_time(self) -> StopReason:
        if self._settings.max_seconds is None:
            return await self._admitted()
        clock = asyncio.timeout(self._settings.max_seconds)
        try:
            async with clock:
                return await self._admitted()
        except TimeoutError as error:
            if isinstance(error, LLMError) or not clock.expired():
                raise
            self._record.cut()
            return "budget"

    async def _admitted(self) -> StopReason:
        await self._admission.enter(self.ticket)
        try:
            model = self._record.model = self.ticket.model
            context = await self._source.context_length(model)
            async with self._equip(context) as equipment:
                self._record.errors = equipment.errors
                self._record.history.tell(equipment.note)
                self._begin()
                return await self._loop(equipment.tools, context).run()
        finally:
            self._admission.leave(self.ticket)

    def _loop(self, tools: Toolset, context: int | None) -> Loop:
        stopping = lambda: self._task.stopping  # noqa: E731 - a property as a function
        return Loop(
            self.id,
            source=self._source,
            settings=self._settings,
            tools=tools,
            context=context,
            record=self._record,
            channel=self._channel,
            stopping=stopping,
        )

    def _complete(self, error: TaskCancelledError) -> None:
        self._stop_reason = "cancelled"
        error.partial = self.partial
        error.context = {"operation": "agent run", "model": self._record.model, **error.context}

    def _close(self) -> None:
        _running.discard(self)
        self._begin()
        if self._stop_reason == "running":  # it was cancelled before it began
            self._stop_reason = "cancelled" if self._task.was_cancelled else "error"
        self.ticket.cancel = _nothing
        # A cancelled run tells no text any more: nobody is to take it for part of an answer.
        self._channel.close(discard=self._stop_reason == "cancelled")


class RunStream(AsyncGenerator[RunEvent, None]):
    """The events of a run: what `agent.stream` and `handle.events()` return.

    Iterate it, once and by one task at a time; it is an async context manager too. It ends after `RunFinished`;
    anything else raises, with `.partial`. Leaving that of `agent.stream` early, in any way, cancels the run and waits
    for its end. Leaving that of `handle.events()` only ends the listening.
    """

    def __init__(self, run: RunHandle, *, owns: bool) -> None:
        self._run = run
        self._owns = owns
        self._events = run._channel.subscribe()  # noqa: SLF001 - two halves of one thing
        self._loop = asyncio.get_running_loop()
        self._left = False
        self._ended = False

    @property
    def handle(self) -> RunHandle:
        """The run."""
        return self._run

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._run!r}>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RunEvent:
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if event is None:
            raise self._end()
        self._ended = isinstance(event, RunFinished)
        return event

    def _end(self) -> Exception:
        """What the end of the events is to the reader; raises what ended the run."""
        if self._run.done:
            self._run._task.outcome()  # noqa: SLF001 - two halves of one thing
        if self._ended:
            return StopAsyncIteration()
        return TaskCancelledError("the events of the run were closed before its end", partial=self._run.partial)

    async def asend(self, value: None) -> RunEvent:
        """The next event; a stream takes no values."""
        if value is not None:
            raise TypeError(f"a {type(self).__name__} takes no values; iterate it")
        return await self.__anext__()

    async def athrow(self, typ: Any, val: Any = None, tb: TracebackType | None = None) -> RunEvent:
        """Leaves the stream and raises."""
        await self.aclose()
        error = typ if isinstance(typ, BaseException) else typ() if val is None else val
        raise error.with_traceback(tb) if tb is not None else error

    async def aclose(self) -> None:
        """Leaves the stream, from any task; idempotent."""
        self._left = True
        if self._owns and not self._ended:
            # Not the events first: whoever reads them is to get the error of the run.
            await self._run._leave(TaskCancelledError("the run was cancelled: its events were left"))  # noqa: SLF001 - its own run
        if not self._owns or self._run.done:
            self._events.leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if getattr(self, "_left", True) or self._ended or self._run.done or self._loop.is_closed():
            return
        if self._owns:
            warnings.warn(
                f"{self!r} was dropped before its end; use `async with`, or aclose()",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
            error = TaskCancelledError("the run was cancelled: its events were dropped")
            self._run._task.cancel_from_anywhere(error)  # noqa: SLF001 - two halves of one thing
        self._loop.call_soon_threadsafe(self._events.leave)


def _nothing(_error: TaskCancelledError) -> None:
    """What remains of the cancel of a run that has ended."""
