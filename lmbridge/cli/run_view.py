"""Shows the events of an agent's run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, Final

from lmbridge.agent.events import (
    ContextCompacted,
    ModelNudged,
    ReasoningDelta,
    RoundFinished,
    RoundStarted,
    RunEvent,
    RunFinished,
    TextDelta,
    ToolCallFinished,
    ToolCallStarted,
)
from lmbridge.agent.result import ENDINGS, CompactionStep, Round, RunResult
from lmbridge.cli.answer_view import AnswerView
from lmbridge.cli.answering import describe_context, describe_speed
from lmbridge.cli.queue_times import QueueTimes
from lmbridge.client.server_progress import ModelLoading, PromptProgress

_NOTICEABLE_SECONDS: Final = 0.05
"""The shortest wait in the queue that is shown, in seconds."""
_COMPACTIONS: Final = {
    "shorten": ("was shortened", "were shortened"),
    "summarize": ("was summarized", "were summarized"),
    "drop": ("is no longer sent", "are no longer sent"),
}
"""What was done with one message, or with several, to make room in the context, by the kind of the step."""


async def show_events(
    events: AsyncIterator[RunEvent],
    view: AnswerView,
    queue: QueueTimes | None = None,
    meter: RoundMeter | None = None,
) -> RunResult[Any]:
    """Shows the events of a run until its end, and returns the result.

    Args:
        events: The events.
        view: Where they are shown.
        queue: How long the requests of each round waited, if that is shown.
        meter: Measures the rounds. The caller passes one to know afterwards what it has measured.

    Raises:
        LLMError: The run failed.
    """
    meter = meter or RoundMeter()
    async for event in events:
        meter.see(event)
        if isinstance(event, RunFinished):
            return event.result
        show_event(event, view)
        if isinstance(event, RoundFinished):
            queue_seconds = 0.0 if queue is None else queue.seconds(event.round.number)
            view.remark(meter.describe(event.round, queue_seconds))
    raise RuntimeError("the events of a run ended without RunFinished")


class RoundMeter:
    """Measures how fast the model writes in each round."""

    def __init__(self) -> None:
        self._started = self._first = self._last = 0.0
        self._ended: Round | None = None
        self._ended_speed: float | None = None

    def see(self, event: RunEvent) -> None:
        """Records when an event has arrived."""
        now = monotonic()
        if isinstance(event, RoundStarted):
            self._started, self._first, self._last = now, 0.0, 0.0
        elif isinstance(event, TextDelta | ReasoningDelta):
            self._first = self._first or now
            self._last = now
        elif isinstance(event, RoundFinished):
            self._ended, self._ended_speed = event.round, self._tokens_per_second(event.round)

    def _tokens_per_second(self, ended: Round) -> float | None:
        tokens = ended.usage["completion_tokens"] if ended.usage else 0
        if tokens < 2 or self._last <= self._first:
            return None
        # The time is measured from the first token on, so the first token does not count.
        return (tokens - 1) / (self._last - self._first)

    def describe_last(self, context_length: int | None) -> list[str]:
        """Returns what is known about the last round that has ended: its speed, and how full the context is.

        Args:
            context_length: The tokens that fit into the context, if that is known.
        """
        parts = [] if self._ended_speed is None else [describe_speed(self._ended_speed)]
        if self._ended is not None and self._ended.usage:
            parts.append(
                describe_context(
                    self._ended.usage["prompt_tokens"] + self._ended.usage["completion_tokens"], context_length
                )
            )
        return parts

    def describe(self, ended: Round, queue_seconds: float = 0.0) -> str:
        """Returns one line about a round that has ended.

        Args:
            ended: The round.
            queue_seconds: How long its requests waited in the queue of the client, in seconds.
        """
        parts = [f"round {ended.number}"]
        if queue_seconds >= _NOTICEABLE_SECONDS:
            parts.append(f"queued {queue_seconds:.1f} s" if queue_seconds >= 1 else f"queued {queue_seconds:.2f} s")
        tokens = ended.usage["completion_tokens"] if ended.usage else 0
        if tokens:
            parts.append(f"{tokens} tokens")
        if (speed := self._tokens_per_second(ended)) is not None:
            parts.append(describe_speed(speed))
        if self._first:
            parts.append(f"first after {self._first - self._started:.2f} s")
        if ended.usage:
            parts.append(describe_context(ended.usage["prompt_tokens"] + tokens, None))
        return " · ".join([*parts, f"{ended.seconds:.1f} s"])


def show_event(event: RunEvent, view: AnswerView) -> None:
    """Shows one event."""
    match event:
        case TextDelta(text):
            view.text(text)
        case ReasoningDelta(text):
            view.reasoning(text)
        case RoundStarted():
            view.wait(f"round {event.round}: waiting for the model ...")
        case ModelLoading():
            view.progress(_with_percentage("loading the model", event.fraction))
        case PromptProgress():
            view.progress(_with_percentage("reading the prompt", event.fraction))
        case ContextCompacted(step):
            view.remark(_describe_compaction(step))
        case ModelNudged():
            view.remark(f"asked the model again ({event.nudge.kind.replace('_', ' ')})")
        case ToolCallStarted(call):
            view.call_started(call.name, call.arguments)
        case ToolCallFinished():
            view.call_finished(event.call.name, event.text, is_error=event.is_error, seconds=event.seconds)


def _with_percentage(what: str, fraction: float | None) -> str:
    return f"{what} ..." if fraction is None else f"{what} {fraction:.0%} ..."


def _describe_compaction(step: CompactionStep) -> str:
    one, several = _COMPACTIONS[step.kind]
    what = f"1 message {one}" if step.messages == 1 else f"{step.messages} messages {several}"
    return f"made room in the context: {what} (about {step.tokens_before} tokens before, {step.tokens_after} after)"


def describe_ending(result: RunResult[Any]) -> str:
    """Returns one line about a run whose stop reason is not "stop"."""
    what, _ = ENDINGS[result.stop_reason]
    how = "with the best answer so far" if result.has_answer else "without an answer"
    return f"the run ended {how}: {what}"
