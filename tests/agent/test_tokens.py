"""The estimate of tokens, and how the context is divided between the prompt and the answer."""

from __future__ import annotations

from typing import Any

import pytest

from lmbridge import Agent, ContextLengthExceededError, LLMClient
from lmbridge.agent.history import History
from lmbridge.agent.settings import MaxTokens
from lmbridge.agent.tokens import ContextBudget, TokenEstimate
from lmbridge.testing import RecordedRequest, ScriptedServer, reply, stall
from tests.agent.support import add, sent


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
    assert context.learn_overflow(error) == 0
    assert context.max_tokens() == 4096 - 1000 - 64


@pytest.mark.parametrize(
    ("context_length", "numbers", "expected"),
    [
        (None, {"prompt_tokens": 5000, "context_length": 4096}, 5000 - 4096 + 1024 + 64),
        (4096, {"prompt_tokens": 5000}, 5000 - 4096 + 1024 + 64),
        # Without any number, a quarter has to go.
        (100_000, {}, 250),
        (None, {}, 250 + 64),
    ],
)
def test_an_overflow_says_how_much_has_to_go(
    context_length: int | None, numbers: dict[str, int], expected: int
) -> None:
    history = History("x" * 3_000)
    context = budget(history, context_length=context_length)
    context.learn(history.size, 1000)
    error = ContextLengthExceededError(
        "too long", prompt_tokens=numbers.get("prompt_tokens"), context_length=numbers.get("context_length")
    )
    assert context.learn_overflow(error) == expected


# Exact counts

COUNTS = "/v1/chat/completions/input_tokens"


EARLIER = [
    {"role": role, "content": f"{number}: " + "word " * 200} for number in range(5) for role in ("user", "assistant")
]
"""A conversation of about 10,000 bytes, which is estimated as more than 3,000 tokens."""


async def continue_conversation(server: ScriptedServer, context: int) -> tuple[list[RecordedRequest], int]:
    """Runs an agent after the earlier messages; returns the requests that counted, and how many messages were sent."""
    server.on_path("/v1/models", reply(200, {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": context}]}))
    async with LLMClient(server.api_base, "m", model_mismatch="ignore") as client:
        await Agent(client, tools=[add]).run("Go on.", messages=EARLIER)
    return [request for request in server.requests if request.path == COUNTS], len(sent(server)["messages"])


async def test_the_server_counts_the_prompt_only_when_it_nearly_fills_the_context(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.on_path(COUNTS, reply(200, {"input_tokens": 1700}))
    assert await continue_conversation(scripted_server, 16_000) == ([], 11)


async def test_an_exact_count_keeps_messages_that_an_estimate_would_leave_out(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path(COUNTS, reply(200, {"input_tokens": 1700}))
    [counted], messages = await continue_conversation(scripted_server, 3000)
    assert messages == 11
    assert counted.json["messages"] == sent(scripted_server)["messages"]
    assert counted.json["tools"] == sent(scripted_server)["tools"]
    assert sent(scripted_server)["max_tokens"] == 3000 - 1700 - 64


async def test_an_exact_count_leaves_out_messages_that_an_estimate_would_keep(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path(COUNTS, reply(200, {"input_tokens": 9000}))
    [_], messages = await continue_conversation(scripted_server, 4800)
    assert messages < 11


@pytest.mark.parametrize("answered", [reply(404), reply(500, "jinja error")], ids=["cannot", "fails"])
async def test_without_an_exact_count_the_estimate_decides(scripted_server: ScriptedServer, answered: Any) -> None:
    scripted_server.on_path(COUNTS, answered)
    [_], messages = await continue_conversation(scripted_server, 3000)
    assert messages < 11


async def test_a_run_cannot_be_stopped_by_a_count_that_never_arrives(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine, the request itself takes a moment.
    monkeypatch.setattr("lmbridge.agent.client_source._COUNT_SECONDS", 0.5)
    scripted_server.on_path(COUNTS, stall())
    [counted], messages = await continue_conversation(scripted_server, 3000)
    await scripted_server.wait_until(lambda: counted.aborted)
    assert messages < 11


def test_a_prompt_that_the_server_has_counted_is_not_counted_again() -> None:
    history = History("word " * 2000)
    context = budget(history, context_length=4096)
    assert context.needs_exact_count
    context.learn(history.size, 3900)
    assert not context.needs_exact_count
    history.add_answer("More.")
    assert context.needs_exact_count
