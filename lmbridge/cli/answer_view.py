"""Shows an answer while it arrives: its text, its reasoning, and the calls of an agent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Literal, Self

from lmbridge._printable import one_line
from lmbridge.cli.terminal import Terminal, json_text

ReasoningMode = Literal["show", "hide"]
"""Whether the reasoning of a model is shown."""

_ARGUMENT_CHARACTERS: Final = 200
"""How many characters of a call's arguments are shown at most."""
_RESULT_CHARACTERS: Final = 200
"""How many characters of a call's result are shown at most."""


class AnswerView:
    """The part of the terminal in which one answer appears.

    The text of the answer goes to stdout. The reasoning before it is dimmed on a terminal; where there are no styles,
    the lines "[thinking]" and "[/thinking]" enclose it. If stdout is a pipe, the reasoning goes to stderr.

    Args:
        terminal: Where the answer is written.
        reasoning: Whether reasoning is shown. If not, a terminal shows only its length.
        silent: Whether nothing of the answer is shown, because the caller prints it when it is complete.
    """

    def __init__(self, terminal: Terminal, reasoning: ReasoningMode = "show", *, silent: bool = False) -> None:
        self._terminal = terminal
        self._silent = silent
        self._reasoning = reasoning
        self._part: Literal["none", "reasoning", "text"] = "none"
        self._at_line_start = True
        self._hidden_characters = 0
        self._stack = ExitStack()
        self._update_wait: Callable[[str], None] = lambda _text: None
        self._is_waiting = False
        self.has_shown_text: bool = False
        """True once any text has been shown."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def wait(self, text: str) -> None:
        """Shows what is being waited for, until the next piece arrives."""
        self._stop_waiting()
        self._update_wait = self._stack.enter_context(self._terminal.waiting(text))
        self._is_waiting = True

    def progress(self, text: str) -> None:
        """Shows the progress of what is being waited for, unless a piece of the answer has already arrived."""
        if self._part == "none":
            if self._is_waiting:
                self._update_wait(text)
            else:
                self.wait(text)

    def text(self, piece: str) -> None:
        """Shows a piece of the answer."""
        if self._silent:
            return
        if self._part != "text":
            self._end_reasoning()
            self._part = "text"
        self._stop_waiting()
        self._terminal.write(piece)
        self.has_shown_text = True
        self._at_line_start = piece.endswith("\n")

    def reasoning(self, piece: str) -> None:
        """Shows a piece of the reasoning."""
        if self._silent:
            return
        if self._reasoning == "hide":
            self._hidden_characters += len(piece)
            self._part = "reasoning"
            self._update_wait(f"thinking ... ({self._hidden_characters} characters)")
            return
        self._stop_waiting()
        if self._part != "reasoning":
            self._end_line()
            self._part = "reasoning"
            if not self._terminal.has_styles:
                self._write_reasoning("[thinking]\n")
        self._write_reasoning(piece)
        self._at_line_start = piece.endswith("\n")

    def call_started(self, name: str, arguments: Mapping[str, Any] | None) -> None:
        """Shows a call that is about to be made, on a terminal."""
        self._end_part()
        if not self._terminal.shows_notices:
            return
        shown = _shortened(json_text(dict(arguments or {})), _ARGUMENT_CHARACTERS)
        self._terminal.notice(f"→ {one_line(name)} {one_line(shown)}", "cyan")
        self.wait(f"{one_line(name)} is running ...")

    def call_finished(self, name: str, text: str, *, is_error: bool, seconds: float) -> None:
        """Shows the result of a call, on a terminal."""
        self._end_part()
        if not self._terminal.shows_notices:
            return
        shown = one_line(_shortened(text, _RESULT_CHARACTERS))
        mark, style = ("✗", "red") if is_error else ("✓", "dim")
        self._terminal.notice(f"{mark} {one_line(name)} ({seconds:.1f} s): {shown}", style)

    def remark(self, text: str) -> None:
        """Shows a line about the work, on a terminal."""
        self._end_part()
        if self._terminal.shows_notices:
            self._terminal.notice(text)

    def end(self) -> None:
        """Ends the answer: what follows begins on a new line."""
        self._end_part()

    def _end_part(self) -> None:
        self._end_reasoning()
        self._end_line()
        self._part = "none"
        self._stop_waiting()

    def _end_reasoning(self) -> None:
        if self._part != "reasoning":
            return
        self._stop_waiting()
        if self._reasoning == "hide":
            if self._terminal.shows_answers:
                self._terminal.notice(f"[{self._hidden_characters} characters of reasoning]")
            self._hidden_characters = 0
            return
        if not self._at_line_start:
            self._write_reasoning("\n")
            self._at_line_start = True
        self._write_reasoning("\n" if self._terminal.has_styles else "[/thinking]\n")

    def _write_reasoning(self, text: str) -> None:
        if self._terminal.shows_answers:
            self._terminal.write(text, "dim italic")
        else:
            self._terminal.notice(text, "dim italic", end="")

    def _end_line(self) -> None:
        if self._part == "text" and not self._at_line_start:
            self._terminal.write("\n")
        self._at_line_start = True

    def _stop_waiting(self) -> None:
        self._stack.close()
        self._update_wait = lambda _text: None
        self._is_waiting = False


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."
