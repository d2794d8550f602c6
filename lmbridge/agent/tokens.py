"""Estimates the tokens of a conversation, and divides the model's context between the prompt and the answer.

The exact number would need the model's own tokenizer and chat template, which the server has and a client does not. So
the number is estimated from the size of the JSON, and corrected with the server's count in each reply. The alternative
was to request the exact count before every round. But few servers can count, and the request costs a round trip. So it
is sent only when the count decides something: when, by the estimate, the prompt fills the context or nearly does.
"""

from __future__ import annotations

from typing import Final

from lmbridge.agent.history import History
from lmbridge.agent.settings import MaxTokens
from lmbridge.client.context_overflow import PromptSize
from lmbridge.client.token_count import BYTES_PER_TOKEN
from lmbridge.errors import ContextLengthExceededError

_DEFAULT_MAX_TOKENS: Final = 8192
_MIN_MAX_TOKENS: Final = 16
"""The lowest `max_tokens` that a request gets by default, however little room the prompt leaves."""
_TEMPLATE_TOKENS: Final = 64
"""Tokens that a chat template may add beyond the estimate."""
_ANSWER_RESERVE: Final = 1024
"""Tokens that compaction keeps free for the answer, or a quarter of the context if that is less."""
_MIN_BYTES_TO_LEARN_FROM: Final = 2_000
"""The size in bytes above which the tokens per byte are learned from a prompt. In a smaller one, the chat template
dominates."""
_NEARLY_FULL: Final = 0.9
"""The share of the room for the prompt beyond which the server is asked how many tokens the prompt really has."""


class TokenEstimate:
    """Estimates the tokens of a prompt from the last count by the server and the number of bytes added since.

    Until the server has counted a prompt, three bytes of JSON are estimated as one token. For most English text and
    code, this estimate is slightly too high, and for Chinese characters, it is about right.
    """

    def __init__(self) -> None:
        self._known_size = 0
        self._known_tokens = 0
        self._tokens_per_byte = 1 / BYTES_PER_TOKEN

    def tokens(self, size: int) -> int:
        """Estimates the tokens of a prompt from its size in bytes of JSON, tools included."""
        return max(0, self._known_tokens + round((size - self._known_size) * self._tokens_per_byte))

    def is_known(self, size: int) -> bool:
        """Returns whether the server has counted a prompt of exactly this size."""
        return size == self._known_size

    def size(self, tokens: int) -> int:
        """Estimates how many bytes of a prompt a number of tokens takes."""
        return round(tokens / self._tokens_per_byte)

    def learn(self, size: int, tokens: int | None) -> None:
        """Records how many tokens the server counted for a prompt of this size; None if it did not count them."""
        if tokens and size:
            self._known_size, self._known_tokens = size, tokens
            if size > _MIN_BYTES_TO_LEARN_FROM:
                self._tokens_per_byte = min(max(tokens / size, 1 / 8), 2.0)


class ContextBudget:
    """Divides the context of a run's model between the prompt and the answer.

    Args:
        history: The conversation.
        tools_size: Bytes of the definitions of the tools, which are sent with every request.
        context_length: The number of tokens in the context, the answer included; None if it is unknown.
        max_tokens: The option `max_tokens` of the run.
    """

    def __init__(self, history: History, *, tools_size: int, context_length: int | None, max_tokens: MaxTokens) -> None:
        self._history = history
        self.tools_size: int = tools_size
        self._context_length = context_length
        self._max_tokens = max_tokens
        self._estimate = TokenEstimate()

    @property
    def prompt_size(self) -> int:
        """The bytes of the next request's messages and tools."""
        return self._history.size + self.tools_size

    def max_tokens(self) -> int:
        """Returns the `max_tokens` of the next request."""
        if isinstance(self._max_tokens, int):
            return self._max_tokens
        if self._context_length is None:
            return _DEFAULT_MAX_TOKENS
        left = self._context_length - self._estimate.tokens(self.prompt_size) - _TEMPLATE_TOKENS
        return max(_MIN_MAX_TOKENS, min(_DEFAULT_MAX_TOKENS, left))

    def tokens_of(self, prompt_size: int) -> int:
        """Estimates the tokens of a prompt from its size in bytes."""
        return self._estimate.tokens(prompt_size)

    def learn(self, prompt_size: int, prompt_tokens: int | None) -> None:
        """Records how many tokens the server counted for a prompt of this size; None if it did not count them."""
        self._estimate.learn(prompt_size, prompt_tokens)

    @property
    def is_unknown(self) -> bool:
        """Whether the length of the context is unknown, so that nothing can be compared with it."""
        return self._context_length is None

    def learn_context_length(self, tokens: int | None) -> None:
        """Records the length of a context whose length was unknown; None if it is still unknown."""
        self._context_length = tokens

    @property
    def needs_exact_count(self) -> bool:
        """Whether the prompt may be too long by the estimate, so that the exact count is worth a request."""
        if self._context_length is None or self._estimate.is_known(self.prompt_size):
            return False
        return self._estimate.tokens(self.prompt_size) > _NEARLY_FULL * self._room(self._context_length)

    def compared(self, prompt_size: int) -> PromptSize | None:
        """Returns the tokens of a prompt of this size, and the context length; None if that length is unknown."""
        if self._context_length is None:
            return None
        exact = self._estimate.is_known(prompt_size)
        return PromptSize(self._estimate.tokens(prompt_size), exact=exact, context_length=self._context_length)

    def is_shorter_than(self, tokens: int) -> bool:
        """Returns whether the context has fewer tokens than that, or an unknown number."""
        return self._context_length is None or self._context_length < tokens

    def size_of(self, tokens: int) -> int:
        """Estimates how many bytes of a prompt a number of tokens takes."""
        return self._estimate.size(tokens)

    def tokens_left(self, messages_size: int) -> int:
        """Returns how many tokens of the context are left beside a prompt whose messages have this size."""
        prompt_tokens = self._estimate.tokens(messages_size + self.tools_size)
        return (self._context_length or 0) - prompt_tokens - _TEMPLATE_TOKENS

    def excess(self, *, at_least: int = 0) -> int:
        """Returns how many tokens of the prompt have to be removed, so that prompt and answer fit.

        The result is 0 if the context length is unknown.

        Args:
            at_least: The smallest number to return if the context length is known. Default: 0.
        """
        if self._context_length is None:
            return 0
        return max(at_least, self._estimate.tokens(self.prompt_size) - self._room(self._context_length), 0)

    def learn_overflow(self, error: ContextLengthExceededError) -> int:
        """Learns from a prompt that was too long, and returns how many tokens of it have to be removed."""
        self._estimate.learn(self.prompt_size, error.prompt_tokens)
        prompt_tokens = self._estimate.tokens(self.prompt_size)
        self._context_length = error.context_length or self._context_length or prompt_tokens
        # If the prompt would have fitted according to the estimate, the estimate is wrong, and a quarter is removed.
        estimate_is_wrong = error.prompt_tokens is None and prompt_tokens < self._context_length
        return self.excess(at_least=prompt_tokens // 4 if estimate_is_wrong else 0)

    def _room(self, context_length: int) -> int:
        """Returns how many tokens the prompt may have, so that there is some context left for the answer."""
        return context_length - min(_ANSWER_RESERVE, context_length // 4) - _TEMPLATE_TOKENS
