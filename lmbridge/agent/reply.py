"""What a model answered, as a run needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import msgspec

from lmbridge._text import replace_lone_surrogates
from lmbridge.client.reasoning import split_reasoning
from lmbridge.types import Usage

WireCall: TypeAlias = Mapping[str, Any]


@attrs.define(kw_only=True)
class Reply:
    """What the model answered."""

    text: str
    reasoning: str
    calls: Sequence[WireCall]
    finish_reason: str | None
    usage: Usage | None

    @classmethod
    def read(cls, reply: Mapping[str, Any]) -> Reply:
        """That of a whole chat completion."""
        reply = replace_lone_surrogates(reply)
        choice: Mapping[str, Any] = next(iter(reply.get("choices") or ()), {})
        reasoning, text = split_reasoning(reply)
        return cls(
            text=text,
            reasoning=reasoning,
            calls=(choice.get("message") or {}).get("tool_calls") or (),
            finish_reason=choice.get("finish_reason"),
            usage=reply.get("usage"),
        )

    @property
    def is_empty(self) -> bool:
        """Whether it is no answer at all."""
        return not (self.calls or self.text.strip() or self.finish_reason == "length")

    @property
    def is_cut(self) -> bool:
        """Whether its last call lacks the end of its arguments."""
        if not self.calls or self.finish_reason != "length":
            return False
        try:
            msgspec.json.decode(self.calls[-1]["function"]["arguments"])
        except (ValueError, RecursionError):
            return True
        return False
