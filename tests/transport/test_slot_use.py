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
