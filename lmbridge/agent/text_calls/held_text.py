"""`HeldText`: holds back text of a reply that may be a call, so that a stream does not show it as an answer.

Text is held from the position at which a call may begin, until it is clear that no call begins there, or until the
reply has ended and its calls have been read. If an answer contains something that resembles a call, the text before
that is shown without delay, and the rest at the end of the reply.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from lmbridge.agent.text_calls.syntaxes import AT_LINE_START, MOST_INDENTED, OPENING, SYNTAX_OF, begins_line

_FENCE: Final = re.compile(r"(?:\A|\n)[ \t]{0,3}(`{3}\w{0,20}[ \t]*\n\s{0,50})\Z")
_PREFIXES: Final = frozenset(opening[:length] for opening in SYNTAX_OF for length in range(1, len(opening)))
_LONGEST_PREFIX: Final = max(map(len, _PREFIXES))
_PARTIAL_JSON: Final = r"(?:\[\s{0,50})?\{\s{0,50}(?:[\"'][a-z_]{0,15}(?:[\"']\s{0,20})?)?|\[\s{0,50}"
_PARTIAL_CALL: Final = re.compile(
    rf"(?:`{{1,3}}\w{{0,20}}[ \t]*(?:\n\s{{0,50}})?)?(?:{_PARTIAL_JSON}|\[\s{{0,20}}[A-Za-z_][\w.]{{0,99}})?\Z"
)
_LONGEST_PARTIAL: Final = 200
_NAME: Final = re.compile(r"[\"'](?:name|tool_name)[\"']\s*:\s*[\"']([^\"'\n]{1,100})[\"']|\[\s*([\w.]{1,100})\(")
_EXAMINED_CHARACTERS: Final = 120
"""How many characters after an opening decide whether it is only mentioned."""


class HeldText:
    """Passes on the text of one reply, except for what may be a call.

    Args:
        is_tool: Returns a true value if a name can be meant for one of the tools.
        is_whole: Whether text is held only at the beginning of the reply, because calls after other text do not count.
        holds_all: Whether the whole text is held, because it is expected to be a call. Default: False.
    """

    def __init__(self, is_tool: Callable[[str], object], *, is_whole: bool, holds_all: bool = False) -> None:
        self._is_tool = is_tool
        self._is_whole = is_whole
        self._passed: list[str] = []
        # Whether something other than white space was passed on, how the last line of the text that was passed on
        # begins, and the last character of that text.
        self._has_passed_text = False
        self._line = ""
        self._last_shown = " "
        # The text that is held, and the position in it from which the search for openings goes on.
        self._held = ""
        self._position = 0
        # Once a call has begun, its text is only collected.
        self._rest: list[str] | None = [] if holds_all else None

    def feed(self, text: str) -> str:
        """Returns what may be shown after the next piece of the reply."""
        if self._rest is not None:
            self._rest.append(text)
            return ""
        self._held += text
        shown = self._held[: self._end_of_text()]
        self._held = self._held[len(shown) :]
        self._position = max(0, self._position - len(shown))
        if shown:
            self._passed.append(shown)
            self._last_shown = shown[-1]
            self._has_passed_text = self._has_passed_text or not shown.isspace()
            _, line_break, line = shown.rpartition("\n")
            self._line = (line if line_break else self._line + line)[: MOST_INDENTED + 1]
        return shown

    def rest(self, text_before_calls: str | None) -> str:
        """Returns what is still to be shown at the end of the reply.

        Args:
            text_before_calls: If the reply has calls in its text, the text before them, which is all that is shown of
                it. None for any other reply.
        """
        held = self._held + "".join(self._rest or ())
        if text_before_calls is None:
            return held
        shown = "".join(self._passed).lstrip()
        return text_before_calls.removeprefix(shown) if text_before_calls.startswith(shown) else ""

    def _end_of_text(self) -> int:
        """Returns the position up to which the held text can be shown."""
        text = self._held
        if self._is_whole and self._has_passed_text:
            return len(text)
        while (opening := OPENING.search(text, self._position)) is not None:
            start = opening.start()
            may_be_call = self._may_be_call(opening)
            if may_be_call is not False:
                fence = self._fence_before(start)
                begin = start if fence is None else fence.start(1)
                if may_be_call:
                    self._rest = []
                return begin
            self._position = opening.end()
        return self._begin_of_partial_opening()

    def _may_be_call(self, opening: re.Match[str]) -> bool | None:
        """Returns whether a call begins at an opening; None if that is not clear yet."""
        syntax = SYNTAX_OF.get(opening[0])
        needs_line = syntax is None or syntax.opening in AT_LINE_START
        if needs_line and not self._begins_line(opening.start()) and self._fence_before(opening.start()) is None:
            return False
        is_clear = len(self._held) - opening.end() >= _EXAMINED_CHARACTERS
        if syntax is not None:
            # After a backtick, as in `<tool_call>`, the opening is only mentioned.
            if (self._last_shown + self._held)[opening.start()] == "`" and opening[0][0] != "`":
                return False
            return syntax.content.match(self._held, opening.end()) is not None if is_clear else None
        name = _NAME.search(self._held, opening.start())
        if name is None:
            return is_clear or None
        return bool(self._is_tool(name[1] or name[2]))

    def _begins_line(self, position: int) -> bool:
        # White space at the beginning of the reply is removed before its calls are read.
        is_first = not self._has_passed_text and not self._held[:position].strip()
        return is_first or begins_line(self._held, position, line_before=self._line)

    def _fence_before(self, position: int) -> re.Match[str] | None:
        """Returns the line that opens a fenced block whose content begins at a position, or None."""
        return _FENCE.search(self._held, max(0, position - _LONGEST_PARTIAL), position)

    def _begin_of_partial_opening(self) -> int:
        """Returns the position from which the held text may be a partial opening, or else the length of the text."""
        text = self._held
        begin = max(self._position, len(text) - _LONGEST_PREFIX)
        for place in range(begin, len(text)):
            if text[place:] in _PREFIXES:
                begin = place
                break
        else:
            begin = len(text)
        partial = _PARTIAL_CALL.search(text, max(self._position, len(text) - _LONGEST_PARTIAL))
        if partial is not None and partial.start() < begin and self._begins_line(partial.start()):
            return partial.start()
        return begin
