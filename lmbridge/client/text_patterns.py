"""`TextPatterns`: several regular expressions that are searched for as one."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Final


class TextPatterns:
    """A group of regular expressions that mean the same.

    They are compiled at the first search, because compiling all of them takes milliseconds and most programs never see
    an error.
    """

    def __init__(self, *patterns: str) -> None:
        self.pattern: Final = "|".join(patterns)

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.IGNORECASE | re.DOTALL)

    def search(self, text: str) -> re.Match[str] | None:
        """Returns the first match of one of the patterns in a text, or None."""
        return self._compiled.search(text)

    def match(self, text: str) -> re.Match[str] | None:
        """Returns the match of one of the patterns at the beginning of a text, or None."""
        return self._compiled.match(text)
