"""`ends_in_repetition`: whether a model has fallen into a loop."""

from __future__ import annotations

import pytest

from lmbridge.client.repeated_text import ends_in_repetition

ONCE = " ".join(map(str, range(100, 180)))[:250]
"""A text without repetitions, of the greatest length that may be repeated."""


@pytest.mark.parametrize(
    "text",
    [
        "0" * 200,
        " " * 300,
        "It begins well. " + "json." * 50,
        "90123456" + "7890123456" * 30 + "789",
        '[{"name": "a"}' + ',\n            {"name": "b", "type": "json"}' * 6 + ',\n            {"na',
        "x" + ONCE * 4,
    ],
)
def test_a_text_in_a_loop(text: str) -> None:
    assert ends_in_repetition(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0" * 199,
        "0, " * 66,
        "json." * 50 + " and then an end",
        " ".join(map(str, range(500))),
        ONCE * 3,
        "a long sentence that comes only three times, " * 3,
    ],
)
def test_a_text_that_goes_on(text: str) -> None:
    assert not ends_in_repetition(text)
