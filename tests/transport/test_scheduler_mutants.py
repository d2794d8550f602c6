"""Shows that the state machine finds a scheduler that breaks a rule, by breaking each rule in turn.

A mutant is the scheduler with one piece of its source text replaced. The state machine has to find it by one of its own
checks: a mutant that fails by accident, by a NameError say, proves nothing. A replacement that no longer applies to the
source fails the test as well.

The events are drawn at random instead of by hypothesis, which is ten times as fast and depends on the seeds alone.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from types import ModuleType

import pytest

from lmbridge.transport import scheduler
from lmbridge.transport.scheduler import Scheduler
from tests.transport import schedule_machine, schedule_reference
from tests.transport.schedule_machine import SCHEDULER_MODULES, random_walk

WALKS = 4000

# The histories take half a minute on a quiet machine, and several times as long on a busy one.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MUTANTS = {
    # max_concurrency
    "max_concurrency ignored": ("while len(self.in_flight) < self.limits.max_concurrency and", "while"),
    "one more than max_concurrency": ("while len(self.in_flight) <", "while len(self.in_flight) <="),
    "max_concurrency ignored without a queue": ("if self.waiting or len(self.in_flight) >=", "if self.waiting or 99 <"),
    "new arrivals overtake the queue": ("if self.waiting or len(", "if len("),
    # max_loaded_models
    "new arrivals do not wait for their model": (
        "if not (queue.is_active and queue.is_loaded) or queue.is_surplus:",
        "if queue.is_surplus:",
    ),
    "new arrivals do not wait for the first request": (
        "if not (queue.is_active and queue.is_loaded) or",
        "if not queue.is_active or",
    ),
    "max_loaded_models ignored": ("return limit is None or len(self.active) < limit", "return True"),
    "one model more": ("len(self.active) < limit", "len(self.active) <= limit"),
    "one model less": ("len(self.active) < limit", "len(self.active) < max(1, limit - 1)"),
    "a model with something in flight gives way": (
        "if not each.in_flight and self._first_admissible",
        "if self._first_admissible",
    ),
    "a model with an admissible request gives way": (
        " and self._first_admissible(each, now) is None]",
        "]",
    ),
    "the model that was used last gives way": (
        "sorted(unneeded, key=lambda each: each.idle_since)",
        "sorted(unneeded, key=lambda each: -each.idle_since)",
    ),
    # Drains
    "no drain": ("elif models.draining is None and not", "elif False and not"),
    "the newest model is drained": ("next(iter(models.active))", "list(models.active)[-1]"),
    "a drain holds nothing back": ("return queue.is_surplus or queue is self.draining", "return queue.is_surplus"),
    "a drain never ends": (
        "not self._has_overdue:\n            models.draining = None",
        "not self._has_overdue:\n            pass",
    ),
    "a drain outlives its model": (
        "if queue is self.draining:\n            self.draining",
        "if False:\n            self.draining",
    ),
    "a drain before all batches are admitted": (
        "models.draining is None and not models.batch_members",
        "models.draining is None",
    ),
    "a drain although there is room": (
        "not models.batch_members and not models.has_room()",
        "not models.batch_members",
    ),
    "a drain too early": ("now >= first.arrived_at + limit\n", "now >= first.arrived_at + limit / 2\n"),
    "a drain a moment late": ("now >= first.arrived_at + limit\n", "now > first.arrived_at + limit\n"),
    "a drain decided by another sum than the timer's": (
        "now >= first.arrived_at + limit\n",
        "now - first.arrived_at >= limit\n",
    ),
    "no timer for the next overdue request": ("moments.append(first.arrived_at + limit)", "pass"),
    "a timer that rings forever": (
        "min((when for when in moments if when > now), default",
        "min(moments, default",
    ),
    # Batches and order
    "a batch of one": (
        "self.batch_members += len(queue.waiting)\n        for permit in queue.waiting:",
        "self.batch_members += 1\n        for permit in list(queue.waiting)[:1]:",
    ),
    "a batch that stays open": (
        "queue.waiting[permit] = None",
        "queue.waiting[permit] = None; permit.in_batch = True; self._models.batch_members += queue.is_active",
    ),
    "a batch that never ends": ("            self.batch_members -= 1", "            pass"),
    "last in, first out": (
        "(permit), permit.order_number, permit.arrival_number",
        "(permit), -permit.order_number, permit.arrival_number",
    ),
    "active models in the order of their names": (
        "active_candidate = min(heads, key=lambda permit: permit.rank,",
        "active_candidate = min(heads, key=lambda permit: str(permit.model),",
    ),
    "active models always first": (
        "if active_candidate is not None and active_candidate.rank < inactive_candidate.rank:",
        "if active_candidate is not None:",
    ),
    "active models always last": (
        "if active_candidate is not None and active_candidate.rank < inactive_candidate.rank:",
        "if False:",
    ),
    "requests that were held back are forgotten": (
        "permit.in_batch = False\n            self.push(permit)\n            self.next_overdue.push(permit)",
        "permit.in_batch = False",
    ),
    "a model that gives way keeps its batch": (
        "self.batch_members -= permit.in_batch\n            permit.in_batch = False",
        "pass",
    ),
    "a batch is overtaken although a request is overdue": (
        "if self._has_overdue:\n            # The batch",
        "if False:\n            # The batch",
    ),
    "a batch is never overtaken": (
        "if self._has_overdue:\n            # The batch",
        "if True:\n            # The batch",
    ),
    "requests for inactive models are forgotten": (
        "            if not permit.queue.is_active:\n                (self",
        "            if False:\n                (self",
    ),
    "requests for inactive models never become overdue": (
        "if not queue.is_active:\n            self._models.next_overdue.push(permit)",
        "if False:\n            pass",
    ),
    # Priorities
    "priorities ignored": ("permit.rank = -self.capped_level(permit), permit", "permit.rank = 0, permit"),
    "the lowest priority first": ("permit.rank = -self", "permit.rank = self"),
    "requests rise above the highest priority": (
        "return min(permit.level, self.highest_priority)",
        "return permit.level",
    ),
    "requests are not sorted anew when a more urgent one arrives": (
        "if self._levels.add(permit):",
        "if self._levels.add(permit) and False:",
    ),
    "the highest priority is that of a request that has left": (
        "del self._counts[permit.priority]\n        return self._update_highest_priority()",
        "del self._counts[permit.priority]\n        return False",
    ),
    "no request rises": (
        "permit.level, permit.rises_at = permit.priority + periods,",
        "permit.level, permit.rises_at = permit.priority,",
    ),
    "a request rises once only": ("permit.priority + periods, permit", "permit.priority + min(1, periods), permit"),
    "a request rises a moment late": ("permit.rises_at <= now:", "permit.rises_at < now:"),
    "a request that has risen keeps its place in the queue": (
        "self._rising.push(permit)\n            self._models.push(permit)",
        "self._rising.push(permit)",
    ),
    "an urgent request is overdue sooner": (
        "now >= first.arrived_at + limit\n",
        "now >= first.arrived_at + limit / (1 + max(0, first.priority))\n",
    ),
    # Runs
    "the order of runs ignored": ('is_by_run = self.limits.order == "run"', "is_by_run = False"),
    "runs are ordered although requests should be": ('is_by_run = self.limits.order == "run"', "is_by_run = True"),
    "the number of begun runs is not limited": (
        "if limit is None or self.total < limit:",
        "if True:",
    ),
    "one begun run more": ("if each >= level) < limit", "if each >= level) <= limit"),
    "begun runs of a lower priority count": ("if each >= level)", "if True)"),
    "begun runs of the same priority do not count": (
        "if each >= level)",
        "if each > level)",
    ),
    "new arrivals do not wait for other runs": (
        "if self._is_newcomer(permit) and not self._may_begin(permit.priority, now):\n            return False",
        "if False:\n            return False",
    ),
    "a begun run waits for other runs again": (
        "return not self._runs.has_begun(permit.run)",
        "return True",
    ),
    "the task of a permit waits for other runs": (
        "if self._runs.limit is None or permit.is_nested:",
        "if self._runs.limit is None:",
    ),
    "other first requests of a begun run still wait": (
        "for each in list(self._newcomers.get(permit.run, ())):",
        "for each in []:",
    ),
    "runs hold up a drain": ("return self._has_overdue or self._may_begin", "return self._may_begin"),
    "runs hold up a request that has risen above them": (
        "self._may_begin(self._levels.capped_level(permit), now)",
        "self._may_begin(permit.priority, now)",
    ),
    "no timer for a request that rises above runs": ("moments.append(rising.rises_at)", "pass"),
    "no timer for an idle run": ("moments += [self._runs.next_drop(), ", "moments += ["),
    "idle runs count forever": (
        "            del self._idle[run]\n            self._remove(run)",
        "            del self._idle[run]",
    ),
    "runs do not count while they have requests": (
        "if not self._requests[run]:\n            del self._requests[run]\n            self",
        "if True:\n            self",
    ),
    "a run that calls a tool does not count": (
        "until = self._idle[run] = now + (0.0 if tools_are_slow else self._patience[run])",
        "until = self._idle[run] = now",
    ),
    "an idle run counts a moment too long": (
        "while self.next_drop() <= now:",
        "while self.next_drop() < now:",
    ),
    "a run that asks again does not count": (
        "if run in self._patience:\n            self._add",
        "if False:\n            self._add",
    ),
    "an idle run counts for 3 seconds in any case": ("min(seconds, RUN_PATIENCE)", "RUN_PATIENCE"),
    "an idle run counts as long as the first answer took": ("min(seconds, RUN_PATIENCE)", "seconds"),
    "the first answer is counted from the arrival": (
        "now - permit.admitted_at)\n        queue",
        "now - permit.arrived_at)\n        queue",
    ),
    "any answer counts as the first one": (
        "            if permit.begins_run:\n",
        "            if True:\n",
    ),
    "a run that asks again counts as idle": (
        "self._requests[run] += 1\n        self._idle.pop(run, None)",
        "self._requests[run] += 1",
    ),
    "a run that pauses counts": ("if self._idle.pop(run, None) is not None:", "if False:"),
    "a run that pauses does not count although it has requests": (
        "if self._idle.pop(run, None) is not None:",
        "if True:",
    ),
    "a run that has ended counts": ("self._idle.pop(run, None)\n        self._remove(run)", "pass"),
    "a single request counts forever": (
        "            if permit.run is None:\n                self._runs.remove_single(permit.priority)\n",
        "",
    ),
    "runs that have begun are not counted": ("self.total += 1", "pass"),
    # How long tools take
    "runs count although the latest tools were slow": (
        "(0.0 if tools_are_slow else self._patience[run])",
        "self._patience[run]",
    ),
    "half of the latest tools decide against the others": (
        "2 * sum(self._ended_soon) < _OBSERVED_TOOLS",
        "2 * sum(self._ended_soon) <= _OBSERVED_TOOLS",
    ),
    "all earlier tools count, not only the latest ones": (
        "deque([True] * _OBSERVED_TOOLS, maxlen=_OBSERVED_TOOLS)",
        "deque([True] * _OBSERVED_TOOLS)",
    ),
    "a tool that took as long as reading counts as fast": (
        "self._ended_soon.append(now < calling_since + patience)",
        "self._ended_soon.append(now <= calling_since + patience)",
    ),
    "tools of runs without patience count": (
        "if calling_since is not None and patience:",
        "if calling_since is not None:",
    ),
    "a pause counts as a tool": ("self._calling_since.pop(run, None)\n        if self._idle", "if self._idle"),
    # The slots of the server
    "a run displaces others whose tools are running": (
        "return self._runs.have_room(level) and now >= self._slot_kept_until(level)",
        "return self._runs.have_room(level)",
    ),
    "a slot is kept a moment too long": ("now >= self._slot_kept_until(level)", "now > self._slot_kept_until(level)"),
    "a slot is not kept while tools are running": (
        "return self._idle.get(conversation, self._unanswered.get(conversation, -math.inf))",
        "return self._unanswered.get(conversation, -math.inf)",
    ),
    "a slot is not kept while the next request is on the way": (
        "return self._idle.get(conversation, self._unanswered.get(conversation, -math.inf))",
        "return self._idle.get(conversation, -math.inf)",
    ),
    "a slot is kept until there is an answer": (
        "self._unanswered[run] = now + self._patience[run]",
        "self._unanswered[run] = math.inf",
    ),
    "a slot is kept for runs of a lower priority": ("self._counted.get(conversation, -math.inf) < level", "False"),
    "a slot is not kept for runs of the same priority": (
        "self._counted.get(conversation, -math.inf) < level",
        "self._counted.get(conversation, -math.inf) <= level",
    ),
    "the slot that was used last is taken": (
        "return next(iter(self._idle), None)",
        "return next(reversed(self._idle), None)",
    ),
    "a slot is taken although there is an unused one": (" if is_full else None", ""),
    "conversations stay although their slots were taken": ("while self._idle and len(self._busy) +", "while False and"),
    "a slot is busy as soon as a request is sent": (
        "permit.is_on_the_way = conversation in self._idle\n",
        "permit.is_on_the_way = False\n        self._idle.pop(conversation, None)\n",
    ),
    "a slot is idle although its request was answered": (
        "permit.is_on_the_way = False\n            conversation = permit.run or permit\n            self._idle.pop(",
        "return\n            self._idle.pop(",
    ),
    "a request that has ended keeps its slot busy": ("self._slots.end(permit)", "pass"),
    "single requests use no slots": (
        "self._slots.end(permit)",
        "if permit.run is not None:\n                    self._slots.end(permit)",
    ),
    "requests before the first run use no slots": (
        "for each in self.in_flight:\n                self._slots",
        "for each in [permit]:\n                self._slots",
    ),
    # What the server remembers
    "a slot is kept although the server remembers": (
        "bool(self._displaced) if self.remembers is None else not self.remembers",
        "bool(self._displaced) or self.remembers is not None",
    ),
    "a slot is not kept although the server forgets": (
        "bool(self._displaced) if self.remembers is None else not self.remembers",
        "bool(self._displaced) and self.remembers is None",
    ),
    "slots are kept as long as nothing is known": (
        "bool(self._displaced) if self.remembers is None else not self.remembers",
        "not self.remembers",
    ),
    "any number of runs is displaced to learn about the server": (
        "bool(self._displaced) if self.remembers is None else not self.remembers",
        "self.remembers is False",
    ),
    "runs wait although the server remembers": (
        'if remembers and self.limits.max_begun_runs == "auto":',
        "if False:",
    ),
    "a limit of the user is ignored if the server remembers": (
        'if remembers and self.limits.max_begun_runs == "auto":',
        "if remembers:",
    ),
    "any reply shows what the server remembers": (
        "if not (permit.was_displaced and is_first_attempt):",
        "if not is_first_attempt:",
    ),
    "a second attempt shows what the server remembers": (
        "if not (permit.was_displaced and is_first_attempt):",
        "if not permit.was_displaced:",
    ),
    "half of a prompt is not enough": ("2 * cached >= before", "2 * cached > before"),
    "the new messages of a prompt have to be in the cache": ("2 * cached >= before", "2 * cached >= prompt"),
    "a shorter prompt shows what the server remembers": ("elif before and prompt >= before:", "elif before:"),
    "a prompt of the same length shows nothing": (
        "elif before and prompt >= before:",
        "elif before and prompt > before:",
    ),
    "an unknown number of tokens counts as remembered": (
        "self._learn(remembers=bool(self.remembers))",
        "self._learn(remembers=True)",
    ),
    "an unknown number of tokens counts as forgotten": (
        "elif cached is None:\n",
        "elif cached is None:\n            self.remembers = False\n",
    ),
    "several models count as one": ("if len(self._models) > 1:", "if False:"),
    "a server that forgot is never given another chance": (
        "if not self._requests_left and self.remembers is False:",
        "if False:",
    ),
    "a server that forgot gets another chance a request too late": (
        "_LASTING_REQUESTS: Final = 100",
        "_LASTING_REQUESTS: Final = 101",
    ),
    "a server that remembers is doubted": (
        "if not self._requests_left and self.remembers is False:",
        "if not self._requests_left:",
    ),
    "old models count for ever": (
        "self.remembers, self._models = None, set()",
        "self.remembers = None",
    ),
    "under new limits, the server counts as unknown until it is asked": (
        "remembers = self._remembers if self._slots is None else self._slots.remembers",
        "remembers = self._slots is not None and self._slots.remembers",
    ),
    "new limits make the scheduler forget about the server": ("self._remembers = self._slots.remembers", "pass"),
    "each request of a displaced run shows what the server remembers": (
        "permit.run in self._displaced and conversation not in self._busy",
        "permit.run in self._displaced",
    ),
    "a run whose request has ended is still displaced": (
        "if permit.was_displaced and permit.run is not None:\n            self._displaced.discard",
        "if False:\n            self._displaced.discard",
    ),
    "a run that has ended is still displaced": ("self._slots.forget_run(run)", "pass"),
    "a run that is over is displaced": (" and not conversation.is_over", ""),
    "nobody is displaced": ("self._displaced.add(conversation)", "pass"),
    "no request is known to have been displaced": (
        "permit.was_displaced = permit.run in self._displaced and conversation not in self._busy",
        "permit.was_displaced = False",
    ),
    # First requests
    "first requests do not go alone": (
        "if not queue.is_loaded:\n            queue.first_request",
        "if False:\n            queue.first_request",
    ),
    "a new model counts as loaded": (
        "queue.is_active = True\n        self.active[queue] = None",
        "queue.is_active = queue.is_loaded = True\n        self.active[queue] = None",
    ),
    "no next first request after a failure": (
        "queue.first_request = None\n            if queue.is_surplus",
        "pass\n            if queue.is_surplus",
    ),
    "a failed first request counts as an answer": (
        "queue.first_request = None\n            if queue.is_surplus",
        "queue.first_request, queue.is_loaded = None, True\n            if queue.is_surplus",
    ),
    "the answer to any request counts": (
        "if queue is not None and queue.first_request is permit:",
        "if queue is not None:",
    ),
    "an answer does not count": ("queue.is_loaded, queue.first_request = True, None", "queue.first_request = None"),
    "still loaded after an eviction": (
        "if queue is not None:\n            queue.is_loaded = False",
        "if False:\n            pass",
    ),
    "still loaded after a swap": (
        "queue.is_active = queue.is_loaded = queue.is_surplus",
        "queue.is_active = queue.is_surplus",
    ),
    # Leaving
    "a permit is not returned": ("            del self.in_flight[permit]\n", "            pass\n"),
    "a model keeps the permit of an ended request": ("            queue.in_flight -= 1\n", "            pass\n"),
    "a request that leaves the queue stays in it": (
        'if permit.state == "waiting":\n            self._dequeue(permit, queue)',
        'if permit.state == "waiting":\n            pass',
    ),
    "a permit can be returned twice": (
        "else self.in_flight):\n            return False",
        "else self.in_flight):\n            return True",
    ),
    "swaps counted twice": ("self.swaps[queue.model] += 1", "self.swaps[queue.model] += 2"),
    "swaps not counted": ("self.swaps[queue.model] += 1", "pass"),
    "queues are kept forever": ("self.queues.pop(queue.model, None)", "pass"),
    # Deadlocks
    "no deadlock is found": ("if not own or permit.state", "if True or permit.state"),
    "only the holder of all permits is deadlocked": (
        "return limit is not None and len(own_queues) >= limit",
        "return False",
    ),
    "a deadlock in a drain is not found": ("if queue in own_queues:\n                return True", "return False"),
    "a drain of another task's model is a deadlock": ("if queue in own_queues:\n                return", "return"),
    "the holder of one of several permits is deadlocked": ("len(own) >= self.limits.max_concurrency", "own"),
    "the holder of one of several models is deadlocked": ("len(own_queues) >= limit", "len(own_queues) >= 1"),
    "deadlocks are not looked for after a drain": (
        "models.draining = next(iter(models.active))\n            self.revision += 1",
        "models.draining = next(iter(models.active))",
    ),
    "deadlocks are not looked for after new limits": (
        "        self.revision += 1\n        if not was_limited:",
        "        if not was_limited:",
    ),
    # New limits
    "new limits do not wait for a first request": (
        "            queue.first_request = permit\n        queue.is_loaded",
        "            pass\n        queue.is_loaded",
    ),
    "a new limit of models does not wait for a first answer": ("if not was_limited:", "if False:"),
    "other new limits forget that a model is loaded": ("if not was_limited:", "if True:"),
    "a new limit of models waits although there was an answer": (
        "known = {permit.model for permit in self.in_flight if permit.has_answered}",
        "known = set()",
    ),
    "a new limit of models waits for each answer": ("            known.add(permit.model)\n", ""),
    "new limits forget the waiting requests": (
        "permit.in_batch = False\n            self._enqueue(permit)",
        "permit.is_newcomer = permit.in_batch = False",
    ),
    "new limits forget the requests in flight": (
        "queue.in_flight += 1\n        queue.is_active = True",
        "queue.is_active = True",
    ),
    # Limits lowered below what is in flight
    "no model is surplus": ("queue.is_surplus = not self.has_room()", "queue.is_surplus = False"),
    "every model is surplus": ("queue.is_surplus = not self.has_room()", "queue.is_surplus = True"),
    "the second request of a model makes it surplus": ("if queue not in self.active:", "if True:"),
    "surplus models get requests from the queue": (
        "return queue.is_surplus or queue is self.draining",
        "return queue is self.draining",
    ),
    "surplus models get new arrivals": (
        " or queue.is_surplus:\n            self._models.discard",
        ":\n            self._models.discard",
    ),
    "surplus models keep their slots when they are idle": ("if queue.is_surplus and not queue.in_flight:", "if False:"),
    "surplus models lose their slots with requests in flight": (
        "if queue.is_surplus and not queue.in_flight:",
        "if queue.is_surplus and queue in self._models.active:",
    ),
    "a surplus model is surplus forever": (
        "queue.is_active = queue.is_loaded = queue.is_surplus = False",
        "queue.is_active = queue.is_loaded = False",
    ),
    "one model gives way where several have to": ("excess = len(models.active) - limit + 1", "excess = 1"),
    "models give way although that is not enough": ("if len(unneeded) < excess:", "if not unneeded:"),
    "a swap is counted for each model that gives way": (
        "self.swaps[queue.model] += 1",
        "self.swaps[queue.model] += excess",
    ),
    "a deadlock behind a surplus model is not found": (
        "if not self._models.is_held_back(queue):",
        "if queue is not self._models.draining:",
    ),
    "a deadlock behind another task's surplus model is not found": (
        "if queue in own_queues:\n                return True",
        "return queue in own_queues",
    ),
}


def mutant_of_the_scheduler(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> type[Scheduler]:
    """Returns the scheduler class, made from the source of its modules with one piece of text replaced."""
    sources = [inspect.getsource(module) for module in SCHEDULER_MODULES]
    count = sum(source.count(old) for source in sources)
    assert count == 1, f"{old!r} is {count} times in the source: this mutant needs a new text"
    with monkeypatch.context() as patched:
        for original, source in zip(SCHEDULER_MODULES, sources, strict=True):
            module = ModuleType(original.__name__)
            # The modules that follow import from this one.
            patched.setitem(sys.modules, original.__name__, module)
            exec(compile(source.replace(old, new), "a mutant of " + original.__name__, "exec"), module.__dict__)
        mutant = sys.modules[scheduler.__name__].__dict__["Scheduler"]
    assert isinstance(mutant, type)
    return mutant


def search(scheduler_class: type[Scheduler]) -> None:
    for seed in range(WALKS):
        random_walk(seed, scheduler_class)


@pytest.mark.parametrize(("old", "new"), MUTANTS.values(), ids=list(MUTANTS))
def test_a_mutant_is_found(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    mutant = mutant_of_the_scheduler(monkeypatch, old, new)
    with pytest.raises(AssertionError) as found:
        search(mutant)
    # The scheduler contains no assertion, and neither does the code around it: the error is one of these checks.
    where = traceback.extract_tb(found.value.__traceback__)[-1].filename
    assert where in {schedule_machine.__file__, schedule_reference.__file__}


def test_nothing_is_found_in_the_scheduler_itself() -> None:
    search(Scheduler)


def test_a_mutation_that_does_not_apply_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="is 0 times in the source"):
        mutant_of_the_scheduler(monkeypatch, "a text that is not in the source of the scheduler", "")
