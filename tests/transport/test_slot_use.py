"""`SlotUse`: which conversations a server has in its slots."""

from __future__ import annotations

from lmbridge._scheduled_run import ScheduledRun
from lmbridge.transport.permits import Permit
from lmbridge.transport.slot_use import SlotUse


def used(slots: SlotUse, *conversations: ScheduledRun | Permit) -> None:
    for each in conversations:
        slots.begin(each)
        slots.end(each)


def test_a_new_conversation_displaces_the_one_that_was_used_least_recently() -> None:
    slots = SlotUse(2)
    a, b, c = ScheduledRun(), ScheduledRun(), Permit("m", 0.0)
    used(slots, a, b, a)
    assert slots.next_displaced() is b
    used(slots, c)
    assert slots.next_displaced() is a


def test_nothing_is_displaced_while_a_slot_is_unused() -> None:
    slots = SlotUse(3)
    a, b, c = ScheduledRun(), ScheduledRun(), ScheduledRun()
    used(slots, a, b)
    assert slots.next_displaced() is None
    slots.begin(c)
    assert slots.next_displaced() is a


def test_a_conversation_with_a_request_in_flight_is_not_displaced() -> None:
    slots = SlotUse(2)
    a, b = ScheduledRun(), ScheduledRun()
    used(slots, a, b)
    slots.begin(a)
    slots.begin(a)
    slots.end(a)
    assert slots.next_displaced() is b
    slots.begin(b)
    assert slots.next_displaced() is None


def test_more_requests_than_slots_leave_the_conversations_that_were_used_last() -> None:
    slots = SlotUse(2)
    a, b, c, d = (ScheduledRun() for _ in range(4))
    used(slots, a)
    for each in (b, c, d):
        slots.begin(each)
    assert slots.next_displaced() is None
    for each in (b, c, d):
        slots.end(each)
    assert slots.next_displaced() is c
