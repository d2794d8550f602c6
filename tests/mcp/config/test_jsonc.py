"""Parsing JSON with comments and trailing commas."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge.mcp.config.jsonc import parse_jsonc
from tests.support import assert_linear


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_plain_json_is_parsed_as_json(value: Any) -> None:
    assert parse_jsonc(json.dumps(value)) == value
    assert parse_jsonc(json.dumps(value, indent=1, ensure_ascii=False)) == value


def test_comments_and_trailing_commas_are_ignored_but_not_inside_strings() -> None:
    text = """{
        // a comment
        "a": { /* several
        lines */ "b": ["x // no comment", "/*", ",]", "\\"", ],},
    }"""
    assert parse_jsonc(text) == {"a": {"b": ["x // no comment", "/*", ",]", '"']}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  // a comment\n  "a": {"command" "x"}\n}', "Expecting ':' delimiter at line 3 column 19"),
        ("", "Expecting value at line 1 column 1"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' occurs twice"),
        ("[" * 100_000, "it is nested too deeply"),
    ],
)
def test_an_error_names_the_line_and_the_column_or_the_key(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_jsonc(text)


@pytest.mark.slow
@pytest.mark.parametrize("text", ['{"a": "', "/*"], ids=["a string", "a comment"])
def test_the_time_for_what_is_never_closed_is_linear(text: str) -> None:
    def parse(size: int) -> None:
        with pytest.raises(ValueError, match="line 1"):
            parse_jsonc(text + ('\\"' if '"' in text else "/*") * size)

    assert_linear(parse, 4000)
