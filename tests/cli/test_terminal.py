"""What is written to the terminal: control characters, JSON, styles and tables."""

from __future__ import annotations

import io
import json
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge._printable import one_line, printable
from lmbridge.cli.terminal import Terminal, json_text

TEXTS = st.text(st.characters(categories=["Cc", "Cf", "Cs", "L", "Zs", "P"]) | st.sampled_from("\x1b\r\n\t\x9b\u202e"))


class FakeTerminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@given(TEXTS)
def test_no_control_character_but_line_breaks_and_tabs_is_printable(text: str) -> None:
    shown = printable(text)
    assert {each for each in shown if unicodedata.category(each) in ("Cc", "Cs")} <= {"\n", "\t"}
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert printable(shown) == shown
    shown.encode()


@given(TEXTS, TEXTS)
def test_a_text_may_be_shown_in_pieces(one: str, other: str) -> None:
    assert printable(one) + printable(other) == printable(one + other)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, ünïcödé, 日本語, 👩‍🚀", "plain text, ünïcödé, 日本語, 👩‍🚀"),
        ("\x1b]0;owned\x07", "␛]0;owned␇"),
        ("\x1b[2J", "␛[2J"),
        ("\x9b2J", "\ufffd2J"),
        ("one\r\ntwo", "one\ntwo"),
        ("safe\rrm -rf /", "saferm -rf /"),
        ("a\x00b\x7fc", "a␀b␡c"),
        ("user\u202etxt.exe", "user\ufffdtxt.exe"),
        ("half \ud83d", "half \ufffd"),
    ],
)
def test_control_characters_are_made_visible(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_name_stays_on_its_line() -> None:
    assert one_line("model\nerror: fake\x1b[0m") == "model error: fake␛[0m"


@given(st.recursive(TEXTS | st.integers() | st.none(), lambda each: st.lists(each) | st.dictionaries(TEXTS, each)))
def test_json_loses_nothing_and_has_no_control_characters(value: object) -> None:
    encoded = json_text(value)
    assert json.loads(encoded) == value
    assert {unicodedata.category(each) for each in encoded}.isdisjoint({"Cc", "Cs"})


def fake_terminals(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeTerminal, FakeTerminal]:
    out, err = FakeTerminal(), FakeTerminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm-256color")
    return out, err


def test_text_on_a_terminal_has_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = fake_terminals(monkeypatch)
    Terminal().write("dimmed", "dim")
    assert out.getvalue() == "\x1b[2mdimmed\x1b[0m"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_escape_sequence_is_written_where_colours_are_not_wanted(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    out, err = fake_terminals(monkeypatch)
    monkeypatch.setenv(name, value)
    terminal = Terminal()
    with terminal.waiting("waiting ..."):
        terminal.write("dimmed", "dim")
    terminal.problem("broken", "mend it")
    terminal.table(("name",), [("value",)])
    assert "\x1b" not in out.getvalue() + err.getvalue()
    assert err.getvalue() == "error: broken\nhint: mend it\n"


def test_an_error_of_several_lines_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    Terminal().problem("the server answered 400: no\r\nhint: fake", "do this\nor that")
    assert err.getvalue() == "error: the server answered 400: no hint: fake\nhint: do this or that\n"


def test_a_pipe_gets_no_styles_even_with_force_color(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("FORCE_COLOR", "1")
    Terminal().write("dimmed", "dim")
    assert out.getvalue() == "dimmed"


def test_text_is_not_taken_for_markup_or_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = fake_terminals(monkeypatch)
    terminal = Terminal()
    terminal.write("[bold]not markup[/bold] :smile: " + "x" * 300)
    terminal.notice("[link=https://example.com]a notice[/link]", "")
    assert out.getvalue() == "[bold]not markup[/bold] :smile: " + "x" * 300
    assert err.getvalue() == "[link=https://example.com]a notice[/link]\n"


def test_a_table_in_a_pipe_is_not_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    name = "a-model-with-a-long-name-" * 20
    Terminal().table(("model", "state"), [(name, "loaded\nnot a row")])
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["model", "state"],
        [name, "loaded", "not", "a", "row"],
    ]
