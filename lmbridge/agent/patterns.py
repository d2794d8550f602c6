"""Matches the regular expressions in schemas from untrusted sources, in time proportional to the text.

`re` backtracks: with `^(a+)+$`, each further "a" of a text that does not match doubles its time, and it holds the
interpreter meanwhile. A thread would not help, because `re` does not release the GIL. A process would have to be
started, waited for and killed, and a package such as RE2 would be a large dependency for a rare keyword. So patterns
are matched here, by the classic construction of Thompson: the text is read once, with the set of all places in the
pattern that the match may have reached. The sets are cached, so that most characters cost one look-up.

The syntax is what JavaScript, which JSON schema refers to, Python and Rust have in common, and the rules are those of
Python, except that `$` matches only at the very end. Back references and lookbehinds are not supported, because they
need backtracking.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Final, Literal, NamedTuple, TypeAlias

import attrs

from lmbridge.agent.step_limit import spend_steps

_LONGEST_PATTERN: Final = 10_000
"""The number of characters beyond which a pattern is not supported."""
_MOST_STATES: Final = 10_000
"""The number of states beyond which a pattern is not supported. `a{1000}` has a thousand of them."""
_MOST_PARTS: Final = 50_000
"""The number of parts beyond which a pattern is not supported, those without states included. `(a{0}){1000}` has two
thousand of them."""
_STEPS_OF_CHARACTER: Final = 10
"""What it costs to read a character of a pattern, in steps of `step_limit`."""
_MOST_CACHED_STEPS: Final = 20_000
"""The number of steps that a pattern keeps in its cache."""

_CharTest: TypeAlias = Callable[[str], bool]


class UnsupportedPatternError(ValueError):
    """A pattern is not valid, or uses a construct that is not supported."""


# What a pattern consists of


class _Char(NamedTuple):
    """Matches one character."""

    test: _CharTest


class _Sequence(NamedTuple):
    """Matches its parts one after the other."""

    parts: Sequence[_Part]


class _Choice(NamedTuple):
    """Matches any one of its parts."""

    parts: Sequence[_Part]


class _Repeat(NamedTuple):
    """Matches its part several times."""

    part: _Part
    least: int
    most: int | None


class _Boundary(NamedTuple):
    """Matches between two characters, depending on what they are."""

    kind: Literal["start", "end", "line start", "line end", "word edge", "no word edge"]


class _Lookahead(NamedTuple):
    """Matches where its part matches, or does not match, the following text."""

    part: _Part
    is_negative: bool


_Part: TypeAlias = _Char | _Sequence | _Choice | _Repeat | _Boundary | _Lookahead


# States. State 0 is the end of the match.


class _CharState(NamedTuple):
    test: _CharTest
    following: int


class _SplitState(NamedTuple):
    following: tuple[int, ...]


class _BoundaryState(NamedTuple):
    kind: str
    following: int


class _LookaheadState(NamedTuple):
    start: int
    is_negative: bool
    following: int


_State: TypeAlias = _CharState | _SplitState | _BoundaryState | _LookaheadState
_END: Final = 0


@attrs.define
class Pattern:
    """A regular expression whose match takes time in proportion to the text."""

    _states: list[_State]
    _start: int
    _cache: dict[tuple[frozenset[int], str, str], tuple[bool, frozenset[int]]] = attrs.field(factory=dict)

    def search(self, text: str) -> bool:
        """Returns whether the pattern matches some part of a text.

        Raises:
            StepLimitError: The search takes more steps than are allowed.
        """
        return self._run(self._start, text, 0, is_search=True)

    def _run(self, start: int, text: str, position: int, *, is_search: bool) -> bool:
        can_cache = is_search and not any(isinstance(state, _LookaheadState) for state in self._states)
        always = frozenset([start] if is_search else ())
        reached = frozenset([start])
        before = text[position - 1 : position] if position else ""
        for number in range(position, len(text) + 1):
            char = text[number : number + 1]
            # The only thing that matters about the character before is on which side of a boundary it is.
            side = before if before in ("", "\n") else "w" if _is_word(before) else " "
            step = self._cache.get((reached, side, char)) if can_cache else None
            if step is None:
                spend_steps(len(reached) + 1)
                has_ended, following = self._step(reached, side, char, partial(self._matches_ahead, text, number))
                step = has_ended, following | always
                if can_cache:
                    if len(self._cache) >= _MOST_CACHED_STEPS:
                        self._cache.clear()
                    self._cache[reached, side, char] = step
            elif not number % 16:
                # A cached step takes about a sixteenth of the time of another one.
                spend_steps(1)
            has_ended, reached = step
            if has_ended or not reached:
                return has_ended
            before = char
        return False

    def _matches_ahead(self, text: str, position: int, state: _LookaheadState) -> bool:
        return self._run(state.start, text, position, is_search=False) is not state.is_negative

    def _step(
        self,
        reached: Iterable[int],
        side: str,
        char: str,
        matches_ahead: Callable[[_LookaheadState], bool],
    ) -> tuple[bool, frozenset[int]]:
        """Returns whether the match has ended before a character, and the states that it reaches after it."""
        following: set[int] = set()
        seen = set(reached)
        remaining = list(seen)
        while remaining:
            number = remaining.pop()
            if number == _END:
                return True, frozenset()
            state = self._states[number]
            if isinstance(state, _CharState):
                if char and state.test(char):
                    following.add(state.following)
                continue
            if isinstance(state, _SplitState):
                further: tuple[int, ...] = state.following
            elif isinstance(state, _BoundaryState):
                further = (state.following,) if _is_boundary(state.kind, side, char) else ()
            else:
                further = (state.following,) if matches_ahead(state) else ()
            remaining += [each for each in further if each not in seen]
            seen.update(further)
        spend_steps(len(seen))
        return False, frozenset(following)


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


def _is_boundary(kind: str, side: str, char: str) -> bool:
    if kind == "start":
        return not side
    if kind == "end":
        return not char
    if kind == "line start":
        return side in ("", "\n")
    if kind == "line end":
        return char in ("", "\n")
    return ((side == "w") is not _is_word(char)) is (kind == "word edge")


def compile_pattern(source: str) -> Pattern:
    """Compiles a regular expression.

    Raises:
        UnsupportedPatternError: The expression is not valid, too large, or uses a construct that is not supported.
        StepLimitError: It takes more steps than are allowed.
    """
    if len(source) > _LONGEST_PATTERN:
        raise UnsupportedPatternError("it is too long")
    try:
        compiled = _compile(source)
    except RecursionError as exc:
        raise UnsupportedPatternError("it is nested too deeply") from exc
    if isinstance(compiled, str):
        raise UnsupportedPatternError(compiled)
    return compiled


@lru_cache(maxsize=1_000)
def _compile(source: str) -> Pattern | str:
    """Returns a pattern, or why it is not supported; `lru_cache` would forget an exception."""
    spend_steps(_STEPS_OF_CHARACTER * len(source))
    try:
        compiler = _Compiler()
        return Pattern(compiler.states, compiler.add(_Parser(source).parse(), _END))
    except UnsupportedPatternError as exc:
        return str(exc)


class _Compiler:
    """Turns the parts of a pattern into states, from the end to the beginning."""

    def __init__(self) -> None:
        # The end of the match is not a state.
        self.states: list[_State] = [_SplitState(())]
        self._parts_left = _MOST_PARTS

    def add(self, part: _Part, following: int) -> int:
        """Adds the states of a part, after which the match goes on with another state; returns where it begins."""
        spend_steps(1)
        # A part without states can be repeated as well, by repetitions that multiply: `a{0}{9999}{9999}`.
        self._parts_left -= 1
        if self._parts_left < 0:
            raise UnsupportedPatternError("it is too large")
        if isinstance(part, _Char):
            return self._append(_CharState(part.test, following))
        if isinstance(part, _Boundary):
            return self._append(_BoundaryState(part.kind, following))
        if isinstance(part, _Lookahead):
            return self._append(_LookaheadState(self.add(part.part, _END), part.is_negative, following))
        if isinstance(part, _Choice):
            return self._append(_SplitState(tuple(self.add(each, following) for each in part.parts)))
        if isinstance(part, _Repeat):
            return self._add_repeat(part, following)
        for each in reversed(part.parts):
            following = self.add(each, following)
        return following

    def _add_repeat(self, repeat: _Repeat, following: int) -> int:
        start = following
        if repeat.most is None:
            start = self._append(_SplitState(()))
            self.states[start] = _SplitState((self.add(repeat.part, start), following))
        else:
            for _ in range(repeat.most - repeat.least):
                start = self._append(_SplitState((self.add(repeat.part, start), following)))
        for _ in range(repeat.least):
            start = self.add(repeat.part, start)
        return start

    def _append(self, state: _State) -> int:
        if len(self.states) >= _MOST_STATES:
            raise UnsupportedPatternError("it is too large")
        self.states.append(state)
        return len(self.states) - 1


# Parsing

_CLASSES: Final[dict[str, _CharTest]] = {"d": str.isdecimal, "w": _is_word, "s": str.isspace}
_CONTROLS: Final = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0", "a": "\a"}
_CATEGORIES: Final = {
    "Letter": "L", "Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll", "Mark": "M", "Number": "N",
    "Decimal_Number": "Nd", "Punctuation": "P", "Symbol": "S", "Separator": "Z", "Other": "C",
}  # fmt: skip
_SHORT_CATEGORIES: Final = ("L", "M", "N", "P", "S", "Z", "C")
_MOST_REPEATS: Final = 10_000
"""The largest number in a repetition. A larger one would have too many states in any case."""


class _Parser:
    """Reads the source of a pattern."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._position = 0
        self._flags: frozenset[str] = frozenset()

    def parse(self) -> _Part:
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

    def _choice(self) -> _Part:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else _Choice(parts)

    def _sequence(self) -> _Part:
        parts: list[_Part] = []
        while self._position < len(self._source) and not self._peek("|") and not self._peek(")"):
            parts.append(self._repeated(self._atom()))
        return _Sequence(parts)

    def _repeated(self, part: _Part) -> _Part:
        while (bounds := self._quantifier()) is not None:
            part = _Repeat(part, *bounds)
            # Whether a match is long or short does not matter here.
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
            raise UnsupportedPatternError("it repeats something too often")
        return lower, upper

    def _atom(self) -> _Part:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return _Char(self._class())
        if char == ".":
            return _Char((lambda _: True) if "s" in self._flags else (lambda each: each != "\n"))
        if char == "^":
            return _Boundary("line start" if "m" in self._flags else "start")
        if char == "$":
            return _Boundary("line end" if "m" in self._flags else "end")
        if char in "*+?":
            raise UnsupportedPatternError("it repeats nothing")
        return self._escape() if char == "\\" else self._char_of(char)

    def _char_of(self, what: str | _CharTest) -> _Part:
        """Returns a part that matches a character, or the characters that pass a test."""
        return _Char(self._with_flags(lambda char: char == what) if isinstance(what, str) else what)

    def _with_flags(self, test: _CharTest) -> _CharTest:
        """Returns a test that disregards the case if the pattern does. A negation has to come after it."""
        if "i" not in self._flags:
            return test
        return lambda char: any(test(each) for each in {char, char.lower(), char.upper()} if len(each) == 1)

    def _group(self) -> _Part:
        flags = self._flags
        lookahead = None
        if self._take("?"):
            if self._take("=") or self._peek("!"):
                lookahead = self._take("!")
            elif self._take("#"):
                self._until(")")
                return _Sequence(())
            elif self._take("P<") or (self._peek("<") and not self._peek("<=") and not self._peek("<!")):
                self._until(">")
            elif not self._read_flags():
                # The flags are those of the rest of the group around this one.
                return _Sequence(())
        part = self._choice()
        if not self._take(")"):
            raise UnsupportedPatternError("it has a parenthesis that is never closed")
        self._flags = flags
        return part if lookahead is None else _Lookahead(part, lookahead)

    def _read_flags(self) -> bool:
        """Reads `i:` or `i)`, and returns whether a group follows."""
        while (char := self._next()) not in ":)":
            if char not in "imsua":
                raise UnsupportedPatternError(f"it has a group that begins with '(?{char}'")
            self._flags |= {char}
        return char == ":"

    def _escape(self) -> _Part:
        if self._peek("b") or self._peek("B"):
            return _Boundary("word edge" if self._next() == "b" else "no word edge")
        if self._take("A"):
            return _Boundary("start")
        if self._take("Z") or self._take("z"):
            return _Boundary("end")
        return self._char_of(self._escaped_char())

    def _escaped_char(self) -> str | _CharTest:
        """Reads what follows a backslash, within a class or outside of it."""
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

    def _category(self, *, is_negated: bool) -> _CharTest:
        name = self._until("}") if self._take("{") else self._next()
        name = name.removeprefix("General_Category=").removeprefix("gc=")
        name = _CATEGORIES.get(name, name)
        if name[:1] not in _SHORT_CATEGORIES or len(name) > 2:
            raise UnsupportedPatternError(f"it has the category {name!r}")

        def test(char: str) -> bool:
            return unicodedata.category(char).startswith(name)

        folded = self._with_flags(test)
        return _negated(folded) if is_negated else folded

    def _class(self) -> _CharTest:
        """Reads a class of characters, whose bracket has been read."""
        is_negated = self._take("^")
        chars: set[str] = set()
        ranges: list[tuple[str, str]] = []
        tests: list[_CharTest] = []
        is_first = True
        while is_first or not self._peek("]"):
            is_first = False
            low = self._class_char()
            if self._peek("-") and not self._peek("-]") and isinstance(low, str):
                self._next()
                if not isinstance(high := self._class_char(), str) or high < low:
                    raise UnsupportedPatternError("it has a range without an end")
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

    def _class_char(self) -> str | _CharTest:
        char = self._next()
        if char != "\\":
            return char
        # Within a class, this is a backspace and not the edge of a word.
        return "\b" if self._take("b") else self._escaped_char()


def _negated(test: _CharTest) -> _CharTest:
    return lambda char: not test(char)
