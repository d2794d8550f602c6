"""The command line in a real terminal: a pseudo-terminal, whose screen a terminal emulator draws."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pyte
import pytest

from lmbridge.testing import answer, stall
from lmbridge.testing.completions import completion_chunk
from tests.threaded_server import ThreadedServer

# Each test starts an interpreter.
pytestmark = pytest.mark.slow

ROWS, COLUMNS = 24, 100
SECONDS = 30


class Screen:
    """A program in a pseudo-terminal, and what its screen shows."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._emulator = pyte.ByteStream(self._screen)
        self.program = pexpect.spawn(
            sys.executable,
            ["-m", "lmbridge", *arguments],
            env={**os.environ, "TERM": "xterm-256color", **environment},
            dimensions=(ROWS, COLUMNS),
            timeout=SECONDS,
        )
        # prompt_toolkit asks the terminal where the cursor is.
        self._screen.write_process_input = self.type  # type: ignore[assignment]  # how pyte answers
        self.received = b""

    @property
    def text(self) -> str:
        """The lines of the screen, without empty ones at the end."""
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def wait_for(self, condition: Callable[[str], bool]) -> str:
        """Reads from the program until its screen meets a condition, and returns the text of the screen."""
        while not condition(self.text):
            self._read()
        return self.text

    def shows(self, text: str) -> str:
        """Waits until a text is on the screen, and returns the whole screen."""
        return self.wait_for(lambda screen: text in screen)

    def type(self, keys: str) -> None:
        self.program.send(keys)

    def resize(self, rows: int, columns: int) -> None:
        self.program.setwinsize(rows, columns)
        self._screen.resize(rows, columns)

    def wait_end(self) -> int:
        """Reads until the program has ended, and returns its exit status."""
        try:
            while True:
                self._read()
        except pexpect.EOF:
            self.program.wait()
        status = self.program.exitstatus
        assert status is not None
        return int(status)

    def _read(self) -> None:
        try:
            data = self.program.read_nonblocking(size=4096, timeout=SECONDS)
        except pexpect.TIMEOUT as exc:
            raise AssertionError(f"the screen did not change:\n{self.text}") from exc
        self.received += data
        self._emulator.feed(data)


@pytest.fixture
def start(server: ThreadedServer, tmp_path: Path) -> Iterator[Callable[..., Screen]]:
    screens: list[Screen] = []

    def start(*arguments: str, **environment: str) -> Screen:
        environment = {
            "LMBRIDGE_API_BASE": server.api_base,
            "LMBRIDGE_DATA_HOME": str(tmp_path / "data"),
            **environment,
        }
        screens.append(Screen(list(arguments), environment))
        return screens[-1]

    yield start
    for screen in screens:
        screen.program.close(force=True)


def piece(text: str) -> dict[str, Any]:
    return completion_chunk("chatcmpl-1", "test-model", {"content": text})


def test_an_answer_appears_while_it_is_written(server: ThreadedServer, start: Callable[..., Screen]) -> None:
    server.answer(stall(after=(piece("Once upon"), piece(" a time"))))
    screen = start("chat", "Tell a story")
    assert screen.shows("Once upon a time").startswith("Once upon a time")
    screen.type("\x03")
    server.wait_until(lambda scripted: scripted.aborts)
    assert screen.wait_end() == 130
    assert "interrupted" in screen.text


def test_the_status_stands_below_the_answer(server: ThreadedServer, start: Callable[..., Screen]) -> None:
    server.answer(answer("Paris is the capital."))
    screen = start("chat", "The capital?")
    assert screen.wait_end() == 0
    first, second = screen.text.splitlines()
    assert first == "Paris is the capital."
    assert second.startswith("4 tokens · ")
    assert second.endswith("context 5")


def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(server: ThreadedServer, start: Callable[..., Screen]) -> None:
    server.scripted.script(stall(after=(piece("Once upon"),)), answer("The end."))
    screen = start("chat")
    screen.shows("\n>")
    screen.type("Tell a story\r")
    screen.shows("Once upon")
    screen.type("\x03")
    server.wait_until(lambda scripted: scripted.aborts)
    screen.shows("[stopped]")
    screen.type("Go on\r")
    screen.shows("The end.")
    sent = server.scripted.requests[-1].json["messages"]
    assert [each["content"] for each in sent] == ["Tell a story", "Once upon", "Go on"]
    screen.wait_for(lambda text: text.splitlines()[-1].startswith("test-model · "))
    screen.type("\x03")
    assert screen.wait_end() == 130


def test_several_lines_and_pasted_text_are_one_question(server: ThreadedServer, start: Callable[..., Screen]) -> None:
    screen = start("chat")
    screen.shows("\n>")
    screen.type("first\x1b\r\x1b[200~second\nthird\x1b[201~\r")
    server.wait_until(lambda scripted: any(each.method == "POST" for each in scripted.requests))
    assert server.scripted.requests[-1].json["messages"][0]["content"] == "first\nsecond\nthird"
    screen.shows("\ntest-model · 5 tokens")
    screen.type("\x04")
    assert screen.wait_end() == 0


def test_a_smaller_window_keeps_the_conversation_usable(server: ThreadedServer, start: Callable[..., Screen]) -> None:
    screen = start("chat")
    screen.shows("\n>")
    screen.resize(10, 40)
    screen.type("x" * 60 + "\r")
    screen.shows("Hello from the scripted server.")
    screen.shows("\ntest-model · 5 tokens")
    assert server.scripted.requests[-1].json["messages"][0]["content"] == "x" * 60
    screen.type("/exit\r")
    assert screen.wait_end() == 0


def test_escape_sequences_of_the_model_do_not_reach_the_terminal(
    server: ThreadedServer, start: Callable[..., Screen]
) -> None:
    server.answer(answer("\x1b[2J\x1b]0;owned\x07safe"))
    screen = start("chat", "Hello")
    assert screen.wait_end() == 0
    assert "␛[2J␛]0;owned␇safe" in screen.text
    assert b"\x1b[2J" not in screen.received
    assert b"\x1b]0;" not in screen.received


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_escape_sequence_is_written_where_none_is_wanted(
    server: ThreadedServer, start: Callable[..., Screen], environment: dict[str, str]
) -> None:
    server.answer(answer("Paris", reasoning="Hmm."))
    screen = start("chat", "The capital?", **environment)
    assert screen.wait_end() == 0
    assert b"\x1b" not in screen.received
    assert screen.text.splitlines()[:4] == ["[thinking]", "Hmm.", "[/thinking]", "Paris"]


def test_reasoning_is_dimmed_and_can_be_hidden(server: ThreadedServer, start: Callable[..., Screen]) -> None:
    server.answer(answer("Paris", reasoning="Hmm, France."))
    shown = start("chat", "The capital?")
    assert shown.wait_end() == 0
    assert b"\x1b[2;3mHmm," in shown.received
    hidden = start("chat", "The capital?", "--reasoning", "hide")
    assert hidden.wait_end() == 0
    assert "Hmm" not in hidden.text
    assert "[12 characters of reasoning]" in hidden.text


def test_a_person_approves_a_call_that_may_destroy_something(
    server: ThreadedServer, start: Callable[..., Screen], tmp_path: Path
) -> None:
    tool = {"name": "delete_notes", "description": "Deletes all notes.", "inputSchema": {"type": "object"}}
    config = tmp_path / "mcp.json"
    config.write_text(stdio_config([tool]))
    call = {"id": "call_1", "type": "function", "function": {"name": "delete_notes", "arguments": "{}"}}
    server.scripted.script(answer("", tool_calls=[call]), answer("I did not delete them."))
    screen = start("run", "Delete my notes", "--mcp", "notes", "--mcp-config", str(config))
    screen.shows("Run delete_notes {}? [y]es, [n]o, [a]lways:")
    screen.type("n\r")
    assert screen.wait_end() == 0
    assert "I did not delete them." in screen.text
    (result,) = [each for each in server.scripted.requests[-1].json["messages"] if each["role"] == "tool"]
    assert "the user has refused this call" in result["content"]


def stdio_config(tools: list[dict[str, Any]]) -> str:
    """Returns a configuration with one MCP server, which has some tools."""

    program = (
        f"import json, sys\ntools = {tools!r}\n"
        "for line in sys.stdin:\n"
        "    message = json.loads(line)\n"
        "    if 'id' not in message: continue\n"
        "    results = {'initialize': {'protocolVersion': '2025-06-18', 'capabilities': {'tools': {}},\n"
        "               'serverInfo': {'name': 'notes', 'version': '1'}}, 'tools/list': {'tools': "
        + repr(tools)
        + "}}\n"
        "    result = results.get(message['method'])\n"
        "    answer = {'result': result} if result is not None else {'error': {'code': -32601, 'message': 'unknown'}}\n"
        "    print(json.dumps({'jsonrpc': '2.0', 'id': message['id'], **answer}), flush=True)\n"
    )
    return json.dumps({"mcpServers": {"notes": {"command": sys.executable, "args": ["-c", program]}}})
