"""Regular expressions that are matched in linear time."""

from __future__ import annotations

import contextlib
import re
import warnings
from typing import Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmbridge.agent.pattern_syntax import UnsupportedPatternError
from lmbridge.agent.patterns import compile_pattern
from lmbridge.agent.schema_check_limit import StepLimit, StepLimitError
from tests.support import assert_linear

_ATOMS = st.sampled_from(
    ["a", "b", "1", "_", ".", r"\d", r"\w", r"\s", r"\D", "[ab]", "[^a]", "[a-c1]", r"[\d_]", "x", r"\."]
)
_PATTERNS = st.recursive(
    _ATOMS | st.sampled_from(["^", "$", r"\b", r"\B"]),
    lambda parts: (
        st.lists(parts, min_size=1, max_size=3).map("".join)
        | st.lists(parts, min_size=1, max_size=3).map(lambda each: f"(?:{'|'.join(each)})")
        | st.tuples(parts, st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,}", "{1,}?"])).map(
            lambda each: f"(?:{each[0]}){each[1]}"
        )
        | parts.map(lambda each: f"(?={each})")
        | parts.map(lambda each: f"(?!{each})")
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(_PATTERNS, st.text("ab1_ x.é-AB", min_size=1, max_size=8), st.sampled_from(["", "(?i)"]))
def test_a_pattern_matches_what_python_matches(pattern: str, text: str, flags: str) -> None:
    pattern = flags + pattern
    assert compile_pattern(pattern).search(text) is (re.search(pattern, text) is not None)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        (r"^\d{4}-\d{2}-\d{2}$", ["2026-01-31"], ["2026-1-31", "x2026-01-31", "2026-01-31\n"]),
        (r"^[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}$", ["a.b@c.de"], ["a@b", "@c.de"]),
        (r"^(?=.*\d)(?=.*[a-z])(?!.*\s).{6,}$", ["abc123"], ["abcdef", "abc 123", "a1"]),
        (r"^(?=!)..$", ["!x"], ["xx"]),
        (r"^(?!!)..$", ["xx"], ["!x"]),
        (r"^(?i)abc$", ["ABC", "abc"], ["abd"]),
        (r"(?i:a)b", ["Ab"], ["AB"]),
        (r"(?i)^[^a]+$", ["b", "B"], ["a", "A", "bA"]),
        (r"(?i)^[^a-z]+$", ["1"], ["a", "A"]),
        (r"(?i)^[^\W\d]+$", ["aA_"], ["1", "-"]),
        (r"(?i)^[s-z]+$", ["sZ"], ["ß"]),
        (r"(?m)^b$", ["a\nb\nc"], ["ab"]),
        (r"^(?s).$", ["\n"], ["ab"]),
        (r"^.$", ["a"], ["\n", ""]),
        (r"^(?P<year>\d+)\Z", ["12"], ["12\n", "a"]),
        (r"\A(?<year>\d+)\z", ["12"], ["12a"]),
        (r"^\p{Lu}\p{Ll}+$", ["Öl"], ["öl", "Ö1"]),
        (r"^\p{Letter}+$", ["Öl"], ["1"]),
        (r"^\P{L}+$", ["12"], ["1a"]),
        (r"^[\p{L}\p{Nd} -]+$", ["Öl 1-2"], ["a_b"]),
        (r"^\u00e9\x41\u{1F600}$", ["éA😀"], ["eA"]),
        (r"^[]a]+$", ["a]"], ["b"]),
        (r"^[\]\-\\^]+$", ["]-\\^"], ["a"]),
        (r"^[a-]+$", ["a-"], ["b"]),
        (r"^[\b]$", ["\b"], ["b"]),
        (r"^a{,2}b{x}$", ["aab{x}", "b{x}"], ["aaab{x}"]),
        (r"^a{2}{2}$", ["aaaa"], ["aa"]),
        (r"(a*)*b", ["b", "aab"], ["a"]),
        (r"(?#a comment)x", ["x"], ["a"]),
        (r"^\/[^\/]+$", ["/a"], ["/a/b"]),
        (r"", ["", "a"], []),
        (r"a|", ["", "b"], []),
        (r"^\cJ\t\n?$", ["\n\t"], ["J"]),
    ],
)
def test_the_syntax_of_schemas_is_understood(pattern: str, matching: list[str], others: list[str]) -> None:
    compiled = compile_pattern(pattern)
    assert [text for text in matching if not compiled.search(text)] == []
    assert [text for text in others if compiled.search(text)] == []


@pytest.mark.parametrize(
    "pattern",
    [
        "(", ")", "(a", "a)", "[", "[a", "[^", "*", "+a", "a|*", "(?", "(?<=a)b", "(?<!a)b", r"(a)\1",
        r"(?P<n>a)(?P=n)", r"\k<n>", "(?>a)", "a++", "\\", r"\q", r"\x4", r"\u12", r"\u{zz}", r"\u{110000}",
        r"\p{Script=Greek}", r"\p{",
        "[b-a]", r"[a-\d]", "a{2,1}", "a{99999999999999999999}", "a{10001}", "(?:a{1000}){1000}", "(?x)a", "(?P<n",
        "(" * 5_000 + ")" * 5_000, "a" * 10_001,
    ],
)  # fmt: skip
def test_everything_else_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedPatternError):
        compile_pattern(pattern)


@given(st.text("ab[](){}^$|?*+-,1\\pdwbxu<>=!:.", max_size=12), st.text("ab1", max_size=4))
def test_any_source_is_compiled_or_refused(source: str, text: str) -> None:
    with contextlib.suppress(UnsupportedPatternError):
        compile_pattern(source).search(text)


# Pieces of syntax, so that sources that are joined from them are often valid.
_PIECES: Final = [
    "(", "(?:", "(?=", "(?!", "(?i:", "(?s:", "(?m:", "(?P<n>", "(?#", "(?i)", ")", "[", "[^", "]", "{", "}", "{1,2}",
    "{,2}", "*", "+", "?", "|", "^", "$", ".", "-", ",", ":", "=", "!", "<", ">", "#", "&", "~", "a", "b", "B", "1",
    r"\d", r"\W", r"\s", r"\b", r"\B", r"\A", r"\x41", r"\u0041", r"\.", r"\]", r"\-", r"\\",
]  # fmt: skip


@settings(max_examples=500)
@given(st.lists(st.sampled_from(_PIECES), max_size=8).map("".join), st.text("aAbB1 !=<>:-^]", min_size=1, max_size=5))
@example("^(?=!)", "!x")
@example("^(?!!)", "!x")
@example("^(?==)", "=x")
@example("^(?::)", ":x")
@example("^(?P<n>>)", ">x")
def test_a_source_that_python_compiles_too_means_the_same(source: str, text: str) -> None:
    with warnings.catch_warnings():
        # Python warns about sources such as `[[`, whose meaning it may change some day.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            expected = re.compile(source)
            pattern = compile_pattern(source)
        except (re.error, UnsupportedPatternError):
            return
    assert pattern.search(text) is (expected.search(text) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        r"^(a+)+$",
        r"^(a|a)*$",
        r"^(a|aa)+$",
        r"(.*,){11}P",
        r"(a?){30}a{30}b",
        r"^(?:.*a){10}b",
        r"a+$",
        r"(a*)*b",
        r"^(([a-z])+.)+[A-Z]([a-z])+$",
        r"(?:a{1,20}){1,20}b",
    ],
)
def test_the_time_of_a_search_is_linear(pattern: str) -> None:
    compiled = compile_pattern(pattern)
    assert_linear(lambda size: compiled.search("a" * size + "!"), 1_000)


def test_a_search_that_is_not_linear_ends_at_the_limit() -> None:
    with StepLimit(10_000), pytest.raises(StepLimitError):
        compile_pattern("(?=(a+)+$)b").search("a" * 10_000 + "!")
    with StepLimit(10_000):
        assert compile_pattern("(?=(a+)+$)a").search("a" * 100)


@pytest.mark.parametrize("repeats", ["{0}{9999}{9999}", "{0}{9999}{9999}{9999}", "{400}{400}", "{1}{0}{9999}{9999}"])
@pytest.mark.parametrize("part", ["a", "(?:)", "(?:a|b)", "(?#x)", "(?i)"])
def test_repetitions_that_multiply_are_refused_early(part: str, repeats: str) -> None:
    with StepLimit(200_000), pytest.raises(UnsupportedPatternError, match="too large"):
        compile_pattern(f"(?:{part}){repeats}")


def test_compiling_a_pattern_spends_steps() -> None:
    with StepLimit(5_000), pytest.raises(StepLimitError):
        compile_pattern("ab" * 2_500)
    with StepLimit(5_000), pytest.raises(StepLimitError):
        compile_pattern("(?:abcd){2000}")


def test_a_refused_pattern_is_not_compiled_again() -> None:
    source = "xy" * 1_000 + "(?<=b)"
    with pytest.raises(UnsupportedPatternError):
        compile_pattern(source)
    with StepLimit(0), pytest.raises(UnsupportedPatternError, match="<"):
        compile_pattern(source)
