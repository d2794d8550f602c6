"""`SlotUse`: which conversations a server has in its slots."""

from __future__ import annotations

import pytest

from lmbridge._scheduled_run import ScheduledRun
from lmbridge.transport.permits import Permit
from lmbridge.transport.slot_use import SlotUse


def began(slots: SlotUse, run: ScheduledRun | None = None, model: str = "m") -> Permit:
    permit = Permit(model, 0.0, run=run)
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
    """Returns a run whose slot has been taken by others, and whose latest prompt had 100 tokens."""
    run = ScheduledRun()
    permit = began(slots, run)
    slots.note_reply(permit, (100, 0), is_first_attempt=True)
    slots.end(permit)
    used(slots, ScheduledRun(), ScheduledRun())
    return run


@pytest.mark.parametrize(
    ("prompt", "cached", "remembers"),
    [(100, 100, True), (100, 50, True), (100, 49, False), (5000, 100, True), (5000, 0, False), (5000, None, False)],
)
def test_a_reply_after_a_slot_was_lost_shows_whether_the_server_remembers(
    prompt: int, cached: int | None, remembers: bool
) -> None:
    """Only what was in the prompt before can be in a cache. A long result of a tool cannot."""
    slots = SlotUse(2)
    permit = began(slots, displaced(slots))
    slots.note_reply(permit, (prompt, cached), is_first_attempt=True)
    assert slots.remembers is remembers
    assert slots.is_worth_keeping is not remembers


def test_other_replies_do_not_show_whether_the_server_remembers() -> None:
    slots = SlotUse(2)
    run = ScheduledRun()
    first = began(slots, run)
    slots.note_reply(first, (100, 0), is_first_attempt=True)
    slots.end(first)
    slots.note_reply(began(slots, run), (100, 100), is_first_attempt=True)
    slots.note_reply(began(slots), (100, 100), is_first_attempt=True)
    assert slots.remembers is None


def test_a_shorter_prompt_is_another_conversation() -> None:
    """A tool has made a request, or the run has forgotten old messages."""
    slots = SlotUse(2)
    slots.note_reply(began(slots, displaced(slots)), (99, 0), is_first_attempt=True)
    assert slots.remembers is None


def test_a_second_attempt_finds_what_the_first_one_has_left() -> None:
    slots = SlotUse(2)
    slots.note_reply(began(slots, displaced(slots)), (100, 100), is_first_attempt=False)
    assert slots.remembers is None


def test_a_second_request_at_the_same_time_finds_what_the_first_one_has_brought_back() -> None:
    slots = SlotUse(2)
    run = displaced(slots)
    first, second = began(slots, run), began(slots, run)
    assert first.was_displaced
    assert not second.was_displaced


@pytest.mark.parametrize(("before", "after"), [(None, False), (False, False), (True, True)])
@pytest.mark.parametrize("usage", [None, (100, None)])
def test_a_reply_without_numbers_does_not_contradict_one_with_numbers(
    usage: tuple[int, int | None] | None, before: bool | None, after: bool
) -> None:
    slots = SlotUse(2, remembers=before)
    slots.note_reply(began(slots, displaced(slots)), usage, is_first_attempt=True)
    assert slots.remembers is after


def test_nothing_is_learned_from_several_models() -> None:
    """Each has slots of its own, so that a request for another model displaces nothing."""
    slots = SlotUse(2)
    run = displaced(slots)
    slots.end(began(slots, model="another"))
    slots.note_reply(began(slots, run), (100, 100), is_first_attempt=True)
    assert slots.remembers is False


def test_a_server_that_forgot_gets_another_chance() -> None:
    slots = SlotUse(2, remembers=False)
    used(slots, *(ScheduledRun() for _ in range(99)))
    assert slots.remembers is False
    used(slots, ScheduledRun())
    assert slots.remembers is None
    slots = SlotUse(2, remembers=True)
    used(slots, *(ScheduledRun() for _ in range(200)))
    assert slots.remembers is True


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
