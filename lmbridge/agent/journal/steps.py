"""The steps of a run, as they are stored in JSON, and `Recording`, the form in which a resumed run replays them.

A journal has these kinds of steps:

========  ==========================================================================================
begun     the run was admitted: its model, and the names of its tools
reply     the model has replied: the whole reply, with its calls and its usage
summary   the model has written a summary, because its context was full
planned   for each call of the last reply, whether it will be made, and if not, why
started   a call is about to be made
done      a call has ended: its result
failed    the run ended with an error, and can be resumed
ended     the run has ended: its stop reason and its answer
========  ==========================================================================================

The step "reply" and all steps of its calls have the `number` of the reply, which counts from 0. The `place` of a call
is its position among the calls of its reply, also from 0. `seconds` is how long the run had been working when the step
was recorded. Fields without a description mean the same as those of `RecordedReply`, `RecordedCall`, `RecordedResult`,
`ToolCall` or `RunResult`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import attrs
import msgspec

from lmbridge.agent.journal.database import StoredStep
from lmbridge.agent.journal_interface import FinishedRun, RecordedCall, RecordedReply, RecordedResult
from lmbridge.agent.model_reply import ModelReply
from lmbridge.agent.result import RunResult, StopReason
from lmbridge.agent.result_images import ImagePlace
from lmbridge.agent.tools import ToolCall
from lmbridge.errors import LLMError
from lmbridge.types import RunUsage

_T = TypeVar("_T")

_encode: Final = msgspec.json.Encoder().encode


@attrs.frozen(kw_only=True)
class RunStart:
    """The task and the options with which a run began, and what is needed to resume it."""

    task: Any
    """The task, as a string or as content parts."""
    messages: list[dict[str, Any]] | None
    """The conversation that the run continues; None for a new one."""
    model: str | None
    """The model that was requested for this run; None means the agent's."""
    settings: dict[str, Any]
    """The options of the agent and of the run, without functions, objects and types."""
    has_approve: bool
    """True if calls had to be approved."""
    output_schema: Any
    """The JSON schema of the output; None if the run has no output type."""
    extra: dict[str, Any]
    """What the program needs to open the tools of the run again, such as the names of MCP servers."""
    version: str
    """The version of lmbridge that began the run."""

    def output_mismatch(self, schema: Any) -> tuple[str, str] | None:
        """Returns why the run cannot be resumed with an output of this schema, and what to do; None if it can be.

        Args:
            schema: The JSON schema of the output type with which the run would be resumed; None if there is none.
        """
        if schema == self.output_schema:
            return None
        reason = "it needs its output type" if schema is None else "it did not begin with this output type"
        return reason, "pass the same output_type= as when the run began"


@attrs.frozen(kw_only=True)
class BegunStep:
    """The data of the step "begun"."""

    model: str | None
    tools: list[str]


@attrs.frozen(kw_only=True)
class ReplyStep:
    """The data of the step "reply"."""

    number: int
    round: int
    seconds: float
    served_model: str | None
    image_place: ImagePlace
    reply: ModelReply


@attrs.frozen(kw_only=True)
class SummaryStep:
    """The data of the step "summary"."""

    number: int
    """The number of the next reply."""
    seconds: float
    reply: ModelReply


@attrs.frozen(kw_only=True)
class EditedCall:
    """The call that the user wanted instead of the requested one."""

    name: str
    arguments: dict[str, Any]


@attrs.frozen(kw_only=True)
class StoredResult:
    """The result of a call."""

    text: str
    is_error: bool
    images: list[dict[str, Any]]
    seconds: float
    """How long the call took, in seconds."""


@attrs.frozen(kw_only=True)
class JournaledCall:
    """A call in the step "planned"."""

    place: int
    id: str
    name: str
    arguments: dict[str, Any] | None
    refusal: str | None
    edited: EditedCall | None
    result: StoredResult | None


@attrs.frozen(kw_only=True)
class PlannedStep:
    """The data of the step "planned"."""

    number: int
    seconds: float
    calls: list[JournaledCall]


@attrs.frozen(kw_only=True)
class StartedStep:
    """The data of the step "started"."""

    number: int
    place: int
    seconds: float


@attrs.frozen(kw_only=True)
class DoneStep:
    """The data of the step "done"."""

    number: int
    place: int
    seconds: float
    result: StoredResult


@attrs.frozen(kw_only=True)
class FailedStep:
    """The data of the step "failed"."""

    seconds: float
    error: str
    """The message of the error."""
    kind: str
    """The name of the class of the error."""
    dropped: list[int]
    """The numbers of the replies without calls since the last one with calls. They may be why the run failed, so a
    resumed run asks the model again in their place."""


@attrs.frozen(kw_only=True)
class RequestedCall:
    """A call in the step "ended"."""

    id: str
    name: str
    arguments: dict[str, Any] | None
    repaired: bool


@attrs.frozen(kw_only=True)
class EndedStep:
    """The data of the step "ended"."""

    seconds: float
    stop_reason: StopReason
    has_last_words: bool
    model: str | None
    rounds: int
    text: str
    reasoning: str
    usage: RunUsage
    messages: list[dict[str, Any]]
    tool_calls: list[RequestedCall]
    warnings: list[str]
    errors: dict[str, str]


Step = BegunStep | ReplyStep | SummaryStep | PlannedStep | StartedStep | DoneStep | FailedStep | EndedStep

_KINDS: Final[Mapping[str, type[Any]]] = {
    "begun": BegunStep,
    "reply": ReplyStep,
    "summary": SummaryStep,
    "planned": PlannedStep,
    "started": StartedStep,
    "done": DoneStep,
    "failed": FailedStep,
    "ended": EndedStep,
}
_NAMES: Final = {kind: name for name, kind in _KINDS.items()}


def encode(value: object) -> str:
    """Returns a start or the data of a step as JSON."""
    return _encode(value).decode()


def decode(data: str, kind: type[_T]) -> _T:
    """Returns a start or the data of a step.

    Raises:
        ValueError: The JSON does not describe such an object.
    """
    return msgspec.json.decode(data, type=kind)


def encode_step(step: Step) -> tuple[str, str]:
    """Returns the kind and the data of a step, as they are stored."""
    return _NAMES[type(step)], encode(step)


def decode_step(stored: StoredStep) -> Step:
    """Returns a step.

    Raises:
        ValueError: The kind of the step is unknown, or the data do not belong to this kind.
    """
    if stored.kind not in _KINDS:
        raise ValueError(f"unknown kind of step: {stored.kind!r}")
    step: Step = decode(stored.data, _KINDS[stored.kind])
    return step


def describe_call(call: RecordedCall) -> JournaledCall:
    """Returns a call as a part of the step "planned"."""
    edited = call.edited
    return JournaledCall(
        place=call.place,
        id=call.id,
        name=call.name,
        arguments=None if call.arguments is None else dict(call.arguments),
        refusal=call.refusal,
        edited=None if edited is None else EditedCall(name=edited.name, arguments=dict(edited.arguments or {})),
        result=None if call.result is None else describe_result(call.result),
    )


def describe_result(result: RecordedResult) -> StoredResult:
    """Returns the result of a call as a part of a step."""
    images = [dict(image) for image in result.images]
    return StoredResult(text=result.text, is_error=result.is_error, images=images, seconds=result.seconds)


def describe_end(finished: FinishedRun, seconds: float) -> EndedStep:
    """Returns the step "ended" of a run."""
    result = finished.result
    calls = [
        RequestedCall(
            id=call.id,
            name=call.name,
            arguments=None if call.arguments is None else dict(call.arguments),
            repaired=call.repaired,
        )
        for call in result.tool_calls
    ]
    return EndedStep(
        seconds=seconds,
        stop_reason=result.stop_reason,
        has_last_words=finished.has_last_words,
        model=result.model,
        rounds=result.rounds,
        text=result.text,
        reasoning=result.reasoning,
        usage=result.usage,
        messages=result.messages,
        tool_calls=calls,
        warnings=list(result.warnings),
        errors={name: str(error) for name, error in result.errors.items()},
    )


def _finished_run(ended: EndedStep) -> FinishedRun:
    result: RunResult = RunResult(
        text=ended.text,
        model=ended.model,
        rounds=ended.rounds,
        stop_reason=ended.stop_reason,
        messages=ended.messages,
        tool_calls=tuple(
            ToolCall(call.id, call.name, call.arguments, repaired=call.repaired) for call in ended.tool_calls
        ),
        usage=ended.usage,
        reasoning=ended.reasoning,
        has_answer=ended.stop_reason == "stop" or ended.has_last_words,
        errors={name: LLMError(text) for name, text in ended.errors.items()},
        warnings=tuple(ended.warnings),
    )
    return FinishedRun(result, ended.has_last_words)


@attrs.define
class Recording:
    """The steps of a run from before an interruption, in the form in which they are replayed."""

    begun: BegunStep | None = None
    """The model and the tools of the run; None if it had not been admitted."""
    finished: FinishedRun | None = None
    """The result of the run; None if it has not ended."""
    replies: list[tuple[ReplyStep, RecordedReply]] = attrs.field(factory=list)
    """The replies, in order."""
    summaries: dict[int, list[ModelReply]] = attrs.field(factory=dict)
    """The replies with summaries. The keys are the numbers of the replies that follow the summaries."""
    calls: dict[int, dict[int, RecordedCall]] = attrs.field(factory=dict)
    """The planned calls. The keys are the numbers of the replies, and the places of the calls in them."""
    call_seconds: dict[int, float] = attrs.field(factory=dict)
    """How long the run had been working when the last step of the calls of a reply was recorded, in seconds."""
    seconds: float = 0.0
    """How long the run had been working when its last step was recorded, in seconds."""

    @classmethod
    def of(cls, steps: Sequence[Step]) -> Recording:
        """Reads the steps of a run.

        Raises:
            ValueError: The steps contradict each other.
            IndexError: A step "failed" has the number of a reply that does not exist.
        """
        recording = cls()
        for step in steps:
            recording._add(step)
        return recording

    def _add(self, step: Step) -> None:
        if isinstance(step, BegunStep):
            self.begun = step
            return
        self.seconds = max(self.seconds, step.seconds)
        if isinstance(step, PlannedStep | StartedStep | DoneStep):
            self._add_call_step(step)
        elif isinstance(step, ReplyStep):
            if step.number != len(self.replies):
                raise ValueError(f"the reply {len(self.replies)} is missing")
            recorded = RecordedReply(
                round=step.round,
                reply=step.reply,
                served_model=step.served_model,
                image_place=step.image_place,
            )
            self.replies.append((step, recorded))
        elif isinstance(step, SummaryStep):
            self.summaries.setdefault(step.number, []).append(step.reply)
        elif isinstance(step, EndedStep):
            self.finished = _finished_run(step)
        else:
            for number in step.dropped:
                reply, recorded = self.replies[number]
                self.replies[number] = reply, attrs.evolve(recorded, is_dropped=True)

    def _add_call_step(self, step: PlannedStep | StartedStep | DoneStep) -> None:
        self.call_seconds[step.number] = step.seconds
        if isinstance(step, PlannedStep):
            self.calls[step.number] = {call.place: _recorded_call(call) for call in step.calls}
            return
        call = self.calls.get(step.number, {}).get(step.place)
        if call is None:
            raise ValueError(f"the call {step.place} of the reply {step.number} was not planned")
        call.has_started = True
        if isinstance(step, DoneStep):
            call.result = _recorded_result(step.result)


def _recorded_call(call: JournaledCall) -> RecordedCall:
    edited = call.edited
    return RecordedCall(
        place=call.place,
        id=call.id,
        name=call.name,
        arguments=call.arguments,
        refusal=call.refusal,
        edited=None if edited is None else ToolCall(call.id, edited.name, edited.arguments),
        result=None if call.result is None else _recorded_result(call.result),
    )


def _recorded_result(result: StoredResult) -> RecordedResult:
    return RecordedResult(
        text=result.text, is_error=result.is_error, images=tuple(result.images), seconds=result.seconds
    )
