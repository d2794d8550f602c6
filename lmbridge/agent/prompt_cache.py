"""`PromptCacheWatch`: notices when a server has evaluated again what it had in its prompt cache.

A server processes each conversation in a slot, which keeps the tokens of its last prompt. If the next prompt begins in
the same way, the server evaluates only the rest. So a run sends its messages unchanged, and adds new ones at the end.
If the server nevertheless evaluates much more than the new messages, either an earlier message has changed, which this
module finds, or the server has dropped its cache, for example because another conversation needed the slot.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from lmbridge.agent.events import PromptCacheLost
from lmbridge.client.usage import cached_tokens
from lmbridge.types import Usage

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_NOTICED_TOKENS: Final = 256
"""How many tokens have to be evaluated again to be worth an event. Servers reuse their caches in blocks."""


@attrs.define
class PromptCacheWatch:
    """Compares the tokens that a server has evaluated with those that were new, request by request."""

    _messages: Sequence[Mapping[str, Any]] = attrs.field(init=False, default=())
    _tools: object = attrs.field(init=False, default=None)
    _prompt_tokens: int = attrs.field(init=False, default=0)

    def compare(
        self, messages: Sequence[Mapping[str, Any]], tools: object, usage: Usage | None
    ) -> PromptCacheLost | None:
        """Records a request that was answered. Returns an event if much of the previous prompt was evaluated again.

        Args:
            messages: The messages that were sent.
            tools: The definitions of the tools that were sent.
            usage: The tokens that the server has counted.
        """
        before, tools_before, expected = self._messages, self._tools, self._prompt_tokens
        prompt_tokens = (usage or {}).get("prompt_tokens") or 0
        self._messages, self._tools, self._prompt_tokens = messages, tools, prompt_tokens
        cached = cached_tokens(usage)
        if cached is None or not before:
            return None
        # If more than half of the previous prompt came from the cache, only its end has changed, for example because a
        # long nudge was removed again. If that leaves a prompt that is shorter than the previous one, only its own
        # tokens can come from the cache.
        evaluated_again = min(expected, prompt_tokens) - cached
        if evaluated_again < _NOTICED_TOKENS or cached > expected // 2:
            return None
        has_other_tools = tools != tools_before
        index = 0 if has_other_tools else _first_difference(before, messages)
        if has_other_tools:
            change = "the tools have changed"
        else:
            change = "no message has changed" if index is None else f"message {index} is the first that has changed"
        logger.info(
            "the server took %s of the %s tokens of a prompt from its cache, after a prompt of %s tokens; %s",
            cached,
            prompt_tokens,
            expected,
            change,
        )
        return PromptCacheLost(index)


def _first_difference(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> int | None:
    """Returns the index of the first message that has changed or is gone; None if messages were only added."""
    for index, (old, new) in enumerate(zip(before, after, strict=False)):
        if old is not new and old != new:
            return index
    return len(after) if len(after) < len(before) else None
