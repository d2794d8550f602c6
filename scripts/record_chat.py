"""Records a conversation with `lmbridge chat --local` in a real terminal, as docs/chat.svg, the picture of the README.

    python scripts/record_chat.py

It needs `pip install -e '.[cli,local]' --group dev`. Everything in the picture was shown by the program in this order.
Pauses of more than half a second are shortened to that, because a machine for tests is slow.
"""

from __future__ import annotations

import html
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import pexpect
import pyte

TARGET: Final = Path(__file__).parent.parent / "docs" / "chat.svg"
COLUMNS: Final = 96
ROWS: Final = 11
COMMAND: Final = "lmbridge chat --local"
QUESTIONS: Final = ("What is the capital of France?", "Give me two tips for a good night's sleep.")
LONGEST_PAUSE: Final = 0.5
TYPING: Final = 0.04
REST: Final = 4.0
"""How many seconds the last picture stays before the film begins again."""
SECONDS: Final = 300
"""How long the program may take to write something, in seconds."""

Screen = tuple[str, ...]


class Shown(NamedTuple):
    """A text in a row, with the seconds between which it is visible."""

    row: int
    text: str
    start: float
    end: float


class Recorder:
    """A terminal with a program in it, and what it showed when."""

    def __init__(self, command: str, folder: str) -> None:
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)
        self._now = 0.0
        self.film: list[tuple[float, Screen]] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LMBRIDGE_", "LMSTUDIO_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
        env = {**kept, "PATH": path, "TERM": "xterm-256color", "LMBRIDGE_DATA_HOME": folder}
        self._program = pexpect.spawn("bash", ["-c", command], env=env, dimensions=(ROWS, COLUMNS), timeout=SECONDS)
        self._screen.write_process_input = self._program.send  # type: ignore[method-assign]  # how pyte answers

    @property
    def shown(self) -> Screen:
        return tuple(line.rstrip() for line in self._screen.display)

    def read(self) -> None:
        """Reads what the program writes next, and keeps the picture if it is another one."""
        began = time.monotonic()
        self._stream.feed(self._program.read_nonblocking(4096, timeout=SECONDS))
        self._now += min(time.monotonic() - began, LONGEST_PAUSE)
        if not self.film or self.film[-1][1] != self.shown:
            self.film.append((self._now, self.shown))

    def wait_for_prompt(self) -> None:
        """Reads until the program waits for a question."""
        while not (self._has_empty_prompt and self._has_toolbar):
            self.read()

    def type(self, text: str) -> None:
        """Types a text, one key after the other, and Enter."""
        for number in range(1, len(text) + 1):
            self._program.send(text[number - 1])
            while not any(line == f"> {text[:number]}".rstrip() for line in self.shown):
                self.read()
            self._now += TYPING
        self._program.send("\r")
        # The prompt with the question has to scroll into the conversation before the next one can be recognized.
        while self._has_toolbar:
            self.read()

    @property
    def _has_empty_prompt(self) -> bool:
        return ">" in self.shown

    @property
    def _has_toolbar(self) -> bool:
        lines = [line for line in self.shown if line]
        return len(lines) > 3 and lines[-1].startswith("smollm2")

    def close(self) -> None:
        """Ends the program."""
        self._program.send("\x04")
        self._program.read()
        self._program.close()


def rows_of(film: Sequence[tuple[float, Screen]], end: float) -> Iterator[Shown]:
    """Yields the texts of each row, with the time for which they were visible."""
    for row in range(ROWS):
        text, start = "", 0.0
        for moment, screen in [*film, (end, ("",) * ROWS)]:
            if screen[row] != text:
                if text:
                    yield Shown(row, text, start, moment)
                text, start = screen[row], moment


def draw(film: Sequence[tuple[float, Screen]]) -> str:
    """Returns the film as an SVG. Without animations, it shows the last picture."""
    end = film[-1][0] + REST
    width, height, line = COLUMNS * 8.4 + 40, ROWS * 20 + 56, 20
    styles, texts = [], []
    for number, shown in enumerate(rows_of(film, end)):
        lasts = shown.end >= end
        if shown.start or not lasts:
            begin, over = shown.start / end * 100, shown.end / end * 100
            hidden = "" if lasts else f"{over:.2f}%,100%{{opacity:0}}"
            visible = f"{begin:.2f}%,{99.99 if lasts else over - 0.01:.2f}%{{opacity:1}}"
            before = f"0%,{max(begin - 0.01, 0):.2f}%{{opacity:0}}" if begin > 0.01 else ""
            styles.append(f"@keyframes k{number}{{{before}{visible}{hidden}}}#t{number}{{animation-name:k{number}}}")
        kind = {">": "prompt", "$": "prompt", "s": "bar"}.get(shown.text[0], "answer")
        texts.append(
            f'<text id="t{number}" class="{kind}{"" if lasts else " gone"}" x="20" y="{56 + shown.row * line}">'
            f"{html.escape(shown.text)}</text>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" '
        'aria-label="A conversation in a terminal with lmbridge chat">\n<style>\n'
        "text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#d7e3e8;"
        f"white-space:pre;animation:{end:.2f}s step-end infinite}}\n"
        ".prompt{fill:#7fd4e6;font-weight:600}.bar{fill:#8fa3ab}.gone{opacity:0}\n"
        "@media (prefers-reduced-motion:reduce){text{animation:none!important}}\n"
        f"{''.join(styles)}\n</style>\n"
        f'<rect width="{width:.0f}" height="{height}" rx="10" fill="#10242b"/>\n'
        '<circle cx="22" cy="20" r="6" fill="#e06c5c"/><circle cx="42" cy="20" r="6" fill="#d9a441"/>'
        '<circle cx="62" cy="20" r="6" fill="#6aa66f"/>\n' + "\n".join(texts) + "\n</svg>\n"
    )


def main() -> None:
    """Records the conversation and writes the picture."""
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(f"echo '$ {COMMAND}'; exec {COMMAND} -t 0 --no-log", folder)
        recorder.wait_for_prompt()
        for question in QUESTIONS:
            recorder.type(question)
            recorder.wait_for_prompt()
        recorder.close()
    TARGET.write_text(draw(recorder.film))
    print(f"written: {TARGET}, {TARGET.stat().st_size:,} bytes, {len(recorder.film)} pictures")


if __name__ == "__main__":
    main()
