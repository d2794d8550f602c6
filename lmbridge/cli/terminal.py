"""Writes to the terminal. No other module of the command line writes to stdout or stderr.

Every text goes through `printable`, because texts of models and servers may contain control characters.

The answer goes to stdout, and everything else to stderr, so that a pipe gets the answer alone.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TextIO

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from lmbridge._printable import one_line, printable

_UNSAFE_IN_JSON: Final = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""The characters that `printable` replaces, except for the control characters that the JSON encoder escapes."""


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Returns JSON that is safe to write to a terminal: unsafe characters are escaped, so that no character is lost."""
    encoded = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found.group()):04x}", encoded)


class Terminal:
    """Standard output and standard error of a command.

    Colours, and views that change while they are shown, appear only on a terminal. `NO_COLOR` in the environment
    (https://no-color.org) switches them off, and so does a terminal that calls itself "dumb".
    """

    def __init__(self) -> None:
        # A character that the encoding of the terminal does not have must not end the program.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        self._out = _console(sys.stdout)
        self._err = _console(sys.stderr)
        self._status: Status | None = None

    @property
    def shows_answers(self) -> bool:
        """Whether a person sees what is written to stdout."""
        return self._out.is_terminal

    @property
    def shows_notices(self) -> bool:
        """Whether a person sees what is written to stderr."""
        return self._err.is_terminal

    @property
    def has_styles(self) -> bool:
        """Whether stdout shows colours and dimmed text."""
        return self._out.color_system is not None

    @property
    def is_interactive(self) -> bool:
        """Whether a person can be asked something."""
        return sys.stdin.isatty() and self.shows_answers and self.shows_notices

    @property
    def width(self) -> int:
        """The number of columns; in a pipe, that of an ordinary terminal."""
        return self._out.width if self.shows_answers else _ORDINARY_WIDTH

    def write(self, text: str, style: str = "") -> None:
        """Writes a piece of text to stdout at once, without a line break after it."""
        self._out.print(Text(printable(text), style), end="", soft_wrap=True)
        self._out.file.flush()

    def line(self, text: str = "", style: str = "") -> None:
        """Writes a line to stdout."""
        self.write(f"{text}\n", style)

    def json(self, value: Any, *, indent: int | None = None) -> None:
        """Writes a value to stdout as JSON."""
        self._out.file.write(f"{json_text(value, indent=indent)}\n")
        self._out.file.flush()

    def notice(self, text: str, style: str = "dim", *, end: str = "\n") -> None:
        """Writes a line about the work itself to stderr."""
        self._err.print(Text(printable(text), style), end=end, soft_wrap=True)
        self._err.file.flush()

    def problem(self, text: str, hint: str | None = None, *, kind: str = "error") -> None:
        """Writes an error or a warning to stderr: one line, and a line that says what to do."""
        style = "bold red" if kind == "error" else "bold yellow"
        # A text may quote the output of a program, which has several lines.
        self._err.print(Text.assemble((f"{kind}: ", style), one_line(text)), soft_wrap=True)
        if hint:
            self._err.print(Text.assemble(("hint: ", "bold"), one_line(hint)), soft_wrap=True)
        self._err.file.flush()

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
        """Writes a table to stdout. In a pipe, its cells are not shortened."""
        table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(one_line(cell)) for cell in row))
        if self.shows_answers:
            self._out.print(table)
        else:
            with self._out.capture() as captured:
                self._out.print(table)
            self._out.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())
        self._out.file.flush()

    @property
    def ask(self) -> Callable[[str], Awaitable[str]] | None:
        """A function that asks the person a question, or None if the terminal cannot be used for that."""
        return self._ask if self.is_interactive else None

    async def _ask(self, question: str) -> str:
        # Imported here because it takes a tenth of a second.
        from lmbridge.cli.line_editor import ask_person  # noqa: PLC0415 - see above

        if self._status is not None:
            self._status.stop()
        try:
            return await ask_person(printable(question))
        finally:
            if self._status is not None:
                self._status.start()

    @contextmanager
    def waiting(self, text: str) -> Iterator[Callable[[str], None]]:
        """Shows what is being waited for, until the end of the block. In a pipe or without colours, nothing is shown.

        The context manager yields a function that replaces the text.
        """
        if not self.shows_notices or self._err.color_system is None:
            yield lambda _text: None
            return
        with self._err.status(Text(printable(text), "dim"), spinner="dots") as status:
            self._status = status
            try:
                yield lambda text: status.update(Text(printable(text), "dim"))
            finally:
                self._status = None


_ORDINARY_WIDTH: Final = 80
_UNLIMITED_WIDTH: Final = 10_000
"""The width in columns of a table that goes into a pipe, where no cell has to be shortened."""


class _Console(Console):
    """A console that reports a closed pipe as an error, so that the command cleans up before it ends."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - rich calls it while it handles a BrokenPipeError


def _console(stream: TextIO) -> Console:
    is_plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return _Console(
        file=stream,
        # A program that reads the output must not get escape sequences because FORCE_COLOR is set.
        force_terminal=stream.isatty(),
        color_system=None if is_plain or not stream.isatty() else "auto",
        width=None if stream.isatty() else _UNLIMITED_WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
    )
