"""`RunRecord`: the state of a run while it is in progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from lmbridge._text import replace_lone_surrogates
from lmbridge.agent.history import History
from lmbridge.agent.result import CompactionStep, Nudge, Round, RunResult, StopReason
from lmbridge.agent.tools import ToolCall
from lmbridge.client.reasoning import SplitReply, split_reasoning
from lmbridge.client.usage import cached_tokens
from lmbridge.observe.watches import RunWatch
from lmbridge.types import RunUsage, Usage

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_EMPTY_REPLY: Final = SplitReply("", "")


def _zero_usage() -> RunUsage:
    return {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


@attrs.define(eq=False)
class RunRecord:
    """The state of a run so far, from which its `RunResult` can be made at any moment."""

    history: History
    """The conversation of the run."""
    model: str | None = None
    """The model that is requested; None if the server chooses it."""
    served_model: str | None = None
    """The first model that the server named in a reply; None before that."""
    rounds: int = 0
    """How many rounds have begun."""
    calls: list[ToolCall] = attrs.field(factory=list)
    """The calls that the model has requested, in order."""
    errors: Mapping[str, Exception] = attrs.field(factory=dict)
    """The errors of the tool sources that failed; the run goes on without these. The keys are their names."""
    warnings: list[str] = attrs.field(factory=list)
    """What may be wrong with the result although the run ended without an error."""
    has_last_words: bool = False
    """Whether the model has given an answer in the additional round after a limit; see `on_limit` of `Agent`."""
    output: Any = None
    """The validated output of a run with an output type; None until the model has given it."""
    log: list[Round] = attrs.field(factory=list)
    """The rounds that have ended."""
    usage: RunUsage = attrs.field(factory=_zero_usage)
    """Tokens of all rounds, as far as the server counted them."""
    round_nudges: list[Nudge] = attrs.field(factory=list)
    """The nudges of the current round."""
    round_compactions: list[CompactionStep] = attrs.field(factory=list)
    """The steps that made room in the context in the current round."""
    round_usage: RunUsage | None = None
    """Tokens of the current round; None if the server has not counted any."""
    watch: RunWatch | None = None
    """Notifies the observers of the run; None if it has none."""
    _last_reply: SplitReply = _EMPTY_REPLY
    _reply_so_far: Callable[[], Mapping[str, Any] | None] | None = None
    _is_replying: bool = False

    @property
    def last_reply(self) -> SplitReply:
        """The model's last reply, as far as it has arrived."""
        return self._last_reply if self._reply_so_far is None else split_reasoning(self._reply_so_far() or {})

    @property
    def text(self) -> str:
        """The text of the last reply."""
        return self.last_reply.text

    @property
    def reasoning(self) -> str:
        """The reasoning of the last reply."""
        return self.last_reply.reasoning

    def warn(self, warning: str) -> None:
        """Adds a warning to the result, and logs it, unless the run has this warning already."""
        if warning not in self.warnings:
            logger.warning("%s; run with model %r", warning, self.served_model or self.model)
            self.warnings.append(warning)

    def begin_round(self) -> None:
        """Counts a new round, and clears what belongs to the previous one."""
        self.rounds += 1
        self.round_nudges = []
        self.round_compactions = []
        self.round_usage = None

    def begin_reply(self) -> None:
        """Clears the last reply, because the model is about to be asked again."""
        self._last_reply, self._reply_so_far, self._is_replying = _EMPTY_REPLY, None, True

    def attach_stream(self, reply_so_far: Callable[[], Mapping[str, Any] | None]) -> None:
        """Takes the text of the last reply from a stream that is being read.

        Args:
            reply_so_far: Returns the chat completion as far as it has arrived, or None before its first chunk.
        """
        self._reply_so_far = reply_so_far

    def end_reply(self, text: str, reasoning: str) -> None:
        """Records a reply that has arrived completely."""
        self._last_reply, self._reply_so_far, self._is_replying = SplitReply(reasoning, text), None, False

    def add_usage(self, usage: Usage) -> None:
        """Adds the tokens that the server counted for a reply."""
        self.usage = _add_usages(self.usage, usage)
        self.round_usage = _add_usages(self.round_usage or _zero_usage(), usage)

    def truncate(self) -> None:
        """Ends the last reply, because the run is out of time. What has arrived of it is added to the conversation."""
        self._last_reply, self._reply_so_far = self.last_reply, None
        if self._is_replying and self.text:
            self.history.add_answer(replace_lone_surrogates(self.text))
        self._is_replying = False

    def result(self, stop_reason: StopReason, messages: list[dict[str, Any]] | None = None) -> RunResult:
        """Returns a snapshot of the run.

        Args:
            stop_reason: Why the run ended, or "running".
            messages: A copy of the conversation, if there is one already. By default, a new copy is made.
        """
        if messages is None:
            messages = self.history.snapshot(ended=stop_reason != "running")
        return RunResult(
            text=self.text,
            model=self.model or self.served_model,
            rounds=self.rounds,
            stop_reason=stop_reason,
            messages=messages,
            tool_calls=tuple(self.calls),
            usage=RunUsage(**self.usage),
            reasoning=self.reasoning,
            output=self.output,
            has_answer=stop_reason == "stop" or self.has_last_words,
            errors=dict(self.errors),
            log=tuple(self.log),
            warnings=tuple(self.warnings),
        )


def _add_usages(one: RunUsage, other: Usage) -> RunUsage:
    added: RunUsage = {
        "prompt_tokens": one["prompt_tokens"] + (other.get("prompt_tokens") or 0),
        "completion_tokens": one["completion_tokens"] + (other.get("completion_tokens") or 0),
        "total_tokens": one["total_tokens"] + (other.get("total_tokens") or 0),
    }
    cached = cached_tokens(other)
    if cached is not None or "cached" in one:
        added["cached"] = one.get("cached", 0) + (cached or 0)
    return added
