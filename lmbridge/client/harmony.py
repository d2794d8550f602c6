"""Reads the Harmony format of gpt-oss, in which a reply consists of messages on channels.

Such a reply reaches a client only from a server that does not know the format. It looks like this::

    <|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>

The channel "analysis" has the reasoning, and "final" has the answer. "commentary" has tool calls, which name their
recipient after "to=", and texts for the user that announce such calls. The format is described in
https://developers.openai.com/cookbook/articles/openai-harmony; servers that treat the tokens as special ones may leave
out some of them, such as the `<|end|>`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Literal

Kind = Literal["reasoning", "text"]
"""The part of a reply to which a message belongs."""

OPENINGS: Final = ("<|channel|>", "<|start|>assistant")
"""How a reply in this format begins."""
_MESSAGE: Final = "<|message|>"
_CONSTRAIN: Final = "<|constrain|>"
_TOKEN: Final = re.compile(r"<\|(?:start|channel|end|return|call)\|>")
_BEGINNINGS: Final = ("<|start|>", "<|channel|>")
"""The tokens with which a message may begin."""
_TOKENS: Final = (*_BEGINNINGS, "<|end|>", "<|return|>", "<|call|>")
_LONGEST_TOKEN: Final = len("<|channel|>")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")
_CUT_HEADER: Final = re.compile(
    r"(?:<\|start\|>\w*)?\s*(?:<\|channel\|>\s*(?P<channel>\w*))?\s*(?:<\|constrain\|>\s*\w*\s*)?(?P<rest>.*)",
    re.DOTALL,
)
"""A header without the token that ends it, and the text that follows its parts."""
_CHANNELS: Final = ("analysis", "commentary", "final")
_RECIPIENT: Final = re.compile(r"\bto=")
_LONGEST_HEADER: Final = 500
"""A text of this length without the token that ends a header is not a header."""


class HarmonyReader:
    """Reads one reply, in pieces that may end anywhere.

    Args:
        emit: Called with the kind and the text of each piece of a message.
    """

    def __init__(self, emit: Callable[[Kind, str], None]) -> None:
        self._emit_piece = emit
        self._state: Literal["header", "body", "between", "plain"] = "between"
        # What has been fed and not read yet begins at this position: a header that is not complete, or the beginning of
        # a token. The text before the position is dropped only at the end of `feed`, so that the time is linear.
        self._text = ""
        self._position = 0
        self._kind: Kind = "text"
        self._is_call = False
        self._has_message = False
        # A line feed separates a message from an earlier one of the same kind.
        self._needs_separator = False
        self._kinds_so_far: set[Kind] = set()

    def feed(self, text: str) -> None:
        """Reads the next piece of the reply."""
        self._text = self._text[self._position :] + text
        self._position = 0
        read = {"header": self._read_header, "body": self._read_body, "between": self._read_between}
        while self._state != "plain" and read[self._state]():
            pass
        if self._state == "plain":
            self._emit_up_to(len(self._text))

    def close(self) -> None:
        """Emits what was held back because it could have become a token. Call it at the end of the reply."""
        if self._state == "header" and self._has_message:
            self._skip_cut_header()
        if self._state == "body" or not self._has_message:
            self._emit_up_to(len(self._text))
        self._position = len(self._text)

    def _skip_cut_header(self) -> None:
        """Reads a header that never ended. If a text follows its parts, the text becomes the body of the message."""
        header = self._text[self._position :]
        match = _CUT_HEADER.match(header)
        if match is None or _RECIPIENT.search(header) is not None:
            return
        channel, rest = match["channel"], match["rest"]
        is_cut = not rest or any(token.startswith(rest) for token in (*_TOKENS, _MESSAGE, _CONSTRAIN))
        if channel is None or channel in _CHANNELS:
            if is_cut:
                return
            self._kind = "reasoning" if channel == "analysis" else "text"
            self._needs_separator = self._kind in self._kinds_so_far
            self._position += match.start("rest")
        elif is_cut and any(each.startswith(channel) for each in _CHANNELS):
            return
        self._state = "body"

    # Each of these methods reads to the end of the state that it is named after, and returns whether it got there.

    def _read_header(self) -> bool:
        end = self._text.find(_MESSAGE, self._position, self._position + _LONGEST_HEADER)
        if end < 0:
            if len(self._text) - self._position >= _LONGEST_HEADER:
                self._state, self._kind = "plain", "text"
            return False
        header = self._text[self._position : end]
        channel = _CHANNEL.search(header)
        self._is_call = _RECIPIENT.search(header) is not None
        self._kind = "reasoning" if channel and channel[1] == "analysis" and not self._is_call else "text"
        self._needs_separator = self._kind in self._kinds_so_far
        self._state, self._has_message = "body", True
        if self._is_call:
            self._emit_up_to(end + len(_MESSAGE))
        self._position = end + len(_MESSAGE)
        return True

    def _read_body(self) -> bool:
        token = _TOKEN.search(self._text, self._position)
        if token is None:
            self._emit_up_to(len(self._text) - _length_of_partial_token(self._text))
            return False
        begins_message = token[0] in _BEGINNINGS
        # The token that ends a call is a part of the call.
        self._emit_up_to(token.end() if self._is_call and not begins_message else token.start())
        self._position = token.start() if begins_message else token.end()
        self._state = "header" if begins_message else "between"
        return True

    def _read_between(self) -> bool:
        while self._text[self._position : self._position + 1].isspace():
            self._position += 1
        if self._text.startswith(_BEGINNINGS, self._position):
            self._state = "header"
            return True
        rest = self._text[self._position : self._position + _LONGEST_TOKEN]
        if any(token.startswith(rest) for token in _BEGINNINGS):
            return False
        # A server has left out the header of the answer.
        self._state, self._kind, self._is_call = "body", "text", False
        self._needs_separator = "text" in self._kinds_so_far
        return True

    def _emit_up_to(self, end: int) -> None:
        text = self._text[self._position : end]
        self._position = max(self._position, end)
        if not text:
            return
        if self._needs_separator:
            text = "\n" + text
            self._needs_separator = False
        self._kinds_so_far.add(self._kind)
        self._emit_piece(self._kind, text)


def _length_of_partial_token(text: str) -> int:
    """Returns how many characters at the end of a text may be the beginning of a token."""
    start = text.rfind("<", -_LONGEST_TOKEN)
    return len(text) - start if start >= 0 and any(token.startswith(text[start:]) for token in _TOKENS) else 0
