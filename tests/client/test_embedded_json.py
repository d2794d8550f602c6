"""The search for the only JSON value in a text: what counts as one, and that it takes linear time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmbridge.client.embedded_json import EmbeddedValue, find_only_value
from tests.support import assert_linear

PROSE = st.text(st.sampled_from("ab :.,\n\"'`()é"), max_size=20)
VALUES = st.dictionaries(
    st.text(max_size=4),
    st.recursive(st.integers() | st.text() | st.booleans() | st.none(), lambda leaf: st.lists(leaf, max_size=3)),
    max_size=3,
)


@given(before=PROSE, value=VALUES, after=PROSE)
def test_an_object_is_found_whatever_prose_is_around_it(before: str, value: dict[str, Any], after: str) -> None:
    found = find_only_value(f"a {before}{json.dumps(value)}{after}", with_arrays=False)
    assert found is not None
    assert json.loads(found.text) == value


@given(values=st.lists(VALUES, min_size=2, max_size=4), prose=PROSE)
@example(values=[{"": 0}, {"": False}], prose="")
def test_an_object_is_found_only_if_all_objects_are_the_same(values: list[dict[str, Any]], prose: str) -> None:
    found = find_only_value(f"a {prose.join(map(json.dumps, values))}", with_arrays=False)
    # 0 and False are equal in Python, but not the same in JSON.
    assert (found is not None) == (len({json.dumps(value, sort_keys=True) for value in values}) == 1)


@pytest.mark.parametrize(
    ("text", "with_arrays", "found"),
    [
        ("no value", True, None),
        ("", True, None),
        ("see [1]", True, EmbeddedValue("[1]", True)),
        ("see [1]", False, None),
        ("see [1].", True, EmbeddedValue("[1]", False)),
        ("```\n[1]\n``` \n", True, EmbeddedValue("[1]", True)),
        ("[1] and [2]", True, None),
        ('{"a": 1} {"a": 1.0}', True, None),
        ('{"a": 1, "b": 2} {"b": 2, "a": 1}', True, EmbeddedValue('{"b": 2, "a": 1}', True)),
        ('{"a": 1} {"a": true}', True, None),
        ("[1]", True, None),
        ("[" * 100_000, True, None),
        ('a {"b": ' * 50_000, True, None),
    ],
)
def test_only_one_value_may_be_there(text: str, with_arrays: bool, found: EmbeddedValue | None) -> None:
    assert find_only_value(text, with_arrays=with_arrays) == found


@pytest.mark.slow
@pytest.mark.parametrize("part", ["{", "[", "{x", "[x", "{x}", "[x]", '{"a": 1} ', "[[1], ", '{"', "{ "])
def test_the_search_takes_linear_time(part: str) -> None:
    assert_linear(lambda size: find_only_value(part * size, with_arrays=True), 20_000)


@pytest.mark.parametrize("opening", ["[0,", "[ [", '[0,"" ,'])
@pytest.mark.parametrize("end", ["1,", '1,"x'])
def test_brackets_around_a_long_text_are_not_read_again_and_again(
    monkeypatch: pytest.MonkeyPatch, opening: str, end: str
) -> None:
    begun: list[int] = []
    raw_decode = json.JSONDecoder.raw_decode

    def counted(decoder: json.JSONDecoder, text: str, start: int = 0) -> tuple[Any, int]:
        begun.append(start)
        return raw_decode(decoder, text, start)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counted)
    # Each attempt reads the text to its end, where it turns out not to be JSON.
    assert find_only_value(f"Here: {opening * 300}{'1,' * 100_000}{end}", with_arrays=True) is None
    assert 0 < len(begun) <= 3


def test_a_value_behind_a_few_brackets_in_a_long_text_is_found() -> None:
    text = f'{"See [1, 2 and {x}. " * 80}{{"a": 1}}{" [1, 2 and so on." * 200}'
    assert find_only_value(text, with_arrays=False) == EmbeddedValue('{"a": 1}', False)
