"""The figures that were measured, and their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any


class Result:
    """The figures of one peer in one row."""

    def __init__(self) -> None:
        self.figures: dict[int, Any] = {}
        """The figure of each round. None means that the awaited event never came."""
        self.failure = ""
        """The reason why a round has no figure; empty if all went well."""
        self.seconds = 0.0
        """The seconds that all rounds have taken so far."""

    @property
    def known(self) -> dict[int, float]:
        """The figures of the rounds in which the awaited event came."""
        return {number: value for number, value in self.figures.items() if value is not None}

    @property
    def is_never(self) -> bool:
        """True if the awaited event came in fewer than half of the rounds."""
        return len(self.known) * 2 < len(self.figures)

    @property
    def median(self) -> float | None:
        """The median figure, or None if there is none."""
        return median(self.known.values()) if self.known and not self.is_never else None

    def ratios(self, baseline: Result) -> list[float]:
        """Returns the ratios to the baseline's figures, for each round in which both have one."""
        return [value / baseline.known[number] for number, value in self.known.items() if number in baseline.known]

    def as_json(self) -> dict[str, Any]:
        return {"figures": self.figures, "failure": self.failure}


Results = dict[tuple[str, str], Result]
"""The results by the key of the row and the name of the peer."""


def spread(values: Sequence[float]) -> float:
    """Returns half the range of the middle half of the values."""
    if len(values) < 3:
        return (max(values) - min(values)) / 2 if values else 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2
