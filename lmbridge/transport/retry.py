"""How long to wait before a request is sent again.

This is the only module that imports `backoff`, and it uses only its wait generator and its jitter: its decorators retry
by exception class, while a request is retried by what the server's reply says (see `Classify`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import backoff

MAX_RETRIES: Final = 5
"""The number of retries that a request gets at most, whatever the caller asks for."""
MAX_WAIT: Final = 15.0
"""The longest wait that lmbridge chooses by itself, in seconds."""
MAX_RETRY_AFTER: Final = 60.0
"""The longest `Retry-After` that is waited for, in seconds. Beyond it, the error is raised at once."""
_FIRST_WAIT: Final = 0.5
_FIRST_POLL: Final = 0.5
_LAST_POLL: Final = 2.0


class Verdict(enum.Enum):
    """What to do about a reply that is not a success."""

    RETRY = "retry"
    """Send the request again, a limited number of times, with waits that grow."""
    POLL = "poll"
    """Send the request again until `Timeouts.load` runs out: the server is loading. It does not count as a retry."""
    FAIL = "fail"
    """Raise the error."""


Classify = Callable[[int, Mapping[str, str], bytes], Verdict]
"""A function `(status, headers, body) -> Verdict`: what the client knows about servers, lent to the transport."""


def retry_waits() -> Iterator[float]:
    """Yields the seconds to wait before the first, second, ... retry: exponential, capped, and with full jitter."""
    ceilings = backoff.expo(base=2, factor=_FIRST_WAIT, max_value=MAX_WAIT)
    # The first item of backoff's generators is not a wait: it stands for the first `send`.
    next(ceilings)
    for ceiling in ceilings:
        yield backoff.full_jitter(ceiling)


def poll_waits() -> Iterator[float]:
    """Yields the seconds to wait between two requests to a server that is loading."""
    wait = _FIRST_POLL
    while True:
        yield wait
        wait = min(wait * 1.5, _LAST_POLL)


def parse_retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Returns the seconds that a `Retry-After` header asks for, as a number or as a date (RFC 9110, 10.2.3).

    Args:
        headers: The headers of a reply.
        now: The time with which a date is compared. Default: the present.

    Returns:
        The seconds, 0 for a date in the past; None if the header is missing or cannot be read.
    """
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
