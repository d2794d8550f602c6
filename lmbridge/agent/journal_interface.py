"""`RunJournal`: what a run writes into its journal, and what it reads from there when it is resumed.

A resumed run is not restored from a copy of its state. It starts again from the beginning, and as long as the journal
has records, they stand in for the model and the tools: the loop makes every decision once more, and arrives at the same
state. A copy of the state would have to be kept in step with each module that holds a part of it.

The loop knows a journal only through this protocol. Without a journal, the only cost is a comparison with None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import attrs

from lmbridge.agent.model_reply import ModelReply
from lmbridge.agent.result import RunResult, ToolRecord
from lmbridge.agent.result_images import ImagePlace
from lmbridge.agent.tools import ToolCall

UNCERTAIN_RESULT: Final = (
    "No result: the program was interrupted while the tool was running. The call may have happened, completely or in"
    " part. Find out whether it did before you make it again."
)
"""What the model reads about a call that had started before an interruption and is not known to have ended."""


@attrs.frozen(kw_only=True)
class RecordedReply:
    """A reply of the model, with what the run learned while it arrived."""

    round: int
    """The number of the round."""
    reply: ModelReply
    """The reply."""
    served_model: str | None
    """The first model that the server named in the replies of the run."""
    image_place: ImagePlace
    """Where the images of results were in the request."""
    is_dropped: bool = False
    """Whether this reply may be why the run failed, so that the model is asked again. Its tokens still count."""


@attrs.frozen(kw_only=True)
class RecordedResult:
    """The result of a call, from which its `ToolRecord` is made."""

    text: str
    """The text for the model, without the warning about a repetition."""
    is_error: bool
    """See `ToolRecord.is_error`."""
    images: tuple[Mapping[str, Any], ...] = ()
    """See `ToolRecord.images`."""
    seconds: float = 0.0
    """See `ToolRecord.seconds`."""

    @classmethod
    def of(cls, record: ToolRecord) -> RecordedResult:
        """Returns what a journal keeps of the record of a call."""
        return cls(text=record.text, is_error=record.is_error, images=record.images, seconds=record.seconds)


@attrs.define(kw_only=True)
class RecordedCall:
    """A call of a reply, as a journal records it. Identical calls that are made only once are recorded as one."""

    place: int
    """The index of the call in the list of the calls of its reply, from 0."""
    id: str
    """The id of the call."""
    name: str
    """The name of the tool in the run."""
    arguments: Mapping[str, Any] | None
    """The arguments that the model requested; None if they could not be read."""
    refusal: str | None = None
    """The refusal that the model reads if the user did not allow the call; None if the call was allowed."""
    edited: ToolCall | None = None
    """The call that the user wanted instead of this one, or None."""
    has_started: bool = False
    """Whether the call has been started, at least once."""
    result: RecordedResult | None = None
    """The result; None if the call has not ended."""


@attrs.frozen
class FinishedRun:
    """The result of a run that has ended without an error, or because it had used up a limit."""

    result: RunResult
    """The result. If it comes from a file, it has neither the log of the rounds nor the output."""
    has_last_words: bool
    """See `RunRecord.has_last_words`."""


class RunJournal(Protocol):
    """Keeps the steps of one run, and replays those from before an interruption.

    Each async method returns when its step is on disk. If the caller is cancelled, the step is written nevertheless.
    """

    @property
    def run_id(self) -> str:
        """The id of the run, which stays the same when the run is resumed."""
        ...

    @property
    def seconds_spent(self) -> float:
        """How long the run had been working before it was interrupted, in seconds; 0 for a new run."""
        ...

    def seconds(self) -> float:
        """Returns how long the run has been working so far, in seconds.

        While recorded steps are replayed, this is the value at which the last replayed step was recorded.
        """
        ...

    async def open(self) -> FinishedRun | None:
        """Opens the journal for this run, and reads the steps from before an interruption.

        Returns:
            The result of the run if it is already finished, so that there is nothing left to do; otherwise None.

        Raises:
            JournalError: The journal cannot be used, or the run is in progress elsewhere.
        """
        ...

    async def begin(self, model: str | None, tool_names: Sequence[str]) -> None:
        """Records the model and the tools of a run that has been admitted.

        Raises:
            JournalError: A resumed run has another model than before, or lacks tools that it had.
        """
        ...

    def next_reply(self, round_number: int) -> RecordedReply | None:
        """Returns the next reply from before the interruption, or None if the model has to be asked.

        Raises:
            JournalError: The reply belongs to another round, because this version of lmbridge decides differently.
        """
        ...

    @property
    def is_replaying(self) -> bool:
        """Whether there are more replies from before the interruption."""
        ...

    def next_summary(self) -> ModelReply | None:
        """Returns the summary that the model wrote at this point before the interruption, or None."""
        ...

    async def add_summary(self, reply: ModelReply) -> None:
        """Records a summary that the model has written because its context was full."""
        ...

    async def add_reply(self, reply: RecordedReply) -> None:
        """Records a reply of the model."""
        ...

    def calls_of_reply(self) -> Mapping[int, RecordedCall]:
        """Returns the calls of the last reply that were planned before the interruption, by their `place`."""
        ...

    async def plan(self, calls: Sequence[RecordedCall]) -> None:
        """Records the calls of the last reply, before any of them starts."""
        ...

    async def start(self, place: int) -> None:
        """Records that a call of the last reply is about to be made."""
        ...

    async def finish(self, place: int, result: RecordedResult) -> None:
        """Records the result of a call of the last reply."""
        ...

    async def end(self, finished: FinishedRun) -> None:
        """Records the result of the run."""
        ...

    async def fail(self, error: BaseException) -> None:
        """Records the error that ended the run. The run can still be resumed later."""
        ...

    async def close(self) -> None:
        """Releases the run as soon as all its steps are on disk. It is idempotent."""
        ...
