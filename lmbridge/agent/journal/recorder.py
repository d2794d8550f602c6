"""`RunRecorder`: writes the steps of one run to a journal, and replays the steps from before an interruption."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from lmbridge.agent.journal.journal import JournalState, read_recording
from lmbridge.agent.journal.run_store import RunStore
from lmbridge.agent.journal.steps import (
    BegunStep,
    DoneStep,
    FailedStep,
    PlannedStep,
    Recording,
    ReplyStep,
    RunStart,
    StartedStep,
    Step,
    SummaryStep,
    describe_call,
    describe_end,
    describe_result,
)
from lmbridge.agent.journal_interface import FinishedRun, RecordedCall, RecordedReply, RecordedResult
from lmbridge.agent.model_reply import ModelReply
from lmbridge.errors import JournalError


class RunRecorder:
    """Implements `RunJournal` for one run in a file.

    Args:
        store: Writes the steps into the file.
        run_id: The id of the run. If the journal already has a run with this id, that run is resumed.
        start: The task and the options of the run. They are only written if the run is new.
    """

    def __init__(self, store: RunStore, run_id: str, start: RunStart) -> None:
        self._store = store
        self._run_id = run_id
        self._start = start
        self._recording = Recording()
        # The number of replies so far, and how many of them were replayed from the journal.
        self._replies = 0
        self._replayed = 0
        self._next_number = 0
        # The numbers of the replies without calls since the last one with calls. If the run fails, it may be because of
        # them, so the model is asked again when the run is resumed.
        self._without_calls: list[int] = []
        self._replayed_seconds = 0.0
        self._resumed_at = time.monotonic()

    @property
    def run_id(self) -> str:
        """See `RunJournal`."""
        return self._run_id

    @property
    def seconds_spent(self) -> float:
        """See `RunJournal`."""
        return self._recording.seconds

    def seconds(self) -> float:
        """See `RunJournal`."""
        if self.is_replaying:
            return self._replayed_seconds
        return self._recording.seconds + time.monotonic() - self._resumed_at

    async def open(self) -> FinishedRun | None:
        """See `RunJournal`."""
        stored = await self._store.open_run(self._run_id, self._start)
        self._next_number = len(stored)
        self._recording = read_recording(self._run_id, stored, path=self._store.path)
        self._resumed_at = time.monotonic()
        return self._recording.finished

    async def begin(self, model: str | None, tool_names: Sequence[str]) -> None:
        """See `RunJournal`."""
        begun = self._recording.begun
        if begun is None:
            await self._add(BegunStep(model=model, tools=list(tool_names)))
        elif model != begun.model:
            message = f"the run {self._run_id!r} began with model {begun.model!r}, and would be resumed with {model!r}"
            raise self._mismatch(message, "use the same model")
        elif missing := [name for name in begun.tools if name not in tool_names]:
            message = f"the run {self._run_id!r} lacks tools that it began with: {', '.join(missing)}"
            raise self._mismatch(message, "pass the same tools")

    def next_reply(self, round_number: int) -> RecordedReply | None:
        """See `RunJournal`."""
        if self._replayed == len(self._recording.replies):
            return None
        reply, recorded = self._recording.replies[self._replayed]
        if recorded.round != round_number and not recorded.is_dropped:
            raise self._mismatch(
                f"reply {reply.number + 1} of the run {self._run_id!r} belongs to round {recorded.round}, and not to"
                f" round {round_number}",
                f"the run was begun by lmbridge {self._start.version}; resume it with that version",
            )
        self._replayed += 1
        self._replies = self._replayed
        self._replayed_seconds = self._recording.call_seconds.get(reply.number, reply.seconds)
        self._note_calls(reply.number, has_calls=bool(reply.reply.calls) or recorded.is_dropped)
        return recorded

    @property
    def is_replaying(self) -> bool:
        """See `RunJournal`."""
        return self._replayed < len(self._recording.replies)

    def next_summary(self) -> ModelReply | None:
        """See `RunJournal`."""
        summaries = self._recording.summaries.get(self._replies)
        return summaries.pop(0) if summaries else None

    async def add_summary(self, reply: ModelReply) -> None:
        """See `RunJournal`."""
        await self._add(SummaryStep(number=self._replies, seconds=self.seconds(), reply=reply))

    async def add_reply(self, reply: RecordedReply) -> None:
        """See `RunJournal`."""
        number = self._replies
        self._replies += 1
        self._note_calls(number, has_calls=bool(reply.reply.calls))
        await self._add(
            ReplyStep(
                number=number,
                round=reply.round,
                seconds=self.seconds(),
                served_model=reply.served_model,
                image_place=reply.image_place,
                reply=reply.reply,
            )
        )

    def _note_calls(self, number: int, *, has_calls: bool) -> None:
        if has_calls:
            self._without_calls.clear()
        else:
            self._without_calls.append(number)

    def calls_of_reply(self) -> Mapping[int, RecordedCall]:
        """See `RunJournal`."""
        return self._recording.calls.get(self._replies - 1, {})

    async def plan(self, calls: Sequence[RecordedCall]) -> None:
        """See `RunJournal`."""
        described = [describe_call(call) for call in calls]
        await self._add(PlannedStep(number=self._replies - 1, seconds=self.seconds(), calls=described))

    async def start(self, place: int) -> None:
        """See `RunJournal`."""
        await self._add(StartedStep(number=self._replies - 1, place=place, seconds=self.seconds()))

    async def finish(self, place: int, result: RecordedResult) -> None:
        """See `RunJournal`."""
        described = describe_result(result)
        await self._add(DoneStep(number=self._replies - 1, place=place, seconds=self.seconds(), result=described))

    async def end(self, finished: FinishedRun) -> None:
        """See `RunJournal`."""
        await self._add(describe_end(finished, self.seconds()), state="finished")

    async def fail(self, error: BaseException) -> None:
        """See `RunJournal`."""
        failed = FailedStep(
            seconds=self.seconds(), error=str(error), kind=type(error).__name__, dropped=list(self._without_calls)
        )
        await self._add(failed, state="failed")

    async def close(self) -> None:
        """See `RunJournal`."""
        await self._store.release_run(self._run_id)

    async def _add(self, step: Step, *, state: JournalState | None = None) -> None:
        number = self._next_number
        self._next_number += 1
        await self._store.add_step(self._run_id, number, step, state)

    def _mismatch(self, message: str, hint: str) -> JournalError:
        return JournalError(message, problem="mismatch", hint=hint, path=self._store.path)
