"""What ends a run that does not come to its end: the same call over and over, bad calls, spent budgets."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import msgspec

WARN_AT: Final = 3
STOP_AT: Final = 5

_canonical: Final = msgspec.json.Encoder(order="sorted").encode


class RepetitionGuard:
    """Counts calls that had the same arguments and the same result before, in whichever order they come.

    A poll whose result changes is a new one each time, and so is not counted.
    """

    def __init__(self) -> None:
        self._seen: Counter[int] = Counter()
        self.tripped = False

    def note(self, name: str, arguments: Any, result: str) -> str:
        """Counts a call that was answered.

        Returns:
            The result to tell the model: with a warning behind it if it has had it too often.
        """
        key = hash((name, _canonical(arguments), result))  # not the texts themselves: results may be large
        self._seen[key] += 1
        times = self._seen[key]
        self.tripped |= times >= STOP_AT
        if times < WARN_AT:
            return result
        return (
            f"{result}\n\n[This call was made {times} times, with the same arguments and the same result each time."
            " Do something else, or answer with what there is.]"
        )


class BadCallGuard:
    """Counts calls in a row that could not be made.

    Args:
        limit: How many end the run.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0
        self.tripped = False

    def note(self, *, bad: bool) -> None:
        """Counts a call; a good one begins the count anew."""
        self._in_a_row = self._in_a_row + 1 if bad else 0
        self.tripped |= self._in_a_row >= self._limit


class TokenBudget:
    """Adds up the tokens of a run.

    Args:
        limit: How many it may use; None for any number.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._spent = 0

    def spend(self, tokens: int) -> None:
        """Counts the tokens of a round."""
        self._spent += tokens

    @property
    def is_spent(self) -> bool:
        """Whether the limit is reached."""
        return self._limit is not None and self._spent >= self._limit
