"""Makes the texts of models, servers and tools safe to write to a terminal.

Such a text may contain control characters, by accident or on purpose: an escape sequence can rename the window,
overwrite what is on the screen, or type commands in some terminals. `printable` replaces these characters by visible
ones. Output that goes into a pipe or a file is treated the same, because it often reaches a terminal in the end.
"""

from __future__ import annotations

import logging
import re
from typing import Final

_UNSAFE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, characters that change the direction of the text around them, and halves of surrogate pairs."""
_PICTURES: Final = 0x2400
"""The character that shows the control character 0; those for 1 to 31 follow it."""
_PICTURE_OF_DELETE: Final = "\u2421"


def printable(text: str) -> str:
    """Returns a text that is safe to write to a terminal. Line breaks and tabs stay as they are.

    A control character becomes a visible one that stands for it, such as "␛". Carriage returns are left out, because
    they would let the text overwrite itself. Characters that change the direction of the text, and whatever else cannot
    be shown, become the replacement character U+FFFD.
    """
    return _UNSAFE.sub(_as_visible, text.replace("\r", ""))


def one_line(text: str) -> str:
    """Returns a text that is safe to write into a line of other text, such as the name of a model."""
    return printable(" ".join(text.splitlines()))


def _as_visible(found: re.Match[str]) -> str:
    code = ord(found.group())
    if code < 0x20:
        return chr(_PICTURES + code)
    return _PICTURE_OF_DELETE if code == 0x7F else "\ufffd"


class SafeFormatter(logging.Formatter):
    """Formats log records, which may quote servers, for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the text of a record."""
        return printable(super().format(record))
