from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge._text import excerpt, json_for_model, redacted_beginning, replace_lone_surrogates, shorten

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
)


def test_a_long_text_is_shortened_with_dots_and_a_short_one_is_not() -> None:
    assert shorten("abcde", 5) == "abcde"
    assert shorten("abcdef", 5) == "abcde..."


def test_an_excerpt_of_a_long_text_says_how_long_it_is() -> None:
    assert excerpt("x" * 500) == "x" * 500
    assert excerpt("x" * 501) == "x" * 500 + "... (501 characters)"


def test_an_excerpt_of_a_part_of_a_body_says_how_large_the_body_was() -> None:
    assert excerpt("x" * 501, 10_000) == "x" * 500 + "... (from a body of 10000 bytes)"


@pytest.mark.parametrize("text", ["secret and more", b"secret and more"])
def test_a_short_text_is_kept_whole_without_its_secrets(text: str | bytes) -> None:
    assert redacted_beginning(text, lambda text: text.replace("secret", "[key]")) == "[key] and more"


@given(st.integers(239_000, 251_000))
def test_a_secret_that_is_cut_in_two_is_not_shown(position: int) -> None:
    text = "." * position + "s" * 5_000 + "." * 100_000
    shown = redacted_beginning(text.encode(), lambda text: text.replace("s" * 5_000, ""))
    assert set(shown) == {"."}
    assert len(shown) > 200_000


@pytest.mark.parametrize(
    ("value", "replaced"),
    [
        ("plain", "plain"),
        ("cut \ud83d here", "cut ? here"),
        ("\udd42", "?"),
        ("\ud83d\ude42", "🙂"),
        ({"content": "a\ud83d", "parts": ["\udc00", 1, None]}, {"content": "a?", "parts": ["?", 1, None]}),
    ],
)
def test_lone_surrogates_become_question_marks_and_pairs_become_characters(value: Any, replaced: Any) -> None:
    assert replace_lone_surrogates(value) == replaced


@given(JSON_VALUES)
def test_a_value_without_lone_surrogates_can_be_encoded(value: Any) -> None:
    msgspec.json.encode(replace_lone_surrogates(value))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_text_without_surrogates_is_returned_unchanged(text: str) -> None:
    assert replace_lone_surrogates(text) is text


@given(JSON_VALUES)
def test_small_and_large_values_are_the_same_json(value: Any) -> None:
    assert json.loads(json_for_model(value)) == value
    large = json_for_model([value, "x" * 100_000])
    assert json.loads(large) == [value, "x" * 100_000]


def test_only_large_json_has_no_spaces() -> None:
    assert json_for_model({"ä": [1, 2]}) == '{"ä": [1, 2]}'
    assert json_for_model({"ä": [1, 2], "b": "x" * 100_000}).startswith('{"ä":[1,2],"b":"x')
    with pytest.raises(TypeError):
        json_for_model(object())
