"""The rules of scheduling, told naively: plain lists, searched from end to end, and nothing of the scheduler's own.

A `Record` is told what happened, in order, and says whether each admission was the one that the rules ask for.
"""

from __future__ import annotations

import math

import attrs

from lmbridge.config import Limits


@attrs.define(eq=False)
class Entry:
    """One request, as an onlooker sees it."""

    model: str | None
    owner: str | None
    """The task that holds it or waits for it; None: one that does nothing else."""
    arrived: float
    admitted: float = math.nan
    over: float = math.nan
    overtaken_by: list[str | None] = attrs.field(factory=list)
    """Models that became active while its own was not."""
    epochs_before: int | None = None
    """How many epochs had begun when it was admitted, the one that began for it included."""

    def __repr__(self) -> str:
        return f"{self.model}@{self.arrived:.1f}"


@attrs.define(eq=False)
class Epoch:
    """A model's time as an active one, with the requests that waited for it when it began."""

    model: str | None
    began: float
    batch: tuple[Entry, ...]
    for_whom: Entry


class Record:
    """What happened, and what has to happen next.

    Args:
        limits: The rules' numbers.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.arrived: list[Entry] = []
        self.waiting: list[Entry] = []
        self.in_flight: list[Entry] = []
        self.over: list[Entry] = []
        self.epochs: list[Epoch] = []
        self.swaps = 0
        self.active: list[str | None] = []  # the longest first
        self.batch: list[Entry] = []  # members of all batches, not yet admitted
        self.warm: set[str | None] = set()
        self.first_requests: dict[str | None, Entry] = {}
        self.idle_since: dict[str | None, float] = {}
        self.draining: list[str | None] = []  # one at most

    # What happened

    def set_limits(self, limits: Limits) -> None:
        was_limited = self.limits.max_loaded_models is not None
        self.limits = limits
        self.batch, self.draining, self.idle_since = [], [], {}
        for entry in self.waiting:
            entry.overtaken_by = []
        self.active = list(dict.fromkeys(entry.model for entry in self.in_flight))
        if limits.max_loaded_models is None or not was_limited:
            self.first_requests = {}
        self.warm = {model for model in self.active if model not in self.first_requests}

    def arrive(self, entry: Entry) -> None:
        self.arrived.append(entry)
        self.waiting.append(entry)

    def end(self, entry: Entry, now: float) -> None:
        """It is over, or waits no longer."""
        if entry in self.in_flight:
            self.in_flight.remove(entry)
            self.idle_since[entry.model] = now
        else:
            self._dequeue(entry)
        if self.first_requests.get(entry.model) is entry:
            del self.first_requests[entry.model]
        self.over.append(entry)
        entry.over = now

    def answer(self, entry: Entry) -> None:
        if self.first_requests.get(entry.model) is entry:
            del self.first_requests[entry.model]
            self.warm.add(entry.model)

    def mark_unloaded(self, model: str | None) -> None:
        self.warm.discard(model)

    def admit(self, entry: Entry, now: float) -> None:
        """It was admitted, which has to be right."""
        self.look_for_overdue(now)
        assert len(self.in_flight) < self.limits.max_concurrency, f"{entry} is one too many"
        assert self.who_may_go()[:1] == [entry], f"{entry} was admitted, but {self.who_may_go()} may go"
        if self.has_model_limit and entry.model not in self.active:
            self._activate(entry, now)
            for each in self.waiting:
                if each.model not in self.active:
                    each.overtaken_by.append(entry.model)
        self._dequeue(entry)
        self.in_flight.append(entry)
        entry.admitted, entry.epochs_before = now, len(self.epochs)
        if self.has_model_limit and entry.model not in self.warm:
            self.first_requests[entry.model] = entry
        models = {each.model for each in self.in_flight}
        assert not self.has_model_limit or len(models) <= self.max_models, f"{models} are in flight"

    def settled(self, now: float) -> None:
        """Everybody who may go has been admitted, or the scheduler has lost somebody."""
        self.look_for_overdue(now)
        if len(self.in_flight) < self.limits.max_concurrency:
            assert not self.who_may_go(), f"{self.who_may_go()} were forgotten"

    # What the rules say

    @property
    def has_model_limit(self) -> bool:
        return self.limits.max_loaded_models is not None

    @property
    def max_models(self) -> float:
        return math.inf if self.limits.max_loaded_models is None else self.limits.max_loaded_models

    def who_may_go(self) -> list[Entry]:
        """All that wait for nothing but a permit, in the order in which they came."""
        if not self.has_model_limit:
            return list(self.waiting)
        room = self.max_models - len(self.active) + len(self._replaceable())
        return [each for each in self.waiting if (self._is_let_in(each) if each.model in self.active else room > 0)]

    def look_for_overdue(self, now: float) -> None:
        """Begins or ends a drain."""
        if not any(self._is_overdue(each, now) for each in self.waiting):
            self.draining = []
        elif not self.draining and not self.batch and len(self.active) >= self.max_models:
            self.draining = self.active[:1]

    def is_deadlocked(self, entry: Entry, now: float) -> bool:
        """Whether it could go only after a permit of its own task: while all others end, one after the other.

        Other active models go on, so nobody counts on their end to be spared a drain.
        """
        own = [each for each in self.in_flight if each.owner is not None and each.owner == entry.owner]
        if not own:
            return False
        if entry.model in self.draining and entry not in self.batch and entry.model in {each.model for each in own}:
            return True
        future = self._copy()
        while entry in future.waiting:
            others = [each for each in future.in_flight if each not in own]
            future.first_requests, future.warm = {}, set(future.active)
            for other in others:
                future.in_flight.remove(other)
            admitted = False
            while len(future.in_flight) < future.limits.max_concurrency and (ready := future.who_may_go()):
                future._let_in(ready[0])
                admitted = True
                if not any(future._is_overdue(each, now) for each in future.waiting):
                    future.draining = []
            if not admitted and not others:
                return True
        return False

    def check_history(self) -> None:
        """The whole: order within a model, permits, no more swaps than batches, one batch a model ahead of anybody."""
        for model in {each.model for each in self.arrived}:
            times = [e.admitted for e in self.arrived if e.model == model and not math.isnan(e.admitted)]
            assert times == sorted(times), f"{model} was admitted out of order"
        assert len(self.arrived) == len(self.waiting) + len(self.in_flight) + len(self.over)
        assert self.swaps <= len(self.epochs)
        for entry in self.arrived:
            models = entry.overtaken_by
            assert len(models) == len(set(models)), f"{entry} let a model go before it twice: {models}"

    def _is_let_in(self, entry: Entry) -> bool:
        """Whether it may go, its model being active."""
        is_held_back = entry.model in self.draining and entry not in self.batch
        return entry.model not in self.first_requests and not is_held_back

    def _is_overdue(self, entry: Entry, now: float) -> bool:
        limit = self.limits.max_wait
        is_outside = self.has_model_limit and entry.model not in self.active
        return is_outside and limit is not None and entry.arrived + limit <= now

    def _replaceable(self) -> list[str | None]:
        """Active models that have nothing in flight, and nobody who may go; longest idle first."""
        busy = {each.model for each in self.in_flight}
        wanted = {each.model for each in self.waiting if each.model in self.active and self._is_let_in(each)}
        idle = [model for model in self.active if model not in busy and model not in wanted]
        return sorted(idle, key=lambda model: self.idle_since.get(model, -math.inf))

    def _activate(self, entry: Entry, now: float) -> None:
        if len(self.active) >= self.max_models:
            self.swaps += 1
        while len(self.active) >= self.max_models:
            gone = self._replaceable()[0]
            self.active.remove(gone)
            self.idle_since.pop(gone, None)
            if gone in self.draining:
                self.draining = []
        self.active.append(entry.model)
        self.warm.discard(entry.model)
        batch = [each for each in self.waiting if each.model == entry.model]
        self.batch += batch
        self.epochs.append(Epoch(entry.model, now, tuple(batch), entry))

    def _let_in(self, entry: Entry) -> None:
        """An admission that nobody sees, in a future that may not come."""
        if self.has_model_limit and entry.model not in self.active:
            self._activate(entry, 0.0)
        self._dequeue(entry)
        self.in_flight.append(entry)

    def _dequeue(self, entry: Entry) -> None:
        self.waiting.remove(entry)
        if entry in self.batch:
            self.batch.remove(entry)

    def _copy(self) -> Record:
        other = Record(self.limits)
        other.waiting, other.in_flight, other.active = list(self.waiting), list(self.in_flight), list(self.active)
        other.batch, other.idle_since = list(self.batch), dict(self.idle_since)
        other.draining = list(self.draining)
        return other
