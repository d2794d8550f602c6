"""Waiting for a permit: order, cancellation, limits on waiting, and models."""

from __future__ import annotations

import asyncio
import contextvars
import gc
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge._scheduled_run import ScheduledRun, current_run
from lmbridge.config import Limits
from lmbridge.errors import LLMError, LLMTimeoutError, TaskCancelledError
from lmbridge.transport.admission import Admission
from lmbridge.transport.begun_runs import RUN_PATIENCE
from lmbridge.transport.permits import Permit
from tests.support import cancel_at_each_step, living, turns
from tests.transport.clock import Clock

LoopErrors = list[dict[str, Any]]


@pytest.fixture
async def loop_errors() -> LoopErrors:
    """Collects what the event loop would log, such as exceptions that were never retrieved."""
    loop_errors: LoopErrors = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_errors.append(context))
    return loop_errors


def an_admission(max_concurrency: int = 1, max_queue: float | None = 600.0) -> Admission:
    return Admission(Limits(max_concurrency=max_concurrency, max_queue=max_queue))


def ask(admission: Admission, model: str | None = "m") -> asyncio.Task[Permit]:
    """Starts a task that asks for a permit."""
    return asyncio.create_task(admission.acquire(model))


async def held_by_others(admission: Admission, count: int = 1) -> list[Permit]:
    return [await ask(admission) for _ in range(count)]


# Priorities and runs


async def test_the_priority_decides_which_waiting_request_goes_first() -> None:
    admission = an_admission()
    permit = await admission.acquire("m")
    patient = asyncio.create_task(admission.acquire("m", priority=-1))
    urgent = asyncio.create_task(admission.acquire("m", priority=1))
    await turns()
    admission.release(permit)
    assert (await urgent).priority == 1
    assert not patient.done()
    admission.release(urgent.result())
    await patient


def ask_in_run(admission: Admission, run: ScheduledRun) -> asyncio.Task[Permit]:
    context = contextvars.copy_context()
    context.run(current_run.set, run)
    return asyncio.create_task(admission.acquire("m"), context=context)


async def after_a_first_round(run: ScheduledRun, clock: Clock) -> Admission:
    """Returns an admission for one run at a time, and lets a run answer its first request and call a tool."""
    admission = Admission(Limits(max_concurrency=1, max_begun_runs=1))
    permit = await ask_in_run(admission, run)
    clock.now += RUN_PATIENCE
    admission.mark_loaded(permit)
    admission.release(permit)
    return admission


async def test_the_end_of_a_run_lets_the_next_one_begin(clock: Clock) -> None:
    first, second = ScheduledRun(), ScheduledRun()
    admission = await after_a_first_round(first, clock)
    waiting = ask_in_run(admission, second)
    await turns()
    assert (admission.in_flight, waiting.done()) == (0, False)
    first.end()
    assert (await waiting).run is second


async def test_a_run_whose_tool_takes_long_lets_the_next_one_begin(clock: Clock) -> None:
    first, second = ScheduledRun(), ScheduledRun()
    admission = await after_a_first_round(first, clock)
    waiting = ask_in_run(admission, second)
    await turns()
    assert not waiting.done()
    clock.now += RUN_PATIENCE
    await turns()
    assert (await waiting).run is second


async def test_a_run_that_pauses_lets_the_next_one_begin(clock: Clock) -> None:
    first, second = ScheduledRun(), ScheduledRun()
    admission = await after_a_first_round(first, clock)
    waiting = ask_in_run(admission, second)
    await turns()
    assert not waiting.done()
    first.pause()
    assert (await waiting).run is second


@pytest.mark.parametrize("is_held", [True, False], ids=["another request is in flight", "nothing is in flight"])
async def test_the_error_of_a_request_that_waits_for_another_run_names_the_limit_on_runs(
    clock: Clock, is_held: bool
) -> None:
    admission = Admission(Limits(max_concurrency=4, max_begun_runs=1, max_queue=0.2))
    permit = await ask_in_run(admission, ScheduledRun())
    clock.now += RUN_PATIENCE
    admission.mark_loaded(permit)
    if not is_held:
        admission.release(permit)
    waiting = ask_in_run(admission, ScheduledRun())
    await turns()
    clock.wait(0.2)
    with pytest.raises(LLMTimeoutError, match="another one has ended or no longer counts; ") as caught:
        await waiting
    held = "1 of 4 permits are held by: m for 3 s" if is_held else "0 of 4 permits are held"
    assert caught.value.message.partition("; ")[2].partition(" (")[0] == held
    assert caught.value.hint == "raise Limits.max_begun_runs or set it to None, or raise Limits.max_queue"
    assert caught.value.context["holders"] == (["m for 3 s (unread for 3 s)"] if is_held else [])


async def test_the_priority_of_a_run_replaces_that_of_its_client() -> None:
    admission = an_admission(2)
    assert (await ask_in_run(admission, ScheduledRun(-5))).priority == -5
    assert (await ask_in_run(admission, ScheduledRun())).priority == 0


async def test_a_request_of_a_run_that_has_ended_belongs_to_no_run() -> None:
    admission = an_admission()
    run = ScheduledRun(5)
    run.end()
    permit = await ask_in_run(admission, run)
    assert (permit.run, permit.priority) == (None, 0)


async def test_a_request_in_another_event_loop_does_not_belong_to_the_run() -> None:
    admission = an_admission()
    other_loop = asyncio.new_event_loop()
    try:
        permit = await ask_in_run(admission, ScheduledRun(5, other_loop))
    finally:
        other_loop.close()
    assert (permit.run, permit.priority) == (None, 0)
    assert (await ask_in_run(an_admission(), ScheduledRun(5, asyncio.get_running_loop()))).priority == 5


async def test_a_task_that_holds_a_stream_does_not_wait_for_other_runs() -> None:
    admission = Admission(Limits(max_concurrency=2, max_begun_runs=1))
    permits = [await admission.acquire("m"), await admission.acquire("m")]
    assert [permit.state for permit in permits] == ["in flight", "in flight"]


# Order


async def test_a_free_permit_is_granted_without_waiting() -> None:
    admission = an_admission(2)
    asking = admission.acquire("a")
    with pytest.raises(StopIteration) as returned:
        asking.send(None)
    assert (returned.value.value.model, admission.in_flight, admission.queued) == ("a", 1, 0)


async def test_max_concurrency_bounds_the_requests_in_flight_and_the_others_go_in_order_of_arrival() -> None:
    admission = an_admission(3)
    tasks = [ask(admission, str(number)) for number in range(10)]
    for done in range(3, 11):
        await turns()
        assert [task.done() for task in tasks] == [True] * done + [False] * (10 - done)
        assert (admission.in_flight, admission.queued) == (3, 10 - done)
        admission.release(tasks[done - 2].result())
    assert [(await task).model for task in tasks] == [str(number) for number in range(10)]


async def test_a_request_that_arrives_when_a_permit_is_released_queues_behind_the_waiting_ones() -> None:
    admission = an_admission()
    (permit,) = await held_by_others(admission)
    first = ask(admission)
    await turns()
    admission.release(permit)
    last = ask(admission)
    await turns()
    assert (first.done(), last.done()) == (True, False)
    admission.release(first.result())
    assert (await last).model == "m"


async def test_releasing_a_permit_again_does_nothing() -> None:
    admission = an_admission(2)
    permit, _ = await held_by_others(admission, 2)
    tasks = [ask(admission), ask(admission)]
    await turns()
    admission.release(permit)
    admission.release(permit)
    await turns()
    admission.release(permit)
    assert [task.done() for task in tasks] == [True, False]
    assert (admission.in_flight, admission.queued) == (2, 1)
    tasks[1].cancel()


async def test_a_permit_of_another_scheduler_is_ignored() -> None:
    admission = an_admission()
    await held_by_others(admission)
    (foreign,) = await held_by_others(an_admission())
    admission.release(foreign)
    assert admission.in_flight == 1


# Cancellation


async def test_a_cancelled_waiter_does_not_delay_the_others() -> None:
    admission = an_admission()
    (permit,) = await held_by_others(admission)
    tasks = [ask(admission) for _ in range(3)]
    await turns()
    tasks[0].cancel()
    await turns()
    assert (tasks[0].cancelled(), admission.queued) == (True, 2)
    admission.release(permit)
    await turns()
    assert (tasks[1].done(), tasks[2].done()) == (True, False)
    admission.release(tasks[1].result())
    await tasks[2]


async def test_a_permit_is_not_granted_to_a_waiter_that_is_being_cancelled() -> None:
    admission = an_admission()
    (permit,) = await held_by_others(admission)
    tasks = [ask(admission), ask(admission)]
    await turns()
    tasks[0].cancel()
    # The cancelled task has not run yet.
    admission.release(permit)
    await turns()
    assert (tasks[0].cancelled(), tasks[1].done()) == (True, True)


async def test_a_waiter_that_is_cancelled_when_it_gets_a_permit_passes_it_on() -> None:
    admission = an_admission()
    (permit,) = await held_by_others(admission)
    tasks = [ask(admission) for _ in range(4)]
    await turns()
    admission.release(permit)
    for task in tasks[:3]:
        task.cancel()
    await turns(6)
    assert [task.cancelled() for task in tasks] == [True, True, True, False]
    admission.release(tasks[3].result())
    assert (admission.in_flight, admission.queued) == (0, 0)


async def test_a_permit_is_free_again_if_its_only_waiter_is_cancelled_when_it_gets_it() -> None:
    admission = an_admission()
    (permit,) = await held_by_others(admission)
    task = ask(admission)
    await turns()
    admission.release(permit)
    task.cancel()
    await turns()
    assert (task.cancelled(), admission.in_flight) == (True, 0)
    assert (await admission.acquire("next")).model == "next"


async def test_a_caller_can_limit_its_wait_with_asyncio_timeout() -> None:
    admission = an_admission()
    await held_by_others(admission)
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0):
            await admission.acquire("m")
    assert type(caught.value) is TimeoutError
    assert admission.queued == 0


async def test_ten_thousand_cancelled_waiters_leave_nothing_behind() -> None:
    admission = an_admission()
    (permit,) = await held_by_others(admission)
    tasks = [ask(admission) for _ in range(10_000)]
    await turns()
    assert admission.queued == 10_000
    for number in range(len(tasks)):
        tasks[number].cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    del tasks
    assert admission.queued == 0
    assert not [each for each in living(Permit) if each.state == "waiting"]
    admission.release(permit)
    assert (await admission.acquire("m"), admission.in_flight)[1] == 1


# Limits on waiting


async def test_a_wait_ends_after_max_queue_with_an_error_that_lists_the_holders_of_the_permits(clock: Clock) -> None:
    admission = an_admission(2, max_queue=60)
    old = await ask(admission, "qwen")
    clock.wait(40)
    await ask(admission, None)
    clock.wait(8)
    old.note_read(clock(), asyncio.current_task())
    task = ask(admission)
    await turns()
    clock.wait(59.5)
    await turns()
    assert not task.done()
    clock.wait(0.5)
    with pytest.raises(LLMTimeoutError) as caught:
        await task
    assert caught.value.phase == "queue"
    holders = ["qwen for 108 s (unread for 60 s)", "unnamed model for 68 s (unread for 68 s)"]
    assert caught.value.context["holders"] == holders
    assert f"not admitted within 60 s; 2 of 2 permits are held by: {', '.join(holders)}; " in str(caught.value)
    assert "Limits.max_queue" in str(caught.value)
    assert (admission.in_flight, admission.queued) == (2, 0)


async def test_max_queue_is_counted_for_each_request_from_its_arrival(clock: Clock) -> None:
    admission = an_admission(1, max_queue=60)
    (permit,) = await held_by_others(admission)
    early = ask(admission)
    await turns()
    clock.wait(30)
    late = ask(admission)
    await turns()
    clock.wait(30)
    with pytest.raises(LLMTimeoutError):
        await early
    assert not late.done()
    admission.release(permit)
    await late


async def test_a_permit_that_was_granted_in_time_is_kept(clock: Clock, loop_errors: LoopErrors) -> None:
    admission = an_admission(1, max_queue=60)
    (permit,) = await held_by_others(admission)
    task = ask(admission)
    await turns()
    # Just before the timer of `task` rings.
    asyncio.get_running_loop().call_at(clock() + 59.9, admission.release, permit)
    clock.wait(60)
    assert (await task).model == "m"
    clock.wait(600)
    await turns()
    assert (admission.in_flight, loop_errors) == (1, [])


async def test_a_permit_that_is_released_too_late_goes_to_the_next_waiter(clock: Clock) -> None:
    admission = an_admission(1, max_queue=60)
    (permit,) = await held_by_others(admission)
    late = ask(admission)
    await turns()
    clock.wait(30)
    following = ask(admission)
    await turns()
    # Right behind the timer of `late`.
    asyncio.get_running_loop().call_at(clock() + 30, admission.release, permit)
    clock.wait(30)
    with pytest.raises(LLMTimeoutError):
        await late
    assert (await following).model == "m"


async def test_without_max_queue_a_wait_does_not_end(clock: Clock) -> None:
    admission = an_admission(1, max_queue=None)
    (permit,) = await held_by_others(admission)
    task = ask(admission)
    await turns()
    clock.wait(1e9)
    await turns()
    assert not task.done()
    admission.release(permit)
    await task


async def test_a_task_that_would_wait_for_its_own_permits_gets_an_error_at_once() -> None:
    admission = an_admission(2, max_queue=None)
    mine = [await admission.acquire("a"), await admission.acquire("b")]
    for _ in range(2):
        with pytest.raises(
            LLMTimeoutError,
            match="streams that its own task holds open; 2 of 2 permits are held",
        ) as e:
            await admission.acquire("c")
        assert e.value.phase == "queue"
    assert (admission.in_flight, admission.queued) == (2, 0)
    # Another task can wait, because this one returns its permits sooner or later.
    other = ask(admission)
    await turns()
    admission.release(mine[0])
    await other
    admission.release(mine[1])
    assert (await admission.acquire("d")).model == "d"


async def test_a_task_that_holds_a_permit_can_wait_for_a_permit_of_another_task() -> None:
    admission = an_admission(2, max_queue=None)
    await admission.acquire("mine")
    (others,) = await held_by_others(admission)
    asyncio.get_running_loop().call_soon(admission.release, others)
    assert (await admission.acquire("mine too")).model == "mine too"


async def test_the_holder_of_a_permit_is_the_task_that_last_read_its_stream() -> None:
    admission = an_admission(1, max_queue=None)
    permit = await admission.acquire("opened here")

    async def read() -> None:
        permit.note_read(0.0, asyncio.current_task())
        with pytest.raises(LLMTimeoutError):
            await admission.acquire("of the reader")

    await asyncio.create_task(read())
    asyncio.get_running_loop().call_soon(admission.release, permit)
    assert (await admission.acquire("of the opener")).model == "of the opener"


async def test_the_holder_of_a_permit_is_at_first_the_task_that_waited_for_it() -> None:
    admission = an_admission(1, max_queue=None)
    permit = await admission.acquire("first")

    async def wait() -> Permit:
        permit = await admission.acquire("second")
        with pytest.raises(LLMTimeoutError):
            await admission.acquire("third")
        return permit

    task = asyncio.create_task(wait())
    await turns()
    admission.release(permit)
    asyncio.get_running_loop().call_soon(admission.release, await task)
    assert (await admission.acquire("fourth")).model == "fourth"


# Failing all waits


def make_closed_error() -> LLMError:
    return TaskCancelledError("closed")


async def test_failing_the_waiters_gives_each_its_own_error() -> None:
    admission = an_admission()
    (permit,) = await held_by_others(admission)
    tasks = [ask(admission) for _ in range(3)]
    await turns()
    admission.fail_waiters(make_closed_error)
    assert (admission.in_flight, admission.queued) == (1, 0)
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in errors] == [TaskCancelledError] * 3
    assert len({id(error) for error in errors}) == 3
    admission.release(permit)
    assert (await ask(admission)).model == "m"


async def test_a_permit_that_was_granted_just_before_the_waiters_failed_is_kept() -> None:
    admission = an_admission()
    (permit,) = await held_by_others(admission)
    task = ask(admission)
    await turns()
    admission.release(permit)
    admission.fail_waiters(make_closed_error)
    assert (await task).model == "m"


async def test_a_cancellation_at_the_moment_of_an_error_stays_a_cancellation_and_nothing_is_logged(
    loop_errors: LoopErrors,
) -> None:
    admission = an_admission()
    await held_by_others(admission)
    for cancel_first in (True, False):
        task = ask(admission)
        await turns()
        if cancel_first:
            task.cancel()
        admission.fail_waiters(make_closed_error)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        del task
        gc.collect()
    assert loop_errors == []


# Models


def with_models(max_concurrency: int = 10, max_loaded_models: int = 1, **options: Any) -> Admission:
    return Admission(Limits(max_concurrency=max_concurrency, max_loaded_models=max_loaded_models, **options))


async def loaded(admission: Admission, model: str) -> Permit:
    """Returns a permit of another task, whose request has been answered."""
    permit = await ask(admission, model)
    admission.mark_loaded(permit)
    return permit


async def test_a_first_request_that_is_cancelled_at_any_moment_leaves_its_turn_to_the_next() -> None:
    for turns_before in range(4):
        admission = with_models()
        first, second, third = (ask(admission, "a") for _ in range(3))
        await turns(turns_before)
        first.cancel()
        await turns()
        # If it was not cancelled, it had its permit already.
        if not first.cancelled():
            admission.release(first.result())
            await turns()
        assert (second.done(), third.done()) == (True, False)
        admission.mark_loaded(second.result())
        await third


@pytest.mark.parametrize("turns_before_release", [1, 2, 3])
async def test_a_wait_for_a_model_can_be_cancelled_before_and_after_its_admission(
    turns_before_release: int,
) -> None:
    admission = with_models()

    async def release_soon(permit: Permit) -> None:
        await turns(turns_before_release)
        admission.release(permit)

    async def wait_for_b() -> None:
        permit = await admission.acquire("a")
        # As if another task held it.
        permit.holder = None
        releasing = asyncio.create_task(release_soon(permit))
        try:
            admission.release(await admission.acquire("b"))
        finally:
            await releasing

    async def check_that_all_is_released() -> None:
        assert (admission.in_flight, admission.queued) == (0, 0)
        (active,) = admission.scheduler._models.queues
        assert active in {"a", "b"}

    await cancel_at_each_step(wait_for_b, check_that_all_is_released, at_least=1)
    await check_that_all_is_released()


async def test_a_cancelled_waiter_at_the_head_of_the_queue_makes_room_for_the_next_at_once() -> None:
    admission = with_models(2)
    permit = await loaded(admission, "a")
    first, second = ask(admission, "b"), ask(admission, "c")
    await turns()
    first.cancel()
    # The cancelled task has not run yet.
    admission.release(permit)
    await turns()
    assert (first.cancelled(), second.done()) == (True, True)
    assert dict(admission.scheduler.swaps) == {"c": 1}


async def test_a_first_request_that_is_cancelled_when_it_is_admitted_passes_its_turn_on() -> None:
    admission = with_models(1)
    permit = await loaded(admission, "a")
    tasks = [ask(admission, model) for model in "bbc"]
    await turns()
    # The first request for b is admitted, and cancelled before its task has run.
    admission.release(permit)
    tasks[0].cancel()
    await turns(6)
    assert [task.done() for task in tasks] == [True, True, False]
    admission.release(tasks[1].result())
    assert (await tasks[2]).model == "c"


async def test_the_timer_is_set_for_the_next_overdue_request_and_moves_when_that_one_leaves(clock: Clock) -> None:
    admission = with_models(max_wait=30.0)
    permit = await loaded(admission, "a")
    first = ask(admission, "b")
    await turns()
    assert admission._timer is not None
    assert admission._timer.when() == clock() + 30
    clock.wait(10)
    second = ask(admission, "c")
    await turns()
    first.cancel()
    await turns()
    # The timer rings for the request that has left.
    clock.wait(20)
    await turns()
    late = ask(admission, "a")
    await late
    assert admission._timer.when() == clock() + 10
    clock.wait(10)
    await turns()
    held_back = ask(admission, "a")
    await turns()
    assert (second.done(), held_back.done()) == (False, False)
    admission.release(permit)
    admission.release(late.result())
    await second
    assert not held_back.done()
    held_back.cancel()


async def test_a_timer_that_rings_at_exactly_its_time_begins_the_drain(clock: Clock) -> None:
    for start, max_wait in ((1000.1, 0.3), (0.1, 0.7), (1e6 + 1 / 3, 29.9)):
        clock.now = start
        admission = with_models(max_wait=max_wait)
        await loaded(admission, "a")
        waiting = ask(admission, "b")
        await turns()
        clock.now = start + max_wait
        await turns()
        held_back = ask(admission, "a")
        await turns()
        assert not held_back.done()
        assert admission._timer is None, "the timer would ring forever"
        waiting.cancel()
        held_back.cancel()
        await turns()


async def test_a_task_whose_own_stream_keeps_the_model_out_gets_an_error_at_once() -> None:
    admission = with_models(max_queue=None)
    mine = await admission.acquire("a")
    with pytest.raises(LLMTimeoutError, match="streams that its own task holds open; 1 of 10 permits") as caught:
        await admission.acquire("b")
    assert caught.value.phase == "queue"
    assert (admission.in_flight, admission.queued) == (1, 0)
    admission.release(mine)
    assert (await admission.acquire("b")).model == "b"


async def test_a_task_that_a_drain_makes_wait_for_itself_gets_an_error_when_the_drain_begins(clock: Clock) -> None:
    admission = with_models(2, max_queue=None, max_wait=30.0)

    async def two_of_a() -> Permit:
        mine = await admission.acquire("a")
        with pytest.raises(LLMTimeoutError, match="forever"):
            # It would be admitted after b only.
            await admission.acquire("a")
        return mine

    twice = asyncio.create_task(two_of_a())
    await turns()
    b = ask(admission, "b")
    await turns()
    clock.wait(29.9)
    await turns()
    assert not twice.done()
    clock.wait(0.1)
    await turns()
    assert twice.done()
    admission.release(await twice)
    await b


async def test_a_task_that_waits_for_the_model_of_another_task_is_not_deadlocked() -> None:
    admission = with_models(max_loaded_models=2, max_queue=None)
    others = await loaded(admission, "b")

    async def ask_for_more_and_more() -> list[Permit]:
        permits = [await admission.acquire("a"), await admission.acquire("c")]
        with pytest.raises(LLMTimeoutError, match="forever"):
            await admission.acquire("d")
        return permits

    task = asyncio.create_task(ask_for_more_and_more())
    await turns()
    assert (admission.in_flight, admission.queued, task.done()) == (2, 1, False)
    admission.release(others)
    assert [permit.model for permit in await task] == ["a", "c"]


async def test_new_limits_admit_requests_that_the_old_ones_kept_waiting() -> None:
    admission = with_models(1)
    permit = await loaded(admission, "a")
    tasks = [ask(admission, model) for model in "ab"]
    await turns()
    admission.set_limits(Limits(max_concurrency=3, max_loaded_models=2))
    await turns()
    assert [task.done() for task in tasks] == [True, True]
    assert admission.acquire_now("a") is None
    admission.release(permit)
    assert admission.acquire_now("a") is not None


async def test_new_limits_end_the_waits_that_they_turn_into_deadlocks() -> None:
    admission = with_models(2, max_queue=None)

    async def ask_twice() -> None:
        # The second request waits for the answer to this one.
        await admission.acquire("a")
        with pytest.raises(LLMTimeoutError, match=r"forever.* 1 of 1 permits"):
            await admission.acquire("a")

    task = asyncio.create_task(ask_twice())
    await turns()
    assert not task.done()
    admission.set_limits(Limits(max_concurrency=1, max_loaded_models=1))
    await task


@pytest.mark.parametrize("before", [None, 300.0])
async def test_new_limits_move_the_timer_of_the_next_overdue_request(clock: Clock, before: float | None) -> None:
    admission = with_models(max_wait=before)
    permit = await loaded(admission, "a")
    b = ask(admission, "b")
    await turns()
    clock.wait(20)
    admission.set_limits(Limits(max_loaded_models=1, max_wait=30.0))
    clock.wait(10)
    await turns()
    assert admission._timer is None, "the timer has not rung"
    held_back = ask(admission, "a")
    await turns()
    assert not held_back.done()
    admission.release(permit)
    await b
    held_back.cancel()


async def test_the_error_of_a_wait_for_a_model_names_the_model_that_holds_the_permit(
    clock: Clock,
) -> None:
    admission = with_models(max_queue=42.0, max_wait=None)
    await loaded(admission, "model")
    waiting = ask(admission, "other")
    await turns()
    clock.wait(42)
    with pytest.raises(LLMTimeoutError) as caught:
        await waiting
    assert caught.value.context["holders"] == ["model for 42 s (unread for 42 s)"]
    assert "1 of 10 permits are held by: model for 42 s (unread for 42 s)" in str(caught.value)
    assert (admission.in_flight, admission.queued) == (1, 0)


async def test_a_batch_member_that_times_out_lets_the_next_drain_begin(clock: Clock) -> None:
    admission = with_models(1, max_queue=60.0, max_wait=30.0)
    permit = await loaded(admission, "a")
    b, late_b, c = ask(admission, "b"), ask(admission, "b"), ask(admission, "c")
    await turns()
    clock.wait(50)
    admission.release(permit)
    await b
    clock.wait(10)
    for task in (late_b, c):
        with pytest.raises(LLMTimeoutError):
            await task
    admission.release(b.result())
    assert (admission.in_flight, admission.queued) == (0, 0)


async def test_failing_the_waiters_includes_those_that_wait_for_a_model() -> None:
    admission = with_models()
    permit = await loaded(admission, "a")
    tasks = [ask(admission, model) for model in "bcbd"]
    await turns()
    admission.fail_waiters(make_closed_error)
    assert [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == [TaskCancelledError] * 4
    assert (admission.in_flight, admission.queued) == (1, 0)
    admission.release(permit)
    assert set(admission.scheduler._models.queues) == {"a"}


async def test_failing_the_waiters_in_a_drain_does_not_admit_those_that_it_held_back(clock: Clock) -> None:
    admission = with_models(max_wait=30.0)
    await loaded(admission, "a")
    overdue = ask(admission, "b")
    await turns()
    clock.wait(30)
    held_back = ask(admission, "a")
    await turns()
    admission.fail_waiters(make_closed_error)
    errors = await asyncio.gather(overdue, held_back, return_exceptions=True)
    assert [type(error) for error in errors] == [TaskCancelledError] * 2
    assert (admission.in_flight, admission.queued) == (1, 0)


# Any events in any order

Kind = Literal["arrive", "finish", "cancel"]
_steps = st.lists(
    st.lists(st.tuples(st.sampled_from(["arrive", "arrive", "finish", "cancel"]), st.integers(0, 9)), max_size=6),
    max_size=20,
)


@settings(deadline=None, max_examples=200)
@given(limit=st.integers(1, 4), arrivals=st.integers(0, 8), steps=_steps)
def test_permits_are_granted_in_order_and_none_is_lost_whatever_happens(
    limit: int, arrivals: int, steps: list[list[tuple[Kind, int]]]
) -> None:
    async def run() -> None:
        admission = an_admission(limit, max_queue=None)
        # In the order of their arrival, without those that are over.
        requests: list[asyncio.Task[Permit]] = []
        rush: list[tuple[Kind, int]] = [("arrive", 0)] * arrivals
        for step in [rush, *steps]:
            # All events of a step happen in one turn of the loop.
            for kind, number in step:
                if kind == "arrive":
                    requests.append(ask(admission))
                elif requests:
                    request = requests[number % len(requests)]
                    if not request.done() and kind == "cancel":
                        request.cancel()
                    elif request.done() and kind == "finish":
                        requests.remove(request)
                        admission.release(request.result())
                assert admission.in_flight <= limit
            await turns(10)
            requests = [request for request in requests if not request.cancelled()]
            in_flight = min(limit, len(requests))
            assert (admission.in_flight, admission.queued) == (in_flight, len(requests) - in_flight)
            waiting = len(requests) - in_flight
            assert [request.done() for request in requests] == [True] * in_flight + [False] * waiting
        while requests:
            assert requests[0].done()
            admission.release(requests.pop(0).result())
            await turns()
        assert (admission.in_flight, admission.queued) == (0, 0)

    asyncio.run(run())


_events = st.tuples(
    st.sampled_from(["arrive", "arrive", "answer", "finish", "finish", "cancel", "wait"]), st.integers(0, 11)
)


@settings(deadline=None, max_examples=150)
@given(
    max_concurrency=st.integers(1, 4),
    max_loaded_models=st.integers(1, 3),
    steps=st.lists(st.lists(_events, max_size=6), max_size=20),
)
def test_with_model_limits_no_permit_and_no_waiter_is_lost_whatever_happens(
    max_concurrency: int, max_loaded_models: int, steps: list[list[tuple[str, int]]]
) -> None:
    async def run(clock: Clock) -> None:
        admission = with_models(max_concurrency, max_loaded_models, max_queue=None)
        # Without those that are over.
        requests: list[asyncio.Task[Permit]] = []

        def happen(kind: str, number: int) -> None:
            if kind == "arrive":
                requests.append(ask(admission, "abcd"[number % 4]))
            elif kind == "wait":
                clock.wait(4 * number)
            elif requests:
                each = requests[number % len(requests)]
                if kind == "cancel" and not each.done():
                    each.cancel()
                elif kind == "answer" and each.done() and not each.cancelled():
                    admission.mark_loaded(each.result())
                elif kind == "finish" and each.done() and not each.cancelled():
                    requests.remove(each)
                    admission.release(each.result())

        def check() -> None:
            going = [task.result() for task in requests if task.done()]
            assert set(admission.scheduler.in_flight) == set(going)
            assert admission.queued == len(requests) - len(going)
            assert len(going) <= max_concurrency
            assert len({permit.model for permit in going}) <= max_loaded_models
            assert going or not requests, "all requests wait although nothing is in flight"

        for step in steps:
            # All events of a step happen in one turn of the loop.
            for kind, number in step:
                happen(kind, number)
            await turns(10)
            requests = [task for task in requests if not task.cancelled()]
            check()
        while requests:
            happen("finish", next(number for number, task in enumerate(requests) if task.done()))
            await turns(5)
            check()
        assert set(admission.scheduler._models.queues) == {queue.model for queue in admission.scheduler._models.active}

    async def with_clock() -> None:
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock()
            patch.setattr(asyncio.get_running_loop(), "time", clock)
            await run(clock)

    asyncio.run(with_clock())
