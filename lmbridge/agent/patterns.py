"""Matches the regular expressions in schemas from untrusted sources, in time proportional to the text.

`re` backtracks: with `^(a+)+$`, each further "a" of a text that does not match doubles the time, and nothing else runs
in the meantime. A thread would not help, because `re` does not release the GIL. A process would have to be started,
waited for and killed, and a package such as RE2 would be a large dependency for a rare keyword. So patterns are matched
here, by Thompson's classic construction: the text is read once, together with the set of all places in the pattern that
the match may have reached. The sets are cached, so that most characters cost one look-up.

The supported syntax is what Python and Rust have in common with JavaScript, whose regular expressions JSON schema
prescribes. The rules are those of Python, except that `$` matches only at the very end. Back references and lookbehinds
are not supported, because they need backtracking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Final, NamedTuple, TypeAlias

import attrs

from lmbridge.agent.pattern_syntax import (
    AlternativesPart,
    BoundaryPart,
    CharPart,
    CharTest,
    LookaheadPart,
    Part,
    RepeatPart,
    UnsupportedPatternError,
    is_word_char,
    parse_pattern,
)
from lmbridge.agent.schema_check_limit import spend_steps

_LONGEST_PATTERN: Final = 10_000
"""The number of characters beyond which a pattern is not supported."""
_MOST_STATES: Final = 10_000
"""The number of states beyond which a pattern is not supported. `a{1000}` has a thousand of them."""
_MOST_PARTS: Final = 50_000
"""The number of parts beyond which a pattern is not supported, including parts without states. `(a{0}){1000}` has two
thousand parts."""
_STEPS_OF_CHARACTER: Final = 10
"""How many steps of `schema_check_limit` it costs to read a character of a pattern."""
_MOST_CACHED_STEPS: Final = 20_000
"""The number of steps that a pattern keeps in its cache."""


# States. State 0 is the end of the match.


class _CharState(NamedTuple):
    test: CharTest
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
            # Of the preceding character, only the kind matters, because it decides whether there is a boundary.
            preceding = before if before in ("", "\n") else "w" if is_word_char(before) else " "
            step = self._cache.get((reached, preceding, char)) if can_cache else None
            if step is None:
                spend_steps(len(reached) + 1)
                has_ended, following = self._step(reached, preceding, char, partial(self._matches_ahead, text, number))
                step = has_ended, following | always
                if can_cache:
                    if len(self._cache) >= _MOST_CACHED_STEPS:
                        self._cache.clear()
                    self._cache[reached, preceding, char] = step
            elif not number % 16:
                # A step from the cache takes about a sixteenth of the time of any other.
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
        preceding: str,
        char: str,
        matches_ahead: Callable[[_LookaheadState], bool],
    ) -> tuple[bool, frozenset[int]]:
        """Returns whether the match ends before a character, and the states that are reached after the character."""
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
                further = (state.following,) if _is_boundary(state.kind, preceding, char) else ()
            else:
                further = (state.following,) if matches_ahead(state) else ()
            remaining += [each for each in further if each not in seen]
            seen.update(further)
        spend_steps(len(seen))
        return False, frozenset(following)


def _is_boundary(kind: str, preceding: str, char: str) -> bool:
    if kind == "start":
        return not preceding
    if kind == "end":
        return not char
    if kind == "line start":
        return preceding in ("", "\n")
    if kind == "line end":
        return char in ("", "\n")
    return ((preceding == "w") is not is_word_char(char)) is (kind == "word edge")


def compile_pattern(source: str) -> Pattern:
    """Compiles a regular expression.

    Raises:
        UnsupportedPatternError: The expression is not valid, too large, or uses a construct that is not supported.
        StepLimitError: The compilation takes more steps than are allowed.
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
    """Returns a pattern, or the reason why it is not supported, because `lru_cache` does not keep exceptions."""
    spend_steps(_STEPS_OF_CHARACTER * len(source))
    try:
        compiler = _Compiler()
        return Pattern(compiler.states, compiler.add(parse_pattern(source), _END))
    except UnsupportedPatternError as exc:
        return str(exc)


class _Compiler:
    """Turns the parts of a pattern into states, from the end to the beginning."""

    def __init__(self) -> None:
        # State 0 stands for the end of the match, and has no content.
        self.states: list[_State] = [_SplitState(())]
        self._parts_left = _MOST_PARTS

    def add(self, part: Part, following: int) -> int:
        """Adds the states of a part, and returns its first state. After the part, the match goes on at `following`."""
        spend_steps(1)
        # Parts without states have to be limited as well, because nested repetitions multiply: `a{0}{9999}{9999}`.
        self._parts_left -= 1
        if self._parts_left < 0:
            raise UnsupportedPatternError("it is too large")
        if isinstance(part, CharPart):
            return self._append(_CharState(part.test, following))
        if isinstance(part, BoundaryPart):
            return self._append(_BoundaryState(part.kind, following))
        if isinstance(part, LookaheadPart):
            return self._append(_LookaheadState(self.add(part.part, _END), part.is_negative, following))
        if isinstance(part, AlternativesPart):
            return self._append(_SplitState(tuple(self.add(each, following) for each in part.parts)))
        if isinstance(part, RepeatPart):
            return self._add_repeat(part, following)
        for each in reversed(part.parts):
            following = self.add(each, following)
        return following

    def _add_repeat(self, repeat: RepeatPart, following: int) -> int:
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
