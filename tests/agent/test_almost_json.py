"""JSON with small mistakes: what is read, and what is not because there is more than one way to read it."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge.agent.almost_json import read_almost_json, repair_arguments
from tests.support import assert_linear


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'a': 1, 'b': 'x'}", {"a": 1, "b": "x"}),
        ("{'a': 'it\\'s', \"b\": 'say \"x\"'}", {"a": "it's", "b": 'say "x"'}),
        ('{"a": "it\\\'s"}', {"a": "it's"}),
        ('{"a": 1, "b": [1, 2,],}', {"a": 1, "b": [1, 2]}),
        ('{"a": 1, // one\n "b": 2 /* two */, # three\n}', {"a": 1, "b": 2}),
        ('{"a": True, "b": False, "c": None}', {"a": True, "b": False, "c": None}),
        ('{"a": "x\ny\tz"}', {"a": "x\ny\tz"}),
        ('{"a": """x\n"y" z"""}', {"a": 'x\n"y" z'}),
        ("{a: 1, b_2: [true]}", {"a": 1, "b_2": [True]}),
        ("{\u201ca\u201d: \u201cx\u201d}", {"a": "x"}),
        ('{"a": 1 "b": 2}', {"a": 1, "b": 2}),
        ('{"a": "x"\n"b": "y"}', {"a": "x", "b": "y"}),
        ('[{"a": 1} {"a": 2}]', [{"a": 1}, {"a": 2}]),
        ('{"a": [1, 2}', {"a": [1, 2]}),
        ('{"a": {"b": [1, 2}}', {"a": {"b": [1, 2]}}),
        ('{"a": 1}}', {"a": 1}),
        ('{"a": {"b": 1}}]}\n', {"a": {"b": 1}}),
        ('{"a": "\\d+\\s"}', {"a": "\\d+\\s"}),
        ('{"a": "\\d \\\\ \\" \\/"}', {"a": '\\d \\ " /'}),
        ('{"a": "\\ud83d\\ude00", }', {"a": "\U0001f600"}),
        ('```json\n{"a": 1,}\n```', {"a": 1}),
        ("{'a': 1}{'a': 1}", {"a": 1}),
        ("{'a': 1}\n{'a': 1} {'a': 1}", {"a": 1}),
        ("{'a': 3.10, 'b': -1e5}", {"a": 3.1, "b": -1e5}),
    ],
)
@pytest.mark.parametrize("may_be_cut", [True, False])
def test_small_mistakes_are_repaired(text: str, value: Any, may_be_cut: bool) -> None:
    assert json.loads(repair_arguments(text, may_be_cut=may_be_cut)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1', {"a": 1}),
        ('{"a": "x"', {"a": "x"}),
        ('{"a": {"b": [1, {"c": 2}]}', {"a": {"b": [1, {"c": 2}]}}),
        ('{"a": [1, 2', {"a": [1, 2]}),
        ('{"a": 1 ', {"a": 1}),
        ("{'a': true", {"a": True}),
    ],
)
def test_missing_brackets_are_added_only_if_nothing_was_cut_off(text: str, value: Any) -> None:
    assert json.loads(repair_arguments(text, may_be_cut=False)) == value
    with pytest.raises(ValueError, match="cut off"):
        repair_arguments(text, may_be_cut=True)
    # What follows shows that the model went on, so that nothing was cut off.
    assert json.loads(read_almost_json(f"{text}</tool_call>", may_be_cut=True).text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "{",
        '{"a"',
        '{"a":',
        '{"a": 1,',
        '{"a": "x',
        "{'a': 'x",
        '{"a": 1, "b',
        '{"a": tru',
        '{"a": -',
        '{"a": 1}{"a": 2}',
        '{"a": 1} and {"a": 2}',
        "{'text': 'it's'}",
        '{"a": "say "x" now"}',
        '{"a": "x" "b": 2}',
        '{"a" 1}',
        '{"a": hello world}',
        '{"a": 01}',
        '{"a": 1,, "b": 2}',
        '{"a": C:\\x}',
        '{"a": "C:\\data\\new"}',
        "{'a': 'C:\\users\\new'}",
        "{'a': undefined}",
        "[" * 300,
    ],
)
@pytest.mark.parametrize("may_be_cut", [True, False])
def test_what_is_not_clear_is_refused(text: str, may_be_cut: bool) -> None:
    with pytest.raises(ValueError, match=r"."):
        repair_arguments(text, may_be_cut=may_be_cut)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_valid_json_stays_as_it_is(value: Any) -> None:
    assert json.loads(read_almost_json(json.dumps(value)).text) == value
    assert json.loads(read_almost_json(json.dumps(value, ensure_ascii=False, indent=1)).text) == value


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=3))
def test_the_literals_of_python_are_read(value: Any) -> None:
    try:
        text = read_almost_json(repr(value)).text
    except ValueError:
        # Python writes some characters as escapes that JSON does not have.
        assert "\\" in repr(value)
    else:
        assert "\\x" in repr(value) or "\\U" in repr(value) or json.loads(text) == value


@given(st.text(alphabet="{}[]\"'\\,:1-aTnu#/* \n<`", max_size=30), st.booleans())
def test_any_text_is_read_as_json_or_refused(text: str, may_be_cut: bool) -> None:
    try:
        written = repair_arguments(text, may_be_cut=may_be_cut)
    except ValueError:
        return
    json.loads(written)


def read(unit: str, size: int) -> None:
    """Reads a text that consists of one piece again and again."""
    for before in ("", '{"a": ['):
        try:
            read_almost_json(before + unit * size, may_be_cut=False)
        except ValueError:
            continue


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    ["1, ", "'x', ", '"', "'", '"""', "{'a':", "[", "/* ", "{//\n", '\\"', "{} ", "\u201c", "<escape>", "}", "\\d"],
)
def test_the_time_to_read_is_linear(unit: str) -> None:
    assert_linear(partial(read, unit), 2_000, doublings=2)


def test_the_time_to_read_a_fence_is_linear() -> None:
    def repair(size: int) -> None:
        assert repair_arguments(f"```json\n{{'a':{' ' * size}1}}\n```", may_be_cut=False) == '{"a":1}'

    assert_linear(repair, 1_000)
