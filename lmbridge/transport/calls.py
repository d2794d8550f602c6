"""A request, its answer, and the bookkeeping between them: attempts, deadlines, waits. No socket here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Self

import attrs

from lmbridge.config import Timeouts
from lmbridge.errors import LLMTimeoutError
from lmbridge.transport.admission import Admission
from lmbridge.transport.deadline import Deadline, DeadlineTimer
from lmbridge.transport.retry import (
    MAX_RETRIES,
    MAX_RETRY_AFTER,
    Classify,
    Verdict,
    parse_retry_after,
    poll_waits,
    retry_waits,
)
from lmbridge.transport.scheduler import Permit
from lmbridge.transport.sse import Event, NamedEvent

Phase = Literal["connect", "load", "first_byte", "idle", "total"]


def _never(_data: bytes) -> bool:
    return False


@attrs.define(kw_only=True, eq=False)
class Request:
    """What to send, and how to treat it."""

    operation: str
    """For people: "chat completion"."""
    method: str
    path: str
    """Below `/v1`: "/chat/completions"."""
    classify: Classify
    timeouts: Timeouts
    max_retries: int
    body: bytes | None = None
    """JSON."""
    model: str | None = None
    queued: bool = True
    """Whether it is a generation, which waits for a permit."""
    repeatable: bool = True
    """Whether it may be sent again if the server may have begun with it. What is not goes out on a new connection."""
    reports_error: Callable[[bytes], bool] = _never
    """Whether a reply with a good status, or the data of an event, reports an error all the same."""
    below_root: bool = False
    """Whether the path is beside `/v1` and not below it: "/api/v1/models"."""


class Call(Deadline):
    """One request under way, from its admission to the end of its body; and the deadline of each of its attempts."""

    # One object for both: with many requests at a time, what costs is how many objects the collector has to look at.
    __slots__ = (
        "_admission",
        "_load_deadline",
        "_polls",
        "_started",
        "_waits",
        "attempted",
        "attempts",
        "permit",
        "request",
        "retries",
        "total_deadline",
        "url",
    )

    def __init__(
        self, request: Request, url: str, admission: Admission, permit: Permit | None, deadline_timer: DeadlineTimer
    ) -> None:
        super().__init__(deadline_timer, math.inf)
        self.request = request
        self.permit = permit
        self.attempts = 0
        self.retries = 0
        self.url = url
        self._admission = admission
        self._started = deadline_timer.time()
        self.attempted = self._started
        self.total_deadline = self._started + _or_infinity(request.timeouts.total)
        self._load_deadline = math.inf
        self._waits: Iterator[float] | None = None
        self._polls: Iterator[float] | None = None

    def context(self) -> dict[str, Any]:
        """What errors say about it."""
        return {
            "operation": self.request.operation,
            "url": self.url,
            "model": self.request.model,
            "attempts": self.attempts,
            "seconds": self.deadline_timer.time() - self._started,
        }

    def begin_attempt(self) -> Self:
        """Counts an attempt; returns the deadline for its answer, to be entered."""
        self.attempts += 1
        self.attempted = self.deadline_timer.time()
        self.when = self.first_byte_deadline
        self._reached = False
        return self

    @property
    def first_byte_deadline(self) -> float:
        """When the first event, or the whole plain reply, is due."""
        return min(self.attempted + _or_infinity(self.request.timeouts.first_byte), self.total_deadline)

    def wait_before_next(self, verdict: Verdict, retry_after: float | None) -> float | None:
        """Seconds to wait before the next attempt, or None if there is to be none.

        Raises:
            LLMTimeoutError: phase "load": the server has been loading for too long.
        """
        now = self.deadline_timer.time()
        if verdict is Verdict.POLL:
            wait = self._wait_for_loading(now)
        elif verdict is Verdict.RETRY and self.retries < min(self.request.max_retries, MAX_RETRIES):
            if retry_after is not None and retry_after > MAX_RETRY_AFTER:
                return None
            self._waits = self._waits or retry_waits()
            wait = next(self._waits) + (retry_after or 0.0)
        else:
            return None
        if now + wait >= self.total_deadline:
            return None
        self._load_deadline = self._load_deadline if verdict is Verdict.POLL else math.inf
        self.retries += verdict is Verdict.RETRY
        return wait

    def _wait_for_loading(self, now: float) -> float:
        budget = self.request.timeouts.load
        if self._load_deadline == math.inf:
            self._load_deadline = now + _or_infinity(budget)
        if now >= self._load_deadline:
            raise self.timed_out("load")
        self._polls = self._polls or poll_waits()
        return min(next(self._polls), self._load_deadline - now)

    def timed_out(self, phase: Phase, cause: BaseException | None = None) -> LLMTimeoutError:
        """The error for a limit that ran out."""
        limit = getattr(self.request.timeouts, phase)
        what, hint = _PHASES[phase]
        return LLMTimeoutError(f"{what} within {limit:g} s", cause, phase=phase, hint=hint, context=self.context())

    def release(self) -> None:
        """Gives its permit back; a second time does nothing."""
        if self.permit is not None:
            self._admission.release(self.permit)

    def note_first_event(self, first: Event) -> None:
        """Notes its first event, or its whole reply: others may be waiting for the model to be loaded.

        What reports an error shows that it is not: then the next of them goes alone.
        """
        if self.permit is not None and self.permit.is_first_request:
            name, data = (first.name, first.data) if isinstance(first, NamedEvent) else ("", first)
            if name != "error" and not self.request.reports_error(data):
                self._admission.mark_loaded(self.permit)

    def mark_unloaded(self) -> None:
        """Notes that its model is not loaded, whatever was thought: the next request for it goes alone."""
        if self.permit is not None:
            self._admission.mark_unloaded(self.request.model)


@attrs.define(kw_only=True, eq=False)
class Reply:
    """A whole answer, whatever its status."""

    call: Call
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def retry_after(self) -> float | None:
        """Seconds that the server asked to wait."""
        return parse_retry_after(self.headers)


_PHASES = {
    "connect": (
        "no connection",
        "check that the address is right and the host is up, or raise Timeouts.connect",
    ),
    "load": (
        "the server is still loading its model, not ready",
        "raise Timeouts.load, or load the model first",
    ),
    "first_byte": (
        "no answer",
        "the server may be busy with other requests, a long prompt or loading; raise Timeouts.first_byte",
    ),
    "idle": ("no further event", "the server may have hung; raise Timeouts.idle if its model is that slow"),
    "total": ("no end", "raise Timeouts.total, or ask for fewer tokens"),
}


def _or_infinity(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds
