"""The estimate of tokens, and how the context is divided between the prompt and the answer."""

from __future__ import annotations

import pytest

from lmbridge import ContextLengthExceededError
from lmbridge.agent.history import History
from lmbridge.agent.settings import MaxTokens
from lmbridge.agent.tokens import ContextBudget, TokenEstimate


def budget(history: History, *, context_length: int | None, max_tokens: MaxTokens = "auto") -> ContextBudget:
    """Returns the budget of a run without tools."""
    return ContextBudget(history, tools_size=0, context_length=context_length, max_tokens=max_tokens)


def test_an_estimate_learns_from_the_tokens_that_the_server_counted() -> None:
    estimate = TokenEstimate()
    assert estimate.tokens(3000) == 1000
    estimate.learn(4000, 1000)
    assert estimate.tokens(4000) == 1000
    assert estimate.tokens(8000) == 2000
    assert estimate.tokens(2000) == 500
    assert estimate.size(100) == 400
    estimate.learn(10_000, None)
    assert estimate.tokens(4000) == 1000


def test_a_short_prompt_does_not_change_the_tokens_per_byte() -> None:
    estimate = TokenEstimate()
    estimate.learn(40, 60)
    assert estimate.tokens(40) == 60
    assert estimate.tokens(3040) == 1060


@pytest.mark.parametrize(
    ("context_length", "max_tokens", "expected"),
    [(None, "auto", 8192), (100_000, "auto", 8192), (4096, "auto", 4096 - 1000 - 64), (512, "auto", 16), (512, 99, 99)],
)
def test_max_tokens_is_the_option_or_what_is_left_of_the_context(
    context_length: int | None, max_tokens: MaxTokens, expected: int
) -> None:
    history = History("Go.")
    context = budget(history, context_length=context_length, max_tokens=max_tokens)
    context.learn(history.size, 1000)
    assert context.max_tokens() == expected


def test_an_overflow_teaches_the_context_length() -> None:
    history = History("Go.")
    context = budget(history, context_length=None)
    error = ContextLengthExceededError("too long", prompt_tokens=1000, context_length=4096)
    assert context.make_room(error)
    assert context.max_tokens() == 4096 - 1000 - 64
    assert not context.make_room(error)
