"""Removes from the texts of a server the characters that models read but people do not see.

A description of a tool goes into the prompt, and a server's stderr into errors and terminals. Escape sequences,
zero-width characters, and Unicode's "tag" characters can hide instructions to the model, or change what a terminal
shows. Results of tools are not changed: they are data, and must arrive as they were sent.
"""

from __future__ import annotations

import re
from typing import Final

_ESCAPE_SEQUENCES: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f"
"""Control characters except tab and line feed."""
_ZERO_WIDTH_OR_DIRECTION = "\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
_TAGS = "\U000e0000-\U000e007f"
_INVISIBLE: Final = re.compile(f"[{_CONTROL}{_ZERO_WIDTH_OR_DIRECTION}{_TAGS}]")


def sanitize_text(text: str) -> str:
    """Returns a text without escape sequences, control characters and invisible formatting characters."""
    return _INVISIBLE.sub("", _ESCAPE_SEQUENCES.sub("", text.replace("\r\n", "\n")))
