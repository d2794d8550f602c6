"""Reads JSON that a model wrote with small mistakes, where there is only one way to read it.

These deviations are understood: single, triple and typographic quotes, the literals of Python, keys without quotes,
trailing and missing commas, comments, line breaks and other control characters in strings, escapes that JSON does not
have, and closing brackets that are missing or left over. The result is a JSON text and not a value, so that it can be
read like any other JSON: numbers stay as they were written, and an object with the same key twice is still a mistake.

If a closing bracket is missing, the arguments may have been cut off. So the bracket is added only if the last value is
complete, and the text either goes on with something that cannot be JSON, such as a closing tag, or is known not to have
been cut off. Everything else that is incomplete is refused: a string without its closing quote, a key without a value,
or a comma without a next item.

The package `json-repair` was considered. It reads anything as some value: it accepts a text that was cut off, takes the
second of two objects, and puts an empty text in place of a missing value. With it, calls would be made with arguments
that no model wrote.
"""

from __future__ import annotations

import json
import re
from typing import Final, NamedTuple

_MOST_LEVELS: Final = 200
_SKIPPED: Final = re.compile(r"\s+|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_NUMBER: Final = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.])")
_WORD: Final = re.compile(r"[A-Za-z_$][\w$-]*")
_LITERALS: Final = {
    "true": "true",
    "false": "false",
    "null": "null",
    "True": "true",
    "False": "false",
    "None": "null",
}
_STRINGS: Final = (
    re.compile(r'"""(.*?)"""', re.DOTALL),
    re.compile(r"'''(.*?)'''", re.DOTALL),
    re.compile(r'"((?:[^"\\]++|\\.)*+)"', re.DOTALL),
    re.compile(r"'((?:[^'\\]++|\\.)*+)'", re.DOTALL),
    re.compile("\u201c([^\u201c\u201d]*)\u201d"),
    # The quotes of FunctionGemma and of Gemma 4.
    re.compile(r"<escape>(.*?)<escape>", re.DOTALL),
    re.compile(r'<\|"\|>(.*?)<\|"\|>', re.DOTALL),
)
_ESCAPE: Final = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_VALID_ESCAPES: Final = '"\\/bfnrtu'
_PLAIN_ESCAPES: Final = '"\\/'
_TRAILING_BRACKETS: Final = re.compile(r"[\s}\]]*")
_ENDS: Final = ("<", "`", "[END")
"""The beginnings of the texts that may follow a complete JSON value: a tag, such as `</tool_call>` or
`[END_TOOL_REQUEST]`, or the end of a Markdown fence."""
_FENCE: Final = re.compile(r"```\w{0,20}(.*?)(?:```)?", re.DOTALL)


class AlmostJson(NamedTuple):
    """A value that was written almost as JSON."""

    text: str
    """The value as JSON."""
    end: int
    """The position after the value, and after surplus closing brackets that follow it."""


def read_almost_json(text: str, position: int = 0, *, may_be_cut: bool = True) -> AlmostJson:
    """Returns the value at a position of a text as JSON.

    The time is proportional to the length of the value.

    Args:
        text: The text.
        position: Where the value begins. There may be white space before it.
        may_be_cut: Whether the text may have been cut off at its end. If not, closing brackets that are missing at the
            end are added.

    Raises:
        ValueError: The value cannot be read, or could be read in several ways.
    """
    reader = _ValueReader(text, position, may_be_cut=may_be_cut)
    reader.read()
    rest = _TRAILING_BRACKETS.match(text, reader.position)
    end = reader.position
    if rest is not None and rest[0].strip():
        end = reader.position + len(rest[0].rstrip())
    return AlmostJson("".join(reader.pieces), end)


def repair_arguments(text: str, *, may_be_cut: bool) -> str:
    """Returns the arguments of a call as JSON, if they are almost JSON, and nothing else follows them.

    Args:
        text: The arguments as the model wrote them, which are not valid JSON.
        may_be_cut: As in `read_almost_json`.

    Raises:
        ValueError: The arguments cannot be read, or could be read in several ways.
    """
    fence = _FENCE.fullmatch(text.strip())
    text = (fence[1] if fence is not None else text).strip()
    found = read_almost_json(text, may_be_cut=may_be_cut)
    end = found.end
    while end < len(text):
        # Some servers and models write the arguments several times.
        again = read_almost_json(text, end, may_be_cut=may_be_cut)
        if again.text != found.text:
            raise ValueError("the arguments are followed by something else")
        end = again.end
    return found.text


class _ValueReader:
    """Reads one value, without recursion, and writes it as JSON into `pieces`."""

    def __init__(self, text: str, position: int, *, may_be_cut: bool) -> None:
        self.pieces: list[str] = []
        self.position = position
        self._text = text
        self._may_be_cut = may_be_cut
        self._open: list[str] = []

    def read(self) -> None:
        """Reads the value.

        Raises:
            ValueError: The value cannot be read, or could be read in several ways.
        """
        self._read_value()
        while self._open:
            self._skip()
            if self._open[-1] == "}" and not self._closes():
                self._read_key()
            if self._closes():
                self._close()
            else:
                self._read_value()
                if self._open and self.pieces[-1] in "{[":
                    continue
            while self._open and not self._read_separator():
                pass

    def _read_value(self) -> None:
        self._skip()
        character = self._peek()
        if character in ("{", "["):
            if len(self._open) >= _MOST_LEVELS:
                raise ValueError("nested too deeply")
            self._open.append("}" if character == "{" else "]")
            self.position += 1
            self.pieces.append(character)
            return
        if (string := self._read_string()) is not None:
            self.pieces.append(string)
        elif (number := _NUMBER.match(self._text, self.position)) is not None:
            self.pieces.append(number[0])
            self.position = number.end()
        elif (word := _WORD.match(self._text, self.position)) is not None and word[0] in _LITERALS:
            self.pieces.append(_LITERALS[word[0]])
            self.position = word.end()
        else:
            raise ValueError(f"no value at character {self.position}")

    def _read_key(self) -> None:
        key = self._read_string()
        if key is None:
            word = _WORD.match(self._text, self.position)
            if word is None:
                raise ValueError(f"no key at character {self.position}")
            key, self.position = json.dumps(word[0]), word.end()
        self._skip()
        if self._peek() != ":":
            raise ValueError(f"no colon at character {self.position}")
        self.position += 1
        self.pieces += [key, ":"]

    def _read_separator(self) -> bool:
        """Reads what follows an item. Returns True if another item comes, and False if a bracket was closed."""
        after_item = self.position
        self._skip()
        character = self._peek()
        if character == ",":
            self.position += 1
            self._skip()
            if not self._peek():
                raise ValueError("the text ends after a comma")
            if self._closes():
                self._close()
                return False
            self.pieces.append(",")
            return True
        if self._closes():
            self._close()
            return False
        if not character or self._text.startswith(_ENDS, self.position):
            self._close_at_end(at_end_of_text=not character)
            return False
        # A comma is missing. But two strings on the same line may also be a single string with quotes in it.
        is_new_line = "\n" in self._text[after_item : self.position]
        if character in "\"'{[" and (is_new_line or not self.pieces[-1].startswith('"')):
            self.pieces.append(",")
            return True
        raise ValueError(f"neither a comma nor a closing bracket at character {self.position}")

    def _closes(self) -> bool:
        character = self._peek()
        return character in ("}", "]") and character in self._open

    def _close(self) -> None:
        """Closes a bracket, after the brackets within it whose closing bracket is missing."""
        character = self._peek()
        while (closed := self._open.pop()) != character:
            self.pieces.append(closed)
        self.pieces.append(character)
        self.position += 1

    def _close_at_end(self, *, at_end_of_text: bool) -> None:
        if at_end_of_text and self._may_be_cut:
            raise ValueError("the text may have been cut off")
        self.pieces += reversed(self._open)
        self._open.clear()

    def _read_string(self) -> str | None:
        """Reads the string at this position, and returns it as JSON; None if something else is there."""
        character = self._peek()
        if character not in ('"', "'", "\u201c", "<"):
            return None
        for pattern in _STRINGS:
            if (string := pattern.match(self._text, self.position)) is not None:
                self.position = string.end()
                return _quote(string[1])
        raise ValueError(f"the string that begins at character {self.position} has no closing quote")

    def _peek(self) -> str:
        return self._text[self.position : self.position + 1]

    def _skip(self) -> None:
        """Goes on to the next character that is neither white space nor part of a comment."""
        while (skipped := _SKIPPED.match(self._text, self.position)) is not None:
            self.position = skipped.end()


def _quote(inner: str) -> str:
    r"""Returns a string as JSON, given what is written between its quotes.

    Escapes that JSON does not have are taken literally, such as the `\d` of a regular expression. A string that has
    such escapes as well as valid ones, such as `C:\data\new`, could mean two things.

    Raises:
        ValueError: The string could mean two things.
    """
    if "\\" not in inner:
        return json.dumps(inner, ensure_ascii=False)
    escapes = {each[1] for each in _ESCAPE.finditer(inner)} - {"'", *_PLAIN_ESCAPES}
    valid = {each for each in escapes if _is_valid_escape(each)}
    if valid and escapes != valid:
        raise ValueError("a string has valid JSON escapes as well as invalid ones")
    pieces: list[str] = []
    position = 0
    for escape in _ESCAPE.finditer(inner):
        pieces.append(_escape_plain(inner[position : escape.start()]))
        pieces.append(_escape_of(escape[1]))
        position = escape.end()
    pieces.append(_escape_plain(inner[position:]))
    return '"' + "".join(pieces) + '"'


def _is_valid_escape(escaped: str) -> bool:
    """Returns whether JSON has an escape, given what `_ESCAPE` has found after the backslash."""
    return escaped[0] in _VALID_ESCAPES and escaped != "u"


def _escape_of(escaped: str) -> str:
    if escaped == "'":
        return "'"
    if _is_valid_escape(escaped):
        return "\\" + escaped
    return "\\\\" + _escape_plain(escaped)


def _escape_plain(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
