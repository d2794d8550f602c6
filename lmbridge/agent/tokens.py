"""Estimates the tokens of a conversation, and divides the model's context between the prompt and the answer.

The exact number would need the model's own tokenizer and chat template, which the server has and a client does not. So
the number is estimated from the size of the JSON, and corrected with the server's count in each reply. A request to
`/tokenize` before every round was the alternative; few servers have it, and it would cost a round trip.
"""

from __future__ import annotations

from typing import Final

from lmbridge.agent.history import History
from lmbridge.agent.settings import MaxTokens
from lmbridge.errors import ContextLengthExceededError

_DEFAULT_MAX_TOKENS: Final = 8192
_MIN_MAX_TOKENS: Final = 16
_TEMPLATE_TOKENS: Final = 64
"""Tokens that a chat template may add beyond the estimate."""
_ANSWER_RESERVE: Final = 1024
"""Tokens that trimming the history keeps free for the answer, or a quarter of the context if that is less."""
_MIN_BYTES_TO_LEARN_FROM: Final = 2_000
"""The size in bytes above which a prompt shows the tokens per byte. In a smaller prompt, the template dominates."""


class TokenEstimate:
    """Estimates the tokens of a prompt from the last count by the server and the number of bytes added since.

    Until the server has counted a prompt, three bytes of JSON are estimated as one token. That is slightly too high for
    most English text and code, and about right for Chinese characters.
    """

    def __init__(self) -> None:
        self._known_size = 0
        self._known_tokens = 0
        self._tokens_per_byte = 1 / 3

    def tokens(self, size: int) -> int:
        """Returns the tokens of a prompt of that many bytes of JSON, tools included."""
        return max(0, self._known_tokens + round((size - self._known_size) * self._tokens_per_byte))

    def size(self, tokens: int) -> int:
        """Returns how many bytes that many tokens of a prompt take."""
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
        history: The conversation, which is trimmed if it does not fit.
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
        """Returns the estimated tokens of a prompt of that many bytes."""
        return self._estimate.tokens(prompt_size)

    def learn(self, prompt_size: int, prompt_tokens: int | None) -> None:
        """Records how many tokens the server counted for a prompt of this size; None if it did not count them."""
        self._estimate.learn(prompt_size, prompt_tokens)

    def trim(self) -> None:
        """Leaves out old messages until prompt and answer fit, if the context length is known."""
        if self._context_length is not None:
            self._trim(self._context_length)

    def make_room(self, error: ContextLengthExceededError) -> bool:
        """Learns from a prompt that was too long, and returns whether the next request will be smaller."""
        self._estimate.learn(self.prompt_size, error.prompt_tokens)
        prompt_tokens, max_tokens = self._estimate.tokens(self.prompt_size), self.max_tokens()
        self._context_length = error.context_length or self._context_length or prompt_tokens
        # If the prompt would have fitted according to the estimate, the estimate is wrong, and a quarter is left out.
        estimate_is_wrong = error.prompt_tokens is None and prompt_tokens < self._context_length
        has_trimmed = self._trim(self._context_length, at_least=prompt_tokens // 4 if estimate_is_wrong else 0)
        return has_trimmed or self.max_tokens() < max_tokens

    def _trim(self, context_length: int, *, at_least: int = 0) -> bool:
        """Leaves out old messages until prompt and answer fit, and at least `at_least` tokens of them."""
        reserve = min(_ANSWER_RESERVE, context_length // 4)
        room = context_length - reserve - _TEMPLATE_TOKENS
        excess = max(at_least, self._estimate.tokens(self.prompt_size) - room)
        return excess > 0 and self._history.trim(self._estimate.size(excess))
