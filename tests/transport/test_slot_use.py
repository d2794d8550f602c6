"""`SlotUse`: which conversations a server has in its slots."""

from __future__ import annotations

from lmbridge._scheduled_run import ScheduledRun
from lmbridge.transport.permits import Permit
from lmbridge.transport.slot_use import SlotUse


def began(slots: SlotUse, run: ScheduledRun | None = None) -> Permit:
    permit = Permit("m", 0.0, run=run)
    slots.begin(permit)
    return permit


def used(slots: SlotUse, *runs: ScheduledRun) -> None:
    for run in runs:
        slots.end(began(slots, run))


def test_a_new_conversation_displaces_the_one_that_was_used_least_recently() -> None:
    slots = SlotUse(2)
    a, b = ScheduledRun(), ScheduledRun()
    used(slots, a, b, a)
    assert slots.next_displaced() is b
    slots.end(began(slots))
    assert slots.next_displaced() is a


def test_nothing_is_displaced_while_a_slot_is_unused() -> None:
    slots = SlotUse(3)
    a, b, c = ScheduledRun(), ScheduledRun(), ScheduledRun()
    used(slots, a, b)
    assert slots.next_displaced() is None
    began(slots, c)
    assert slots.next_displaced() is a


def test_a_conversation_may_be_displaced_until_the_server_has_answered_its_request() -> None:
    slots = SlotUse(2)
    a, b = ScheduledRun(), ScheduledRun()
    used(slots, a, b)
    permit = began(slots, a)
    assert slots.next_displaced() is a
    slots.answer(permit)
    assert slots.next_displaced() is b


def test_a_request_that_fails_before_an_answer_counts_as_the_latest_use() -> None:
    slots = SlotUse(2)
    a, b = ScheduledRun(), ScheduledRun()
    used(slots, a, b)
    slots.end(began(slots, a))
    assert slots.next_displaced() is b


def test_a_conversation_is_busy_until_its_last_request_has_ended() -> None:
    slots = SlotUse(2)
    a, b = ScheduledRun(), ScheduledRun()
    first, second = began(slots, a), began(slots, a)
    used(slots, b)
    slots.end(first)
    assert slots.next_displaced() is b
    slots.end(second)
    assert slots.next_displaced() is b
    used(slots, b)
    assert slots.next_displaced() is a


def test_more_requests_than_slots_leave_the_conversations_that_were_used_last() -> None:
    slots = SlotUse(2)
    a, b, c, d = (ScheduledRun() for _ in range(4))
    used(slots, a)
    permits = [began(slots, each) for each in (b, c, d)]
    assert slots.next_displaced() is None
    for each in permits:
        slots.end(each)
    assert slots.next_displaced() is c


def displaced(slots: SlotUse) -> ScheduledRun:
    """Returns a run whose slot has been taken by others."""
    run = ScheduledRun()
    used(slots, run, ScheduledRun(), ScheduledRun())
    return run


def test_a_reply_after_a_slot_was_lost_shows_whether_the_server_remembers() -> None:
    slots = SlotUse(2)
    permit = began(slots, displaced(slots))
    assert permit.was_displaced
    slots.note_cached_tokens(permit, 50, 100)
    assert slots.remembers is True
    assert not slots.is_worth_keeping
    slots.note_cached_tokens(permit, 49, 100)
    assert slots.remembers is False
    assert slots.is_worth_keeping


def test_other_replies_do_not_show_whether_the_server_remembers() -> None:
    slots = SlotUse(2)
    run = ScheduledRun()
    first = began(slots, run)
    slots.note_cached_tokens(first, 0, 100)
    slots.end(first)
    slots.note_cached_tokens(began(slots, run), 100, 100)
    assert slots.remembers is None


def test_one_run_at_a_time_is_displaced_to_find_out_whether_the_server_remembers() -> None:
    slots = SlotUse(2)
    assert not slots.is_worth_keeping
    run = displaced(slots)
    assert slots.is_worth_keeping
    permit = began(slots, run)
    assert slots.is_worth_keeping
    # It failed, so it has shown nothing, and the next one may be displaced.
    slots.end(permit)
    assert not slots.is_worth_keeping


def test_a_displaced_run_that_ends_shows_nothing() -> None:
    slots = SlotUse(2)
    run = displaced(slots)
    slots.forget_run(run)
    assert not slots.is_worth_keeping
