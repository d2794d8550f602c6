"""The rules of scheduling by model, one by one, and then all together with any events in any order.

Every step of a `SchedulerHarness` is checked against a `ReferenceSchedule`, a second implementation of the rules.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge._scheduled_run import ScheduledRun
from lmbridge.config import Limits
from lmbridge.transport.permits import Permit
from lmbridge.transport.scheduler import Scheduler
from tests.transport.schedule_machine import SCHEDULER_MODULES, ScheduleMachine, SchedulerHarness
from tests.transport.schedule_reference import ReferenceRequest, ReferenceSchedule


def a_harness(
    max_concurrency: int = 10,
    max_loaded_models: int | None = 1,
    max_wait: float | None = 30.0,
    start: float = 0.0,
    begun: int | Literal["auto"] | None = "auto",
) -> SchedulerHarness:
    limits = Limits(
        max_concurrency=max_concurrency,
        max_loaded_models=max_loaded_models,
        max_wait=max_wait,
        max_begun_runs=begun,
    )
    return SchedulerHarness(limits, start=start)


def arrive(harness: SchedulerHarness, models: str, owner: str | None = None) -> list[ReferenceRequest]:
    return [harness.arrive(model, owner) for model in models]


def finish(harness: SchedulerHarness, *requests: ReferenceRequest) -> None:
    for request in requests:
        harness.end(request)
        harness.check()


def in_flight(harness: SchedulerHarness) -> str:
    """Returns the models of the requests in flight, in the order of their admission."""
    return "".join(str(request.model) for request in harness.reference.in_flight)


def load(harness: SchedulerHarness, models: str) -> list[ReferenceRequest]:
    """Brings one request for each model in flight and answers it."""
    requests = arrive(harness, models)
    for request in requests:
        harness.answer(request)
    assert in_flight(harness) == models
    return requests


def answer_after(harness: SchedulerHarness, seconds: float, request: ReferenceRequest) -> None:
    """Lets the first event of a reply arrive after some time."""
    harness.wait(seconds)
    harness.answer(request)


# Permits and models


def test_without_a_model_limit_all_models_run_side_by_side_in_order_of_arrival() -> None:
    harness = a_harness(3, None)
    requests = arrive(harness, "abcdab")
    # No first request goes alone, either.
    assert in_flight(harness) == "abc"
    finish(harness, requests[1])
    assert in_flight(harness) == "acd"
    finish(harness, requests[3], requests[0])
    assert in_flight(harness) == "cab"


def test_a_request_for_another_model_waits_until_an_active_model_has_nothing_in_flight() -> None:
    harness = a_harness(max_loaded_models=2)
    a, b = load(harness, "ab")
    arrive(harness, "c")
    (second_a,) = arrive(harness, "a")
    assert in_flight(harness) == "aba"
    finish(harness, a)
    assert in_flight(harness) == "ba"
    finish(harness, second_a)
    assert in_flight(harness) == "bc"
    assert dict(harness.scheduler.swaps) == {"c": 1}
    finish(harness, b)


def test_the_model_that_has_been_idle_longest_gives_way() -> None:
    harness = a_harness(max_loaded_models=2)
    a, b = load(harness, "ab")
    finish(harness, b)
    harness.wait(1)
    finish(harness, a)
    arrive(harness, "c")
    assert harness.reference.active == ["a", "c"]


def test_a_model_that_becomes_active_where_there_is_room_is_not_a_swap() -> None:
    harness = a_harness(max_loaded_models=2)
    finish(harness, *load(harness, "ab"))
    finish(harness, *load(harness, "ab"))
    assert not harness.scheduler.swaps


def test_requests_for_active_models_are_admitted_while_no_request_is_overdue() -> None:
    harness = a_harness(2)
    (a,) = load(harness, "a")
    arrive(harness, "b")
    harness.wait(29.9)
    for _ in range(5):
        (late,) = arrive(harness, "a")
        assert in_flight(harness) == "aa"
        finish(harness, a)
        a = late
    assert not harness.scheduler.swaps


# Drains and batches


def test_once_a_request_is_overdue_the_longest_active_model_is_drained_and_the_other_goes_on() -> None:
    harness = a_harness(max_loaded_models=2)
    a, _b = load(harness, "ab")
    arrive(harness, "c")
    harness.wait(30)
    arrive(harness, "ab")
    assert in_flight(harness) == "abb"
    finish(harness, a)
    assert in_flight(harness) == "bbc"
    assert [request.model for request in harness.reference.waiting] == ["a"]


def test_a_drain_does_not_touch_what_is_in_flight_however_long_it_takes() -> None:
    harness = a_harness()
    a, second = load(harness, "aa")
    arrive(harness, "b")
    harness.wait(10_000)
    assert in_flight(harness) == "aa"
    finish(harness, a)
    harness.wait(10_000)
    assert in_flight(harness) == "a"
    finish(harness, second)
    assert in_flight(harness) == "b"


def test_a_request_for_an_active_model_is_never_overdue() -> None:
    harness = a_harness(1)
    (a,) = load(harness, "a")
    arrive(harness, "a")
    harness.wait(1000)
    assert harness.timer == math.inf
    assert not harness.reference.draining
    finish(harness, a)
    assert in_flight(harness) == "a"


def test_without_max_wait_no_request_is_overdue() -> None:
    harness = a_harness(max_wait=None)
    load(harness, "a")
    arrive(harness, "b")
    harness.wait(1e9)
    arrive(harness, "a")
    assert in_flight(harness) == "aa"


def test_a_drain_ends_when_the_overdue_request_leaves_and_those_held_back_go() -> None:
    harness = a_harness()
    load(harness, "a")
    (b,) = arrive(harness, "b")
    harness.wait(30)
    arrive(harness, "aa")
    assert in_flight(harness) == "a"
    finish(harness, b)
    assert in_flight(harness) == "aaa"


def test_a_drain_ends_when_another_model_has_given_way() -> None:
    harness = a_harness(max_loaded_models=2)
    _a, b = load(harness, "ab")
    arrive(harness, "c")
    harness.wait(30)
    arrive(harness, "a")
    assert (in_flight(harness), harness.reference.draining) == ("ab", ["a"])
    finish(harness, b)
    assert (in_flight(harness), harness.reference.draining) == ("aca", [])


def test_a_batch_is_admitted_before_the_next_drain_and_later_arrivals_are_not() -> None:
    harness = a_harness(2)
    (a,) = load(harness, "a")
    batch = arrive(harness, "bbbb")
    arrive(harness, "c")
    # Both are overdue.
    harness.wait(100)
    finish(harness, a)
    harness.answer(batch[0])
    arrive(harness, "b")
    assert (in_flight(harness), harness.reference.draining) == ("bb", [])
    finish(harness, batch[0])
    assert harness.reference.draining == []
    finish(harness, batch[1])
    assert (in_flight(harness), harness.reference.draining) == ("bb", ["b"])
    finish(harness, batch[2], batch[3])
    assert in_flight(harness) == "c"


def test_requests_that_a_drain_holds_back_wait_behind_the_overdue_one_even_if_they_arrived_earlier() -> None:
    # DESIGN: "later arrivals for it are held back, except members of its running batch"; read as later than the batch.
    harness = a_harness(1)
    (a,) = load(harness, "a")
    arrive(harness, "ab")
    harness.wait(30)
    finish(harness, a)
    assert in_flight(harness) == "b"


def test_the_requests_that_were_held_back_are_the_next_batch_in_order_of_arrival() -> None:
    harness = a_harness(3)
    (a,) = load(harness, "a")
    (b,) = arrive(harness, "b")
    harness.wait(30)
    held_back = arrive(harness, "aaa")
    finish(harness, a)
    assert in_flight(harness) == "b"
    finish(harness, b)
    harness.answer(held_back[0])
    assert harness.reference.in_flight == held_back
    assert harness.reference.epochs[-1].batch == tuple(held_back)


def test_a_batch_whose_last_member_is_cancelled_does_not_hold_up_the_next_drain() -> None:
    harness = a_harness()
    (a,) = load(harness, "a")
    _, second = arrive(harness, "bb")
    arrive(harness, "c")
    harness.wait(100)
    finish(harness, a)
    # The second one waits for the answer to the first.
    assert (in_flight(harness), harness.reference.draining) == ("b", [])
    finish(harness, second)
    assert harness.reference.draining == ["b"]


@pytest.mark.parametrize("start", [0.1, 0.7, 1000.1, 12345.678, 1e6 + 1 / 3])
@pytest.mark.parametrize("max_wait", [0.1, 0.3, 1 / 3, 29.9, 30.0])
def test_a_drain_begins_at_exactly_the_time_for_which_the_timer_was_set(start: float, max_wait: float) -> None:
    harness = a_harness(max_wait=max_wait, start=start)
    load(harness, "a")
    arrive(harness, "b")
    # In floating point, `timer - start` may be less than `max_wait`.
    assert harness.timer == start + max_wait
    harness.wait(harness.timer - start + 1e-9)
    assert harness.reference.draining == ["a"]
    harness.check()


# First requests


def test_the_first_request_for_a_model_that_is_not_loaded_goes_alone_until_it_is_answered() -> None:
    harness = a_harness(max_loaded_models=2)
    first, *_ = arrive(harness, "aaabb")
    assert in_flight(harness) == "ab"
    harness.answer(first)
    assert in_flight(harness) == "abaa"


def test_if_the_first_request_fails_the_next_one_goes_alone() -> None:
    harness = a_harness()
    first, second, third, _ = arrive(harness, "aaaa")
    finish(harness, first)
    assert harness.reference.in_flight == [second]
    finish(harness, third)
    assert harness.reference.in_flight == [second]
    harness.answer(second)
    assert in_flight(harness) == "aa"


def test_a_model_counts_as_unloaded_after_an_eviction() -> None:
    harness = a_harness()
    finish(harness, *load(harness, "a"))
    harness.mark_unloaded("a")
    first, _ = arrive(harness, "aa")
    assert harness.reference.in_flight == [first]
    # While the model is being loaded, that changes nothing.
    harness.mark_unloaded("a")
    harness.answer(first)
    assert in_flight(harness) == "aa"


def test_a_model_counts_as_unloaded_when_its_slot_went_to_another() -> None:
    harness = a_harness()
    for model in "aba":
        first, second = arrive(harness, model * 2)
        assert harness.reference.in_flight == [first]
        harness.answer(first)
        finish(harness, first, second)


def test_an_idle_model_that_keeps_its_slot_stays_loaded() -> None:
    harness = a_harness()
    finish(harness, *load(harness, "a"))
    harness.wait(1e6)
    arrive(harness, "aa")
    assert in_flight(harness) == "aa"


# New limits


def test_new_limits_admit_more_at_once_and_do_not_touch_what_is_in_flight() -> None:
    harness = a_harness(1)
    arrive(harness, "aab")
    harness.set_limits(Limits(max_concurrency=3, max_loaded_models=2))
    # The first request for a is not answered yet.
    assert in_flight(harness) == "ab"
    harness.set_limits(Limits(max_concurrency=1, max_loaded_models=2))
    harness.check()
    assert in_flight(harness) == "ab"
    harness.set_limits(Limits(max_concurrency=3))
    assert in_flight(harness) == "aba"


# Limits lowered below what is in flight


def lower(harness: SchedulerHarness, max_loaded_models: int) -> None:
    harness.set_limits(Limits(max_loaded_models=max_loaded_models))
    harness.check()


def test_surplus_models_finish_what_is_in_flight_before_another_model_becomes_active() -> None:
    harness = a_harness(max_loaded_models=None)
    a, b = arrive(harness, "ab")
    lower(harness, 1)
    arrive(harness, "c")
    finish(harness, a)
    assert in_flight(harness) == "b"
    finish(harness, b)
    assert in_flight(harness) == "c"


def test_a_surplus_model_gets_no_new_requests_and_a_model_within_the_limit_does() -> None:
    harness = a_harness(max_loaded_models=2)
    a, b = load(harness, "ab")
    lower(harness, 1)
    _, second_a = arrive(harness, "ba")
    assert in_flight(harness) == "aba"
    finish(harness, b)
    assert in_flight(harness) == "aa"
    finish(harness, a, second_a)
    assert in_flight(harness) == "b"


def test_a_model_keeps_its_slot_as_long_as_giving_it_up_would_not_make_room() -> None:
    harness = a_harness(max_loaded_models=2)
    a, b = load(harness, "ab")
    lower(harness, 1)
    arrive(harness, "c")
    finish(harness, a)
    (another_a,) = arrive(harness, "a")
    assert in_flight(harness) == "ba"
    finish(harness, b, another_a)
    assert in_flight(harness) == "c"
    assert dict(harness.scheduler.swaps) == {"c": 1}


def test_several_idle_models_give_way_to_one_if_a_surplus_model_is_in_flight() -> None:
    harness = a_harness(max_loaded_models=3)
    a, b, _c = load(harness, "abc")
    lower(harness, 2)
    finish(harness, a, b)
    arrive(harness, "d")
    assert in_flight(harness) == "cd"
    assert harness.reference.active == ["c", "d"]
    assert dict(harness.scheduler.swaps) == {"d": 1}


def test_a_task_that_holds_a_surplus_model_cannot_wait_for_the_model_that_would_have_to_give_way_first() -> None:
    harness = a_harness(max_loaded_models=2)
    load(harness, "a")
    (b,) = arrive(harness, "b", "mine")
    harness.answer(b)
    lower(harness, 1)
    arrive(harness, "c")
    harness.wait(30)
    (deadlocked,) = arrive(harness, "a", "mine")
    assert harness.deadlocked == [deadlocked]


# Deadlocks


def test_a_request_is_deadlocked_when_its_task_holds_all_models_and_not_while_another_task_holds_one() -> None:
    harness = a_harness(max_loaded_models=2)
    arrive(harness, "a", "mine")
    (b,) = arrive(harness, "b", "other")
    arrive(harness, "c", "mine")
    assert not harness.deadlocked
    finish(harness, b)
    assert in_flight(harness) == "ac"
    (d,) = arrive(harness, "d", "mine")
    assert harness.deadlocked == [d]


def test_a_drain_can_turn_a_wait_into_a_deadlock() -> None:
    harness = a_harness(2)
    (a,) = arrive(harness, "a", "mine")
    harness.answer(a)
    (other,) = arrive(harness, "a")
    (second,) = arrive(harness, "a", "mine")
    arrive(harness, "b")
    harness.wait(29.9)
    assert not harness.deadlocked
    harness.wait(0.1)
    assert harness.deadlocked == [second]
    finish(harness, other, a)
    assert in_flight(harness) == "b"


def test_new_limits_can_turn_a_wait_into_a_deadlock() -> None:
    harness = a_harness(2)
    arrive(harness, "a", "mine")
    # It waits for the answer to the first request.
    (second,) = arrive(harness, "a", "mine")
    assert not harness.deadlocked
    harness.set_limits(Limits(max_concurrency=1, max_loaded_models=1))
    assert harness.deadlocked == [second]


# Priorities


def test_the_request_with_the_highest_priority_goes_first() -> None:
    harness = a_harness(1, None)
    (first,) = arrive(harness, "a")
    batch = harness.arrive("a", priority=-1)
    (normal,) = arrive(harness, "a")
    urgent = harness.arrive("a", priority=1)
    for request, following in ((first, urgent), (urgent, normal), (normal, batch)):
        finish(harness, request)
        assert harness.reference.in_flight == [following]


def test_a_request_rises_by_one_level_for_each_max_wait_seconds() -> None:
    harness = a_harness(1, None)
    (first,) = arrive(harness, "a")
    patient = harness.arrive("a", priority=-1)
    harness.wait(29.9)
    (normal,) = arrive(harness, "a")
    harness.wait(0.1)
    urgent = harness.arrive("a", priority=1)
    for request, following in ((first, urgent), (urgent, patient), (patient, normal)):
        finish(harness, request)
        assert harness.reference.in_flight == [following]


def test_requests_do_not_rise_above_the_highest_priority_that_waits() -> None:
    # Otherwise the first requests of young runs would go before those of old runs as soon as they have waited long.
    harness = a_harness(1, None, begun=None)
    old, young = ScheduledRun(), ScheduledRun()
    first = harness.arrive("a", run=old)
    harness.arrive("a", run=young)
    harness.wait(100)
    of_old = harness.arrive("a", run=old)
    finish(harness, first)
    assert harness.reference.in_flight == [of_old]


def test_a_patient_member_of_a_batch_does_not_hold_up_an_overdue_request() -> None:
    harness = a_harness(1)
    (b,) = load(harness, "b")
    batch = [harness.arrive("a"), harness.arrive("a", priority=-5)]
    finish(harness, b)
    harness.answer(batch[0])
    (overdue,) = arrive(harness, "b")
    harness.wait(30)
    arrive(harness, "aaa")
    finish(harness, batch[0])
    assert harness.reference.in_flight == [batch[1]]
    finish(harness, batch[1])
    assert harness.reference.in_flight == [overdue]


def test_a_model_that_gives_way_has_no_batch_any_more() -> None:
    """The members of its batch whose runs could not begin yet used to prevent every later drain."""
    harness = a_harness(1)
    first, second = ScheduledRun(), ScheduledRun()
    of_first = harness.arrive("a", run=first)
    harness.arrive("a", run=second)
    finish(harness, of_first)
    finish(harness, harness.arrive("b", run=first))
    harness.end_run(first)
    while harness.reference.in_flight:
        finish(harness, harness.reference.in_flight[0])
    assert harness.scheduler._models.batch_members == 0


def test_without_max_wait_no_request_rises() -> None:
    harness = a_harness(1, None, None)
    (first,) = arrive(harness, "a")
    harness.arrive("a", priority=-1)
    harness.wait(1e9)
    (normal,) = arrive(harness, "a")
    finish(harness, first)
    assert harness.reference.in_flight == [normal]


def test_a_request_with_a_high_priority_does_not_kill_or_drain_another_model() -> None:
    harness = a_harness(2)
    (a,) = load(harness, "a")
    harness.arrive("b", priority=5)
    (second,) = arrive(harness, "a")
    assert harness.reference.in_flight == [a, second]
    finish(harness, a, second)
    assert in_flight(harness) == "b"


def test_of_several_inactive_models_that_of_the_most_urgent_request_is_next() -> None:
    harness = a_harness()
    (a,) = load(harness, "a")
    arrive(harness, "b")
    harness.arrive("c", priority=1)
    finish(harness, a)
    assert in_flight(harness) == "c"


# Runs


def test_requests_of_an_older_run_go_before_those_of_a_younger_one() -> None:
    harness = a_harness(1, None, begun=None)
    old, young = ScheduledRun(), ScheduledRun()
    first = harness.arrive("a", run=old)
    of_young = harness.arrive("a", run=young)
    (lone,) = arrive(harness, "a")
    of_old = harness.arrive("a", run=old)
    for request, following in ((first, of_old), (of_old, of_young), (of_young, lone)):
        finish(harness, request)
        assert harness.reference.in_flight == [following]


def test_in_the_order_of_requests_the_age_of_a_run_does_not_count() -> None:
    harness = SchedulerHarness(Limits(max_concurrency=1, order="request"))
    old = ScheduledRun()
    first = harness.arrive("a", run=old)
    (lone,) = arrive(harness, "a")
    harness.arrive("a", run=old)
    finish(harness, first)
    assert harness.reference.in_flight == [lone]


def test_no_more_runs_begin_than_there_are_permits_until_one_ends() -> None:
    harness = a_harness(2, None)
    runs = [ScheduledRun() for _ in range(3)]
    requests = [harness.arrive("a", run=run) for run in runs]
    answer_after(harness, 2, requests[0])
    finish(harness, requests[0])
    # The first run calls a tool, and its permit stays free.
    assert harness.reference.in_flight == [requests[1]]
    again = harness.arrive("a", run=runs[0])
    assert harness.reference.in_flight == [requests[1], again]
    finish(harness, again)
    harness.end_run(runs[0])
    assert harness.reference.in_flight == [requests[1], requests[2]]


@pytest.mark.parametrize(("seconds", "kept"), [(0.5, 0.5), (3, 3), (60, 3)])
def test_a_run_whose_tool_takes_long_lets_the_next_begin_and_goes_first_when_it_asks_again(
    seconds: float, kept: float
) -> None:
    harness = a_harness(1, None)
    old, young, youngest = ScheduledRun(), ScheduledRun(), ScheduledRun()
    first = harness.arrive("a", run=old)
    answer_after(harness, seconds, first)
    finish(harness, first)
    of_young = harness.arrive("a", run=young)
    harness.wait(kept - 0.1)
    assert not harness.reference.in_flight
    harness.wait(0.1)
    assert harness.reference.in_flight == [of_young]
    harness.arrive("a", run=youngest)
    of_old = harness.arrive("a", run=old)
    finish(harness, of_young)
    assert harness.reference.in_flight == [of_old]


def test_only_the_first_answer_of_a_run_says_how_long_its_place_is_kept() -> None:
    harness = a_harness(1, None)
    run = ScheduledRun()
    for seconds in (1.0, 2.5):
        request = harness.arrive("a", run=run)
        answer_after(harness, seconds, request)
        finish(harness, request)
    (lone,) = arrive(harness, "a")
    harness.wait(0.9)
    assert harness.reference.waiting == [lone]
    harness.wait(0.1)
    assert harness.reference.in_flight == [lone]


@pytest.mark.parametrize("answered", [True, False])
def test_no_place_is_kept_for_a_run_whose_answer_took_no_time_or_never_came(answered: bool) -> None:
    harness = a_harness(1, None)
    first = harness.arrive("a", run=ScheduledRun())
    if answered:
        harness.answer(first)
    (lone,) = arrive(harness, "a")
    finish(harness, first)
    assert harness.reference.in_flight == [lone]


def test_a_run_that_pauses_lets_the_next_begin_at_once() -> None:
    harness = a_harness(1, None)
    run = ScheduledRun()
    first = harness.arrive("a", run=run)
    answer_after(harness, 3, first)
    (lone,) = arrive(harness, "a")
    harness.pause_run(run)
    finish(harness, first)
    # The run had a request when it paused, so that did not count.
    assert harness.reference.waiting == [lone]
    harness.pause_run(run)
    assert harness.reference.in_flight == [lone]


def test_a_request_waits_for_other_runs_for_as_long_as_they_go_on() -> None:
    harness = a_harness(2, None, begun=1)
    run = ScheduledRun()
    harness.arrive("a", run=run)
    (lone,) = arrive(harness, "a")
    harness.wait(300.0)
    assert harness.reference.waiting == [lone]
    harness.end_run(run)
    assert lone in harness.reference.in_flight


def test_a_request_that_rises_above_the_priority_of_a_run_does_not_wait_for_it() -> None:
    harness = a_harness(2, 1, begun=1)
    harness.answer(harness.arrive("a", run=ScheduledRun()))
    (patient,) = arrive(harness, "a")
    harness.wait(10)
    # It has to wait for its model, and others may rise up to its level in the meantime.
    urgent = harness.arrive("b", priority=1)
    harness.wait(19.9)
    assert harness.reference.waiting == [patient, urgent]
    harness.wait(0.1)
    assert harness.reference.waiting == [urgent]


def test_an_overdue_request_does_not_wait_for_runs() -> None:
    harness = a_harness(2, 1, begun=1)
    first = harness.arrive("a", run=ScheduledRun())
    answer_after(harness, 3, first)
    (other,) = arrive(harness, "b")
    harness.wait(30)
    finish(harness, first)
    # The run still counts, because its tool may answer soon.
    assert harness.reference.in_flight == [other]


def test_a_batch_does_not_wait_for_runs_while_a_request_is_overdue() -> None:
    harness = a_harness(2, 1, begun=1)
    (before,) = load(harness, "z")
    first = harness.arrive("a", run=ScheduledRun())
    (member,) = arrive(harness, "a")
    finish(harness, before)
    harness.answer(first)
    (other,) = arrive(harness, "b")
    harness.wait(29.9)
    assert harness.reference.waiting == [member, other]
    harness.wait(0.1)
    assert harness.reference.in_flight == [first, member]


def test_a_begun_run_of_a_lower_priority_does_not_hold_up_a_request() -> None:
    harness = a_harness(2, None, begun=1)
    harness.arrive("a", run=ScheduledRun(), priority=-1)
    urgent = harness.arrive("a")
    assert urgent in harness.reference.in_flight
    assert harness.arrive("a", priority=-1) in harness.reference.waiting


def test_a_task_that_holds_a_permit_does_not_wait_for_runs_to_get_another_one() -> None:
    harness = a_harness(2, None, begun=1)
    harness.arrive("a", "mine")
    second = harness.arrive("a", "mine")
    assert second in harness.reference.in_flight


def test_the_first_requests_of_one_run_begin_together() -> None:
    harness = a_harness(3, None, begun=1)
    run = ScheduledRun()
    first, second = harness.arrive("a", run=run), harness.arrive("a", run=run)
    assert harness.reference.in_flight == [first, second]


def test_runs_that_come_and_go_leave_nothing_behind() -> None:
    harness = a_harness(2, None)
    scheduler = harness.scheduler
    for _ in range(20):
        runs = [ScheduledRun() for _ in range(4)]
        requests = [harness.arrive("a", run=run) for run in runs]
        # The last run leaves without having begun.
        finish(harness, requests.pop())
        while harness.reference.in_flight:
            request = harness.reference.in_flight[0]
            finish(harness, request)
            assert request.run is not None
            harness.end_run(request.run)
    begun = scheduler._runs
    kept = [begun._counted, begun._idle, begun._totals, begun._requests]
    assert not any(kept)
    assert not scheduler._newcomers


# Memory and speed


def test_requests_that_come_and_go_behind_a_long_wait_leave_nothing_behind() -> None:
    harness = a_harness(max_wait=None)
    load(harness, "a")
    arrive(harness, "b")
    scheduler = harness.scheduler
    for number in range(1000):
        permit = Permit(f"model {number}", 0.0)
        scheduler.arrive(permit)
        assert scheduler.admit(0.0) == []
        assert scheduler.leave(permit, 0.0)
        models = scheduler._models
        for heap in (models.ready, models.newcomers, models.next_overdue):
            assert len(heap) < 20
        assert len(scheduler._rising) < 20
    assert set(scheduler._models.queues) == {"a", "b"}


def _lines_for(run: Callable[[], None]) -> int:
    """Counts the lines of the scheduler that are executed, each as often as it is."""
    count = 0
    files = {module.__file__ for module in SCHEDULER_MODULES}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def _in_turn(models: list[str], limits: Limits) -> None:
    """All requests arrive at once, overdue from the start, and each ends as soon as it is admitted."""
    scheduler = Scheduler(limits)
    for model in models:
        scheduler.arrive(Permit(model, -1000.0))
        scheduler.admit(0.0)
    for _ in models:
        permit = next(iter(scheduler.in_flight))
        scheduler.mark_loaded(permit, 0.0)
        assert scheduler.leave(permit, 0.0)
        scheduler.admit(0.0)
        scheduler.next_change(0.0)
    assert (len(scheduler.in_flight), len(scheduler.waiting)) == (0, 0)


def _cancelled(models: list[str], limits: Limits, step: int) -> None:
    """All requests but the first leave again while they wait, the latest first if `step` is -1."""
    scheduler = Scheduler(limits)
    permits = [Permit(model, 0.0) for model in models]
    for permit in permits:
        scheduler.arrive(permit)
        scheduler.admit(0.0)
    for permit in permits[1:][::step]:
        assert scheduler.leave(permit, 0.0)
        scheduler.admit(0.0)
        scheduler.next_change(0.0)
    assert (len(scheduler.in_flight), len(scheduler.waiting)) == (1, 0)


ONE = Limits(max_concurrency=1, max_loaded_models=1)
FOUR = Limits(max_concurrency=4, max_loaded_models=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda count: _in_turn(["a"] * count, ONE), id="one model"),
        pytest.param(lambda count: _in_turn(["a"] * count, Limits(max_concurrency=1)), id="no limit of models"),
        pytest.param(lambda count: _in_turn([str(number) for number in range(count)], ONE), id="all different"),
        pytest.param(lambda count: _in_turn([str(number) for number in range(count)], FOUR), id="all different, two"),
        pytest.param(lambda count: _in_turn(["a", "b", "c"] * (count // 3), FOUR), id="three models in turn"),
        pytest.param(lambda count: _cancelled(["a"] * count, ONE, 1), id="cancelled"),
        pytest.param(lambda count: _cancelled(["a"] * count, ONE, -1), id="cancelled backwards"),
        pytest.param(lambda count: _cancelled([str(i) for i in range(count)], ONE, 1), id="different, cancelled"),
        pytest.param(lambda count: _cancelled([str(i) for i in range(count)], ONE, -1), id="different, backwards"),
    ],
)
def test_ten_thousand_waiters_cost_no_more_each_than_a_thousand(run: Callable[[int], None]) -> None:
    """It counts lines of Python, and so leaves out the comparisons inside the heap: O(log n) for each push and pop."""
    few, many = _lines_for(lambda: run(1_000)) / 1_000, _lines_for(lambda: run(10_000)) / 10_000
    assert few > 10
    assert many < 1.05 * few


def test_each_waiter_is_pushed_to_each_heap_at_most_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = 0
    push = heapq.heappush

    def count(heap: list[Any], item: object) -> None:
        nonlocal pushed
        pushed += 1
        push(heap, item)

    monkeypatch.setattr("heapq.heappush", count)
    _in_turn(["a", "b", "c"] * 1000, FOUR)
    _in_turn([str(number) for number in range(3000)], ONE)
    # The heaps are the two of the queue, the two of inactive models, those overdue next, and those that rise next.
    assert 0 < pushed <= 6 * 2 * 6000


# The bound on a wait


@st.composite
def _jobs(draw: st.DrawFn, priorities: list[int]) -> list[tuple[int, str, int, int, int]]:
    """Draws requests: arrival, model, the times after admission at which they are answered and end, and priority."""
    gaps, times = st.sampled_from([0, 0, 0, 1, 5, 20]), st.sampled_from([0, 1, 3, 10, 40])
    jobs, now = [], 0
    for _ in range(draw(st.integers(1, 25))):
        now += draw(gaps)
        answered = draw(times)
        model, priority = draw(st.sampled_from("aaabbc")), draw(st.sampled_from(priorities))
        jobs.append((now, model, answered, answered + 1 + draw(times), priority))
    return jobs


def _simulate(limits: Limits, jobs: list[tuple[int, str, int, int, int]]) -> ReferenceSchedule:
    """Runs requests in simulated time, in whole seconds, until all have ended."""
    harness = SchedulerHarness(limits, start=0.0)
    events: list[tuple[float, int, str, ReferenceRequest | int]] = [
        (job[0], -1, "arrive", n) for n, job in enumerate(jobs)
    ]
    heapq.heapify(events)
    known: set[ReferenceRequest] = set()
    while events:
        when, _, what, which = heapq.heappop(events)
        harness.wait(when - harness.now)
        if isinstance(which, int):
            harness.arrive(jobs[which][1], priority=jobs[which][4])
        elif what == "answer":
            harness.answer(which)
        else:
            harness.end(which)
        harness.check()
        for request in harness.reference.in_flight:
            if request not in known:
                known.add(request)
                number = harness.reference.arrived.index(request)
                heapq.heappush(events, (harness.now + jobs[number][2], 2 * number, "answer", request))
                heapq.heappush(events, (harness.now + jobs[number][3], 2 * number + 1, "end", request))
    assert len(harness.reference.over) == len(jobs)
    return harness.reference


def _ahead_of(request: ReferenceRequest, reference: ReferenceSchedule) -> list[ReferenceRequest]:
    """Returns the requests for whose time in flight another one may have to wait once it is overdue."""
    overdue = _overdue(request, reference)
    began = [each for each in reference.epochs[: request.epochs_before] if each.model != request.model]
    running = [each for each in began if each.began <= overdue][-1:]
    later = [each for each in began if each.began >= overdue]
    members = {member for epoch in running + later for member in epoch.batch}
    own = {each for each in _before(request, reference) if each.model == request.model}
    in_flight = {each for each in reference.arrived if each.admitted <= overdue < each.over}
    ahead = members | own | in_flight
    if reference.max_models > 1 or not reference.is_fifo:
        ahead |= {each for member in members | {request} for each in _before(member, reference)}
    if reference.max_models > 1:
        ahead |= {each for epoch in later for each in reference.arrived if each.admitted <= epoch.began < each.over}
        whole = [max(member.admitted for member in epoch.batch) for epoch in running + later if epoch.batch]
        ahead |= {each for moment in whole for each in reference.arrived if each.admitted <= moment < each.over}
    return sorted(ahead, key=lambda each: each.admitted)


def _before(request: ReferenceRequest, reference: ReferenceSchedule) -> list[ReferenceRequest]:
    """Returns the requests that may go before another one."""
    if reference.is_fifo:
        return reference.arrived[: reference.arrived.index(request)]
    return [each for each in reference.arrived if each.arrived <= _overdue(request, reference) and each is not request]


def _overdue(request: ReferenceRequest, reference: ReferenceSchedule) -> float:
    """Returns when a request is overdue, and has risen above the priority of all requests that arrive later."""
    assert reference.limits.max_wait is not None
    levels_above = max(each.priority for each in reference.arrived) - request.priority
    return request.arrived + (1 + levels_above) * reference.limits.max_wait


@settings(deadline=None, max_examples=150)
@given(
    jobs=st.one_of(_jobs([0]), _jobs([0]), _jobs([-1, 0, 0, 1])),
    max_concurrency=st.integers(1, 4),
    max_loaded_models=st.sampled_from([1, 1, 2]),
    max_wait=st.sampled_from([1.0, 10.0, 30.0]),
)
def test_a_wait_is_at_most_max_wait_and_one_batch_for_each_other_model_ahead(
    jobs: list[tuple[int, str, int, int, int]], max_concurrency: int, max_loaded_models: int, max_wait: float
) -> None:
    """Checks the exact bound on the wait of a request.

    From the time at which a request is overdue until it is admitted, one of the following is in flight at every moment.
    So the request waits for no longer than `max_wait` plus the sum of their times in flight.

    - The requests that were in flight when it became overdue, and the members of the running batch that had not been
      admitted yet.
    - The batches of the models that became active after that and before it was admitted: at most one for each other
      model.
    - The requests for its own model that arrived before it.

    If several models are active, all these share the permits, in order of arrival, with the requests for models that
    stay active all the time. Then the following count as well:

    - the requests that arrived before it, or before a member of those batches;
    - the requests that were in flight when one of those models became active or had its batch admitted, because the
      batch of a model that is not loaded waits for its first answer, and no drain begins before that.

    With priorities, "overdue" means that the request has also risen above all priorities: it has waited for `max_wait`
    once more for each level by which another request had a higher priority. And "arrived before it" means that a
    request arrived before that time, because until then it may have gone first. Requests may go before a member of a
    batch as well, so those that "arrived before" a member count even with one active model.
    """
    limits = Limits(max_concurrency=max_concurrency, max_loaded_models=max_loaded_models, max_wait=max_wait)
    reference = _simulate(limits, jobs)
    reference.check_history()
    for request in reference.arrived:
        reached = _overdue(request, reference)
        for each in _ahead_of(request, reference):
            if each.admitted <= reached:
                reached = max(reached, each.over)
        assert request.admitted <= reached, (
            f"{request} was admitted at {request.admitted}, with nothing ahead of it since {reached}"
        )


def test_the_bound_is_met_to_the_second() -> None:
    limits = Limits(max_concurrency=1, max_loaded_models=1, max_wait=30.0)
    # a is drained at 30 and its second request in flight then ends at 36; the batch of b takes 5 and 7, that of c 4.
    jobs = [(0, "a", 1, 18), (1, "a", 1, 18), (2, "b", 1, 5), (2, "c", 1, 4), (2, "d", 1, 1), (3, "b", 1, 7)]
    jobs += [(time, "a", 1, 18) for time in range(4, 31)] + [(time, "b", 1, 9) for time in range(40, 44)]
    reference = _simulate(limits, [(*job, 0) for job in jobs])
    admitted = {str(request.model): request.admitted for request in reversed(reference.arrived[:5])}
    assert admitted == {"a": 0, "b": 36, "c": 36 + 5 + 7, "d": 36 + 5 + 7 + 4}


def test_max_wait_does_not_bound_the_wait_for_earlier_requests_for_the_same_model() -> None:
    limits = Limits(max_concurrency=1, max_loaded_models=1, max_wait=30.0)
    reference = _simulate(limits, [(0, "a", 1, 18, 0)] * 10)
    # docs/model-scheduling.md has this example.
    assert reference.arrived[-1].admitted == 162


# Any events in any order

TestAnyEvents = ScheduleMachine.TestCase
TestAnyEvents.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


# The slots of the server


def harness_that_has_seen(cached: int | None, max_begun_runs: int | Literal["auto"] = "auto") -> SchedulerHarness:
    """Two slots, and a reply to a run that had lost its own, with so many of 100 tokens from the server's cache."""
    harness = SchedulerHarness(Limits(max_concurrency=2, max_begun_runs=max_begun_runs), start=0.0)
    displaced = ScheduledRun()
    request = harness.arrive("m", run=displaced)
    harness.note_reply(request, (100, 0))
    harness.end(request)
    harness.end(harness.arrive("m"))
    harness.end(harness.arrive("m"))
    request = harness.arrive("m", run=displaced)
    harness.note_reply(request, (120, cached))
    harness.end(request)
    harness.end_run(displaced)
    harness.check()
    return harness


def harness_with_a_free_slot(
    tool: float, harness: SchedulerHarness | None = None
) -> tuple[SchedulerHarness, ScheduledRun]:
    """Two slots: one run has ended a moment ago, and the tool of another one has been running for longer than that.

    The first answer of each run took a second, so a slot is kept for that long. By default the server is known to
    forget the conversations that have lost their slot.
    """
    harness = harness or harness_that_has_seen(cached=0)
    ending, calling = ScheduledRun(), ScheduledRun()
    requests = [harness.arrive("m", run=run) for run in (ending, calling)]
    harness.wait(1.0)
    for request in requests:
        harness.answer(request)
    harness.end(requests[1])
    harness.wait(tool)
    harness.end(requests[0])
    harness.end_run(ending)
    return harness, calling


def test_a_run_begins_when_the_server_answers_the_run_whose_slot_it_would_take() -> None:
    harness, calling = harness_with_a_free_slot(tool=0.5)
    newcomer = harness.arrive("m", run=ScheduledRun())
    harness.wait(0.25)
    request = harness.arrive("m", run=calling)
    harness.wait(0.5)
    assert newcomer in harness.reference.waiting
    harness.answer(request)
    assert newcomer in harness.reference.in_flight
    harness.check()


@pytest.mark.parametrize("asks_again", [True, False])
def test_a_run_begins_when_a_slot_has_been_kept_for_as_long_as_reading_takes(asks_again: bool) -> None:
    harness, calling = harness_with_a_free_slot(tool=0.5)
    newcomer = harness.arrive("m", run=ScheduledRun())
    harness.wait(0.25)
    if asks_again:
        harness.arrive("m", run=calling)
    harness.wait(1.0 if asks_again else 0.25)
    assert newcomer in harness.reference.in_flight
    harness.check()


def test_a_run_begins_at_once_in_a_slot_that_was_used_less_recently() -> None:
    harness, _ = harness_with_a_free_slot(tool=0.0)
    assert harness.arrive("m", run=ScheduledRun()) in harness.reference.waiting
    harness = harness_that_has_seen(cached=0)
    harness.end(harness.arrive("m", run=ScheduledRun()))
    calling = harness.arrive("m", run=ScheduledRun())
    harness.wait(1.0)
    harness.answer(calling)
    harness.end(calling)
    assert harness.arrive("m", run=ScheduledRun()) in harness.reference.in_flight


def test_an_urgent_run_does_not_wait_for_the_slot_of_another() -> None:
    harness, _ = harness_with_a_free_slot(tool=0.5)
    assert harness.arrive("m", run=ScheduledRun(), priority=1) in harness.reference.in_flight
    harness.check()


@pytest.mark.parametrize("cached", [None, 0, 49])
def test_slots_are_kept_if_the_server_has_forgotten_a_run(cached: int | None) -> None:
    harness, _ = harness_with_a_free_slot(tool=0.5, harness=harness_that_has_seen(cached))
    assert harness.arrive("m", run=ScheduledRun()) in harness.reference.waiting


@pytest.mark.parametrize("cached", [50, 100])
def test_no_slot_is_kept_if_the_server_has_remembered_a_run(cached: int) -> None:
    harness = harness_that_has_seen(cached)
    calling = [ScheduledRun() for _ in range(2)]
    requests = [harness.arrive("m", run=run) for run in calling]
    harness.wait(1.0)
    for request in requests:
        harness.answer(request)
        harness.end(request)
    # The tools of both are running. As many runs have begun as there are slots.
    assert harness.arrive("m", run=ScheduledRun()) in harness.reference.in_flight
    harness.check()


def test_the_latest_reply_decides_whether_the_server_remembers() -> None:
    harness = harness_that_has_seen(100)
    runs = [ScheduledRun() for _ in range(3)]
    for run in runs:
        request = harness.arrive("m", run=run)
        harness.note_reply(request, (100, 0))
        harness.end(request)
    # The first of them has lost its slot, and the others are in the slots.
    request = harness.arrive("m", run=runs[0])
    harness.note_reply(request, (120, 0))
    harness.end(request)
    request = harness.arrive("m", run=runs[0])
    harness.note_reply(request, (140, 120))
    assert harness.reference.remembers is False
    harness.check()


def test_a_limit_on_begun_runs_that_the_user_has_set_counts_even_if_the_server_remembers() -> None:
    harness = harness_that_has_seen(cached=100, max_begun_runs=1)
    request = harness.arrive("m", run=ScheduledRun())
    harness.wait(1.0)
    harness.answer(request)
    harness.end(request)
    assert harness.arrive("m", run=ScheduledRun()) in harness.reference.waiting
    harness.check()


def test_one_run_at_a_time_may_lose_its_slot_to_find_out_whether_the_server_remembers() -> None:
    unknown = SchedulerHarness(Limits(max_concurrency=2, max_begun_runs=3), start=0.0)
    harness, calling = harness_with_a_free_slot(tool=0.5, harness=unknown)
    second = ScheduledRun()
    request = harness.arrive("m", run=second)
    assert harness.reference.displaced == {calling}
    harness.wait(1.0)
    harness.answer(request)
    harness.end(request)
    harness.end(harness.arrive("m"))
    # A third run would displace the second one, while nobody has seen yet what became of the first one.
    third = harness.arrive("m", run=ScheduledRun())
    assert third in harness.reference.waiting
    harness.end_run(calling)
    assert third in harness.reference.in_flight
    assert harness.reference.displaced == {second}
    harness.check()


def test_what_the_server_remembers_is_still_known_after_the_limits_have_changed() -> None:
    harness = harness_that_has_seen(100)
    harness.set_limits(Limits(max_concurrency=3))
    harness.arrive("m", run=ScheduledRun())
    assert harness.reference.remembers is True
    harness.check()


def test_a_server_that_forgot_gets_another_chance_after_a_hundred_requests() -> None:
    harness = harness_that_has_seen(0)
    # The request whose reply has shown it is the first one.
    for _ in range(98):
        harness.end(harness.arrive("m"))
    assert harness.reference.remembers is False
    harness.check()
    harness.end(harness.arrive("m"))
    assert harness.reference.remembers is None
    harness.check()
