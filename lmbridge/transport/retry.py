"""Decides whether a request is sent again after a failed attempt, and how long to wait before that.

This is the only module that imports `backoff`. It uses the wait generator and the jitter of that library, but not its
decorators: these decide by the class of an exception, while lmbridge decides by the server's reply (see `Classify`).

Which replies can be retried is decided by `client.failures.classify`. What a request that must not be repeated may do
is decided in `attempts`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import ClassVar, Final

import backoff

MAX_RETRIES: Final = 5
"""The most retries of a request, whatever `max_retries` says."""
REFUSED_BEFORE_WORK: Final = (429, 503)
"""The statuses with which a server refuses a request before it starts to work on it."""
MAX_BACKOFF: Final = 15.0
"""The longest wait before a retry, in seconds, to which the seconds of a `Retry-After` are added."""
MAX_RETRY_AFTER: Final = 60.0
"""The longest `Retry-After`, in seconds, that is respected. If it is longer, the error is raised at once."""
_FIRST_BACKOFF: Final = 0.5
"""The longest wait before the first retry, in seconds. It doubles with each retry."""
_FIRST_SERVER_BACKOFF: Final = 1.0
"""The longest time for which a server is left alone after its first failure, in seconds."""
MAX_SERVER_BACKOFF: Final = 60.0
"""The longest time for which a server is left alone after many failures, in seconds."""
_FIRST_POLL_WAIT: Final = 0.5
"""The wait before the first poll of a server that is loading, in seconds."""
_LONGEST_POLL_WAIT: Final = 2.0
"""The longest wait between two polls, in seconds."""


class WaitScale:
    """The factor by which all waits before a further attempt are multiplied."""

    factor: ClassVar[float] = 1.0
    """It is 1, but `lmbridge.testing.retry_without_waiting` sets it to 0."""


class Verdict(enum.Enum):
    """What to do about an attempt that was not successful."""

    RETRY = "retry"
    """Send the request again, a limited number of times and with increasing waits."""
    POLL = "poll"
    """The server is loading: send the request again until `Timeouts.load` runs out. This does not count as a retry."""
    FAIL = "fail"
    """Raise the error, because a further attempt would fail as well."""


Classify = Callable[[int, Mapping[str, str], bytes], Verdict]
"""A function `(status, headers, body) -> Verdict`. The client layer provides it, because it knows what servers say."""


def retry_waits() -> Iterator[float]:
    """Yields the seconds to wait before each retry: exponential backoff with full jitter and an upper limit."""
    ceilings = backoff.expo(base=2, factor=_FIRST_BACKOFF, max_value=MAX_BACKOFF)
    # The first item of backoff's generators is None, which lets callers prime them with `send`.
    next(ceilings)
    for ceiling in ceilings:
        yield backoff.full_jitter(ceiling)


def poll_waits() -> Iterator[float]:
    """Yields the seconds to wait before each poll of a server that is loading."""
    wait = _FIRST_POLL_WAIT
    while True:
        yield wait
        wait = min(wait * 1.5, _LONGEST_POLL_WAIT)


class RetryWaits:
    """The waits of one call between its attempts.

    Retries and polls are counted separately: a server that is loading its model is polled for as long as
    `Timeouts.load` allows, and that uses up no retry.

    Args:
        max_retries: The most retries that the user allows. There are never more than `MAX_RETRIES`.
        load_seconds: The most seconds for which the server may keep answering that it is loading, counted from the
            first such answer. None means no limit.
    """

    def __init__(self, *, max_retries: int, load_seconds: float | None) -> None:
        self._max_retries = min(max_retries, MAX_RETRIES)
        self._load_seconds = math.inf if load_seconds is None else load_seconds
        self._load_deadline = math.inf
        self._waits: Iterator[float] | None = None
        self._polls: Iterator[float] | None = None

    def is_load_over(self, now: float) -> bool:
        """Returns whether the server has been loading for too long, counted from the first call for this load."""
        if self._load_deadline == math.inf:
            self._load_deadline = now + self._load_seconds
        return now >= self._load_deadline

    def next(
        self, verdict: Verdict, retry_after: float | None, *, retries: int, now: float, deadline: float
    ) -> float | None:
        """Returns the seconds to wait before the next attempt, or None if there must not be another one.

        Args:
            verdict: What to do about the last attempt.
            retry_after: The seconds that the server asked the client to wait, or None if it did not ask. The jitter is
                added to them, so the wait is never shorter than that.
            retries: The number of retries so far.
            now: The time now.
            deadline: The time at which the call must have ended.
        """
        if verdict is Verdict.POLL:
            self._polls = self._polls or poll_waits()
            wait = min(next(self._polls), self._load_deadline - now)
        elif verdict is Verdict.RETRY and retries < self._max_retries:
            if retry_after is not None and retry_after > MAX_RETRY_AFTER:
                return None
            self._waits = self._waits or retry_waits()
            wait = next(self._waits) + (retry_after or 0.0)
        else:
            return None
        wait *= WaitScale.factor
        if now + wait >= deadline:
            return None
        if verdict is not Verdict.POLL:
            # The server was not loading this time, so a later load has the whole time again.
            self._load_deadline = math.inf
        return wait


def server_backoff(failures: int) -> float:
    """Returns the seconds for which a server that has failed is not asked again, if there are others.

    Args:
        failures: How often it has failed in a row, at least once.
    """
    ceiling = min(_FIRST_SERVER_BACKOFF * 2.0 ** min(failures - 1, 10), MAX_SERVER_BACKOFF)
    # Half of it is certain, because a wait that is entirely random may be almost zero.
    return ceiling / 2 + backoff.full_jitter(ceiling / 2)


def parse_retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Returns the seconds that a `Retry-After` header asks for, as a number or as a date (RFC 9110, 10.2.3).

    Args:
        headers: The headers of a reply.
        now: The time that a date in the header is compared with. By default it is the current time.

    Returns:
        The seconds, which are 0 for a date in the past, or None if the header is missing or invalid.
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
