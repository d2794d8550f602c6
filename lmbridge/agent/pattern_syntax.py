"""Parses the regular expressions in schemas into their parts.

`lmbridge.agent.patterns` matches the parts; its docstring says which syntax is supported.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

CharTest: TypeAlias = Callable[[str], bool]
"""A function that returns whether a part of a pattern matches a character."""


def is_word_char(char: str) -> bool:
    r"""Returns whether `\w` matches a character."""
    return char.isalnum() or char == "_"


_CLASSES: Final[dict[str, CharTest]] = {"d": str.isdecimal, "w": is_word_char, "s": str.isspace}
_CONTROLS: Final = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0", "a": "\a"}
_CATEGORIES: Final = {
    "Letter": "L", "Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll", "Mark": "M", "Number": "N",
    "Decimal_Number": "Nd", "Punctuation": "P", "Symbol": "S", "Separator": "Z", "Other": "C",
}  # fmt: skip
_SHORT_CATEGORIES: Final = ("L", "M", "N", "P", "S", "Z", "C")
_MOST_REPEATS: Final = 10_000
"""The largest number in a repetition. A larger one would have too many states in any case."""


class UnsupportedPatternError(ValueError):
    """A pattern is not valid, or uses a construct that is not supported."""


class CharPart(NamedTuple):
    """Matches one character."""

    test: CharTest


class SequencePart(NamedTuple):
    """Matches its parts one after the other."""

    parts: Sequence[Part]


class AlternativesPart(NamedTuple):
    """Matches any one of its parts."""

    parts: Sequence[Part]


class RepeatPart(NamedTuple):
    """Matches its part from `least` to `most` times; without a `most`, any larger number of times."""

    part: Part
    least: int
    """The lowest number of times."""
    most: int | None
    """The highest number of times; None means no limit."""


class BoundaryPart(NamedTuple):
    """Matches an empty text between two characters, depending on what these are."""

    kind: Literal["start", "end", "line start", "line end", "word edge", "no word edge"]


class LookaheadPart(NamedTuple):
    """Matches an empty text where its part matches the following text, or does not match it if `is_negative`."""

    part: Part
    is_negative: bool


Part: TypeAlias = CharPart | SequencePart | AlternativesPart | RepeatPart | BoundaryPart | LookaheadPart


def parse_pattern(source: str) -> Part:
    """Parses a regular expression.

    Raises:
        UnsupportedPatternError: The expression is not valid, or uses a construct that is not supported.
        RecursionError: The expression is nested too deeply.
    """
    return _Parser(source).parse()


class _Parser:
    """Reads the source of a pattern."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._position = 0
        self._flags: frozenset[str] = frozenset()

    def parse(self) -> Part:
        """Returns the parts of the whole pattern."""
        part = self._choice()
        if self._position < len(self._source):
            raise UnsupportedPatternError("it has a parenthesis that was never opened")
        return part

    def _peek(self, text: str) -> bool:
        return self._source.startswith(text, self._position)

    def _take(self, text: str) -> bool:
        found = self._peek(text)
        self._position += len(text) if found else 0
        return found

    def _next(self) -> str:
        if self._position >= len(self._source):
            raise UnsupportedPatternError("it ends too early")
        self._position += 1
        return self._source[self._position - 1]

    def _until(self, end: str) -> str:
        """Returns the text up to an end mark, which is skipped."""
        stop = self._source.find(end, self._position)
        if stop < 0:
            raise UnsupportedPatternError(f"it lacks {end!r}")
        text, self._position = self._source[self._position : stop], stop + len(end)
        return text

    def _choice(self) -> Part:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else AlternativesPart(parts)

    def _sequence(self) -> Part:
        parts: list[Part] = []
        while self._position < len(self._source) and not self._peek("|") and not self._peek(")"):
            parts.append(self._repeated(self._atom()))
        return SequencePart(parts)

    def _repeated(self, part: Part) -> Part:
        while (bounds := self._quantifier()) is not None:
            part = RepeatPart(part, *bounds)
            # A lazy quantifier changes only the length of a match, which does not matter here.
            self._take("?")
            if self._peek("+"):
                raise UnsupportedPatternError("it has a possessive quantifier")
        return part

    def _quantifier(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        stop = self._source.find("}", self._position)
        least, comma, most = self._source[self._position + 1 : stop].partition(",")
        is_count = stop > 0 and self._peek("{") and (least + most).isdecimal() and (least + most).isascii()
        if not is_count or (not comma and not least):
            return None
        self._position = stop + 1
        if len(least) > len(str(_MOST_REPEATS)) or len(most) > len(str(_MOST_REPEATS)):
            raise UnsupportedPatternError("it repeats something too often")
        lower = int(least or 0)
        upper = lower if not comma else int(most) if most else None
        if max(lower, upper or 0) > _MOST_REPEATS or (upper is not None and upper < lower):
            raise UnsupportedPatternError("it has a repetition with numbers that are too large or out of order")
        return lower, upper

    def _atom(self) -> Part:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return CharPart(self._class())
        if char == ".":
            return CharPart((lambda _: True) if "s" in self._flags else (lambda each: each != "\n"))
        if char == "^":
            return BoundaryPart("line start" if "m" in self._flags else "start")
        if char == "$":
            return BoundaryPart("line end" if "m" in self._flags else "end")
        if char in "*+?":
            raise UnsupportedPatternError("it repeats nothing")
        return self._escape() if char == "\\" else self._char_of(char)

    def _char_of(self, what: str | CharTest) -> Part:
        """Returns a part that matches a character, or the characters that pass a test."""
        return CharPart(self._with_flags(lambda char: char == what) if isinstance(what, str) else what)

    def _with_flags(self, test: CharTest) -> CharTest:
        """Returns a test that ignores the case if the pattern does.

        To negate a test, negate the result of this method. If its argument were negated, `[^a]` would match "a",
        because "A" is not "a".
        """
        if "i" not in self._flags:
            return test
        return lambda char: any(test(each) for each in {char, char.lower(), char.upper()} if len(each) == 1)

    def _group(self) -> Part:
        flags = self._flags
        is_negative: bool | None = None
        if self._take("?"):
            if self._take("="):
                is_negative = False
            elif self._take("!"):
                is_negative = True
            elif self._take("#"):
                self._until(")")
                return SequencePart(())
            elif self._take("P<") or (self._peek("<") and not self._peek("<=") and not self._peek("<!")):
                self._until(">")
            elif not self._read_flags():
                # These flags apply to the rest of the group that contains them.
                return SequencePart(())
        part = self._choice()
        if not self._take(")"):
            raise UnsupportedPatternError("it has a parenthesis that is never closed")
        self._flags = flags
        return part if is_negative is None else LookaheadPart(part, is_negative)

    def _read_flags(self) -> bool:
        """Reads flags such as `i:` or `i)`, and returns whether a group follows them."""
        while (char := self._next()) not in ":)":
            if char not in "imsua":
                raise UnsupportedPatternError(f"it has a group that begins with '(?{char}'")
            self._flags |= {char}
        return char == ":"

    def _escape(self) -> Part:
        if self._peek("b") or self._peek("B"):
            return BoundaryPart("word edge" if self._next() == "b" else "no word edge")
        if self._take("A"):
            return BoundaryPart("start")
        if self._take("Z") or self._take("z"):
            return BoundaryPart("end")
        return self._char_of(self._escaped_char())

    def _escaped_char(self) -> str | CharTest:
        """Reads what follows a backslash, inside or outside of a class of characters."""
        char = self._next()
        if (test := _CLASSES.get(char.lower())) is not None:
            return test if char.islower() else _negated(test)
        if char in "pP":
            return self._category(is_negated=char == "P")
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char == "c":
            return chr(ord(self._next()) % 32)
        if char in "xu":
            return self._code_point({"x": 2, "u": 4}[char])
        if char.isalnum():
            raise UnsupportedPatternError(f"it has '\\{char}'")
        return char

    def _code_point(self, digits: int) -> str:
        text = self._until("}") if self._take("{") else "".join(self._next() for _ in range(digits))
        try:
            return chr(int(text, 16))
        except (ValueError, OverflowError) as exc:
            raise UnsupportedPatternError(f"it has the character code {text!r}") from exc

    def _category(self, *, is_negated: bool) -> CharTest:
        name = self._until("}") if self._take("{") else self._next()
        name = name.removeprefix("General_Category=").removeprefix("gc=")
        name = _CATEGORIES.get(name, name)
        if name[:1] not in _SHORT_CATEGORIES or len(name) > 2:
            raise UnsupportedPatternError(f"it has the category {name!r}")

        def test(char: str) -> bool:
            return unicodedata.category(char).startswith(name)

        folded = self._with_flags(test)
        return _negated(folded) if is_negated else folded

    def _class(self) -> CharTest:
        """Reads a class of characters, whose opening bracket has already been read."""
        is_negated = self._take("^")
        chars: set[str] = set()
        ranges: list[tuple[str, str]] = []
        tests: list[CharTest] = []
        is_first = True
        while is_first or not self._peek("]"):
            is_first = False
            low = self._class_char()
            if self._peek("-") and not self._peek("-]") and isinstance(low, str):
                self._next()
                if not isinstance(high := self._class_char(), str) or high < low:
                    raise UnsupportedPatternError("it has a character range that is not valid")
                ranges.append((low, high))
            elif isinstance(low, str):
                chars.add(low)
            else:
                tests.append(low)
        self._next()

        def test(char: str) -> bool:
            found = char in chars or any(low <= char <= high for low, high in ranges)
            return found or any(each(char) for each in tests)

        folded = self._with_flags(test)
        return _negated(folded) if is_negated else folded

    def _class_char(self) -> str | CharTest:
        char = self._next()
        if char != "\\":
            return char
        # Inside of a class, `\b` is a backspace and not the edge of a word.
        return "\b" if self._take("b") else self._escaped_char()


def _negated(test: CharTest) -> CharTest:
    return lambda char: not test(char)
