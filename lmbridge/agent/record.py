"""What is known of a run while it goes on."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from lmbridge.agent.history import History
from lmbridge.agent.result import Round, RunResult, StopReason
from lmbridge.agent.tools import ToolCall
from lmbridge.client.reasoning import Piece
from lmbridge.types import Usage


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
    _text: list[str] = attrs.field(factory=list)
    _reasoning: list[str] = attrs.field(factory=list)
    _is_speaking: bool = False

    @property
    def text(self) -> str:
        """What the model said last."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """What it thought before that."""
        return "".join(self._reasoning)

    def begin_round(self) -> None:
        """The next round begins."""
        self.rounds += 1
        self.round_usage = None

    def begin_reply(self) -> None:
        """The model is asked: what it said before is not what it says now."""
        self._text, self._reasoning, self._is_speaking = [], [], True

    def hear(self, piece: Piece) -> None:
        """The model says some more."""
        (self._text if piece.kind == "text" else self._reasoning).append(piece.text)

    def end_reply(self, text: str, reasoning: str) -> None:
        """The reply is whole."""
        self._text, self._reasoning, self._is_speaking = [text], [reasoning], False

    def count(self, usage: Usage) -> None:
        """Adds what the server counted for a reply."""
        self.usage = _sum(self.usage, usage)
        self.round_usage = _sum(self.round_usage or _no_usage(), usage)

    def cut(self) -> None:
        """The run ends in the middle: keeps what the model was saying."""
        if self._is_speaking and self.text:
            self.history.answer(self.text.encode("utf-8", "replace").decode())  # half a surrogate pair cannot be sent
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
