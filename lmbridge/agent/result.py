"""`RunResult`: the outcome of a run, and the log of its rounds."""

from __future__ import annotations

import html
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Final, Generic, Literal

import attrs

from lmbridge.agent.tools import ToolCall
from lmbridge.types import RunUsage

if TYPE_CHECKING:
    # Only type checkers need the default, which lets `RunResult` stand for `RunResult[Any]`.
    from typing_extensions import TypeVar

    from lmbridge.observe.timeline import Timeline

    OutputT = TypeVar("OutputT", default=Any)
else:
    from typing import TypeVar

    OutputT = TypeVar("OutputT")

StopReason = Literal[
    "stop", "length", "repetition", "budget", "bad_calls", "max_rounds", "cancelled", "error", "running"
]
"""Why a run ended.

"stop": the model answered. "length": its last reply was cut off at `max_tokens` or at the end of the context.
"repetition": the model made the same call again and again. "budget": `max_seconds` or `max_total_tokens` was used up.
"bad_calls": too many replies in a row had only calls that could not be made. "max_rounds": the run used up its rounds.
"cancelled": it was cancelled. "error": an error ended it. "running": it has not ended yet.

A run that ends with one of the first five returns its result, unless it has an `output_type` and no answer. A run that
ends with "max_rounds" returns its result only if it has an answer (see `on_limit` of `Agent`); otherwise an exception
carries the result, as it does after "cancelled" and "error". The result of a run in progress has "running".
"""

ENDINGS: Final[Mapping[str, tuple[str, str]]] = {
    "length": (
        "its last reply was cut off at max_tokens or at the end of the context",
        "raise max_tokens, or ask for less",
    ),
    "repetition": ("the model made the same call again and again", "describe the task in more detail"),
    "bad_calls": ("the model's calls could not be made", "offer fewer tools, or use another model"),
    "budget": ("max_seconds or max_total_tokens was used up", "raise the limit"),
    "max_rounds": ("it used up its rounds", "raise max_rounds, or give it a smaller task"),
}
"""For each stop reason without an answer: what happened, and what to do next."""


NudgeKind = Literal[
    "empty",
    "only_reasoning",
    "cut_reasoning",
    "promise",
    "missing_call",
    "unreadable_call",
    "cut_call",
    "repeated_call",
    "no_call",
]
"""What was wrong with a reply, so that the model was asked again.

"empty": the reply was empty. "only_reasoning": it had only reasoning. "cut_reasoning": its reasoning was cut off at the
limit on tokens. "promise": its last sentence promised a call that did not follow. "missing_call": its finish reason
announced a call, but there was none. "unreadable_call": it had a call in a form that could not be read. "cut_call": it
had a call that was cut off at the limit on tokens. "repeated_call": it only repeated calls whose results the model
already has. "no_call": neither it nor the conversation before it had a call, although the model is known to write its
calls as text.
"""


@attrs.frozen(kw_only=True)
class Nudge:
    """A short message that asks the model for another reply, because the last one was flawed or may be a mistake."""

    kind: NudgeKind
    """The flaw of the reply."""
    message: str
    """The message to the model. It does not remain in the conversation."""
    reply: str
    """The text of the flawed reply. It does not remain in the conversation either, unless the kind is "no_call" and the
    reply is used as the answer after all."""
    without_thinking: bool = False
    """Whether the next request asked for a reply without thinking, because the flawed one had only reasoning."""
    without_tools: bool = False
    """Whether the next request offered no tools, because the model had results of tools and still wrote calls."""


CompactionKind = Literal["shorten", "summarize", "drop"]
"""How room was made in the context: results were shortened, messages were summarized, or messages were left out."""


@attrs.frozen(kw_only=True)
class CompactionStep:
    """A step that made room in the model's context. `RunResult.messages` still has all messages as they were."""

    kind: CompactionKind
    """How room was made."""
    messages: int
    """The number of messages that were shortened, or that are no longer sent."""
    tokens_before: int
    """The estimated tokens of the prompt before the step."""
    tokens_after: int
    """The estimated tokens of the prompt after the step."""
    summary: str = ""
    """The model's summary of the messages that are no longer sent; empty unless the kind is "summarize"."""


@attrs.frozen(kw_only=True)
class ToolRecord:
    """A call that the model requested, and its result."""

    call: ToolCall
    """The call, as the model requested it."""
    text: str
    """The text that the model got as the result."""
    is_error: bool = False
    """Whether the call could not be made, was refused, or failed."""
    raw: Any = attrs.field(default=None, repr=False)
    """The value that the tool returned, or the exception that it raised.

    It is None if the tool timed out, never ran, or ran before an interruption of the run.
    """
    images: tuple[Mapping[str, Any], ...] = attrs.field(default=(), repr=False)
    """The images of the result, as content parts, whether or not the model can see them."""
    seconds: float = 0.0
    """How long the call took, in seconds."""
    started: float = 0.0
    """When the call began, in seconds since the run first asked its model.

    It is 0 if the tool was not called, or was called before an interruption of the run.
    """
    repaired: bool = False
    """Whether the model wrote the call with small mistakes that were corrected; `call` is the corrected call."""
    edited: ToolCall | None = None
    """The call that was made instead, because `approve` returned it; None if the call was made as requested."""
    constrained: bool = False
    """Whether the reply with this call was constrained to the schema of the tool, because the call before it was
    invalid; see `Agent(constrain_retries=...)`."""
    is_duplicate: bool = False
    """Whether the reply had an identical call before this one, so that the tool was called only once for both."""


@attrs.frozen(kw_only=True)
class Round:
    """One round of a run: the model's reply that was used, and the calls in it."""

    number: int
    """The number of the round; the first one is 1."""
    model: str | None
    """The model that the server named in its reply, or the requested one if it did not name any."""
    text: str
    """The text of the reply, without its reasoning."""
    reasoning: str
    """The reasoning of the reply."""
    finish_reason: str | None
    """Why the server stopped generating; None if it did not say."""
    tool_calls: tuple[ToolRecord, ...]
    """The calls and their results, in the order in which the model requested them."""
    usage: RunUsage | None
    """The tokens of the round, as the server counted them; None if it did not count them."""
    seconds: float
    """How long the round took, including its tools, in seconds."""
    started: float = 0.0
    """When the round began, in seconds since the run first asked its model."""
    reply_seconds: float = 0.0
    """How long it took to get the reply, in seconds. This includes the wait for a permit, and all replies of the round
    that were not used."""
    nudges: tuple[Nudge, ...] = ()
    """The messages after which the model replied again in this round."""
    compactions: tuple[CompactionStep, ...] = ()
    """The steps that made room in the context before the reply."""


@attrs.frozen(kw_only=True)
class RunResult(Generic[OutputT]):
    """The result of a run that has ended, or the state of a run that is still in progress."""

    text: str
    """The text of the model's last reply. If `has_answer` is True, it is the answer."""
    model: str | None
    """The model of the run; None before the run is admitted, and if the server chose it without naming it."""
    rounds: int
    """How many rounds have begun."""
    stop_reason: StopReason
    """Why the run ended, as one of the words of `StopReason`; "running" if it is still in progress."""
    messages: list[dict[str, Any]] = attrs.field(repr=False)
    """The whole conversation, which can be continued: `agent.run(task, messages=result.messages)`."""
    tool_calls: tuple[ToolCall, ...]
    """The calls that the model requested, in order."""
    usage: RunUsage
    """The tokens of all rounds, as far as the server counted them."""
    reasoning: str
    """The reasoning that led to `text`."""
    # Every run that returns with an output type has an output, so the type does not include None.
    output: OutputT = attrs.field(default=None)
    """The answer as an instance of the run's `output_type`; None if the run has no `output_type` or has not ended."""
    has_answer: bool = False
    """Whether `text` is an answer: the run ended with "stop", or at a limit with an answer that the model gave in an
    additional round (see `on_limit` of `Agent`)."""
    errors: Mapping[str, Exception] = attrs.field(factory=dict)
    """The errors of the tool sources, such as MCP servers, that failed; the run went on without these. The keys are
    their names."""
    log: tuple[Round, ...] = attrs.field(default=(), repr=False)
    """The rounds that have ended."""
    warnings: tuple[str, ...] = ()
    """What may be wrong with the answer although the run ended without an error, such as a tool call at its end that
    could not be read. Each warning is also logged with the level WARNING."""

    def timeline(self, path: str | PathLike[str] | None = None) -> Timeline:
        """Returns the rounds of the run and their tool calls on a time axis.

        A notebook displays the returned object. It shows only what the result contains; the timeline of a
        `lmbridge.observe.TimelineObserver` also shows how long requests waited, and why they were sent again.

        Args:
            path: The HTML file to which the timeline is written. Default: it is not written to a file.

        Raises:
            LLMValidationError: `path` is neither a string nor a path object.
            OSError: The file cannot be written.
        """
        # Imported here because few programs draw their runs.
        from lmbridge.observe.timeline import Bar, Row, Timeline  # noqa: PLC0415

        bars: list[Bar] = []
        for each in self.log:
            text = "\n\n".join(filter(None, (each.reasoning, each.text)))
            end = each.started + each.reply_seconds
            bars.append(Bar(kind="reply", start=each.started, end=end, label=f"round {each.number}", text=text))
            bars += [
                Bar(
                    kind="tool",
                    # The start of a call from before an interruption is not known, but it was after the reply.
                    start=(start := record.started or end),
                    end=start + record.seconds,
                    label=record.call.name,
                    text=f"{record.call.arguments!r}\n{record.text}",
                )
                for record in each.tool_calls
                if record.seconds and not record.is_duplicate
            ]
        has_failed = self.stop_reason in ("error", "max_rounds")
        row = Row(label=f"{self.stop_reason}: {self.text}", bars=bars, has_failed=has_failed)
        rounds = "1 round" if self.rounds == 1 else f"{self.rounds} rounds"
        timeline = Timeline(title=f"Run with {self.model}, {rounds}", rows=[row])
        if path is not None:
            timeline.write(path)
        return timeline

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.text)}</pre>{self.timeline()._repr_html_()}"
