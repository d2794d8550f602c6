"""Names that are similar to one that does not exist."""

from __future__ import annotations

import pytest

from lmbridge._similar_names import close_matches
from tests.support import assert_linear


def test_close_matches_ignore_case_and_come_in_order() -> None:
    names = ["gemma-3-4b", "Qwen3-8B", "Qwen3-4B", "x" * 200]
    assert close_matches("qwen3-4b", names) == ["Qwen3-4B", "Qwen3-8B"]
    assert close_matches("", names) == []


def test_a_close_match_in_a_long_list_is_found() -> None:
    names = [f"org/model-{number}" for number in range(9_000)]
    assert close_matches("qwen3-4", [*names, "qwen3-4b"]) == ["qwen3-4b"]


@pytest.mark.parametrize("letters", ["ab", "a", "abcdefgh"])
def test_the_time_for_close_matches_is_limited(letters: str) -> None:
    def match(size: int) -> None:
        close_matches(letters * 10, [letters * 9 + str(number) for number in range(size)])

    assert_linear(match, 2_000)
