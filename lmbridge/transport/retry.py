"""What is tried again, and after how long. The only importer of `backoff`, and only of its waits."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import backoff

MAX_RETRIES: Final = 5
MAX_WAIT: Final = 15.0
"""Seconds that a wait of our own lasts at most."""
MAX_RETRY_AFTER: Final = 60.0
"""Seconds that a server may ask us to wait before we tell the caller instead."""
_FIRST_WAIT: Final = 0.5
_FIRST_POLL: Final = 0.5
_LAST_POLL: Final = 2.0


class Verdict(enum.Enum):
    """What to do about an answer."""

    RETRY = "retry"
    """Try again a bounded number of times, with growing waits."""
    POLL = "poll"
    """It is about to work: ask again, on the budget for loading, without counting."""
    FAIL = "fail"
    """Hand it to the caller."""


Classify = Callable[[int, Mapping[str, str], bytes], Verdict]
"""`(status, headers, body) -> Verdict`: the client's knowledge of servers, lent to the transport."""


def retry_waits() -> Iterator[float]:
    """Seconds before the 1st, 2nd, ... retry: exponential, capped, fully jittered."""
    ceilings = backoff.expo(base=2, factor=_FIRST_WAIT, max_value=MAX_WAIT)
    next(ceilings)  # its first item is no wait: it takes the first `send`
    for ceiling in ceilings:
        yield backoff.full_jitter(ceiling)


def poll_waits() -> Iterator[float]:
    """Seconds between two questions to a server that is loading."""
    wait = _FIRST_POLL
    while True:
        yield wait
        wait = min(wait * 1.5, _LAST_POLL)


def parse_retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds of a `Retry-After` header, given as a number or as a date (RFC 9110, 10.2.3); None without one."""
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    if value.replace(".", "", 1).isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())
