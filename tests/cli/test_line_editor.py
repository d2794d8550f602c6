"""The line editor of a conversation, with the keys that a terminal sends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from lmbridge.cli.line_editor import LineEditor, ask_person


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        yield keyboard


def make_editor(*history: str) -> LineEditor:
    return LineEditor(["/help", "/model"], history, lambda: "qwen3-4b\x1b[2J")


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("Hello\r", "Hello"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("typed ahead\n", "typed ahead"),
        ("\x1b[200~def f():\n    pass\n\x1b[201~\r", "def f():\n    pass\n"),
        ("wrong\x03right\r", "right"),
        ("\x1b[A\r", "second"),
        ("\x1b[A\x1b[A\r", "first"),
    ],
    ids=["enter", "alt-enter", "typed-ahead", "paste", "ctrl-c", "up", "up-up"],
)
async def test_keys_become_a_text(keyboard: PipeInput, keys: str, text: str) -> None:
    editor = make_editor("first", "second")
    keyboard.send_text(keys)
    assert await editor.read() == text


@pytest.mark.parametrize(("keys", "error"), [("\x03", KeyboardInterrupt), ("\x04", EOFError)])
async def test_ctrl_c_and_ctrl_d_leave_if_there_is_no_text(
    keyboard: PipeInput, keys: str, error: type[BaseException]
) -> None:
    keyboard.send_text(keys)
    with pytest.raises(error):
        await make_editor().read()


def test_the_names_of_commands_are_completed_and_words_in_a_text_are_not() -> None:
    completer = make_editor()._session.completer
    assert completer is not None
    completed = {
        text: [
            each.text for each in completer.get_completions(Document(text), CompleteEvent(completion_requested=True))
        ]
        for text in ("/mo", "and /mo")
    }
    assert completed == {"/mo": ["/model"], "and /mo": []}


def test_the_status_is_printable() -> None:
    assert [text for _, text, *_ in make_editor()._toolbar()] == ["qwen3-4b␛[2J"]


async def test_a_question_is_answered_with_a_line(keyboard: PipeInput) -> None:
    keyboard.send_text("yes\r")
    assert await ask_person("Really? ") == "yes"
    keyboard.send_text("\x04")
    assert await ask_person("Really? ") == ""
