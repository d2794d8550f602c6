"""`ModelReply`: the parts of a chat completion that a run needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import msgspec

from lmbridge._text import replace_lone_surrogates
from lmbridge.client.reasoning import split_reasoning
from lmbridge.types import Usage

WireCall: TypeAlias = Mapping[str, Any]
"""An entry of a message's `tool_calls`."""


@attrs.define(kw_only=True)
class ModelReply:
    """One reply of the model."""

    text: str
    """The answer, without the reasoning."""
    reasoning: str
    """The reasoning, wherever the server put it."""
    calls: Sequence[WireCall]
    """The calls that the model requests."""
    finish_reason: str | None
    """Why the server stopped generating; None if it did not say."""
    usage: Usage | None
    """The tokens of the request, as the server counted them; None if it did not count them."""

    @classmethod
    def from_completion(cls, completion: Mapping[str, Any]) -> ModelReply:
        """Reads a complete chat completion."""
        completion = replace_lone_surrogates(completion)
        choice: Mapping[str, Any] = next(iter(completion.get("choices") or ()), {})
        reasoning, text = split_reasoning(completion)
        return cls(
            text=text,
            reasoning=reasoning,
            calls=(choice.get("message") or {}).get("tool_calls") or (),
            finish_reason=choice.get("finish_reason"),
            usage=completion.get("usage"),
        )

    @property
    def is_empty(self) -> bool:
        """True if the reply has neither an answer nor a call. A reply that was cut off at its limit is not empty."""
        return not (self.calls or self.text.strip() or self.finish_reason == "length")

    @property
    def has_cut_call(self) -> bool:
        """Whether the arguments of its last call were cut off by the limit on tokens."""
        if not self.calls or self.finish_reason != "length":
            return False
        try:
            msgspec.json.decode(self.calls[-1]["function"]["arguments"])
        except (ValueError, RecursionError):
            return True
        return False
