"""The bookkeeping of one call: retries, polls, deadlines, and its permit."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator
from typing import Any

import attrs
import pytest

from lmbridge.config import Limits, Timeouts
from lmbridge.errors import LLMTimeoutError
from lmbridge.transport.admission import Admission
from lmbridge.transport.calls import Call, Reply, Request
from lmbridge.transport.deadline import DeadlineTimer
from lmbridge.transport.interpreter import Interpreter
from lmbridge.transport.retry import Verdict
from lmbridge.transport.time_limits import Phase
from tests.transport.clock import Clock

RETRY, POLL, FAIL = Verdict.RETRY, Verdict.POLL, Verdict.FAIL
UNLIMITED = Timeouts(connect=None, load=None, first_byte=None, idle=None, total=None)


@pytest.fixture
def full_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait is as long as jitter allows."""
    monkeypatch.setattr("backoff.full_jitter", lambda ceiling: ceiling)


def a_call(timeouts: Timeouts = UNLIMITED, *, max_retries: int = 5, **options: Any) -> Call:
    request = Request(
        operation="chat completion",
        method="POST",
        path="/chat/completions",
        interpreter=Interpreter(classify=lambda *_: FAIL),
        timeouts=timeouts,
        max_retries=max_retries,
        model="m",
    )
    return Call(
        attrs.evolve(request, **options),
        "http://x/v1/chat/completions",
        Admission(Limits()),
        DeadlineTimer(asyncio.get_running_loop()),
    )


def waits(call: Call, clock: Clock, verdict: Verdict, retry_after: float | None = None) -> Iterator[float]:
    """Yields the waits after the same verdict over and over, and lets the time pass."""
    for _ in range(1000):
        wait = call.wait_before_next(verdict, retry_after)
        if wait is None:
            return
        yield wait
        clock.wait(wait)
        call.begin_attempt()
    pytest.fail("it would go on forever")


# Retries


@pytest.mark.parametrize(("asked_for", "retries"), [(0, 0), (1, 1), (2, 2), (5, 5), (6, 5), (1000, 5)])
async def test_there_are_as_many_retries_as_asked_for_but_no_more_than_5(
    clock: Clock, asked_for: int, retries: int
) -> None:
    call = a_call(max_retries=asked_for)
    assert len(list(waits(call, clock, RETRY))) == retries == call.retries


@pytest.mark.usefixtures("full_waits")
async def test_waits_grow_from_retry_to_retry(clock: Clock) -> None:
    assert list(waits(a_call(), clock, RETRY)) == [0.5, 1.0, 2.0, 4.0, 8.0]


async def test_a_reply_that_stands_is_not_repeated(clock: Clock) -> None:
    call = a_call()
    assert call.wait_before_next(FAIL, None) is None
    assert call.wait_before_next(FAIL, 1.0) is None
    assert call.retries == 0


async def test_jitter_never_shortens_the_wait_that_the_server_asked_for(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backoff.full_jitter", lambda ceiling: 0.0)
    assert list(waits(a_call(), clock, RETRY, 7.0)) == [7.0] * 5
    monkeypatch.setattr("backoff.full_jitter", lambda ceiling: ceiling)
    assert list(waits(a_call(), clock, RETRY, 7.0)) == [7.5, 8.0, 9.0, 11.0, 15.0]


@pytest.mark.usefixtures("no_waits")
async def test_a_retry_after_of_more_than_a_minute_is_not_waited_for(clock: Clock) -> None:
    assert a_call().wait_before_next(RETRY, 60.0) == 60.0
    call = a_call()
    for retry_after in (60.01, 3600.0, math.inf):
        assert call.wait_before_next(RETRY, retry_after) is None
    assert call.retries == 0


# Loading


async def test_polls_do_not_count_as_retries(clock: Clock) -> None:
    call = a_call(Timeouts(load=300), max_retries=1)
    polls = [wait for wait, _ in zip(waits(call, clock, POLL), range(20), strict=False)]
    assert (polls[0], polls[-1], call.retries) == (0.5, 2.0, 0)
    assert call.wait_before_next(RETRY, None) is not None
    assert call.retries == 1


async def test_a_server_that_never_stops_loading_is_given_up_when_the_budget_is_spent(clock: Clock) -> None:
    call = a_call(Timeouts(load=10))
    started = clock()
    with pytest.raises(LLMTimeoutError, match="did not finish loading its model within 10 s") as caught:
        list(waits(call, clock, POLL))
    assert caught.value.phase == "load"
    assert clock() - started == pytest.approx(10)
    assert caught.value.context["seconds"] == pytest.approx(10)
    assert caught.value.context["attempts"] == call.attempts


async def test_the_last_poll_is_made_when_the_budget_ends_and_not_before(clock: Clock) -> None:
    polls = waits(a_call(Timeouts(load=3)), clock, POLL)
    assert [next(polls) for _ in range(4)] == [0.5, 0.75, 1.125, 0.625]
    with pytest.raises(LLMTimeoutError):
        next(polls)


async def test_the_budget_for_loading_begins_with_the_first_loading_answer(clock: Clock) -> None:
    call = a_call(Timeouts(load=10))
    clock.wait(1000)
    assert call.wait_before_next(POLL, None) == 0.5
    clock.wait(9.9)
    assert call.wait_before_next(POLL, None) == pytest.approx(0.1)
    clock.wait(0.2)
    with pytest.raises(LLMTimeoutError):
        call.wait_before_next(POLL, None)


async def test_another_answer_in_between_ends_the_loading(clock: Clock) -> None:
    call = a_call(Timeouts(load=10))
    for _ in range(3):
        assert call.wait_before_next(POLL, None) is not None
        clock.wait(9)
        assert call.wait_before_next(RETRY, None) is not None
        clock.wait(9)


async def test_without_a_limit_loading_may_take_any_time(clock: Clock) -> None:
    call = a_call(Timeouts(load=None))
    for _ in range(5):
        assert call.wait_before_next(POLL, None) is not None
        clock.wait(1e6)


async def test_polls_ignore_retry_after(clock: Clock) -> None:
    call = a_call()
    assert call.wait_before_next(POLL, 30.0) == 0.5
    assert call.wait_before_next(POLL, 3600.0) == 0.75


# The total limit


@pytest.mark.usefixtures("full_waits")
async def test_a_wait_that_would_exceed_the_total_limit_is_not_begun(clock: Clock) -> None:
    call = a_call(Timeouts(total=3.5, load=None))
    assert list(waits(call, clock, RETRY)) == [0.5, 1.0]  # the next is 2 s, and would end at 3.5 s
    assert call.retries == 2
    assert a_call(Timeouts(total=3.6)).wait_before_next(RETRY, 3.0) == 3.5
    assert a_call(Timeouts(total=3.5)).wait_before_next(RETRY, 3.0) is None
    call = a_call(Timeouts(total=3, load=None))
    polls = list(waits(call, clock, POLL))
    assert polls == [0.5, 0.75, 1.125]
    assert call.wait_before_next(POLL, None) is None


async def test_the_total_limit_starts_with_the_call_and_the_first_byte_limit_with_each_attempt(clock: Clock) -> None:
    call = a_call(Timeouts(first_byte=10, total=25))
    assert call.total_deadline == 1025
    assert call.begin_attempt().deadline == 1010
    clock.wait(12)
    assert call.begin_attempt().deadline == 1022
    clock.wait(10)
    assert call.begin_attempt().deadline == call.first_byte_deadline == 1025
    assert call.attempts == 3


async def test_without_limits_there_is_no_deadline(clock: Clock) -> None:
    call = a_call()
    assert call.begin_attempt().deadline == call.first_byte_deadline == call.total_deadline == math.inf


@pytest.mark.parametrize(
    ("phase", "text"),
    [
        ("connect", "could not connect within 1 s"),
        ("load", "the server did not finish loading its model within 2 s"),
        ("first_byte", "the server did not answer within 3 s"),
        ("idle", "no further event arrived within 0.4 s"),
        ("total", "the reply did not end within 5 s"),
    ],
)
async def test_the_error_of_a_limit_names_the_limit_and_the_request(clock: Clock, phase: Phase, text: str) -> None:
    call = a_call(Timeouts(connect=1, load=2, first_byte=3, idle=0.4, total=5))
    call.begin_attempt()
    clock.wait(2.5)
    cause = TimeoutError()
    error = call.timed_out(phase, cause)
    assert (error.phase, error.__cause__) == (phase, cause)
    prefix = "chat completion with model 'm' at http://x/v1/chat/completions: "
    assert str(error).startswith(f"{prefix}{text} (after 1 attempt, 2.50 s); ")
    assert f"Timeouts.{phase}" in str(error)


# Permit and reply


async def test_a_call_returns_its_permit_once() -> None:
    admission = Admission(Limits())
    call = Call(a_call().request, "http://x", admission, DeadlineTimer(asyncio.get_running_loop()))
    call.admit(await admission.acquire("m"))
    other = await admission.acquire("m")
    call.release()
    call.release()
    assert admission.in_flight == 1
    admission.release(other)
    a_call().release()


async def test_a_reply_has_the_seconds_of_its_retry_after_header() -> None:
    reply = Reply(call=a_call(), status=429, headers={"Retry-After": "1.5"}, body=b"")
    assert reply.retry_after == 1.5
    assert attrs.evolve(reply, headers={}).retry_after is None


class Moved:
    """A `Failover` of a request that another server has had before."""

    attempts = 1
    retries = 1
    seconds = 3.0
    tried = ("http://other: could not connect",)


async def test_the_line_in_the_log_counts_the_attempts_and_the_seconds_at_all_servers(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    moved: Any = Moved()
    call = a_call(failover=moved)
    call.begin_attempt()
    clock.wait(0.5)
    with caplog.at_level(logging.INFO, "lmbridge.transport"):
        call.finish(200)
    fields = vars(caplog.records[-1])
    assert (fields["lmbridge_attempts"], fields["lmbridge_seconds"]) == (2, 3.5)
    assert "200 in 3.50 s, 2 attempts" in caplog.text
    assert call.context()["seconds"] == 3.5


async def test_only_small_data_is_searched_for_an_error() -> None:
    sizes: list[int] = []

    def reports_error(data: bytes) -> bool:
        sizes.append(len(data))
        return True

    call = a_call(interpreter=Interpreter(classify=lambda *_: FAIL, reports_error=reports_error))
    call._admission = Admission(Limits(max_loaded_models=1))
    call.admit(await call._admission.acquire("m"))
    call.note_first_event(b"x" * 1_000, is_stream=False)
    assert call.is_first_request, "an error does not show that the model is loaded"
    call.note_first_event(b"x" * 1_000_000, is_stream=False)
    assert not call.is_first_request
    assert sizes == [1_000]
