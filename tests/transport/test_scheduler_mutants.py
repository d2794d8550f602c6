"""The state machine is worth something only if it finds a scheduler that breaks a rule: here are many of those.

Dice choose what happens instead of hypothesis: that is ten times as fast, and as deterministic as its seeds.
"""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest

from lmbridge.transport import scheduler
from lmbridge.transport.scheduler import Scheduler
from tests.transport.schedule_machine import walk

WALKS = 1000

MUTANTS = {
    "max_concurrency ignored": ("while len(self.in_flight) < self.limits.max_concurrency and", "while"),
    "one more than max_concurrency": ("while len(self.in_flight) <", "while len(self.in_flight) <="),
    "max_concurrency ignored without a queue": ("if self.waiting or len(self.in_flight) >=", "if self.waiting or 99 <"),
    "who comes now overtakes who waits": ("if self.waiting or len(", "if len("),
    "who comes now does not ask for its model": ("if not (queue.is_active and queue.is_loaded):", "if False:"),
    "who comes now does not wait for the first_request": (
        "if not (queue.is_active and queue.is_loaded)",
        "if not queue.is_active",
    ),
    "max_loaded_models ignored": ("return limit is None or len(self._active) < limit", "return True"),
    "one model more": ("len(self._active) < limit", "len(self._active) <= limit"),
    "one model less": ("len(self._active) < limit", "len(self._active) < max(1, limit - 1)"),
    "a model with something in flight gives way": ("if not each.in_flight and self._head", "if self._head"),
    "a model for which somebody waits gives way": (" and self._head(each) is None]", "]"),
    "the model that was used last gives way": ("gone = min(unneeded", "gone = max(unneeded"),
    "no drain": ("elif self._draining is None and not", "elif False and not"),
    "the newest model is drained": ("next(iter(self._active))", "list(self._active)[-1]"),
    "a drain holds nobody back": (" or (queue is self._draining and not queue.batch)", ""),
    "a drain never ends": ("self._draining = None  # whoever", "pass  # whoever"),
    "a drain outlives its model": (
        "if queue is self._draining:\n            self._draining",
        "if False:\n            self._draining",
    ),
    "a drain before all batches are admitted": (
        "self._draining is None and not self._batches",
        "self._draining is None",
    ),
    "a drain where there is room": ("not self._batches and not self._has_room()", "not self._batches"),
    "a drain too early": ("now < first.arrived + limit:", "now < first.arrived + limit / 2:"),
    "a drain a moment late": ("now < first.arrived + limit:", "now <= first.arrived + limit:"),
    "a drain decided by another sum than the timer's": ("now < first.arrived + limit:", "now - first.arrived < limit:"),
    "nobody wakes when somebody is overdue": ("return when if when > now else math.inf", "return math.inf"),
    "the timer rings for ever": ("return when if when > now else math.inf", "return when"),
    "a batch of one": ("queue.batch = len(queue.waiting)", "queue.batch = 1"),
    "a batch that stays open": (
        "queue.waiting[permit] = None",
        "queue.waiting[permit] = None; permit.in_batch = n = queue.batch > 0; queue.batch += n; self._batches += n",
    ),
    "a batch that is never over": ("            self._batches -= 1", "            pass"),
    "last in, first out": ("permit = next(iter(queue.waiting))", "permit = next(reversed(queue.waiting))"),
    "active models in order of their names": (
        "key=lambda permit: permit.number,",
        "key=lambda permit: str(permit.model),",
    ),
    "active models always first": (
        " or (inside is not None and inside.number < outside.number)",
        " or inside is not None",
    ),
    "active models always last": (" or (inside is not None and inside.number < outside.number)", ""),
    "who is held back is forgotten": (
        "for permit in queue.waiting:\n            self._put_outside(permit)",
        "if False:\n            pass",
    ),
    "who waits for a model is forgotten": (
        "if not queue.is_active:\n            self._put_outside(permit)",
        "if False:\n            pass",
    ),
    "no cold model": (
        "if not queue.is_loaded:\n            queue.first_request",
        "if False:\n            queue.first_request",
    ),
    "a new model counts as warm": (
        "queue.is_active = True\n        self._active[queue] = None",
        "queue.is_active = queue.is_loaded = True\n        self._active[queue] = None",
    ),
    "no next first_request after a failure": (
        "queue.first_request = None\n        permit.state",
        "pass\n        permit.state",
    ),
    "a first_request's failure counts as an answer": (
        "queue.first_request = None\n        permit.state",
        "queue.first_request, queue.is_loaded = None, True\n        permit.state",
    ),
    "an answer of anybody counts": ("if queue is not None and queue.first_request is permit:", "if queue is not None:"),
    "an answer does not count": ("queue.is_loaded, queue.first_request = True, None", "queue.first_request = None"),
    "still warm after an eviction": (
        "if queue is not None:\n            queue.is_loaded = False",
        "if False:\n            pass",
    ),
    "still warm after another's turn": ("queue.is_active = queue.is_loaded = False", "queue.is_active = False"),
    "a permit that is not given back": ("            del self.in_flight[permit]\n", "            pass\n"),
    "a permit that its model keeps": ("            queue.in_flight -= 1\n", "            pass\n"),
    "who leaves the queue stays in it": (
        'if permit.state == "waiting":\n            self._dequeue(permit, queue)',
        'if permit.state == "waiting":\n            pass',
    ),
    "a permit given back twice": ("if queue is None or permit not in (", "if False and permit not in ("),
    "swaps without a model that gave way": (
        "            self.swaps[queue.model] += 1",
        "            self.swaps[queue.model] += 2",
    ),
    "swaps not counted": ("self.swaps[queue.model] += 1", "pass"),
    "models are kept for ever": ("self._queues.pop(queue.model, None)", "pass"),
    "who waits for itself is never told": ("if not own or permit.state", "if True or permit.state"),
    "only who holds all permits waits for itself": (
        "return limit is not None and len(own_queues) >= limit",
        "return False",
    ),
    "who waits for itself in a drain is not told": (
        "return queue is self._draining and not permit.in_batch and queue in own_queues",
        "return False",
    ),
    "who waits for another's drain is told": (
        " and not permit.in_batch and queue in own_queues",
        " and not permit.in_batch",
    ),
    "who holds one of several permits is told": ("len(own) >= self.limits.max_concurrency", "own"),
    "who holds one of several models is told": ("len(own_queues) >= limit", "len(own_queues) >= 1"),
    "a drain tells nobody": (
        "self._draining = next(iter(self._active))\n            self.revision += 1",
        "self._draining = next(iter(self._active))",
    ),
    "other limits tell nobody": ("of some stale ones\n        self.revision += 1", "of some stale ones"),
    "other limits let a first_request's others go": (
        "                queue.first_request = permit\n            queue.is_loaded",
        "                pass\n            queue.is_loaded",
    ),
    "other limits forget who waits": (
        "permit.in_batch = False\n            self._enqueue(permit)",
        "permit.in_batch = False",
    ),
    "other limits forget who is in flight": (
        "            queue.in_flight += 1\n            queue.is_active = True",
        "            queue.is_active = True",
    ),
}


def broken(old: str, new: str) -> type[Scheduler]:
    """A scheduler with other words in its source."""
    source = inspect.getsource(scheduler)
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in the source: this mutant needs a new text"
    module = ModuleType("lmbridge.transport.broken_scheduler")
    exec(compile(source.replace(old, new), module.__name__, "exec"), module.__dict__)
    mutant = module.__dict__["Scheduler"]
    assert isinstance(mutant, type)
    return mutant


def search(scheduler_class: type[Scheduler]) -> None:
    for seed in range(WALKS):
        walk(seed, scheduler_class)


@pytest.mark.parametrize(("old", "new"), MUTANTS.values(), ids=list(MUTANTS))
def test_a_scheduler_is_found_that_has(old: str, new: str) -> None:
    with pytest.raises((AssertionError, LookupError)):
        search(broken(old, new))


def test_nothing_is_found_in_the_scheduler_itself() -> None:
    search(Scheduler)
