"""The events of a run, as `agent.stream` and `handle.events()` return them.

`PromptProgress` and `ModelLoading` are those of `lmbridge.client.server_progress`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import attrs

from lmbridge.agent.result import CompactionStep, Nudge, Round, RunResult, ToolRecord
from lmbridge.agent.tools import ToolCall
from lmbridge.client.server_progress import ModelLoading, PromptProgress


@attrs.frozen
class RoundStarted:
    """The model is about to be asked."""

    round: int
    """The number of the round; the first one is 1."""
    model: str | None
    """The model of the run; None if the server chooses it."""


@attrs.frozen
class PromptCacheLost:
    """The server has evaluated much of the prompt again, although it had that part in its cache after the last request.

    The event occurs only with servers that report how many tokens came from their cache, such as llama.cpp.
    """

    index: int | None
    """The index of the first message that has changed since the last request; 0 if the tools have changed. None means
    that nothing has changed, so that the server must have dropped its cache."""


@attrs.frozen
class TextDelta:
    """A piece of the model's answer."""

    text: str
    """The piece, of any length."""


@attrs.frozen
class ReasoningDelta:
    """A piece of the model's reasoning."""

    text: str
    """The piece, of any length."""


@attrs.frozen
class ModelNudged:
    """The reply was neither an answer nor a call, or may be a mistake, so the model is asked again.

    The text so far is not its answer. The only exception is a nudge of the kind "no_call" after which the model still
    makes no call: then the text before the nudge is the answer.
    """

    nudge: Nudge
    """What was wrong with the reply, and what the model reads about it, as in `Round.nudges`."""


@attrs.frozen
class ContextCompacted:
    """The prompt no longer fitted into the model's context, and was made smaller."""

    step: CompactionStep
    """What was done, as in `Round.compactions`."""


@attrs.frozen
class ToolCallStarted:
    """A tool is about to be called.

    For a call that is not made, and for a second identical call of a reply, only `ToolCallFinished` is sent.
    """

    call: ToolCall
    """The call that is about to be made: the one that the model requested, or the one that `approve` returned."""


@attrs.frozen
class ToolCallFinished:
    """A call has a result: the output of the tool, its error, or the reason why the call was not made."""

    record: ToolRecord
    """The call and its result, as in `Round.tool_calls`. Its fields are also fields of the event."""

    @property
    def call(self) -> ToolCall:
        """The call, as the model requested it. If `approve` returned another one, that one is `edited`."""
        return self.record.call

    @property
    def edited(self) -> ToolCall | None:
        """The call that was made instead, as in `ToolCallStarted`; None if the call was made as requested."""
        return self.record.edited

    @property
    def text(self) -> str:
        """The text that the model gets as the result."""
        return self.record.text

    @property
    def is_error(self) -> bool:
        """Whether the call could not be made, was refused, or failed."""
        return self.record.is_error

    @property
    def raw(self) -> Any:
        """The value that the tool returned, or the exception that it raised.

        It is None if the tool timed out, never ran, or ran before an interruption of the run.
        """
        return self.record.raw

    @property
    def images(self) -> tuple[Mapping[str, Any], ...]:
        """The images of the result, as content parts, whether or not the model can see them."""
        return self.record.images

    @property
    def seconds(self) -> float:
        """How long the call took, in seconds."""
        return self.record.seconds

    @property
    def started(self) -> float:
        """When the call began, in seconds since the run first asked its model.

        It is 0 if the tool was not called, or was called before an interruption of the run.
        """
        return self.record.started

    @property
    def repaired(self) -> bool:
        """Whether the model wrote the call with small mistakes that were corrected; `call` is the corrected call."""
        return self.record.repaired

    @property
    def constrained(self) -> bool:
        """Whether the reply with this call was constrained to the schema of the tool, after an invalid call."""
        return self.record.constrained

    @property
    def is_duplicate(self) -> bool:
        """Whether the reply had an identical call before this one, so that the tool was called only once for both."""
        return self.record.is_duplicate


@attrs.frozen
class RoundFinished:
    """A round has ended, its tool calls included."""

    round: Round
    """The entry of `RunResult.log` for this round."""


@attrs.frozen
class RunFinished:
    """The run has ended without an error. It is the last event of such a run."""

    result: RunResult
    """The result, as `agent.run` returns it."""


RunEvent: TypeAlias = (
    RoundStarted
    | ModelLoading
    | PromptProgress
    | PromptCacheLost
    | TextDelta
    | ReasoningDelta
    | ModelNudged
    | ContextCompacted
    | ToolCallStarted
    | ToolCallFinished
    | RoundFinished
    | RunFinished
)
"""Any event of a run."""
