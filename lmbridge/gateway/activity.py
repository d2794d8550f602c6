"""What a gateway is doing: its waiting, running and finished requests, and its rates of requests and tokens."""

from __future__ import annotations

import bisect
import itertools
import time
from collections import Counter, deque
from typing import Final

import attrs

from lmbridge.gateway.fair_order import FairPosition

_FINISHED: Final = 100
"""The number of finished requests that are remembered."""
_MINUTE: Final = 60
_TOKEN_SECONDS: Final = 10
"""The seconds over which the rate of tokens is averaged."""
_NAMED_MODELS: Final = 100
"""The number of models that are counted by name. It is limited because clients choose the names, and the memory for a
name is never freed."""
_OTHER_MODELS: Final = "other"
BUCKETS: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""The upper bounds of the buckets of a histogram of durations, in seconds."""


@attrs.define(eq=False, kw_only=True)
class Entry:
    """One request of a client."""

    id: int
    """A number that increases with each request."""
    model: str | None
    """The model that the request names."""
    endpoint: str
    """The path of the request."""
    priority: int
    """How urgent the request is, as a number. Higher numbers are admitted first."""
    priority_name: str
    """The priority as the client has sent it."""
    client: str
    """The name of the client."""
    streaming: bool
    """Whether the client has asked for an event stream."""
    position: FairPosition
    """The position of the request in the order of all requests."""
    needs_model: bool = True
    """Whether the server has to load the model for the request. It need not for a token count."""
    arrived_at: float
    """The time of arrival, by the monotonic clock."""
    admitted_at: float | None = None
    """The time at which the request was admitted, or None while it waits."""
    server: str | None = None
    """The URL of the server that works on the request, or None while it waits."""
    chunks: int = 0
    """The number of parts of the body that have been passed on."""
    bytes: int = 0
    """The number of bytes of the body that have been passed on."""
    events: int = 0
    """The number of events that have been passed on, which is about the number of tokens; 0 if the body is not an event
    stream."""
    tokens: int | None = None
    """The number of tokens that the server has generated, if it has reported that."""
    status: int | str | None = None
    """The HTTP status of the response, or why the request had no complete response; None before either is known."""
    ended_at: float = 0.0
    """The time at which the request ended, by the monotonic clock; 0 before that."""


class RateCounter:
    """Counts the events of a period that ends now, such as the last minute.

    Args:
        seconds: The length of the period in seconds.
    """

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self._counts: deque[list[int]] = deque()

    def add(self, now: float, count: int = 1) -> None:
        """Counts events that have just happened."""
        second = int(now)
        if self._counts and self._counts[-1][0] == second:
            self._counts[-1][1] += count
        else:
            self._counts.append([second, count])
            self._drop_old(second)

    def total(self, now: float) -> int:
        """Returns the number of events in the period that ends now."""
        self._drop_old(int(now))
        return sum(count for _, count in self._counts)

    def _drop_old(self, second: int) -> None:
        while self._counts and self._counts[0][0] <= second - self._seconds:
            self._counts.popleft()


@attrs.define
class Histogram:
    """A histogram of durations."""

    counts: list[int] = attrs.field(factory=lambda: [0] * (len(BUCKETS) + 1))
    """The number of durations in each of the `BUCKETS`. The last number counts the durations above all bounds."""
    total: float = 0.0
    """The sum of all durations."""

    def add(self, seconds: float) -> None:
        """Adds a duration."""
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


class Activity:
    """Remembers and counts the requests of a gateway."""

    def __init__(self) -> None:
        self.started_at: Final = time.monotonic()
        """The time at which the gateway started, by the monotonic clock."""
        self.entries: Final[dict[int, Entry]] = {}
        """The requests that wait or are in flight, by id."""
        self.finished: Final[deque[Entry]] = deque(maxlen=_FINISHED)
        """The latest requests that have finished, in order."""
        self.outcomes: Final[Counter[tuple[str, str, str]]] = Counter()
        """The number of finished requests by endpoint, model and outcome."""
        self.tokens: Final[Counter[str]] = Counter()
        """The number of generated tokens that the servers reported, by model."""
        self.queue_seconds: Final = Histogram()
        """How long requests have waited until they were admitted."""
        self.request_seconds: Final = Histogram()
        """How long requests have taken from arrival to end."""
        self.answered_models: Final[set[str]] = set()
        """The models that have answered a request for which the server has to load them. Only models that are counted
        by name are added, so their number is limited."""
        self._named_models: set[str] = set()
        self._ids = itertools.count(1)
        self._requests = RateCounter(_MINUTE)
        self._recent_tokens = RateCounter(_TOKEN_SECONDS)

    def next_id(self) -> int:
        """Returns the id of a new request."""
        return next(self._ids)

    def enter(self, entry: Entry) -> None:
        """Adds a request that has arrived."""
        self.entries[entry.id] = entry
        self._requests.add(entry.arrived_at)

    def note_part(self, entry: Entry, size: int, events: int) -> None:
        """Records that a part of a body was passed on.

        Args:
            entry: The request.
            size: The number of bytes.
            events: The number of events in the part, which is about the number of tokens; 0 if the body is not an event
                stream.
        """
        entry.chunks += 1
        entry.bytes += size
        entry.events += events
        if events:
            self._recent_tokens.add(time.monotonic(), events)

    def leave(self, entry: Entry) -> None:
        """Records the end of a request."""
        del self.entries[entry.id]
        now = entry.ended_at = time.monotonic()
        self.finished.append(entry)
        model = self._name_for_counting(entry)
        self.outcomes[entry.endpoint, model, str(entry.status)] += 1
        self.request_seconds.add(now - entry.arrived_at)
        if entry.admitted_at is not None:
            self.queue_seconds.add(entry.admitted_at - entry.arrived_at)
        if entry.tokens is not None:
            self.tokens[model] += entry.tokens
            # The tokens of an event stream were added to the rate as they arrived.
            if not entry.events:
                self._recent_tokens.add(now, entry.tokens)

    def tokens_per_second(self, now: float) -> float | None:
        """Returns how many tokens a second have arrived in the last ten seconds, or None if none have."""
        return self._recent_tokens.total(now) / min(_TOKEN_SECONDS, max(1.0, now - self.started_at)) or None

    def requests_per_minute(self, now: float) -> float:
        """Returns the number of requests in the last minute."""
        return float(self._requests.total(now))

    def in_flight(self) -> list[Entry]:
        """Returns the requests that a server is working on, the oldest first."""
        return [entry for entry in self.entries.values() if entry.admitted_at is not None]

    def waiting(self) -> list[Entry]:
        """Returns the requests that wait for their admission, roughly in the order of their admission."""
        waiting = [entry for entry in self.entries.values() if entry.admitted_at is None]
        return sorted(waiting, key=lambda entry: (-entry.priority, entry.position.number, entry.id))

    def _name_for_counting(self, entry: Entry) -> str:
        model = entry.model or ""
        has_answered = isinstance(entry.status, int) and entry.status < 400
        if has_answered and len(self._named_models) < _NAMED_MODELS:
            self._named_models.add(model)
        if model not in self._named_models:
            return _OTHER_MODELS
        if has_answered and entry.needs_model:
            self.answered_models.add(model)
        return model
