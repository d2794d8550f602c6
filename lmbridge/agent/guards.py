"""Reasons to end a run without an answer: repeated calls, calls that cannot be made, and a spent token budget.

The guards count replies and not calls. A model that asks for the same thing nine times in one reply has not yet seen a
single result, so it has repeated nothing. And a reply full of unusable calls is one mistake, because the model learns
only afterwards what was wrong with the first of them.

`max_seconds` is not here: `RunHandle` in `runs` watches the clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lmbridge.agent.planned_calls import encode_sorted

_WARN_AT: Final = 3
"""After this many replies with the same call and the same result, the model gets a warning."""


class RepetitionGuard:
    """Counts the replies that had the same call with the same result. They need not follow one another directly.

    Calls whose results differ, such as those of a tool that is polled, do not count as repetitions.

    Args:
        limit: The number of such replies that ends the run; None means any number of repetitions is allowed.

    Attributes:
        tripped: Whether the run has to end.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._counts: Counter[int] = Counter()
        # The calls of the current reply that have been counted.
        self._counted: set[int] = set()
        self.tripped: bool = False

    def note(self, name: str, arguments: Any, result: str, images: Sequence[Mapping[str, Any]] = ()) -> str:
        """Counts a call with its result, at most once for each reply. Results with different images are different.

        Returns:
            The result for the model, followed by a warning if three or more replies had this call with this result.
        """
        if self._limit is None:
            return result
        # The key is a hash and not the texts, because results may be large.
        key = hash((name, encode_sorted(arguments), result, *(encode_sorted(each) for each in images)))
        if key not in self._counted:
            self._counted.add(key)
            self._counts[key] += 1
        times = self._counts[key]
        self.tripped |= times >= self._limit
        if times < _WARN_AT:
            return result
        return (
            f"{result}\n\n[This call was made {times} times, with the same arguments and the same result each time."
            " Do something else, or answer with what you have.]"
        )

    def forgive(self) -> None:
        """Counts one reply fewer for each call, because the prompt may no longer contain its result."""
        self._counts -= Counter(self._counts.keys())

    def end_reply(self) -> None:
        """Records that all calls of a reply have been counted."""
        self._counted.clear()


class BadCallGuard:
    """Counts consecutive replies whose calls were all invalid.

    Args:
        limit: How many such replies end the run.

    Attributes:
        tripped: Whether the run has to end.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0
        self.tripped: bool = False

    def note(self, *, bad: bool) -> None:
        """Counts a reply if all its calls are `bad`; otherwise the count starts again from 0."""
        self._in_a_row = self._in_a_row + 1 if bad else 0
        self.tripped |= self._in_a_row >= self._limit


class TokenBudget:
    """Adds up the tokens of a run.

    Args:
        limit: How many tokens the run may use; None means no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._spent = 0

    def spend(self, tokens: int) -> None:
        """Adds the tokens of a request and its reply."""
        self._spent += tokens

    @property
    def is_spent(self) -> bool:
        """Whether the limit has been reached."""
        return self._limit is not None and self._spent >= self._limit
