"""A reference implementation of the scheduling rules, as naive as possible, to compare the scheduler with.

It uses plain lists that are searched from end to end, and shares no code with the scheduler. A `ReferenceSchedule` is
informed of every event in order, and raises an AssertionError if an admission is not the one that the rules demand.
"""

from __future__ import annotations

import math

import attrs

from lmbridge._scheduled_run import ScheduledRun, next_order_number
from lmbridge.config import Limits


@attrs.define(eq=False)
class ReferenceRequest:
    """One request as an observer sees it."""

    model: str | None
    owner: str | None
    """The name of the task that holds the request's permit or waits for it; None for a task that does nothing else."""
    arrived: float
    priority: int = 0
    run: ScheduledRun | None = None
    is_nested: bool = False
    """Whether the request's task held another permit when it arrived."""
    is_answered: bool = False
    takes_slot: bool = False
    """Whether its conversation was in no slot when it was admitted."""
    was_displaced: bool = False
    """Whether its run had lost a slot, and this was the first request after that."""
    begins_run: bool = False
    """Whether it was admitted as the first one of its run."""
    number: int = attrs.field(factory=next_order_number)
    admitted: float = math.nan
    over: float = math.nan
    overtaken_by: list[tuple[float, str | None]] = attrs.field(factory=list)
    """The models that became active while the request's own model was not, and when."""
    epochs_before: int | None = None
    """The number of epochs that had begun when the request was admitted, including one that began for it."""

    def __repr__(self) -> str:
        return f"{self.model}@{self.arrived:.1f}"


@attrs.define(eq=False)
class Epoch:
    """A time in which a model is active, with the requests that waited for the model when it began."""

    model: str | None
    began: float
    batch: tuple[ReferenceRequest, ...]
    for_whom: ReferenceRequest


class ReferenceSchedule:
    """Records what happened, and checks it against what the rules demand.

    Args:
        limits: The numbers in the rules.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.arrived: list[ReferenceRequest] = []
        self.waiting: list[ReferenceRequest] = []
        self.in_flight: list[ReferenceRequest] = []
        self.over: list[ReferenceRequest] = []
        self.epochs: list[Epoch] = []
        self.swaps = 0
        # The model that has been active longest comes first.
        self.active: list[str | None] = []
        # The active models beyond limits that were lowered while these models were in flight.
        self.surplus: list[str | None] = []
        # The members of all batches that have not been admitted yet.
        self.batch: list[ReferenceRequest] = []
        self.loaded: set[str | None] = set()
        self.first_requests: dict[str | None, ReferenceRequest] = {}
        self.idle_since: dict[str | None, float] = {}
        # At most one model.
        self.draining: list[str | None] = []
        # The runs that have begun, with the priority of the request by which they began to count.
        self.begun: dict[ScheduledRun, int] = {}
        self.run_idle_since: dict[ScheduledRun, float] = {}
        # Since when the tools of each run have been running, and whether each call ended before its patience ran out.
        self.calling_since: dict[ScheduledRun, float] = {}
        self.ended_soon: list[bool] = []
        # The runs that do not count while their tools are running, because those of others were slow.
        self.uncounted: set[ScheduledRun] = set()
        # How long the first answer of each run took.
        self.patience: dict[ScheduledRun, float] = {}
        # Until when the slot of a run is kept whose latest request has not been answered.
        self.unanswered: dict[ScheduledRun, float] = {}
        # Whether a run has had a request since the limits changed. Until then, nobody knows the slots.
        self.knows_slots = False
        # The number of requests that had ended when the slots became known.
        self.over_before: int = 0
        # What was in the slots after the latest event, and the runs that have lost a slot and whose next request has
        # not ended yet.
        self.in_slots: set[ScheduledRun | ReferenceRequest] = set()
        self.displaced: set[ScheduledRun] = set()
        # Whether the server still knew a run that had lost its slot, or None if nobody has seen that.
        self.remembers: bool | None = None
        # How many requests that were in a slot have ended, and how many had when that was seen, or slots became known.
        self.ended_in_slots: int = 0
        self.seen_after: int = 0
        # The models since then or since the latest time at which a server that forgets was given another chance.
        self.models: set[str | None] = set()
        # The length of the latest prompt of each run since the slots became known.
        self.prompts: dict[ScheduledRun, int] = {}

    # Events

    def set_limits(self, limits: Limits) -> None:
        was_limited = self.limits.max_loaded_models is not None
        self.limits = limits
        self.knows_slots = False
        self.in_slots, self.displaced = set(), set()
        for request in self.in_flight:
            request.was_displaced = False
        self.batch, self.draining, self.idle_since = [], [], {}
        for request in self.arrived:
            request.overtaken_by = []
        self.active = list(dict.fromkeys(request.model for request in self.in_flight))
        self.surplus = [model for number, model in enumerate(self.active) if number >= self.max_models]
        if limits.max_loaded_models is None:
            self.first_requests = {}
        elif not was_limited:
            # Without a limit, nobody has noticed whether a model is loaded.
            unknown = [each for each in self.in_flight if not self._has_answer(each.model)]
            self.first_requests = {each.model: each for each in reversed(unknown)}
        self.loaded = {model for model in self.active if model not in self.first_requests}

    def arrive(self, request: ReferenceRequest) -> None:
        run = request.run
        if run is not None and run in self.begun and not self._counts(run, request.arrived):
            self.begun[run] = request.priority
        if run is not None and run in self.calling_since:
            since, patience = self.calling_since.pop(run), self.patience.get(run, 0.0)
            if patience > 0:
                self.ended_soon.append(request.arrived < since + patience)
        request.is_nested = any(e.owner is not None and e.owner == request.owner for e in self.in_flight)
        self.arrived.append(request)
        self.waiting.append(request)

    def end_run(self, run: ScheduledRun) -> None:
        run.end()
        self.displaced.discard(run)

    def end(self, request: ReferenceRequest, now: float) -> None:
        """A request has ended, or no longer waits."""
        if request in self.in_flight:
            self._end_generation(request, now)
        else:
            self._leave_queue(request)
        if self.first_requests.get(request.model) is request:
            del self.first_requests[request.model]
        self.over.append(request)
        request.over = now
        if request.run is not None and not self._requests_of(request.run):
            self.run_idle_since[request.run] = now
            self.unanswered.pop(request.run, None)
            if request.run in self.begun:
                self.calling_since[request.run] = now
            (self.uncounted.add if self.ended_soon[-8:].count(False) > 4 else self.uncounted.discard)(request.run)
        if not math.isnan(request.admitted):
            self.ended_in_slots += self.knows_slots
        if request.was_displaced and request.run is not None:
            self.displaced.discard(request.run)
        if self.remembers is False and self.knows_slots and self.ended_in_slots == self.seen_after + 100:
            self.remembers, self.models = None, set()
        self._find_displaced()

    def note_reply(
        self, request: ReferenceRequest, usage: tuple[int, int | None] | None, *, is_first_attempt: bool
    ) -> None:
        """The whole reply to a request has arrived."""
        if request.run is None or not self.knows_slots:
            return
        prompt, cached = usage if usage is not None else (0, None)
        before = self.prompts.get(request.run)
        if prompt > 0:
            self.prompts[request.run] = prompt
        if not request.was_displaced or not is_first_attempt:
            return
        if len(self.models) > 1:
            self.remembers = False
        elif cached is None:
            self.remembers = self.remembers is True
        elif before is None or prompt < before:
            return
        else:
            self.remembers = cached >= before / 2
        self.seen_after = self.ended_in_slots

    def _find_displaced(self) -> None:
        if self.knows_slots:
            before, self.in_slots = self.in_slots, self._busy_in_slots() | set(self._idle_in_slots())
            gone = before - self.in_slots
            self.displaced |= {each for each in gone if isinstance(each, ScheduledRun) and not each.is_over}

    def pause_run(self, run: ScheduledRun) -> None:
        """A run waits for something other than its tools."""
        if run in self.begun and not self._requests_of(run):
            self.run_idle_since[run] = -math.inf
        self.calling_since.pop(run, None)

    def answer(self, request: ReferenceRequest, now: float) -> None:
        """The first event of a request's reply has arrived."""
        if request.begins_run and request.run is not None and not request.is_answered:
            self.patience[request.run] = min(3.0, now - request.admitted)
        request.is_answered = True
        if request.run is not None:
            self.unanswered.pop(request.run, None)
        if self.first_requests.get(request.model) is request:
            del self.first_requests[request.model]
            self.loaded.add(request.model)
        self._find_displaced()

    def mark_unloaded(self, model: str | None) -> None:
        self.loaded.discard(model)

    def admit(self, request: ReferenceRequest, now: float) -> None:
        """The scheduler has admitted a request: checks that no other had to go first."""
        self.update_drain(now)
        assert len(self.in_flight) < self.limits.max_concurrency, f"{request} exceeds max_concurrency"
        may_go = self.admissible(now)
        assert may_go[:1] == [request], f"{request} was admitted, but {may_go} may go"
        assert request.model not in self.surplus, f"{request} was admitted, but its model exceeds the lowered limits"
        if self.has_model_limit and request.model not in self.active:
            self._activate(request, now)
            for each in self.waiting:
                if each.model not in self.active:
                    each.overtaken_by.append((now, request.model))
        self._leave_queue(request)
        if request.run is not None and not self.knows_slots:
            self.knows_slots, self.over_before = True, len(self.over)
            self.seen_after, self.models, self.prompts = (
                self.ended_in_slots,
                {each.model for each in self.in_flight},
                {},
            )
            for each in self.in_flight:
                each.takes_slot = True
        request.takes_slot = (request.run or request) not in self._idle_in_slots()
        request.was_displaced = request.run in self.displaced and request.run not in self._busy_in_slots()
        self.models.add(request.model)
        self.in_flight.append(request)
        self._find_displaced()
        request.admitted, request.epochs_before = now, len(self.epochs)
        if request.run is not None:
            self.unanswered[request.run] = now + self.patience.get(request.run, 0.0)
            request.begins_run = request.run not in self.begun
            self.begun.setdefault(request.run, request.priority)
        if self.has_model_limit and request.model not in self.loaded:
            self.first_requests[request.model] = request
        models = {each.model for each in self.in_flight} - set(self.surplus)
        assert len(models) <= self.max_models, f"{models} are in flight, besides {self.surplus}"

    def check_settled(self, now: float) -> None:
        """Checks that the scheduler has admitted every request that may go."""
        self.update_drain(now)
        if len(self.in_flight) < self.limits.max_concurrency:
            assert not self.admissible(now), f"{self.admissible(now)} may go, but were not admitted"

    # What the rules demand

    @property
    def has_model_limit(self) -> bool:
        return self.limits.max_loaded_models is not None

    @property
    def max_models(self) -> float:
        return math.inf if self.limits.max_loaded_models is None else self.limits.max_loaded_models

    def admissible(self, now: float) -> list[ReferenceRequest]:
        """All requests that wait for nothing but a permit, the one that goes first at the beginning."""
        waiting = [each for each in self.waiting if not self.waits_for_runs(each, now)]
        if self.has_model_limit:
            room = self.max_models - len(self.active) + len(self._replaceable(now))
            waiting = [each for each in waiting if (self._is_let_in(each) if each.model in self.active else room > 0)]
            if any(self._is_overdue(each, now) for each in self.waiting):
                batches = {each.model for each in waiting if each in self.batch}
                waiting = [each for each in waiting if each in self.batch or each.model not in batches]
        return sorted(waiting, key=lambda each: self._rank(each, now))

    def waits_for_runs(self, request: ReferenceRequest, now: float) -> bool:
        """Whether a request has to wait because of other runs that have begun."""
        limit = self.limits.begun_runs
        if limit is None or request.is_nested or request.run in self.begun:
            return False
        if any(self._is_overdue(each, now) for each in self.waiting):
            return False
        if self.remembers and self.limits.max_begun_runs == "auto":
            return False
        level = self._level(request, now)
        runs = [run for run, priority in self.begun.items() if priority >= level]
        others = [each for each in self.in_flight if each.run is None and each.priority >= level]
        if len([run for run in runs if self._counts(run, now)]) + len(others) >= limit:
            return True
        if self.remembers or (self.remembers is None and not self.displaced):
            return False
        run = self.next_displaced()
        if not isinstance(run, ScheduledRun) or run not in runs or not self._counts(run, now):
            return False
        return not self._requests_of(run) or now < self.unanswered.get(run, -math.inf)

    def next_displaced(self) -> ScheduledRun | ReferenceRequest | None:
        """What the slot was used for that was used least recently, or None if there is an unused one."""
        idle = self._idle_in_slots() if self.knows_slots else []
        is_full = len(self._busy_in_slots()) + len(idle) >= self.limits.max_concurrency
        return idle[-1] if is_full and idle else None

    def _busy_in_slots(self) -> set[ScheduledRun | ReferenceRequest]:
        """What has a request in flight that the server is known to have received."""
        return {each.run or each for each in self.in_flight if each.takes_slot or each.is_answered}

    def _idle_in_slots(self) -> list[ScheduledRun | ReferenceRequest]:
        """What the other slots were used for, the latest first. A request that was never admitted has used none."""
        over = [each for each in self.over[self.over_before :] if not math.isnan(each.admitted)]
        busy = self._busy_in_slots()
        used = dict.fromkeys(each.run or each for each in reversed(over))
        return [each for each in used if each not in busy][: max(0, self.limits.max_concurrency - len(busy))]

    def calling_until(self, now: float) -> dict[ScheduledRun, float]:
        """The runs that count while their tools are running, and until when."""
        calling = [run for run in self.begun if not self._requests_of(run) and self._counts(run, now)]
        return {run: self.run_idle_since[run] + self.patience.get(run, 0.0) for run in calling}

    def _counts(self, run: ScheduledRun, now: float) -> bool:
        if run.is_over:
            return False
        if self._requests_of(run):
            return True
        return run not in self.uncounted and now < self.run_idle_since[run] + self.patience.get(run, 0.0)

    def _requests_of(self, run: ScheduledRun) -> list[ReferenceRequest]:
        return [each for each in self.waiting + self.in_flight if each.run is run]

    def _level(self, request: ReferenceRequest, now: float) -> int:
        level, limit = request.priority, self.limits.max_wait
        while limit and request.arrived + (level - request.priority + 1) * limit <= now:
            level += 1
        return min(level, max(each.priority for each in self.waiting))

    def _rank(self, request: ReferenceRequest, now: float) -> tuple[int, int, int]:
        level = self._level(request, now)
        by_run = request.run is not None and self.limits.order == "run"
        return -level, request.run.number if request.run is not None and by_run else request.number, request.number

    def update_drain(self, now: float) -> None:
        """Begins or ends a drain, if the rules demand it."""
        if not any(self._is_overdue(each, now) for each in self.waiting):
            self.draining = []
        elif not self.draining and not self.batch and len(self.active) >= self.max_models:
            self.draining = self.active[:1]

    def is_deadlocked(self, request: ReferenceRequest, now: float) -> bool:
        """Whether a request can go only after its own task has returned a permit.

        It plays a future in which all other requests end, one after the other. A drain is taken into account from its
        beginning on: requests for other active models keep coming, so nobody can count on their end to be spared it.
        """
        own = [each for each in self.in_flight if each.owner is not None and each.owner == request.owner]
        if not own:
            return False
        if request.model in self.draining and request not in self.batch and request.model in {e.model for e in own}:
            return True
        future = self._copy()
        # No request waits forever until its run may begin.
        future.limits = attrs.evolve(self.limits, max_begun_runs=None)
        while request in future.waiting:
            others = [each for each in future.in_flight if each not in own]
            future.first_requests, future.loaded = {}, set(future.active)
            for other in others:
                future._end_generation(other, now)
            admitted = False
            while len(future.in_flight) < future.limits.max_concurrency and (ready := future.admissible(now)):
                future._admit_unseen(ready[0], now)
                admitted = True
                if not any(future._is_overdue(each, now) for each in future.waiting):
                    future.draining = []
            if not admitted and not others:
                return True
        return False

    def check_history(self) -> None:
        """Checks the whole history: the order within a model, the number of swaps, and the bound on being overtaken."""
        for model in {each.model for each in self.arrived}:
            times = [e.admitted for e in self.arrived if e.model == model and not math.isnan(e.admitted)]
            assert not self.is_fifo or times == sorted(times), f"{model} was admitted out of order"
        assert len(self.arrived) == len(self.waiting) + len(self.in_flight) + len(self.over)
        assert self.swaps <= len(self.epochs)
        for request in self.arrived:
            models = [model for when, model in request.overtaken_by if when >= self.has_precedence_from(request)]
            assert len(models) == len(set(models)), f"{request} was overtaken twice by the same model: {models}"

    @property
    def is_fifo(self) -> bool:
        """Whether there were neither priorities nor runs."""
        return all(each.priority == 0 for each in self.arrived) and not self.has_runs

    @property
    def has_runs(self) -> bool:
        """Whether a request may have been overtaken by later ones of an older run."""
        return any(each.run is not None for each in self.arrived)

    def has_precedence_from(self, request: ReferenceRequest) -> float:
        """The time from which on no request that arrives goes before this one, and those before it wait for no run."""
        if self.is_fifo:
            return request.arrived
        if self.has_runs:
            return math.inf
        periods = max(each.priority for each in self.arrived) - request.priority + 1
        periods += self.limits.begun_runs is not None
        return request.arrived + periods * (self.limits.max_wait or math.inf)

    def _has_answer(self, model: str | None) -> bool:
        return any(each.is_answered for each in self.in_flight if each.model == model)

    def _is_let_in(self, request: ReferenceRequest) -> bool:
        """Whether a request for an active model may go."""
        is_held_back = request.model in self.draining and request not in self.batch
        return request.model not in self.first_requests and request.model not in self.surplus and not is_held_back

    def _is_overdue(self, request: ReferenceRequest, now: float) -> bool:
        limit = self.limits.max_wait
        is_inactive = self.has_model_limit and request.model not in self.active
        return is_inactive and limit is not None and request.arrived + limit <= now

    def _replaceable(self, now: float) -> list[str | None]:
        """The active models with nothing in flight and no request that may go, the longest idle first."""
        busy = {each.model for each in self.in_flight}
        waiting = [each for each in self.waiting if not self.waits_for_runs(each, now)]
        wanted = {each.model for each in waiting if each.model in self.active and self._is_let_in(each)}
        idle = [model for model in self.active if model not in busy and model not in wanted]
        return sorted(idle, key=lambda model: self.idle_since.get(model, -math.inf))

    def _activate(self, request: ReferenceRequest, now: float) -> None:
        if len(self.active) >= self.max_models:
            self.swaps += 1
        while len(self.active) >= self.max_models:
            self._deactivate(self._replaceable(now)[0])
        self.active.append(request.model)
        self.loaded.discard(request.model)
        batch = [each for each in self.waiting if each.model == request.model]
        self.batch += batch
        self.epochs.append(Epoch(request.model, now, tuple(batch), request))

    def _deactivate(self, model: str | None) -> None:
        self.active.remove(model)
        self.batch = [each for each in self.batch if each.model != model]
        self.idle_since.pop(model, None)
        if model in self.draining:
            self.draining = []

    def _end_generation(self, request: ReferenceRequest, now: float) -> None:
        self.in_flight.remove(request)
        self.idle_since[request.model] = now
        if request.model in self.surplus and request.model not in {each.model for each in self.in_flight}:
            self.surplus.remove(request.model)
            self._deactivate(request.model)

    def _admit_unseen(self, request: ReferenceRequest, now: float) -> None:
        """Admits a request in a future that is only played."""
        if self.has_model_limit and request.model not in self.active:
            self._activate(request, now)
        self._leave_queue(request)
        self.in_flight.append(request)

    def _leave_queue(self, request: ReferenceRequest) -> None:
        self.waiting.remove(request)
        if request in self.batch:
            self.batch.remove(request)

    def _copy(self) -> ReferenceSchedule:
        other = ReferenceSchedule(self.limits)
        other.waiting, other.in_flight, other.active = list(self.waiting), list(self.in_flight), list(self.active)
        other.batch, other.idle_since = list(self.batch), dict(self.idle_since)
        other.draining, other.surplus = list(self.draining), list(self.surplus)
        return other
