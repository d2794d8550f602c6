"""`RunHandle`, which owns the task of a run, and `RunStream`, which iterates over the events of the run."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final, Generic

import attrs

from lmbridge._closable_stream import ClosableStream
from lmbridge._copying import NotCopyable
from lmbridge._scheduled_run import ScheduledRun, current_run
from lmbridge._tasks import call_in_loop
from lmbridge.agent.cancel import OwnTask
from lmbridge.agent.channel import Channel
from lmbridge.agent.client_source import ClientSource
from lmbridge.agent.events import RunEvent, RunFinished
from lmbridge.agent.history import History, copy_messages
from lmbridge.agent.journal_interface import FinishedRun, RunJournal
from lmbridge.agent.loop import RunLoop
from lmbridge.agent.pause import PauseGate
from lmbridge.agent.result import ENDINGS, OutputT, RunResult, StopReason
from lmbridge.agent.run_record import RunRecord
from lmbridge.agent.sampling import request_fields
from lmbridge.agent.settings import Settings
from lmbridge.agent.switching import RunAdmission, RunPermit
from lmbridge.agent.tool_ranking import EmbeddingRanker, KeywordRanker
from lmbridge.agent.tool_search import ToolSearchOptions
from lmbridge.agent.tool_sources import RunInfo, ToolSources
from lmbridge.agent.toolset import Toolset
from lmbridge.client.content_parts import text_of_part
from lmbridge.client.structured import InvalidAnswerError, answer_format_of
from lmbridge.errors import JournalError, LLMError, MaxRoundsExceededError, RunIncompleteError, TaskCancelledError
from lmbridge.observe.watches import RunWatch

# The variable refers to the permit and not to the run, because sockets and timers keep the context in which they were
# created. If it referred to the run, they would keep the whole conversation alive.
current_permit: Final[ContextVar[RunPermit | None]] = ContextVar("lmbridge_run", default=None)
"""The permit of the run to which the current task belongs, for example as one of its tools; None outside of a run."""


_runs_in_flight: Final[set[RunHandle]] = set()
"""The runs in flight, kept alive because asyncio holds only weak references to tasks."""


class RunHandle(NotCopyable, Generic[OutputT]):
    """A run that is in progress, as `agent.start` returns it.

    The run goes on even if nothing awaits it, nothing reads its events, and the handle is dropped::

        handle = agent.start("Summarise the report.")
        ...
        result = await handle.result()

    Attributes:
        id: The id of the run: a random string, unless a `JournalEntry` has set another one.
    """

    _instead_of_a_copy = "copy the RunResult that result() returns"

    def __init__(
        self,
        model: str | None,
        *,
        source: ClientSource,
        admission: RunAdmission,
        settings: Settings,
        tool_sources: ToolSources,
        history: History,
        is_muted: bool = False,
        journal: RunJournal | None = None,
        task: str | list[Any] = "",
    ) -> None:
        # Without a running loop, this raises an error before a coroutine is created that would never be awaited.
        loop = asyncio.get_running_loop()
        self.id: Final = os.urandom(16).hex() if journal is None else journal.run_id
        self._journal = journal
        # The result from the journal, if the run had already finished when it was resumed.
        self._finished: RunResult | None = None
        self._has_begun = False
        self._begun_waiter: asyncio.Future[None] | None = None
        self._source = source
        self._admission = admission
        self._settings = settings
        self._tool_sources = tool_sources
        self._record = RunRecord(history)
        self._user_task = task
        if settings.observers is not None:
            self._record.watch = RunWatch(settings.observers, self.id)
        self._channel: Channel[RunEvent] = Channel(is_muted=is_muted)
        self.permit: Final = RunPermit(requested_model=model, parent=current_permit.get(), cancel=self._cancel)
        inherited = current_run.get()
        is_part_of_another = inherited is not None and not inherited.is_over and inherited.loop is loop
        self._own_scheduled_run = None if is_part_of_another else ScheduledRun(settings.priority, loop)
        self._scheduled_run = self._own_scheduled_run or inherited
        self._stop_reason: StopReason = "running"
        self._gate = PauseGate()
        self._time_limit: asyncio.Timeout | None = None
        # What is left of max_seconds while the run is paused.
        self._seconds_left: float | None = None
        self._task = OwnTask(self._main(), name=f"lmbridge-run-{self.id}")
        self._task.add_done_callback(self._on_end)
        _runs_in_flight.add(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} model={self._record.model!r} {self.stop_reason}>"

    @property
    def stop_reason(self) -> StopReason:
        """Why the run ended, or "running"."""
        return self._stop_reason

    @property
    def done(self) -> bool:
        """Whether the run has ended, for any reason."""
        return self._task.done

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of the conversation so far, which is valid at any moment and can be continued by another run."""
        if self._finished is not None:
            return copy_messages(self._finished.messages)
        return self._record.history.snapshot(ended=self.done)

    @property
    def partial(self) -> RunResult:
        """The run so far. While the run is in progress, the `stop_reason` of this result is "running"."""
        return self._finished or self._record.result(self._stop_reason)

    def cancel(self) -> bool:
        """Cancels the run, without waiting for its end. `await handle.result()` waits for the end, and then raises.

        Returns:
            False if the run had already ended.
        """
        return self._cancel(TaskCancelledError("the run was cancelled by its handle"))

    async def aclose(self, reason: str = "the run was cancelled by its handle") -> None:
        """Cancels the run and waits for its end. It does not raise the error of the run, and is idempotent.

        A tool of the run itself cannot wait for the end of the run. If such a tool calls this method, the run is
        cancelled and the method returns at once.

        Args:
            reason: The message of the `TaskCancelledError` that `result()` raises.
        """
        error = TaskCancelledError(reason)
        if self._is_called_by_own_tool():
            self._cancel(error)
        else:
            await self._task.end(error)

    @property
    def is_paused(self) -> bool:
        """Whether the run has been paused, and has neither been resumed nor ended since."""
        return self._gate.is_closed and not self.done

    def pause(self) -> bool:
        """Holds the run before its next generation or tool call, until `resume` is called.

        A generation or a tool in progress is not interrupted. If the run has already had its last generation, there is
        nothing left to hold, and it ends. The time until `resume` does not count towards `max_seconds`. A paused run
        can be cancelled. Calling this method again does nothing.

        Returns:
            False if the run had already ended.
        """
        if self.done:
            return False
        if not self._gate.is_closed:
            self._gate.close()
            self._stop_clock()
        return True

    def resume(self) -> bool:
        """Resumes a paused run. Calling it for a run that is not paused does nothing.

        Returns:
            False if the run had already ended.
        """
        if self._gate.is_closed:
            self._gate.open()
            if self._seconds_left is not None and self._time_limit is not None:
                self._time_limit.reschedule(asyncio.get_running_loop().time() + self._seconds_left)
            self._seconds_left = None
        return not self.done

    def _stop_clock(self) -> None:
        limit = self._time_limit
        if limit is not None and not limit.expired() and (when := limit.when()) is not None:
            self._seconds_left = max(0.0, when - asyncio.get_running_loop().time())
            limit.reschedule(None)

    def events(self) -> RunStream[OutputT]:
        """Returns the events of the run from now on. Leaving the stream detaches from the run, which goes on."""
        return RunStream(self, owns_run=False)

    async def result(self) -> RunResult[OutputT]:
        """Waits for the end of the run, and returns its result. If the caller is cancelled, so is the run.

        Raises:
            TaskCancelledError: The run was cancelled.
            MaxRoundsExceededError: The run used up its rounds.
            RunIncompleteError: The run has an `output_type`, and ended without an answer.
            LLMError: The run failed; `.partial` is the run so far. Or a tool of this run called the method.
        """
        if self._is_called_by_own_tool():
            raise LLMError("a run cannot wait for itself", hint="await the result outside of the tools of this run")
        await self._task.wait()
        return self._outcome()

    async def wait_begun(self) -> None:
        """Waits until the run has been admitted and has its tools, or has ended."""
        if not self._has_begun:
            self._begun_waiter = self._begun_waiter or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._begun_waiter)

    # The run itself

    def _mark_begun(self) -> None:
        self._has_begun = True
        if self._begun_waiter is not None and not self._begun_waiter.done():
            self._begun_waiter.set_result(None)

    def _cancel(self, error: TaskCancelledError) -> bool:
        return self._task.cancel(error)

    def _is_called_by_own_tool(self) -> bool:
        permit = current_permit.get()
        return permit is not None and (permit is self.permit or self.permit in permit.ancestors())

    async def _main(self) -> RunResult:
        current_permit.set(self.permit)
        current_run.set(self._scheduled_run)
        result = await (self._run_observed(watch) if (watch := self._record.watch) else self._run())
        self._channel.put_last(RunFinished(result))
        return result

    async def _run(self) -> RunResult:
        return await (self._run_to_result() if self._journal is None else self._run_with_journal(self._journal))

    async def _run_observed(self, watch: RunWatch) -> RunResult:
        """Does the work of the run, and notifies the observers of its beginning and of its end, however it ends."""
        watch.begun(model=self.permit.requested_model, task=_task_text(self._user_task))
        error: BaseException | None = None
        try:
            return await self._run()
        except BaseException as exc:
            error = exc
            raise
        finally:
            record = self._record
            model = record.model or record.served_model
            watch.ended(self._stop_reason, error, model=model, rounds=record.rounds, usage=record.usage)

    async def _run_with_journal(self, journal: RunJournal) -> RunResult:
        """Does the work of the run, and records its result or its error in the journal.

        A cancellation is not recorded, so that the run can be resumed.
        """
        try:
            if (finished := await journal.open()) is not None:
                return self._replay_result(finished)
            try:
                result = await self._run_to_result()
            except RunIncompleteError as error:
                await journal.end(FinishedRun(error.result, self._record.has_last_words))
                raise
            except Exception as error:
                # Whatever ended the run, the journal lists it as failed, unless the journal itself is the reason.
                if not isinstance(error, JournalError):
                    await journal.fail(error)
                raise
            await journal.end(FinishedRun(result, self._record.has_last_words))
        except JournalError as error:
            self._stop_reason = "error"
            error.completed(partial=self.partial)
            raise
        finally:
            await journal.close()
        return result

    def _replay_result(self, finished: FinishedRun) -> RunResult:
        """Returns the result of a run that was already finished, or raises the error with which it ended.

        Raises:
            RunIncompleteError: See `_checked`.
            JournalError: The output type does not accept the output of the run.
        """
        result, output_type = finished.result, self._settings.output_type
        if output_type is not None and result.has_answer:
            try:
                output = answer_format_of(output_type).decode(result.text)
            except InvalidAnswerError as error:
                # A type may have the same schema as before, and still refuse a value that it accepted then.
                raise JournalError(
                    f"the run {self.id!r} cannot be resumed: its output type does not accept its output: {error}",
                    problem="mismatch",
                    hint="pass the same output_type= as when the run began",
                ) from error
            result = attrs.evolve(result, output=output)
        self._stop_reason, self._finished = result.stop_reason, result
        return self._checked(result)

    async def _run_to_result(self) -> RunResult:
        try:
            stop = await self._run_within_max_seconds()
            # A tool or a provider may have suppressed the cancellation.
            self._task.raise_if_cancelled()
            messages = await self._record.history.snapshot_in_slices()
        except asyncio.CancelledError as error:
            self._stop_reason = "cancelled" if self._task.stopping else "error"
            if self._task.stopping:
                raise
            raise LLMError(
                "the run was not cancelled, but something that it waited for was",
                error,
                hint="check what `approve`, the provider of tools, and the client await",
                context={"operation": "agent run", "model": self._record.model},
                partial=self.partial,
            ) from error
        except Exception as error:
            # Every other error ends the run as well. An error of lmbridge also gets the run so far.
            self._stop_reason = "error"
            if isinstance(error, LLMError):
                error.completed(partial=self.partial)
            raise
        self._stop_reason = stop
        return self._checked(self._record.result(stop, messages))

    def _checked(self, result: RunResult) -> RunResult:
        """Returns the result of a run that has ended.

        Raises:
            RunIncompleteError: The run has used up its rounds, or lacks its output.
        """
        stop = result.stop_reason
        if stop == "max_rounds" and not result.has_answer:
            raise MaxRoundsExceededError(
                f"the run did not reach an answer within {result.rounds} rounds",
                result=result,
                hint=f"{ENDINGS['max_rounds'][1]}; the run so far is in .result",
                context={"operation": "agent run", "model": result.model},
            )
        if self._settings.output_type is not None and not result.has_answer:
            meaning, hint = ENDINGS[stop]
            raise RunIncompleteError(
                f"the run ended without its output: {meaning}",
                result=result,
                hint=f"{hint}; the run so far is in .result",
                context={"operation": "agent run", "model": result.model},
            )
        return result

    async def _run_within_max_seconds(self) -> StopReason:
        if self._settings.max_seconds is None:
            return await self._run_when_admitted()
        spent = 0.0 if self._journal is None else self._journal.seconds_spent
        self._time_limit = time_limit = asyncio.timeout(max(0.0, self._settings.max_seconds - spent))
        try:
            async with time_limit:
                if self._gate.is_closed:
                    self._stop_clock()
                return await self._run_when_admitted()
        except TimeoutError as error:
            # The TimeoutError may also come from a tool or from the client.
            if isinstance(error, LLMError) or not time_limit.expired():
                raise
            self._record.truncate()
            return "budget"
        finally:
            # A timeout whose block has been left can no longer be rescheduled. But while the result of the run is being
            # prepared, a caller may still pause or resume the run.
            self._time_limit = None

    async def _run_when_admitted(self) -> StopReason:
        await self._admission.enter(self.permit)
        try:
            model = self._record.model = self.permit.model
            context_length = await self._source.context_length(model)
            info = RunInfo(run_id=self.id, model=model, context_length=context_length)
            async with self._tool_sources.open(info, self._search_options()) as opened:
                self._record.errors = opened.errors
                self._record.history.add_system_note(opened.note)
                if self._journal is not None:
                    await self._journal.begin(model, opened.toolset.all_names)
                self._mark_begun()
                return await self._loop(opened.toolset, context_length).run()
            # Reached only if the context manager of open_tools has suppressed the exception that ended the run.
            self._task.raise_if_cancelled()
            raise LLMError(
                "the context manager of open_tools suppressed the error that ended the run",
                hint="do not suppress exceptions in its __aexit__",
                context={"operation": "agent run", "model": model},
            )
        finally:
            self._admission.leave(self.permit)

    def _search_options(self) -> ToolSearchOptions:
        settings = self._settings
        choice = request_fields(settings.sampling).get("tool_choice")
        function = choice.get("function") if isinstance(choice, Mapping) else None
        return ToolSearchOptions(
            mode=settings.tool_search,
            max_definition_tokens=settings.max_definition_tokens,
            ranker=(
                KeywordRanker()
                if settings.embedding_model is None
                else EmbeddingRanker(self._source, settings.embedding_model)
            ),
            pinned=function.get("name") if isinstance(function, Mapping) else None,
        )

    def _loop(self, toolset: Toolset, context_length: int | None) -> RunLoop:
        return RunLoop(
            self.id,
            source=self._source,
            settings=self._settings,
            toolset=toolset,
            context_length=context_length,
            record=self._record,
            channel=self._channel,
            is_stopping=lambda: self._task.stopping,
            gate=self._gate,
            journal=self._journal,
        )

    def _outcome(self) -> RunResult:
        return self._task.outcome(self._complete_error)

    def _complete_error(self, error: TaskCancelledError) -> None:
        self._stop_reason = "cancelled"
        error.completed(context={"operation": "agent run", "model": self._record.model}, partial=self.partial)

    def _on_end(self) -> None:
        _runs_in_flight.discard(self)
        self._mark_begun()
        if self._stop_reason == "running":
            # The task was cancelled before its first step.
            self._stop_reason = "cancelled" if self._task.was_cancelled else "error"
        # The permit outlives the run in the contexts of sockets and timers, and must not keep the run alive.
        self.permit.cancel = _ignore_cancel
        # Unread text of a cancelled run is dropped: a listener must not take it for part of an answer.
        self._channel.close(discard=self._stop_reason == "cancelled")
        if self._own_scheduled_run is not None:
            self._own_scheduled_run.end()


class RunStream(ClosableStream[RunEvent], Generic[OutputT]):
    """The events of a run, as `agent.stream` and `handle.events()` return them.

    It is iterated once, by one task at a time, and is also an async context manager. It ends after `RunFinished`. If
    the run ends in any other way, the iteration raises its error, with `.partial`. Leaving the stream of `agent.stream`
    early, in any way, cancels the run and waits for its end. Leaving the stream of `handle.events()` only detaches from
    the run.
    """

    _instead_of_a_copy = "copy the events that it yields"

    def __init__(self, run: RunHandle[OutputT], *, owns_run: bool) -> None:
        self._run = run
        self._owns_run = owns_run
        self._events = run._channel.subscribe()  # noqa: SLF001 - the stream and its run share a module
        self._loop = asyncio.get_running_loop()
        self._has_left = False
        self._has_finished = False

    @property
    def handle(self) -> RunHandle[OutputT]:
        """The handle of the run."""
        return self._run

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._run!r}>"

    async def __anext__(self) -> RunEvent:
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if event is None:
            raise self._end_of_events()
        self._has_finished = isinstance(event, RunFinished)
        return event

    def _end_of_events(self) -> Exception:
        """Returns the exception that ends the iteration, or raises the error that ended the run."""
        if self._run.done:
            self._run._outcome()  # noqa: SLF001 - the stream and its run share a module
        if self._has_finished:
            return StopAsyncIteration()
        return TaskCancelledError("the events of the run were closed before its end", partial=self._run.partial)

    async def aclose(self) -> None:
        """Leaves the stream, from any task. It is idempotent."""
        self._has_left = True
        if self._owns_run and not self._has_finished:
            # The run is ended before the events: a task that reads them must get the run's own error.
            await self._run.aclose("the run was cancelled, because its event stream was closed before its end")
        if not self._owns_run or self._run.done:
            self._events.leave()

    def __del__(self) -> None:
        if getattr(self, "_has_left", True) or self._has_finished or self._run.done or self._loop.is_closed():
            return
        if self._owns_run:
            warnings.warn(
                f"{self!r} was dropped before its end; use `async with`, or aclose()",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
            error = TaskCancelledError("the run was cancelled, because its event stream was dropped")
            self._run._task.cancel_from_anywhere(error)  # noqa: SLF001 - the stream and its run share a module
        call_in_loop(self._loop, self._events.leave)


def _task_text(task: str | list[Any]) -> str:
    """Returns the text of a task that may have other content parts."""
    return task if isinstance(task, str) else "\n".join(filter(None, map(text_of_part, task)))


def _ignore_cancel(_error: TaskCancelledError) -> None:
    """Replaces the `cancel` of a permit whose run has ended."""
