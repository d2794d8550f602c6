"""Shows the events of an agent's run."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
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
from lmbridge.agent.result import CompactionStep, Round, RunResult
from lmbridge.cli.answer_view import AnswerView
from lmbridge.cli.queue_times import QueueTimes
from lmbridge.client.progress import ModelLoading, PromptProgress

_NOTICEABLE_SECONDS: Final = 0.05
"""The shortest wait in the queue that is shown, in seconds."""
_COMPACTIONS: Final = {
    "shorten": ("was shortened", "were shortened"),
    "summarize": ("was summarized", "were summarized"),
    "drop": ("is no longer sent", "are no longer sent"),
}
"""What was done with one message, or with several, to make room in the context, by the kind of the step."""


async def show_events(
    events: AsyncIterator[RunEvent], view: AnswerView, queue: QueueTimes | None = None
) -> RunResult[Any]:
    """Shows the events of a run until its end, and returns the result.

    Args:
        events: The events.
        view: Where they are shown.
        queue: How long the requests of each round waited, if that is shown.

    Raises:
        LLMError: The run failed.
    """
    meter = RoundMeter()
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

    def see(self, event: RunEvent) -> None:
        """Records when an event has arrived."""
        now = time.monotonic()
        if isinstance(event, RoundStarted):
            self._started, self._first, self._last = now, 0.0, 0.0
        elif isinstance(event, TextDelta | ReasoningDelta):
            self._first = self._first or now
            self._last = now

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
        if tokens > 1 and self._last > self._first:
            parts.append(f"{(tokens - 1) / (self._last - self._first):.1f} tokens/s")
        if self._first:
            parts.append(f"first after {self._first - self._started:.2f} s")
        if ended.usage:
            parts.append(f"context {ended.usage['prompt_tokens'] + tokens}")
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
