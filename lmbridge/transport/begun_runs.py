"""`BegunRuns`: which runs have begun and not ended, so that their number can be limited.

Why runs are limited at all: an agent's run sends its whole conversation in each round. The server does not have to
process this conversation again if it is still in the cache of a slot, because nothing else has used the slot in the
meantime. So while a run calls a tool, it can be better to leave its slot idle than to let another run begin in it.

How long a slot is kept: no longer than it would take to process the conversation again. The scheduler knows how long
that is: the time until the server began to answer the first request of the run. If a tool takes longer, its run is no
longer counted. So with a server that answers at once, no slot is kept idle at all. One alternative was a fixed number
of seconds, which either wastes the time of a fast server or is too short for a slow one. The other one was to set no
limit on runs, so that every round of every run may have to process its conversation again. If most tool calls take
longer than their slots are kept, the slots are kept in vain. Therefore no slot is kept while most of the latest tool
calls have taken longer; how long they take is still observed.

Why the next run may have to wait although another run has ended: a server gives a new conversation the slot that was
used least recently (`lmbridge.transport.slot_use`). Right after a run has ended, this is not the slot of that run, but
the slot of another run whose tool is running. The new run would displace the conversation of this other run. So if the
other run counts, the new run waits until the server begins to answer the next request of the other run. Such a wait
ends soon, because slots are kept only for as long as described above. In a measurement with 24 runs on 4 slots, the
server processed half as many prompt tokens as without this rule.

In which order runs begin is decided in `scheduler`.
"""

from __future__ import annotations

import heapq
import math
import weakref
from collections import Counter, deque
from typing import Final

from lmbridge._scheduled_run import ScheduledRun, next_order_number

RUN_PATIENCE: Final = 3.0
"""The most seconds for which a run that has begun counts without having a request."""
_OBSERVED_TOOLS: Final = 8
"""The number of the latest tool calls that decide whether runs count while their tools are running."""


class BegunRuns:
    """The runs that have begun and count towards `Limits.max_begun_runs`.

    A run begins when its first request is admitted. It counts until it ends. It also stops counting when it has had no
    request for as long as the server took to begin the answer to its first one, or for `RUN_PATIENCE` seconds if that
    is less; then its next request makes it count again. While most of the latest tool calls, of any run, have taken
    longer than that, a run counts only while it has a request. A request that belongs to no run counts while it is in
    flight.

    Args:
        limit: The highest number of runs that count, or None for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.total: int = 0
        """How many runs count, including the requests in flight that belong to no run."""
        # The parts of `total`, by priority.
        self._totals: dict[int, int] = {}
        # The runs that count, with the priority of the request by which they began to count.
        self._counted: dict[ScheduledRun, int] = {}
        # The runs among them that have no request, with the time at which each stops counting; and a heap of these
        # times, in which entries that are out of date are skipped.
        self._idle: dict[ScheduledRun, float] = {}
        self._next_idle: list[tuple[float, int, ScheduledRun]] = []
        # All runs that have begun, even if they do not count at present, and for how long each counts while it is idle.
        self._patience: weakref.WeakKeyDictionary[ScheduledRun, float] = weakref.WeakKeyDictionary()
        # The runs whose latest request has not been answered yet, with the time until which the slot of each is kept.
        self._unanswered: dict[ScheduledRun, float] = {}
        # The time at which the tools of each run began to run; and for each of the latest tool calls, whether it ended
        # before its run would have stopped counting. At first, all tools are assumed to be fast.
        self._calling_since: weakref.WeakKeyDictionary[ScheduledRun, float] = weakref.WeakKeyDictionary()
        self._ended_soon: deque[bool] = deque([True] * _OBSERVED_TOOLS, maxlen=_OBSERVED_TOOLS)
        # The number of requests of each run that wait or are in flight.
        self._requests: Counter[ScheduledRun] = Counter()

    def has_begun(self, run: ScheduledRun | None) -> bool:
        """Returns whether a run has begun, even if it does not count at present."""
        return run is not None and run in self._patience

    def have_room(self, level: float) -> bool:
        """Returns whether a run may begin with a request of this level. Runs with a lower priority do not count."""
        limit = self.limit
        if limit is None or self.total < limit:
            return True
        return sum(count for each, count in self._totals.items() if each >= level) < limit

    def keeps_slot_until(self, conversation: object, level: float) -> float:
        """Returns the time until which a slot is kept from requests of this level, or minus infinity if it is not kept.

        The slot of a run that counts is kept while the tools of the run are running, and again while its next request
        is on the way. The request is taken to have arrived when the server begins to answer it, or when the server has
        had as much time as it would need to answer it without the slot.

        Args:
            conversation: The conversation that is in the slot.
            level: The level of the requests.
        """
        if not isinstance(conversation, ScheduledRun) or self._counted.get(conversation, -math.inf) < level:
            return -math.inf
        return self._idle.get(conversation, self._unanswered.get(conversation, -math.inf))

    def add_request(self, run: ScheduledRun, priority: int, now: float) -> None:
        """Records that a request of a run has arrived. A run that has begun counts again."""
        self.drop_idle(now)
        calling_since, patience = self._calling_since.pop(run, None), self._patience.get(run)
        # If the patience is 0, the call shows nothing: the run does not count while its tools are running, however fast
        # they are.
        if calling_since is not None and patience:
            self._ended_soon.append(now < calling_since + patience)
        self._requests[run] += 1
        self._idle.pop(run, None)
        if run in self._patience:
            self._add(run, priority)

    def remove_request(self, run: ScheduledRun, now: float) -> None:
        """Records that a request of a run has ended, or no longer waits."""
        self._requests[run] -= 1
        if not self._requests[run]:
            del self._requests[run]
            self._unanswered.pop(run, None)
            self._calling_since[run] = now
            if run in self._counted:
                tools_are_slow = 2 * sum(self._ended_soon) < _OBSERVED_TOOLS
                until = self._idle[run] = now + (0.0 if tools_are_slow else self._patience[run])
                heapq.heappush(self._next_idle, (until, next_order_number(), run))

    def begin(self, run: ScheduledRun, priority: int, now: float) -> bool:
        """Records that a request of a run was admitted. Returns whether it is the first one."""
        is_first = run not in self._patience
        if is_first:
            self._patience[run] = 0.0
        self._unanswered[run] = now + self._patience[run]
        self._add(run, priority)
        return is_first

    def set_patience(self, run: ScheduledRun, seconds: float) -> None:
        """Records how long the server took to begin its answer to the first request of a run."""
        self._patience[run] = min(seconds, RUN_PATIENCE)

    def answer(self, run: ScheduledRun) -> None:
        """Records that the server has begun to answer a request of a run."""
        self._unanswered.pop(run, None)

    def pause(self, run: ScheduledRun) -> None:
        """Stops counting a run that waits for something other than its tools, unless it has a request."""
        self._calling_since.pop(run, None)
        if self._idle.pop(run, None) is not None:
            self._remove(run)

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
        """Stops counting the runs that have had no request for too long."""
        while self.next_drop() <= now:
            _, _, run = heapq.heappop(self._next_idle)
            del self._idle[run]
            self._remove(run)

    def next_drop(self) -> float:
        """Returns when `drop_idle` has to be called next, or infinity."""
        while self._next_idle:
            until, _, run = self._next_idle[0]
            if self._idle.get(run) == until:
                return until
            heapq.heappop(self._next_idle)
        return math.inf

    def _add(self, run: ScheduledRun, priority: int) -> None:
        # A task that a tool has started may go on after the end of the run.
        if run not in self._counted and not run.is_over:
            self._counted[run] = priority
            self.add_single(priority)

    def _remove(self, run: ScheduledRun) -> None:
        priority = self._counted.pop(run, None)
        if priority is not None:
            self.remove_single(priority)
