"""A simulation of agent runs on many servers, event by event, without waiting and without a model.

Each server has slots, and in each slot the conversation that was there last. A run sends its whole conversation in each
round; what the slot has in its cache need not be read again. The rules are those of `lmbridge.transport`, in short:
which server gets a request, which request goes first there, and how many runs may have begun. Every slot works at the
speed that it has while all slots are busy, so a server with idle slots is simulated as slower than it is.
"""

from __future__ import annotations

import heapq
import itertools
import random
from array import array
from collections.abc import Callable
from typing import Final, Literal

import attrs

SLOTS: Final = 4
"""The slots of each server, as `LocalServer` has them by default."""
PROMPT_SPEED: Final = 102.0
"""Tokens of prompts that a server reads in a second, in all slots together. `python -m benchmarks.service_times` on
an AMD EPYC, 2026-11-29, SmolLM2-135M on one thread: the median of five (93 to 104)."""
ANSWER_SPEED: Final = 71.0
"""Tokens of answers that it generates in a second, from the same measurements (54 to 82)."""
GATEWAY_REQUEST: Final = (0.37 - 0.07) * 1e-3
"""Seconds for which the gateway's process works on a request: the time to the first byte with it, minus that with
nothing in between, in the table of `make gateway-bench` in docs/gateway.md. A test compares this and the next one with
that table."""
GATEWAY_CHUNK: Final = 22.7e-6 * 1.23
"""Seconds of CPU time of the gateway for a chunk of a stream, with 100 streams at a time, in the same table."""
TOOL_SECONDS: Final = 0.2
"""The time of a tool call: benchmarks/workers/fleet.py."""
RESULT_TOKENS: Final = 30
ANSWER_TOKENS: Final = 16
TASK_TOKENS: Final = 250
"""The mean length of a task. These three are also those of `make fleet-bench`."""
LONG_TASK: Final = 4
"""One task in ten is this many times as long, to see what that does to the others."""
RUN_PATIENCE: Final = 3.0
"""The most seconds for which a run without a request counts as begun: lmbridge/transport/begun_runs.py."""
COLD_ROUNDS: Final = 1.0
"""The most rounds that a request waits longer for the server that has its conversation: lmbridge/transport/node.py."""

Kind = Literal["arrived", "generated", "passed", "returned", "expired"]


@attrs.frozen(kw_only=True)
class Scenario:
    """What is simulated."""

    servers: int
    """The number of servers."""
    tasks: int
    """The number of tasks, each of which is one run."""
    prefers_warm: bool = True
    """Whether a conversation prefers the server that has it in its cache (`NodePool(prefer_warm=...)`)."""
    order: Literal["run", "request"] = "run"
    """Whether the oldest run goes first, or the oldest request (`Limits(order=...)`)."""
    has_gateway: bool = False
    """Whether all requests pass through one process of the gateway."""
    speed: float = 1.0
    """How many times as fast the servers are as the one that was measured."""
    in_flight: int = 2
    """How many runs are in flight for each slot of the servers."""
    reuses_slots: bool = False
    """Whether a new run gets the slot of one that has ended, instead of the slot that has been free for longest."""
    seed: int = 2026
    """The seed of the random numbers."""


@attrs.frozen(kw_only=True)
class Outcome:
    """The result of a simulation."""

    seconds: float
    """The simulated time until the last run had ended."""
    tasks_per_second: float
    """The tasks that were done in a simulated second."""
    efficiency: float
    """The throughput, as a share of that of slots that are always busy and read no token twice."""
    median: float
    p99: float
    """The median and the 99th percentile of the seconds of a run, with all that it waited for."""
    fairness: float
    """Jain's index of the slowdowns: 1 if each run takes the same multiple of the time that it would need alone."""
    hits: float
    """The share of the rounds after the first whose conversation was in the slot."""
    gateway_load: float
    """The share of its time in which the gateway's process was busy."""


@attrs.define(eq=False)
class _Run:
    number: int
    rounds: int
    tokens: int
    """The length of the conversation."""
    began: float
    alone: float = 0.0
    """The seconds that the run would take in a slot of its own."""
    round: int = 0
    server: _Server | None = None
    """The server that has answered it last."""
    known_to: set[int] = attrs.field(factory=set)
    """The numbers of the servers at which it has begun, even if it does not count there at present."""
    patience: float = 0.0
    """The seconds for which it counts without having a request."""
    slot: int = 0


@attrs.define(eq=False)
class _Server:
    number: int
    free: list[int] = attrs.field(factory=lambda: list(range(SLOTS)))
    """The free slots. The one that has been free for longest comes first."""
    cached: list[int] = attrs.field(factory=lambda: [-1] * SLOTS)
    """The number of the run whose conversation is in each slot."""
    load: int = 0
    begun: dict[int, float] = attrs.field(factory=dict)
    """The runs that count as begun, with the time at which an idle one stops counting."""
    beginning: list[tuple[int, _Run]] = attrs.field(factory=list)
    going_on: list[tuple[int, _Run]] = attrs.field(factory=list)
    """The requests that wait: first ones and later ones, the first to go at the front."""

    def next_run(self, *, limit: int | None) -> _Run | None:
        """Takes the request that goes next out of its queue."""
        first = self.beginning if limit is None or len(self.begun) < limit else []
        candidates = [queue for queue in (self.going_on, first) if queue]
        return heapq.heappop(min(candidates, key=lambda queue: queue[0][0]))[1] if candidates else None

    def take_slot(self, run: _Run) -> bool:
        """Gives a slot to a run, and returns whether its conversation is in it."""
        found = [slot for slot in self.free if self.cached[slot] == run.number]
        run.slot = found[0] if found else self.free[0]
        self.free.remove(run.slot)
        self.cached[run.slot] = run.number
        return bool(found)


class _ByLoad:
    """Finds the least loaded server at once; of several, the one that has had its load for longest."""

    def __init__(self, servers: list[_Server]) -> None:
        self._of_load: list[dict[int, _Server]] = [{each.number: each for each in servers}]
        self._least = 0

    def change(self, server: _Server, by: int) -> None:
        del self._of_load[server.load][server.number]
        server.load += by
        if server.load == len(self._of_load):
            self._of_load.append({})
        self._of_load[server.load][server.number] = server
        self._least = min(self._least, server.load)

    def least(self) -> _Server:
        while not self._of_load[self._least]:
            self._least += 1
        return next(iter(self._of_load[self._least].values()))


class Simulation:
    """One simulation, which can be run once.

    Args:
        scenario: What is simulated.
    """

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._draw = random.Random(scenario.seed)
        self._prompt_speed = PROMPT_SPEED * scenario.speed / SLOTS
        self._answer_seconds = ANSWER_TOKENS * SLOTS / (ANSWER_SPEED * scenario.speed)
        self._limit = SLOTS if scenario.order == "run" else None
        self._by_load = _ByLoad([_Server(number) for number in range(scenario.servers)])
        self._events: list[tuple[float, int, Kind, _Run, _Server]] = []
        self._numbers = itertools.count()
        self._started = self._hits = self._later_rounds = 0
        self._gateway_free = self._gateway_busy = self._work = 0.0
        self._durations = array("d")
        self._slowdowns = array("d")

    def run(self) -> Outcome:
        """Runs all tasks to their end."""
        now = 0.0
        handlers: dict[Kind, Callable[[float, _Run, _Server], None]] = {
            "arrived": self._enqueue,
            "generated": self._end_generation,
            "passed": self._end_round,
            "returned": self._send,
            "expired": self._expire,
        }
        for _ in range(self._scenario.in_flight * SLOTS * self._scenario.servers):
            self._start_run(now)
        while len(self._durations) < self._scenario.tasks:
            now, _, kind, run, server = heapq.heappop(self._events)
            handlers[kind](now, run, server)
        durations = sorted(self._durations)
        total, squares = sum(self._slowdowns), sum(each * each for each in self._slowdowns)
        return Outcome(
            seconds=now,
            tasks_per_second=len(durations) / now,
            efficiency=self._work / (now * SLOTS * self._scenario.servers),
            median=durations[len(durations) // 2],
            p99=durations[len(durations) * 99 // 100],
            fairness=total * total / (len(durations) * squares),
            hits=self._hits / self._later_rounds,
            gateway_load=self._gateway_busy / now,
        )

    def _at(self, time: float, kind: Kind, run: _Run, server: _Server) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), kind, run, server))

    def _start_run(self, now: float) -> None:
        if self._started == self._scenario.tasks:
            return
        tokens = self._draw.randint(TASK_TOKENS * 3 // 5, TASK_TOKENS * 7 // 5)
        run = _Run(self._started, self._draw.randint(3, 5), tokens, now)
        if run.number % 10 == 0:
            run.tokens *= LONG_TASK
        self._started += 1
        work = (run.tokens + (run.rounds - 1) * RESULT_TOKENS) / self._prompt_speed + run.rounds * self._answer_seconds
        self._work += work
        run.alone = work + (run.rounds - 1) * TOOL_SECONDS
        self._send(now, run, self._by_load.least())

    def _send(self, now: float, run: _Run, _: _Server) -> None:
        """Chooses the server of a request, as a `NodePool` does."""
        server = self._by_load.least()
        warm = run.server if self._scenario.prefers_warm else None
        if warm and max(0, warm.load + 1 - SLOTS) - max(0, server.load + 1 - SLOTS) <= COLD_ROUNDS * SLOTS:
            server = warm
        self._by_load.change(server, 1)
        if self._scenario.has_gateway:
            self._at(self._pass_on(now, GATEWAY_REQUEST), "arrived", run, server)
        else:
            self._enqueue(now, run, server)

    def _pass_on(self, now: float, seconds: float) -> float:
        """Returns when the gateway has done some work, which it begins when it has done all that came before."""
        self._gateway_busy += seconds
        self._gateway_free = max(now, self._gateway_free) + seconds
        return self._gateway_free

    def _enqueue(self, now: float, run: _Run, server: _Server) -> None:
        place = run.number if self._scenario.order == "run" else next(self._numbers)
        heapq.heappush(server.going_on if server.number in run.known_to else server.beginning, (place, run))
        if run.number in server.begun:
            server.begun[run.number] = float("inf")
        self._dispatch(now, server)

    def _dispatch(self, now: float, server: _Server) -> None:
        while server.free and (run := server.next_run(limit=self._limit)):
            is_hit = server.take_slot(run)
            if run.round:
                self._later_rounds += 1
                self._hits += is_hit
                run.tokens += RESULT_TOKENS
            reading = (RESULT_TOKENS if is_hit else run.tokens) / self._prompt_speed
            run.round += 1
            run.tokens += ANSWER_TOKENS
            if server.number not in run.known_to:
                run.known_to.add(server.number)
                run.patience = min(RUN_PATIENCE, reading)
            if self._limit is not None:
                server.begun[run.number] = float("inf")
            self._at(now + reading + self._answer_seconds, "generated", run, server)

    def _end_generation(self, now: float, run: _Run, server: _Server) -> None:
        if self._scenario.has_gateway:
            self._at(self._pass_on(now, ANSWER_TOKENS * GATEWAY_CHUNK), "passed", run, server)
        else:
            self._end_round(now, run, server)

    def _end_round(self, now: float, run: _Run, server: _Server) -> None:
        is_ended = run.round == run.rounds
        server.free.insert(0 if is_ended and self._scenario.reuses_slots else len(server.free), run.slot)
        self._by_load.change(server, -1)
        run.server = server
        if not is_ended:
            if run.number in server.begun:
                server.begun[run.number] = now + run.patience
                self._at(now + run.patience, "expired", run, server)
            self._at(now + TOOL_SECONDS, "returned", run, server)
        else:
            server.begun.pop(run.number, None)
            self._durations.append(now - run.began)
            self._slowdowns.append((now - run.began) / run.alone)
            self._start_run(now)
        self._dispatch(now, server)

    def _expire(self, now: float, run: _Run, server: _Server) -> None:
        if server.begun.get(run.number, float("inf")) <= now:
            del server.begun[run.number]
            self._dispatch(now, server)
