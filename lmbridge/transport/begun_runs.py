"""`BegunRuns`: which runs have begun and not ended, so that their number can be limited."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from typing import Final

from lmbridge._scheduled_run import ScheduledRun

RUN_PATIENCE: Final = 3.0
"""The seconds for which a run that has begun counts without having a request: as long as most tools take."""


class BegunRuns:
    """The runs that have begun and count towards `Limits.max_begun_runs`.

    A run begins when its first request is admitted. It counts until it ends, or until it has had no request for
    `RUN_PATIENCE` seconds because its tools take long; then it counts again from its next request on. A request outside
    of a run counts while it is in flight.

    Args:
        limit: The highest number of runs that count, or None for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        # The runs that count, with the priority of the request by which they began to count.
        self._counted: dict[ScheduledRun, int] = {}
        # Those of them that have no request, and since when. The one that has been idle longest comes first.
        self._idle: dict[ScheduledRun, float] = {}
        # All runs that have begun, even if they do not count at present.
        self._known: weakref.WeakSet[ScheduledRun] = weakref.WeakSet()
        # The number of requests of each run that wait or are in flight.
        self._requests: Counter[ScheduledRun] = Counter()
        self.total: int = 0
        """How many runs count, including the requests in flight that belong to no run."""
        # The same number for each priority.
        self._totals: dict[int, int] = {}

    def has_begun(self, run: ScheduledRun | None) -> bool:
        """Returns whether a run has begun, even if it does not count at present."""
        return run is not None and run in self._known

    def have_room(self, priority: int) -> bool:
        """Returns whether a run may begin with a request of a priority. Runs with a lower one do not count."""
        limit = self.limit
        if limit is None or self.total < limit:
            return True
        return sum(count for each, count in self._totals.items() if each >= priority) < limit

    def add_request(self, run: ScheduledRun, priority: int, now: float) -> None:
        """Records that a request of a run has arrived. A run that has begun counts again."""
        self.drop_idle(now)
        self._requests[run] += 1
        self._idle.pop(run, None)
        if run in self._known:
            self._add(run, priority)

    def remove_request(self, run: ScheduledRun, now: float) -> None:
        """Records that a request of a run has ended, or no longer waits."""
        self._requests[run] -= 1
        if not self._requests[run]:
            del self._requests[run]
            if run in self._counted:
                self._idle[run] = now

    def begin(self, run: ScheduledRun, priority: int) -> None:
        """Records that a request of a run was admitted."""
        self._known.add(run)
        self._add(run, priority)

    def end(self, run: ScheduledRun) -> None:
        """Records that a run has ended."""
        self._idle.pop(run, None)
        self._remove(run)

    def add_single(self, priority: int) -> None:
        """Records that a request that belongs to no run was admitted."""
        self.total += 1
        self._totals[priority] = self._totals.get(priority, 0) + 1

    def remove_single(self, priority: int) -> None:
        """Records that a request that belongs to no run, and was in flight, has ended."""
        self.total -= 1
        self._totals[priority] -= 1
        if not self._totals[priority]:
            del self._totals[priority]

    def drop_idle(self, now: float) -> None:
        """Stops counting the runs that have had no request for `RUN_PATIENCE` seconds."""
        while self._idle:
            run, idle_since = next(iter(self._idle.items()))
            if now < idle_since + RUN_PATIENCE:
                break
            del self._idle[run]
            self._remove(run)

    def next_drop(self) -> float:
        """Returns when `drop_idle` has to be called next, or infinity."""
        return min([since + RUN_PATIENCE for since in list(self._idle.values())[:1]], default=math.inf)

    def _add(self, run: ScheduledRun, priority: int) -> None:
        # A task that a tool has started may go on after the end of the run.
        if run not in self._counted and not run.is_over:
            self._counted[run] = priority
            self.add_single(priority)

    def _remove(self, run: ScheduledRun) -> None:
        priority = self._counted.pop(run, None)
        if priority is not None:
            self.remove_single(priority)
