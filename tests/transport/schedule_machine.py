"""A scheduler that anything may happen to, beside a record of what has to come of it.

`Shell` does for the scheduler what `lmbridge.transport.admission` does, with a clock of its own and without a loop.
`ScheduleMachine` lets hypothesis choose what happens, `walk` lets dice.
"""

from __future__ import annotations

import asyncio
import math
import random
import weakref
from typing import cast

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from lmbridge.config import Limits
from lmbridge.transport.scheduler import Permit, Scheduler
from tests.transport.schedule_record import Entry, Record


class Owner:
    """Stands for a task."""


class Shell:
    """Drives a scheduler and its record side by side.

    Args:
        limits: Of both.
        scheduler_class: May be one with a rule broken.
        start: What the clock says at first, in seconds.
    """

    def __init__(self, limits: Limits, scheduler_class: type[Scheduler] = Scheduler, start: float = 1000.1) -> None:
        self.scheduler = scheduler_class(limits)
        self.record = Record(limits)
        self.now = start
        self.timer = math.inf
        self.told: list[Entry] = []
        """Whose wait was ended because it was deadlocked."""
        self.owners: dict[str, Owner] = {}
        self.entries: dict[Permit, Entry] = {}
        self.permits: dict[Entry, Permit] = {}
        self._revision = self.scheduler.revision

    # What happens

    def arrive(self, model: str | None, owner: str | None = None) -> Entry:
        task = None if owner is None else cast("asyncio.Task[object]", self.owners.setdefault(owner, Owner()))
        permit = Permit(model, self.now, None if task is None else weakref.ref(task))
        entry = Entry(model, owner, self.now)
        self.entries[permit], self.permits[entry] = entry, permit
        self.record.arrive(entry)
        if self.scheduler.admit_now(permit, self.now):
            self.record.admit(entry, self.now)
            return entry
        self.scheduler.arrive(permit)
        self._settle()
        return entry

    def end(self, entry: Entry) -> None:
        """It is over, has failed, or waits no longer."""
        self.record.end(entry, self.now)
        assert self.scheduler.leave(self.permits[entry], self.now)
        assert not self.scheduler.leave(self.permits[entry], self.now)
        if self.scheduler.waiting:  # else there is nobody to admit, and admission does not look
            self._settle()

    def answer(self, entry: Entry) -> None:
        self.record.answer(entry)
        self.scheduler.mark_loaded(self.permits[entry], self.now)
        self._settle()

    def mark_unloaded(self, model: str | None) -> None:
        self.record.mark_unloaded(model)
        self.scheduler.mark_unloaded(model)

    def set_limits(self, limits: Limits) -> None:
        self.record.set_limits(limits)
        self.scheduler.set_limits(limits)
        self._settle()

    def wait(self, seconds: float) -> None:
        """Time passes; the timer rings at the very moment that was asked for."""
        then = self.now + seconds
        while self.timer <= then:
            assert self.timer > self.now, "the timer rings for ever"
            self.now, self.timer = self.timer, math.inf
            self._settle()
        self.now = then

    # What has to come of it

    def check(self) -> None:
        """The scheduler is where its record is, and keeps nothing that it does not need."""
        scheduler, record = self.scheduler, self.record
        record.look_for_overdue(self.now)
        deadlocked = [each for each in record.waiting if record.is_deadlocked(each, self.now)]
        assert not deadlocked, f"{deadlocked} wait for themselves"
        assert [self.entries[permit] for permit in scheduler.in_flight] == record.in_flight
        assert [self.entries[permit] for permit in scheduler.waiting] == record.waiting
        assert sum(scheduler.swaps.values()) == record.swaps
        assert scheduler._batches == len(record.batch)
        if record.has_model_limit:
            assert [queue.model for queue in scheduler._active] == record.active
            draining = scheduler._draining if scheduler.waiting else None
            assert ([] if draining is None else [draining.model]) == record.draining
            known = {each.model for each in record.waiting} | set(record.active)
            assert set(scheduler._queues) == known, "a model is kept that nobody needs, or lost"

    def finish_all(self) -> None:
        """Whoever waits is admitted some time, if all others end; and then nothing is left."""
        while self.record.in_flight:
            self.end(self.record.in_flight[0])
            self.check()
        assert not self.record.waiting, "somebody waits though nobody is in flight"
        self.record.check_history()

    def _settle(self) -> None:
        for permit in self.scheduler.admit(self.now):
            self.record.admit(self.entries[permit], self.now)
        self.record.settled(self.now)
        self._fail_deadlocked_waiters()
        self.timer = min(self.timer, self.scheduler.next_overdue(self.now))

    def _fail_deadlocked_waiters(self) -> None:
        """As admission does: who has just come, and all others when models have changed."""
        changed, self._revision = self._revision != self.scheduler.revision, self.scheduler.revision
        for entry in list(self.record.waiting):
            permit = self.permits[entry]
            if entry.owner is not None and (changed or entry is self.record.arrived[-1]) and permit.state == "waiting":
                task = cast("asyncio.Task[object]", self.owners[entry.owner])
                if self.scheduler.is_deadlocked(permit, task):
                    assert self.record.is_deadlocked(entry, self.now), f"{entry} was told that it waits for itself"
                    self.told.append(entry)
                    self.end(entry)


def some_limits(number: int) -> Limits:
    """Limits, one kind for each number."""
    return Limits(
        max_concurrency=1 + number % 4,
        max_loaded_models=(1, 1, 2, 2, 3, None)[number // 4 % 6],
        max_wait=(30.0, 30.0, 0.7, None)[number // 24 % 4],
    )


class Chaos:
    """Anything in any order: what happens is chosen by numbers, and what cannot happen now does not.

    Args:
        limits: To begin with.
        scheduler_class: May be one with a rule broken.
    """

    def __init__(self, limits: Limits, scheduler_class: type[Scheduler] = Scheduler) -> None:
        self.shell = Shell(limits, scheduler_class)
        self.record = self.shell.record

    def happen(self, what: str, number: int) -> None:
        getattr(self, what)(number)
        self.shell.check()

    def one_comes(self, number: int) -> None:
        self.shell.arrive("abcd"[number % 4])

    def some_come(self, number: int) -> None:
        for _ in range(2 + number // 3 % 2):
            self.shell.arrive("abc"[number % 3])

    def a_task_asks(self, number: int) -> None:
        self._ask("abcd"[number % 4], "xyz"[number // 4 % 3])

    def a_holder_asks_for_more(self, number: int) -> None:
        if entry := _one_of([each for each in self.record.in_flight if each.owner], number):
            self._ask(entry.model, entry.owner)

    def one_comes_for_the_drained_model(self, number: int) -> None:
        if self.record.draining:
            self._ask(self.record.draining[0], (None, "x", "y", "z")[number % 4])

    def one_is_answered(self, number: int) -> None:
        if entry := _one_of(self.record.in_flight, number):
            self.shell.answer(entry)

    def one_ends(self, number: int) -> None:
        if entry := _one_of(self.record.in_flight, number):
            self.shell.end(entry)

    def all_of_the_longest_active_model_end(self, _: int) -> None:
        for entry in list(self.record.in_flight):
            if entry.model in self.record.active[:1] and entry in self.record.in_flight:
                self.shell.end(entry)

    def one_finds_its_model_evicted(self, number: int) -> None:
        if entry := _one_of(self.record.in_flight, number):
            self.shell.mark_unloaded(entry.model)
            self.shell.end(entry)

    def one_is_cancelled(self, number: int) -> None:
        if entry := _one_of(self.record.waiting, number):
            self.shell.end(entry)

    def a_model_is_evicted(self, number: int) -> None:
        self.shell.mark_unloaded("abcd"[number % 4])

    def time_passes(self, number: int) -> None:
        self.shell.wait((0.1, 0.7, 10.0, 20.0, 29.9, 30.0, 100.0)[number % 7])

    def somebody_becomes_overdue(self, _: int) -> None:
        if self.shell.timer < math.inf:
            self.shell.wait(self.shell.timer - self.shell.now)

    def the_limits_change(self, number: int) -> None:
        limits = some_limits(number)
        models = {each.model for each in self.record.in_flight}
        if limits.max_loaded_models is None or limits.max_loaded_models >= len(models):
            self.shell.set_limits(limits)

    def _ask(self, model: str | None, owner: str | None) -> None:
        if owner is None or owner not in {each.owner for each in self.record.waiting}:  # it waits for one at a time
            self.shell.arrive(model, owner)


def _one_of(entries: list[Entry], number: int) -> Entry | None:
    return entries[number % len(entries)] if entries else None


EVENTS = [name for name in vars(Chaos) if not name.startswith("_") and name != "happen"]


class ScheduleMachine(RuleBasedStateMachine):
    """Lets hypothesis choose, and show the shortest way to what is wrong."""

    chaos: Chaos | None = None

    @initialize(number=st.integers(0, 95))
    def begin(self, number: int) -> None:
        self.chaos = Chaos(some_limits(number))

    @rule(what=st.sampled_from(EVENTS), number=st.integers(0, 95))
    def happen(self, what: str, number: int) -> None:
        assert self.chaos
        self.chaos.happen(what, number)

    def teardown(self) -> None:
        if self.chaos:
            self.chaos.shell.finish_all()


def walk(seed: int, scheduler_class: type[Scheduler], steps: int = 60) -> None:
    """The same as the machine, but by dice: fast, and the same for ever."""
    dice = random.Random(seed)
    chaos = Chaos(some_limits(dice.randrange(72)), scheduler_class)
    calm = [event for event in EVENTS if event != "the_limits_change"]
    events = EVENTS if seed % 4 == 0 else calm
    for _ in range(steps):
        chaos.happen(dice.choice(events), dice.randrange(96))
    chaos.shell.finish_all()
