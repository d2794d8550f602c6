"""Reasons to end a run without an answer."""

from __future__ import annotations

from typing import Any

import pytest

from lmbridge.agent.guards import BadCallGuard, RepetitionGuard, TokenBudget


def repeat(guard: RepetitionGuard, name: str = "f", arguments: Any = None, result: str = "same") -> str:
    """Notes a call that is the only one of its reply."""
    text = guard.note(name, {} if arguments is None else arguments, result)
    guard.end_reply()
    return text


def test_the_third_repetition_warns_and_the_fifth_ends_the_run() -> None:
    guard = RepetitionGuard(5)
    texts = [repeat(guard, arguments={"a": 1, "b": 2} if n % 2 else {"b": 2, "a": 1}) for n in range(4)]
    assert [text == "same" for text in texts] == [True, True, False, False]
    assert not guard.tripped
    repeat(guard, arguments={"a": 1, "b": 2})
    assert guard.tripped


def test_a_repetition_that_is_forgiven_does_not_count() -> None:
    guard = RepetitionGuard(3)
    for _ in range(10):
        guard.note("read", {"page": 1}, "text")
        guard.end_reply()
        guard.forgive()
    assert not guard.tripped
    for _ in range(3):
        guard.note("read", {"page": 1}, "text")
        guard.end_reply()
    assert guard.tripped


def test_a_cycle_of_two_calls_is_a_repetition_too() -> None:
    guard = RepetitionGuard(5)
    for _ in range(4):
        repeat(guard, "f")
        repeat(guard, "g")
    assert not guard.tripped
    assert "5 times" in repeat(guard, "f")
    assert guard.tripped


def test_repetitions_within_a_reply_count_once() -> None:
    guard = RepetitionGuard(5)
    for _ in range(4):
        for _ in range(100):
            guard.note("f", {}, "x")
            guard.note("g", {}, "y")
        guard.end_reply()
    assert not guard.tripped
    assert "5 times" in guard.note("f", {}, "x")
    assert guard.tripped


@pytest.mark.parametrize("limit", [2, 4, 10])
def test_the_limit_of_repetitions_can_be_set(limit: int) -> None:
    guard = RepetitionGuard(limit)
    for _ in range(limit - 1):
        repeat(guard)
    assert not guard.tripped
    repeat(guard)
    assert guard.tripped


def test_without_a_limit_there_is_neither_a_warning_nor_an_end() -> None:
    guard = RepetitionGuard(None)
    assert {repeat(guard) for _ in range(50)} == {"same"}
    assert not guard.tripped


@pytest.mark.parametrize("what", ["name", "arguments", "result"])
def test_a_call_that_differs_in_anything_is_a_different_call(what: str) -> None:
    guard = RepetitionGuard(5)
    for number in range(20):
        name = f"f{number}" if what == "name" else "f"
        arguments = {"n": number} if what == "arguments" else {}
        result = str(number) if what == "result" else "x"
        assert repeat(guard, name, arguments, result) == result
    assert not guard.tripped


def test_replies_with_bad_calls_are_counted_only_in_a_row() -> None:
    guard = BadCallGuard(3)
    for bad in (True, True, False, True, True):
        guard.note(bad=bad)
        assert not guard.tripped
    guard.note(bad=True)
    assert guard.tripped
    guard.note(bad=False)
    assert guard.tripped


def test_a_budget_is_spent_when_its_limit_is_reached() -> None:
    budget, unlimited = TokenBudget(10), TokenBudget(None)
    for each in (budget, unlimited):
        each.spend(9)
        assert not each.is_spent
        each.spend(1)
    assert budget.is_spent
    assert not unlimited.is_spent
