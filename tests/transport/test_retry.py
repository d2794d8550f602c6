"""How long to wait before a retry, and what a Retry-After header asks for."""

from __future__ import annotations

import itertools
import math
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from lmbridge.transport.retry import (
    MAX_BACKOFF,
    MAX_RETRIES,
    MAX_RETRY_AFTER,
    parse_retry_after,
    poll_waits,
    retry_waits,
)

NOW = datetime(2025, 1, 31, 12, 0, 0, tzinfo=UTC)


def first(count: int) -> list[float]:
    return list(itertools.islice(retry_waits(), count))


def retry_after(value: str) -> float | None:
    return parse_retry_after({"Retry-After": value}, NOW)


def test_the_limits_are_the_documented_ones() -> None:
    assert (MAX_RETRIES, MAX_BACKOFF, MAX_RETRY_AFTER) == (5, 15.0, 60.0)


def test_waits_grow_up_to_15_seconds(no_waits: list[float]) -> None:
    assert first(8) == [0.0] * 8
    assert no_waits == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]


def test_each_wait_is_drawn_between_zero_and_its_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[float, float]] = []

    def lowest(low: float, high: float) -> float:
        ranges.append((low, high))
        return low

    monkeypatch.setattr("random.uniform", lowest)
    assert first(4) == [0.0] * 4
    assert ranges == [(0, 0.5), (0, 1.0), (0, 2.0), (0, 4.0)]


def test_waits_differ_from_one_request_to_the_next() -> None:
    waits = [first(8) for _ in range(50)]
    assert len({tuple(each) for each in waits}) == 50
    ceilings = [0.5, 1, 2, 4, 8, 15, 15, 15]
    assert all(0 <= wait <= ceiling for each in waits for wait, ceiling in zip(each, ceilings, strict=True))


def test_a_loading_server_is_polled_every_half_second_at_first_and_every_two_seconds_later() -> None:
    waits = list(itertools.islice(poll_waits(), 10))
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        (" 120 ", 120.0),
        ("1.5", 1.5),
        ("0.25", 0.25),
        ("Fri, 31 Jan 2025 12:00:30 GMT", 30.0),
        ("Friday, 31-Jan-25 12:00:30 GMT", 30.0),
        ("Fri Jan 31 12:00:30 2025", 30.0),
        ("Fri, 31 Jan 2025 13:00:30 +0100", 30.0),
        ("Fri, 31 Jan 2025 12:00:30 -0000", 30.0),
        ("Fri, 31 Jan 2025 11:59:59 GMT", 0.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_a_number_of_seconds_or_a_date(value: str, seconds: float) -> None:
    assert retry_after(value) == seconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "soon",
        "-1",
        "+1",
        "1e3",
        "1,5",
        "1.2.3",
        ".",
        "nan",
        "inf",
        "²",
        "1 s",
        "Fri, 99 Jan 2025 12:00:30 GMT",
        "Fri, 31 Jan 99999999999999999999 12:00:30 GMT",
        "Fri, 31 Jan 2025 12:00:30 +99999999999999999999",
    ],
)
def test_a_retry_after_that_cannot_be_read_is_ignored(value: str) -> None:
    assert retry_after(value) is None


def test_without_the_header_there_is_no_retry_after() -> None:
    assert parse_retry_after({}) is None


def test_the_name_of_the_header_is_found_in_any_case_if_the_headers_are_case_insensitive() -> None:
    assert parse_retry_after(CIMultiDict({"retry-after": "3"})) == 3.0


def test_by_default_a_date_is_compared_with_the_present() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    seconds = parse_retry_after({"Retry-After": later})
    assert seconds is not None
    assert 0 < seconds <= 3600


_WORDS = st.sampled_from(
    [
        "Fri,",
        "Fri",
        "31",
        "Jan",
        "2025",
        "25",
        "12:00:30",
        "12.00",
        ":",
        "GMT",
        "+0100",
        "-",
        "1-Jan-25",
        "(",
        "é",
        "9" * 30,
    ]
)


@settings(deadline=None)
@given(value=st.one_of(st.text(), st.lists(_WORDS, max_size=7).map(" ".join), st.datetimes().map(format_datetime)))
def test_the_wait_is_never_negative_whatever_the_header_contains(value: str) -> None:
    seconds = retry_after(value)
    assert seconds is None or 0 <= seconds <= math.inf
