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
    "who comes now does not ask for its model": ("if not (group.is_active and group.is_warm):", "if False:"),
    "who comes now does not wait for the loader": (
        "if not (group.is_active and group.is_warm)",
        "if not group.is_active",
    ),
    "max_loaded_models ignored": ("return limit is None or len(self._active) < limit", "return True"),
    "one model more": ("len(self._active) < limit", "len(self._active) <= limit"),
    "one model less": ("len(self._active) < limit", "len(self._active) < max(1, limit - 1)"),
    "a model with something in flight gives way": ("if not each.in_flight and self._head", "if self._head"),
    "a model for which somebody waits gives way": (" and self._head(each) is None]", "]"),
    "the model that was used last gives way": ("gone = min(unneeded", "gone = max(unneeded"),
    "no drain": ("elif self._draining is None and not", "elif False and not"),
    "the newest model is drained": ("next(iter(self._active))", "list(self._active)[-1]"),
    "a drain holds nobody back": (" or (group is self._draining and not group.batch)", ""),
    "a drain never ends": ("self._draining = None  # whoever", "pass  # whoever"),
    "a drain outlives its model": (
        "if group is self._draining:\n            self._draining",
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
    "a batch of one": ("group.batch = len(group.waiting)", "group.batch = 1"),
    "a batch that stays open": (
        "group.waiting[place] = None",
        "group.waiting[place] = None; place.in_batch = n = group.batch > 0; group.batch += n; self._batches += n",
    ),
    "a batch that is never over": ("            self._batches -= 1", "            pass"),
    "last in, first out": ("place = next(iter(group.waiting))", "place = next(reversed(group.waiting))"),
    "active models in order of their names": ("key=lambda place: place.number,", "key=lambda place: str(place.model),"),
    "active models always first": (
        " or (inside is not None and inside.number < outside.number)",
        " or inside is not None",
    ),
    "active models always last": (" or (inside is not None and inside.number < outside.number)", ""),
    "who is held back is forgotten": (
        "for place in group.waiting:\n            self._put_outside(place)",
        "if False:\n            pass",
    ),
    "who waits for a model is forgotten": (
        "if not group.is_active:\n            self._put_outside(place)",
        "if False:\n            pass",
    ),
    "no cold model": ("if not group.is_warm:\n            group.loader", "if False:\n            group.loader"),
    "a new model counts as warm": (
        "group.is_active = True\n        self._active[group] = None",
        "group.is_active = group.is_warm = True\n        self._active[group] = None",
    ),
    "no next loader after a failure": ("group.loader = None\n        place.state", "pass\n        place.state"),
    "a loader's failure counts as an answer": (
        "group.loader = None\n        place.state",
        "group.loader, group.is_warm = None, True\n        place.state",
    ),
    "an answer of anybody counts": ("if group is not None and group.loader is place:", "if group is not None:"),
    "an answer does not count": ("group.is_warm, group.loader = True, None", "group.loader = None"),
    "still warm after an eviction": (
        "if group is not None:\n            group.is_warm = False",
        "if False:\n            pass",
    ),
    "still warm after another's turn": ("group.is_active = group.is_warm = False", "group.is_active = False"),
    "a place that is not given back": ("            del self.in_flight[place]\n", "            pass\n"),
    "a place that its model keeps": ("            group.in_flight -= 1\n", "            pass\n"),
    "who leaves the queue stays in it": (
        'if place.state == "waiting":\n            self._unqueue(place, group)',
        'if place.state == "waiting":\n            pass',
    ),
    "a place given back twice": ("if group is None or place not in (", "if False and place not in ("),
    "swaps without a model that gave way": (
        "            self.swaps[group.model] += 1",
        "            self.swaps[group.model] += 2",
    ),
    "swaps not counted": ("self.swaps[group.model] += 1", "pass"),
    "models are kept for ever": ("self._groups.pop(group.model, None)", "pass"),
    "who waits for itself is never told": ("if not own or place.state", "if True or place.state"),
    "only who holds all places waits for itself": (
        "return limit is not None and len(own_groups) >= limit",
        "return False",
    ),
    "who waits for itself in a drain is not told": (
        "return group is self._draining and not place.in_batch and group in own_groups",
        "return False",
    ),
    "who waits for another's drain is told": (
        " and not place.in_batch and group in own_groups",
        " and not place.in_batch",
    ),
    "who holds one of several places is told": ("len(own) >= self.limits.max_concurrency", "own"),
    "who holds one of several models is told": ("len(own_groups) >= limit", "len(own_groups) >= 1"),
    "a drain tells nobody": (
        "self._draining = next(iter(self._active))\n            self.turns += 1",
        "self._draining = next(iter(self._active))",
    ),
    "other limits tell nobody": ("of some stale ones\n        self.turns += 1", "of some stale ones"),
    "other limits let a loader's others go": (
        "                group.loader = place\n            group.is_warm",
        "                pass\n            group.is_warm",
    ),
    "other limits forget who waits": (
        "place.in_batch = False\n            self._queue(place)",
        "place.in_batch = False",
    ),
    "other limits forget who is in flight": (
        "            group.in_flight += 1\n            group.is_active = True",
        "            group.is_active = True",
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
