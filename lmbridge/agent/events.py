"""What a run tells while it goes on."""

from __future__ import annotations

from typing import TypeAlias

import attrs

from lmbridge.agent.result import Round, RunResult, ToolRecord
from lmbridge.agent.tools import ToolCall


@attrs.frozen
class RoundStarted:
    """The model is about to be asked."""

    round: int
    """From 1."""
    model: str | None


@attrs.frozen
class TextDelta:
    """A piece of what the model says."""

    text: str


@attrs.frozen
class ReasoningDelta:
    """A piece of what the model thinks."""

    text: str


@attrs.frozen
class ToolCallStarted:
    """A tool is about to be called."""

    call: ToolCall


@attrs.frozen
class ToolCallFinished:
    """A call is answered: by the tool, by its failure, or because it could not be made."""

    record: ToolRecord

    @property
    def call(self) -> ToolCall:
        """What the model asked for."""
        return self.record.call

    @property
    def text(self) -> str:
        """What the model is told."""
        return self.record.text

    @property
    def is_error(self) -> bool:
        """Whether the call could not be made, was refused, or failed."""
        return self.record.is_error


@attrs.frozen
class RoundFinished:
    """A round came to its end, its tools included."""

    round: Round


@attrs.frozen
class RunFinished:
    """The run ended well; the last event of such a run."""

    result: RunResult


RunEvent: TypeAlias = (
    RoundStarted | TextDelta | ReasoningDelta | ToolCallStarted | ToolCallFinished | RoundFinished | RunFinished
)
