"""A hundred runs on four slots, in simulated time: in which order they end, and when the last one does.

The schedule is the real one. Only the server is simulated: each slot has the conversation that was there last in its
cache, and a request whose conversation is not there has to be read as a whole.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable
from functools import partial
from typing import Final, Literal

import pytest

from lmbridge._scheduled_run import ScheduledRun
from lmbridge.config import Limits
from tests.transport.schedule_machine import SchedulerHarness
from tests.transport.schedule_reference import ReferenceRequest

RUNS: Final = 100
SLOTS: Final = 4
ROUNDS: Final = 3
READING: Final = 2.0
"""The seconds for a conversation that is not in the cache."""
GENERATING: Final = 1.0

Order = Literal["run", "request"]


class SimulatedServer:
    """A server with slots, whose requests come from runs that call a tool after each round but the last.

    It gives a new conversation the slot that was used least recently.

    Args:
        order: The order in which requests are admitted.
        tool: The seconds that a tool takes.
        forgets: Whether a slot has only the conversation that was there last. Otherwise the server remembers all.
    """

    def __init__(self, order: Order, tool: float, *, forgets: bool) -> None:
        self.ends: list[int] = []
        """The numbers of the runs that have ended, in order."""
        self.seconds: list[float] = []
        """When each of them ended."""
        self.readings: int = 0
        """How often a conversation had to be read as a whole."""
        self._tool, self._forgets = tool, forgets
        self._harness = SchedulerHarness(Limits(max_concurrency=SLOTS, order=order), start=0.0)
        self._runs = [ScheduledRun() for _ in range(RUNS)]
        self._rounds = dict.fromkeys(self._runs, 0)
        self._free = list(range(SLOTS))
        self._cached: dict[int, ScheduledRun | None] = {}
        self._slots: dict[ReferenceRequest, int] = {}
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], object]]] = []

    def simulate(self) -> None:
        """Starts all runs at once, and lets time pass until the last one has ended."""
        for run in self._runs:
            self._at(0.0, partial(self._harness.arrive, "a", run=run))
        while self._events:
            when = self._events[0][0]
            # The schedule may admit a request because time has passed, before anything else happens.
            self._harness.wait(min(when, self._harness.timer) - self._harness.now)
            if self._harness.now == when:
                heapq.heappop(self._events)[2]()
            self._begin_what_was_admitted()
        self._harness.check()

    def _at(self, when: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def _begin_what_was_admitted(self) -> None:
        for request in self._harness.reference.in_flight:
            run = request.run
            if run is not None and request not in self._slots:
                known = [slot for slot in self._free if self._cached.get(slot) is run]
                self._slots[request] = slot = known[0] if known else self._free[0]
                self._free.remove(slot)
                self._cached[slot] = run
                is_cached = bool(known) if self._forgets else self._rounds[run] > 0
                self.readings += not is_cached
                answered = self._harness.now + (0.0 if is_cached else READING)
                self._at(answered, partial(self._harness.answer, request))
                self._at(answered + self._generating(run), partial(self._end, request, run, is_cached))

    def _generating(self, run: ScheduledRun) -> float:
        """The seconds for an answer. Not all are equally long, so that the runs do not stay in step."""
        return GENERATING * (0.6 + 0.2 * ((7 * self._runs.index(run) + 3 * self._rounds[run]) % 5))

    def _end(self, request: ReferenceRequest, run: ScheduledRun, is_cached: bool) -> None:
        self._free.append(self._slots.pop(request))
        before = 800 + 100 * (self._rounds[run] - 1)
        self._harness.note_reply(request, (before + 100, before if is_cached else 0))
        self._harness.end(request)
        self._rounds[run] += 1
        if self._rounds[run] < ROUNDS:
            # Not all tools take the same time, so that the runs do not stay in step.
            seconds = self._tool * (1 + self._runs.index(run) % 5 / 10)
            self._at(self._harness.now + seconds, partial(self._harness.arrive, "a", run=run))
        else:
            self.ends.append(self._runs.index(run))
            self.seconds.append(self._harness.now)
            self._harness.end_run(run)


@functools.cache
def simulate(order: Order, tool: float, *, forgets: bool) -> SimulatedServer:
    server = SimulatedServer(order, tool, forgets=forgets)
    server.simulate()
    assert sorted(server.ends) == list(range(RUNS))
    return server


@pytest.mark.parametrize("forgets", [True, False])
def test_runs_end_one_after_the_other_instead_of_all_at_the_end(forgets: bool) -> None:
    by_run, by_request = (simulate(order, 0.2, forgets=forgets) for order in ("run", "request"))
    assert all(abs(run - place) < SLOTS for place, run in enumerate(by_run.ends))
    half = by_run.seconds[-1] / 2
    assert sum(when <= half for when in by_run.seconds) >= RUNS // 2 - SLOTS
    # Each run has its last round after the first two of all others.
    assert by_request.seconds[0] > by_request.seconds[-1] / 2
    assert sum(by_run.seconds) < 0.7 * sum(by_request.seconds)


@pytest.mark.parametrize("tool", [0.2, 1.0])
def test_hardly_any_conversation_is_read_twice_if_tools_take_less_time_than_reading(tool: float) -> None:
    """A new run would displace another one whose tool is running, if it began as soon as a run has ended.

    That is done once for a hundred requests, to find out whether the server remembers the other one, which may then
    displace one more.
    """
    assert simulate("run", tool, forgets=True).readings <= RUNS + 2 * (1 + ROUNDS * RUNS // 100)


@pytest.mark.parametrize("tool", [0.0, 0.2, 1.0])
def test_the_last_run_ends_earlier_if_the_server_forgets_and_tools_take_less_time_than_reading(tool: float) -> None:
    by_run, by_request = (simulate(order, tool, forgets=True) for order in ("run", "request"))
    assert by_run.seconds[-1] < 0.9 * by_request.seconds[-1]


@pytest.mark.parametrize("forgets", [True, False])
@pytest.mark.parametrize("tool", [0.0, 0.2, 1.0, 2.0, 10.0])
def test_the_last_run_never_ends_later_by_more_than_it_takes_on_its_own(tool: float, forgets: bool) -> None:
    """While the last runs call their tools, there is no other run left that could use their slots."""
    by_run, by_request = (simulate(order, tool, forgets=forgets) for order in ("run", "request"))
    on_its_own = READING + 1.4 * (ROUNDS * GENERATING + (ROUNDS - 1) * tool)
    assert by_run.seconds[-1] <= by_request.seconds[-1] + on_its_own
    assert sum(by_run.seconds) < 0.8 * sum(by_request.seconds)
