"""`Levels`: the priorities of waiting requests, which rise while they wait."""

from __future__ import annotations

import math
from collections import Counter

from lmbridge.transport.permits import Permit


class Levels:
    """The levels of all waiting requests: the priority of each, plus one for each `max_wait` seconds of waiting.

    Args:
        max_wait: The seconds after which a request rises by one level. None and 0 switch this off.
    """

    def __init__(self, max_wait: float | None) -> None:
        self.max_wait = max_wait
        self.highest_priority: int = 0
        """The highest priority of all waiting requests. No request rises above it."""
        # The number of waiting requests of each priority.
        self._counts: Counter[int] = Counter()

    def add(self, permit: Permit) -> bool:
        """Counts a request that has begun to wait. Returns whether the highest priority has changed."""
        self._counts[permit.priority] += 1
        return self._update_highest_priority()

    def remove(self, permit: Permit) -> bool:
        """Stops counting a request that no longer waits. Returns whether the highest priority has changed."""
        self._counts[permit.priority] -= 1
        if self._counts[permit.priority]:
            return False
        del self._counts[permit.priority]
        return self._update_highest_priority()

    def _update_highest_priority(self) -> bool:
        before, self.highest_priority = self.highest_priority, max(self._counts, default=0)
        return self.highest_priority != before

    def update(self, permit: Permit, now: float) -> None:
        """Computes the level of a waiting request, when it rises next, and its rank."""
        limit = self.max_wait
        if not limit:
            permit.level, permit.rises_at = permit.priority, math.inf
        else:
            periods = max(0, int((now - permit.arrived_at) / limit))
            # The division may be off by a rounding error, so the two sums below decide.
            while permit.arrived_at + (periods + 1) * limit <= now:
                periods += 1
            while periods and permit.arrived_at + periods * limit > now:
                periods -= 1
            permit.level, permit.rises_at = permit.priority + periods, permit.arrived_at + (periods + 1) * limit
        self.update_rank(permit)

    def update_rank(self, permit: Permit) -> None:
        """Computes the rank of a request from its level."""
        permit.rank = -self.capped_level(permit), permit.order_number, permit.arrival_number

    def capped_level(self, permit: Permit) -> int:
        """Returns the level of a waiting request, but at most the highest priority that waits.

        Without this limit, requests that have reached that priority would overtake each other by their age, which would
        disturb the order of runs.
        """
        return min(permit.level, self.highest_priority)
