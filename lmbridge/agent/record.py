"""What is known of a run while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from lmbridge._text import replace_lone_surrogates
from lmbridge.agent.history import History
from lmbridge.agent.result import Round, RunResult, StopReason
from lmbridge.agent.tools import ToolCall
from lmbridge.client.reasoning import SplitReply, split_reasoning
from lmbridge.types import Usage

_NOTHING: Final = SplitReply("", "")


def _no_usage() -> Usage:
    return {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


@attrs.define(eq=False)
class Record:
    """A run so far."""

    history: History
    model: str | None = None
    """The model asked for."""
    served: str | None = None
    """The name in the first reply that had one."""
    rounds: int = 0
    calls: list[ToolCall] = attrs.field(factory=list)
    errors: Mapping[str, Exception] = attrs.field(factory=dict)
    """Sources of tools that failed."""
    log: list[Round] = attrs.field(factory=list)
    usage: Usage = attrs.field(factory=_no_usage)
    round_usage: Usage | None = None
    _said: SplitReply = _NOTHING
    _so_far: Callable[[], Mapping[str, Any] | None] | None = None
    _is_speaking: bool = False

    @property
    def said(self) -> SplitReply:
        """What the model said last, and what it thought before that."""
        return self._said if self._so_far is None else split_reasoning(self._so_far() or {})

    @property
    def text(self) -> str:
        """What the model said last."""
        return self.said.text

    @property
    def reasoning(self) -> str:
        """What it thought before that."""
        return self.said.reasoning

    def begin_round(self) -> None:
        """The next round begins."""
        self.rounds += 1
        self.round_usage = None

    def begin_reply(self) -> None:
        """The model is asked: what it said before is not what it says now."""
        self._said, self._so_far, self._is_speaking = _NOTHING, None, True

    def follow(self, so_far: Callable[[], Mapping[str, Any] | None]) -> None:
        """The model speaks.

        Args:
            so_far: The reply as far as it came, whenever it is asked for; None if nothing has come.
        """
        self._so_far = so_far

    def end_reply(self, text: str, reasoning: str) -> None:
        """The reply is whole."""
        self._said, self._so_far, self._is_speaking = SplitReply(reasoning, text), None, False

    def count(self, usage: Usage) -> None:
        """Adds what the server counted for a reply."""
        self.usage = _sum(self.usage, usage)
        self.round_usage = _sum(self.round_usage or _no_usage(), usage)

    def cut(self) -> None:
        """The run ends in the middle: keeps what the model was saying."""
        self._said, self._so_far = self.said, None
        if self._is_speaking and self.text:
            self.history.answer(replace_lone_surrogates(self.text))
        self._is_speaking = False

    def result(self, stop_reason: StopReason) -> RunResult:
        """The run, as a value of its own."""
        return RunResult(
            text=self.text,
            model=self.model or self.served,
            rounds=self.rounds,
            stop_reason=stop_reason,
            messages=self.history.snapshot(ended=stop_reason != "running"),
            tool_calls=tuple(self.calls),
            usage=Usage(**self.usage),
            reasoning=self.reasoning,
            errors=dict(self.errors),
            log=tuple(self.log),
        )


def _sum(one: Usage, other: Usage) -> Usage:
    return {
        "prompt_tokens": one["prompt_tokens"] + (other.get("prompt_tokens") or 0),
        "completion_tokens": one["completion_tokens"] + (other.get("completion_tokens") or 0),
        "total_tokens": one["total_tokens"] + (other.get("total_tokens") or 0),
    }
