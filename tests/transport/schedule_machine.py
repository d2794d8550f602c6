"""Drives a scheduler through any sequence of events, and compares every step with a reference implementation.

`SchedulerHarness` does for the scheduler what `lmbridge.transport.admission` does, with its own clock and without an
event loop. `ScheduleMachine` lets hypothesis choose the events, which finds the shortest failing sequence;
`random_walk` draws them from a seeded random number generator, which is ten times as fast.
"""

from __future__ import annotations

import asyncio
import math
import random
import weakref
from typing import cast

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from lmbridge._scheduled_run import ScheduledRun
from lmbridge.config import Limits
from lmbridge.transport import begun_runs, levels, model_queue, permits, scheduler, slot_use
from lmbridge.transport.permits import Permit
from lmbridge.transport.scheduler import Scheduler
from tests.transport.schedule_reference import ReferenceRequest, ReferenceSchedule

SCHEDULER_MODULES = (permits, model_queue, levels, begun_runs, slot_use, scheduler)
"""The modules that the scheduler consists of. None of them imports one that comes after it."""


class _StandInTask:
    """Stands for an `asyncio.Task`: all that the scheduler needs is an object with an identity."""


class SchedulerHarness:
    """Drives a scheduler and its reference implementation side by side.

    Args:
        limits: The limits of both.
        scheduler_class: The scheduler to test, which may be one with a broken rule.
        start: The time on the clock at the beginning, in seconds.
    """

    def __init__(self, limits: Limits, scheduler_class: type[Scheduler] = Scheduler, start: float = 1000.1) -> None:
        self.scheduler = scheduler_class(limits)
        self.reference = ReferenceSchedule(limits)
        self.now = start
        self.timer = math.inf
        # The requests whose wait was ended because it was a deadlock.
        self.deadlocked: list[ReferenceRequest] = []
        self.tasks: dict[str, _StandInTask] = {}
        self.requests: dict[Permit, ReferenceRequest] = {}
        self.permits: dict[ReferenceRequest, Permit] = {}
        self._checked_revision = self.scheduler.revision

    # Events

    def arrive(
        self, model: str | None, owner: str | None = None, *, priority: int = 0, run: ScheduledRun | None = None
    ) -> ReferenceRequest:
        task = None if owner is None else cast("asyncio.Task[object]", self.tasks.setdefault(owner, _StandInTask()))
        holder = None if task is None else weakref.ref(task)
        permit = Permit(model, self.now, holder, priority=priority, run=run)
        request = ReferenceRequest(model, owner, self.now, priority=priority, run=run)
        self.requests[permit], self.permits[request] = request, permit
        self.reference.arrive(request)
        if self.scheduler.admit_now(permit, self.now):
            self.reference.admit(request, self.now)
            return request
        permit.is_nested = any(each.is_held_by(task) for each in self.scheduler.in_flight)
        self.scheduler.arrive(permit)
        self._settle()
        return request

    def end_run(self, run: ScheduledRun) -> None:
        """An agent's run has ended."""
        self.reference.end_run(run)
        self.scheduler.end_run(run)
        if self.scheduler.waiting:
            self._settle()

    def pause_run(self, run: ScheduledRun) -> None:
        """A run waits for something other than its tools."""
        self.reference.pause_run(run)
        self.scheduler.pause_run(run)
        if self.scheduler.waiting:
            self._settle()

    def end(self, request: ReferenceRequest) -> None:
        """A request has ended, has failed, or no longer waits."""
        self.reference.end(request, self.now)
        assert self.scheduler.leave(self.permits[request], self.now)
        assert not self.scheduler.leave(self.permits[request], self.now)
        # As in Admission.release: without waiting requests there is nothing to admit.
        if self.scheduler.waiting:
            self._settle()

    def answer(self, request: ReferenceRequest) -> None:
        """The first event of a request's reply has arrived."""
        self.reference.answer(request, self.now)
        self.permits[request].has_answered = True
        self.scheduler.mark_loaded(self.permits[request], self.now)
        self._settle()

    def note_reply(
        self, request: ReferenceRequest, usage: tuple[int, int | None] | None, *, is_first_attempt: bool = True
    ) -> None:
        """The whole reply to a request has arrived."""
        self.reference.note_reply(request, usage, is_first_attempt=is_first_attempt)
        self.scheduler.note_reply(self.permits[request], usage, is_first_attempt=is_first_attempt)

    def mark_unloaded(self, model: str | None) -> None:
        self.reference.mark_unloaded(model)
        self.scheduler.mark_unloaded(model)

    def set_limits(self, limits: Limits) -> None:
        self.reference.set_limits(limits)
        self.scheduler.set_limits(limits)
        self._settle()

    def wait(self, seconds: float) -> None:
        """Time passes, and the timer rings at exactly the moment for which the scheduler has asked."""
        then = self.now + seconds
        while self.timer <= then:
            assert self.timer > self.now, "the timer rings forever"
            self.now, self.timer = self.timer, math.inf
            self._settle()
        self.now = then

    # Checks

    def check(self) -> None:
        """Checks that the scheduler agrees with the reference, and keeps nothing that it does not need."""
        scheduler, reference = self.scheduler, self.reference
        reference.check_settled(self.now)
        deadlocked = [each for each in reference.waiting if reference.is_deadlocked(each, self.now)]
        assert not deadlocked, f"{deadlocked} wait for permits of their own tasks"
        assert [self.requests[permit] for permit in scheduler.in_flight] == reference.in_flight
        assert [self.requests[permit] for permit in scheduler.waiting] == reference.waiting
        assert sum(scheduler.swaps.values()) == reference.swaps
        assert scheduler._models.batch_members == len(reference.batch)
        assert scheduler._runs._unanswered == reference.unanswered, "it is wrong until when slots are kept"
        ended_soon = ([True] * 8 + reference.ended_soon)[-8:]
        assert list(scheduler._runs._ended_soon) == ended_soon, "it is wrong how long tools take"
        calling = {run: until for run, until in scheduler._runs._idle.items() if until > self.now}
        assert calling == reference.calling_until(self.now), (
            "it is wrong which runs count while their tools are running"
        )
        if scheduler._slots is not None:
            displaced = scheduler._slots.next_displaced()
            next_displaced = self.requests[displaced] if isinstance(displaced, Permit) else displaced
            assert next_displaced == reference.next_displaced(), "it is wrong which slot is taken next"
            assert set(scheduler._slots._displaced) == reference.displaced, (
                "it is wrong which runs have lost their slot"
            )
            self.check_what_is_remembered()
        if reference.has_model_limit:
            assert [queue.model for queue in scheduler._models.active] == reference.active
            assert [queue.model for queue in scheduler._models.active if queue.is_surplus] == reference.surplus
            draining = scheduler._models.draining if scheduler.waiting else None
            assert ([] if draining is None else [draining.model]) == reference.draining
            needed = {each.model for each in reference.waiting} | set(reference.active)
            assert set(scheduler._models.queues) == needed, "a queue is kept that is not needed, or was lost"

    def check_what_is_remembered(self) -> None:
        slots = self.scheduler._slots
        assert slots is None or slots.remembers == self.reference.remembers, "it is wrong what the server remembers"

    def finish_all(self) -> None:
        """Checks that every waiting request is admitted once the others have ended, and that nothing is left behind."""
        while self.reference.in_flight or (self.reference.waiting and self.timer < math.inf):
            if self.reference.in_flight:
                self.end(self.reference.in_flight[0])
            else:
                # A run that has become idle still counts.
                self.wait(self.timer - self.now)
            self.check()
        assert not self.reference.waiting, "requests wait although nothing is in flight"
        self.reference.check_history()

    def _settle(self) -> None:
        for permit in self.scheduler.admit(self.now):
            self.reference.admit(self.requests[permit], self.now)
        self.reference.check_settled(self.now)
        self._end_deadlocked_waits()
        self.timer = min(self.timer, self.scheduler.next_change(self.now))

    def _end_deadlocked_waits(self) -> None:
        """Asks about deadlocks when Admission does: for the latest request, and for all when the revision changed."""
        changed = self._checked_revision != self.scheduler.revision
        self._checked_revision = self.scheduler.revision
        for request in list(self.reference.waiting):
            permit = self.permits[request]
            is_latest = request is self.reference.arrived[-1]
            if request.owner is not None and (changed or is_latest) and permit.state == "waiting":
                task = cast("asyncio.Task[object]", self.tasks[request.owner])
                if self.scheduler.is_deadlocked(permit, task):
                    assert self.reference.is_deadlocked(request, self.now), f"{request} is not deadlocked"
                    self.deadlocked.append(request)
                    self.end(request)


def some_limits(number: int) -> Limits:
    """Returns limits that are different for each number below 96."""
    return Limits(
        max_concurrency=1 + number % 4,
        max_loaded_models=(1, 1, 2, 2, 3, None)[number // 4 % 6],
        max_wait=(30.0, 30.0, 0.7, None)[number // 24 % 4],
        order="request" if number % 5 == 4 else "run",
        max_begun_runs=("auto", "auto", 1, None)[number % 7 % 4],
    )


class AnyEvents:
    """Every event that can happen to a scheduler, as a method with a number that chooses the details.

    An event that cannot happen in the current state does nothing.

    Args:
        limits: The limits at the beginning.
        scheduler_class: The scheduler to test, which may be one with a broken rule.
        models: The number of models that runs ask for.
    """

    def __init__(self, limits: Limits, scheduler_class: type[Scheduler] = Scheduler, models: int = 3) -> None:
        self.models = models
        self.harness = SchedulerHarness(limits, scheduler_class)
        self.reference = self.harness.reference
        self.runs = [ScheduledRun() for _ in range(4)]

    def happen(self, event: str, number: int) -> None:
        getattr(self, event)(number)
        self.harness.check()

    def one_arrives(self, number: int) -> None:
        self.harness.arrive("abcd"[number % 4])

    def several_arrive(self, number: int) -> None:
        for _ in range(2 + number // 3 % 2):
            self.harness.arrive("abc"[number % 3])

    def a_task_asks(self, number: int) -> None:
        self._ask("abcd"[number % 4], "xyz"[number // 4 % 3])

    def a_holder_asks_for_more(self, number: int) -> None:
        if request := _choose([each for each in self.reference.in_flight if each.owner], number):
            self._ask(request.model, request.owner)

    def one_arrives_for_the_draining_model(self, number: int) -> None:
        if self.reference.draining:
            self._ask(self.reference.draining[0], (None, "x", "y", "z")[number % 4])

    def one_arrives_for_a_surplus_model(self, number: int) -> None:
        if self.reference.surplus:
            self._ask(self.reference.surplus[0], (None, "x", "y", "z")[number % 4])

    def an_urgent_or_a_patient_one_arrives(self, number: int) -> None:
        self.harness.arrive("abcd"[number % 4], priority=(-1, 1, 2, -3)[number // 4 % 4])

    def a_run_asks(self, number: int) -> None:
        run = self.runs[number % 4]
        model = "abc"[number // 4 % self.models]
        self.harness.arrive(model, priority=(0, 0, 0, 1)[number // 12 % 4], run=run)

    def a_run_ends_and_another_begins(self, number: int) -> None:
        run = self.runs[number % 4]
        for request in [each for each in self.reference.waiting + self.reference.in_flight if each.run is run]:
            if request in self.reference.waiting + self.reference.in_flight:
                self.harness.end(request)
        self.harness.end_run(run)
        self.runs[number % 4] = ScheduledRun()

    def a_run_pauses(self, number: int) -> None:
        self.harness.pause_run(self.runs[number % 4])

    def a_run_loses_its_slot_and_asks_again(self, number: int) -> None:
        run = self.runs[number % 4]
        for usage in ((100, 0), self._usage(number // 4)):
            request = self.harness.arrive("a", run=run)
            if request not in self.reference.in_flight:
                return
            self.harness.note_reply(request, usage, is_first_attempt=number % 11 > 0)
            self.harness.end(request)
            for _ in range(3):
                other = self.harness.arrive("a")
                self.harness.end(other)

    def many_requests_end(self, number: int) -> None:
        for _ in range(25 + number % 3):
            self.harness.end(self.harness.arrive("a"))
            self.harness.check_what_is_remembered()

    def a_begun_run_is_answered_and_calls_a_tool(self, number: int) -> None:
        if request := _choose([each for each in self.reference.in_flight if each.run is not None], number):
            self.harness.wait((0.0, 0.7, 3.0, 10.0)[number // 4 % 4])
            if request in self.reference.in_flight:
                self.harness.answer(request)
                self.harness.note_reply(request, self._usage(number), is_first_attempt=number % 11 > 0)
                self.harness.end(request)

    def a_run_calls_several_tools(self, number: int) -> None:
        for _ in range(1 + number // 16):
            request = self.harness.arrive("a", run=self.runs[number % 4])
            self.harness.wait(0.5)
            if request not in self.reference.in_flight:
                return
            self.harness.answer(request)
            self.harness.end(request)
            self.harness.wait((0.1, 0.5, 0.6, 4.0)[number // 4 % 4])

    def one_is_answered(self, number: int) -> None:
        if request := _choose(self.reference.in_flight, number):
            self.harness.answer(request)

    def one_ends(self, number: int) -> None:
        if request := _choose(self.reference.in_flight, number):
            self.harness.end(request)

    def all_of_the_longest_active_model_end(self, _: int) -> None:
        for request in list(self.reference.in_flight):
            if request.model in self.reference.active[:1] and request in self.reference.in_flight:
                self.harness.end(request)

    def all_but_the_surplus_models_end(self, _: int) -> None:
        if self.reference.surplus:
            for request in list(self.reference.in_flight):
                if request.model not in self.reference.surplus and request in self.reference.in_flight:
                    self.harness.end(request)

    def one_finds_its_model_evicted(self, number: int) -> None:
        if request := _choose(self.reference.in_flight, number):
            self.harness.mark_unloaded(request.model)
            self.harness.end(request)

    def one_waiting_is_cancelled(self, number: int) -> None:
        if request := _choose(self.reference.waiting, number):
            self.harness.end(request)

    def a_model_is_evicted(self, number: int) -> None:
        self.harness.mark_unloaded("abcd"[number % 4])

    def time_passes(self, number: int) -> None:
        self.harness.wait((0.1, 0.7, 10.0, 20.0, 29.9, 30.0, 100.0, 3.0)[number % 8])

    def one_becomes_overdue(self, _: int) -> None:
        if self.harness.timer < math.inf:
            self.harness.wait(self.harness.timer - self.harness.now)

    def the_limits_change(self, number: int) -> None:
        self.harness.set_limits(some_limits(number))

    def the_model_limit_is_lowered_below_what_is_in_flight(self, number: int) -> None:
        models = len({each.model for each in self.reference.in_flight})
        if models > 1:
            limits = some_limits(number)
            self.harness.set_limits(
                Limits(
                    max_concurrency=limits.max_concurrency,
                    max_loaded_models=max(1, models - 1 - number // 24 % 2),
                    max_wait=limits.max_wait,
                )
            )

    def _usage(self, number: int) -> tuple[int, int | None] | None:
        """Returns the tokens of a prompt, and those of them that were in a cache, if before it had 100."""
        usages = ((100, 0), (100, 50), (100, 49), (200, 0), (200, 99), (200, 50), (50, 50), (100, None), None)
        return usages[number % 9]

    def _ask(self, model: str | None, owner: str | None) -> None:
        # A task waits for one permit at a time.
        if owner is None or owner not in {each.owner for each in self.reference.waiting}:
            self.harness.arrive(model, owner)


def _choose(requests: list[ReferenceRequest], number: int) -> ReferenceRequest | None:
    return requests[number % len(requests)] if requests else None


EVENTS = [name for name in vars(AnyEvents) if not name.startswith("_") and name != "happen"]
RUN_EVENTS = {
    "a_run_asks",
    "a_run_ends_and_another_begins",
    "a_run_pauses",
    "a_begun_run_is_answered_and_calls_a_tool",
    "a_run_calls_several_tools",
    "a_run_loses_its_slot_and_asks_again",
    "many_requests_end",
}
SLOT_EVENTS = (*sorted(RUN_EVENTS), "one_is_answered", "one_ends", "time_passes", "one_becomes_overdue")
"""The events after which a slot may be kept for a run."""
LIMIT_EVENTS = {"the_limits_change", "the_model_limit_is_lowered_below_what_is_in_flight"}


class ScheduleMachine(RuleBasedStateMachine):
    """Lets hypothesis choose the events, and shrink a failing sequence to the shortest one."""

    events: AnyEvents | None = None

    @initialize(number=st.integers(0, 95))
    def begin(self, number: int) -> None:
        self.events = AnyEvents(some_limits(number))

    @rule(event=st.sampled_from(EVENTS), number=st.integers(0, 95))
    def happen(self, event: str, number: int) -> None:
        assert self.events
        self.events.happen(event, number)

    def teardown(self) -> None:
        if self.events:
            self.events.harness.finish_all()


def random_walk(seed: int, scheduler_class: type[Scheduler], steps: int = 60) -> None:
    """Does what the machine does, but with events that are drawn at random: fast, and the same for each seed.

    The limits change in every fourth walk only, because each change makes the scheduler forget most of its state. Every
    third walk has no runs, because the order of runs bounds no wait, and every fifth has few slots and little but runs.
    """
    rng = random.Random(seed)
    limits = some_limits(rng.randrange(72))
    left_out = (set() if seed % 4 == 0 else LIMIT_EVENTS) | (RUN_EVENTS if seed % 3 == 0 else set())
    names = [name for name in EVENTS if name not in left_out]
    if seed % 5 == 0:
        limits, names = Limits(max_concurrency=2 + seed % 2, max_begun_runs=("auto", 4)[seed // 20 % 2]), [*SLOT_EVENTS]
    events = AnyEvents(limits, scheduler_class, models=1 if seed % 10 == 0 else 3)
    for _ in range(steps):
        events.happen(rng.choice(names), rng.randrange(96))
    events.harness.finish_all()
