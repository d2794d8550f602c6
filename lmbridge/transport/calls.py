"""Requests, replies, and the bookkeeping of a call: its attempts, its deadlines, its waits and its line in the log.

Nothing in this module sends or receives anything, so all of it can be tested with a fake clock.

What happens to the connection when a call is cancelled is decided by `Attempts` in `attempts`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from lmbridge.config import Timeouts
from lmbridge.errors import LLMError, LLMResponseError, LLMTimeoutError
from lmbridge.transport.admission import Admission
from lmbridge.transport.deadline import Deadline, DeadlineTimer
from lmbridge.transport.decompression import decompressed_beginning
from lmbridge.transport.interpreter import Interpreter
from lmbridge.transport.permits import Permit
from lmbridge.transport.retry import RetryWaits, Verdict, parse_retry_after
from lmbridge.transport.sse import Event, NamedEvent
from lmbridge.transport.time_limits import Phase, timed_out

if TYPE_CHECKING:
    from lmbridge.observe.observer import Observers
    from lmbridge.observe.watches import RequestWatch
    from lmbridge.transport.failover_interface import Failover

logger: logging.Logger = logging.getLogger("lmbridge.transport")

MAX_REPLY_BYTES: Final = 256 * 1024**2
"""The default of the option `max_reply_bytes`."""


@attrs.frozen
class TokenUsage:
    """The tokens that a server has counted for one request."""

    prompt: int
    """The number of tokens in the prompt."""
    completion: int
    """The number of tokens that were generated."""
    cached: int | None = None
    """The number of tokens of the prompt that came from the server's cache, or None if the server does not say."""


@attrs.define(eq=False)
class Request:
    """A request as the client layer describes it: what to send, and how to treat it.

    Create another one for each call of `Transport.request`, `stream` or `forward`. The transport changes it: it drops
    the `body` of a stream that has begun, and `forward` sets `keeps_compression`. Copying each request instead would
    take time.
    """

    operation: str
    """What the request is for. Errors and log lines contain it, so it is plain English, such as "chat completion"."""
    method: str
    """The HTTP method in capital letters."""
    path: str
    """The path below `/v1`, such as "/chat/completions"."""
    interpreter: Interpreter
    """The functions that interpret what the server says."""
    timeouts: Timeouts
    """The time limits of this request."""
    max_retries: int
    """The most retries after failed attempts. There are never more than `MAX_RETRIES`."""
    body: bytes | None = None
    """The body as JSON, or None for a request without a body."""
    model: str | None = None
    """The model that the request names, or None if it names no model."""
    priority: int = 0
    """How urgent the request is. While requests wait for a permit, a higher number goes first."""
    queued: bool = True
    """Whether the request needs a permit, as all generations do. Model lists and health checks do not."""
    repeatable: bool = True
    """Whether the request may be sent again even if the server may have started to work on it.

    Set it to False if sending the request twice would have a different effect on the server than sending it once. It
    is then sent on a fresh connection, because a kept connection may turn out to be dead only after the request has
    been sent.
    """
    complete_error: Callable[[LLMError], Awaitable[None]] | None = None
    """An async function that adds facts to an error of a stream before the reader of the stream gets the error. It may
    send another request to the server, for example to find out which models exist."""
    max_bytes: int | None = None
    """The most bytes that the body of a whole reply may have, or None for the `max_reply_bytes` of the transport."""
    below_root: bool = False
    """Whether the path starts at the root of the server, such as "/api/v1/models", and not below `/v1`."""
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    """The headers of this request. They replace the transport's headers of the same name, and may be secret."""
    query: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    """The query parameters of this request. Neither the log nor any error contains them."""
    keeps_compression: bool = False
    """Whether the body of the reply is left as the server sends it, even if it is compressed."""
    on_admitted: Callable[[Call], None] | None = None
    """Called when the request gets its permit, and once more for each server that it is passed on to."""
    observers: Observers | None = attrs.field(default=None, repr=False)
    """The observers of the request, or None."""
    failover: Failover | None = attrs.field(default=None, repr=False)
    """Decides whether another server gets the request when an attempt has failed; None if there is only one."""


class Call:
    """The processing of one request, from its arrival to the end of the reply.

    Args:
        request: The request.
        url: The absolute URL that the request is sent to.
        admission: The `Admission` that the permit is returned to.
        deadline_timer: The timer that watches the deadlines of the call.
        max_reply_bytes: The most bytes that the body of a whole reply may have, unless the request itself has a limit.
    """

    __slots__ = (
        "_admission",
        "_earlier_seconds",
        "_is_logged",
        "_max_reply_bytes",
        "_started",
        "_waits",
        "arrived",
        "attempts",
        "deadline_timer",
        "first_byte_deadline",
        "permit",
        "read_usage",
        "request",
        "retries",
        "total_deadline",
        "url",
        "watch",
    )

    def __init__(
        self,
        request: Request,
        url: str,
        admission: Admission,
        deadline_timer: DeadlineTimer,
        max_reply_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        self.request: Request = request
        """The request."""
        self.url: str = url
        """The absolute URL that the request is sent to."""
        self.deadline_timer: Final = deadline_timer
        self.permit: Permit | None = None
        """The permit that the call holds, or None if it needs no permit or has not been admitted yet."""
        earlier = request.failover
        self.attempts: int = 0 if earlier is None else earlier.attempts
        """The number of times that the request has been sent."""
        self.retries: int = 0 if earlier is None else earlier.retries
        """The number of attempts that count as retries. Polls of a server that is loading do not."""
        self.read_usage: Callable[[], TokenUsage | None] | None = None
        """A function that returns the numbers of tokens, if they are known. It is called when the call is over."""
        self.arrived: Reply | None = None
        """The part of the reply that had arrived when the last attempt broke off, or None. A large part is cut after
        its beginning."""
        self._admission = admission
        self._max_reply_bytes = max_reply_bytes
        self._started = deadline_timer.time()
        self._earlier_seconds = 0.0 if earlier is None else earlier.seconds
        self.total_deadline: float = self._started + _or_infinity(request.timeouts.total) - self._earlier_seconds
        """The time at which `Timeouts.total` runs out, by the clock of the event loop."""
        self.first_byte_deadline: float = math.inf
        """The time by which the first event of this attempt must arrive, or its whole reply if it is not streamed."""
        # Created after the first failed attempt, because most calls have none.
        self._waits: RetryWaits | None = None
        self._is_logged = False
        self.watch: RequestWatch | None = None
        """Notifies the observers of the request; None if it has none."""
        if request.observers is not None:
            # Imported here because most programs have no observers.
            from lmbridge.observe.watches import RequestWatch  # noqa: PLC0415 - see above

            self.watch = RequestWatch(request.observers, operation=request.operation, url=url, model=request.model)

    def admit(self, permit: Permit) -> None:
        """Stores the permit, and starts the clock of the time limits, which do not include the time in the queue."""
        self.permit = permit
        self.total_deadline += permit.admitted_at - self._started
        self._started = permit.admitted_at
        if self.request.on_admitted is not None:
            self.request.on_admitted(self)
        if self.watch is not None:
            self.watch.admitted()
            for swap in self._admission.swaps_for(permit):
                self.watch.swapped(swap.before, swap.after)

    @property
    def seconds(self) -> float:
        """The seconds since the request was first admitted, not counting the time in the queues of further servers."""
        return self._earlier_seconds + self.deadline_timer.time() - self._started

    def context(self) -> dict[str, Any]:
        """Returns the facts about this call that its errors contain."""
        context: dict[str, Any] = {
            "operation": self.request.operation,
            "url": self.url,
            "model": self.request.model,
            "attempts": self.attempts,
            "seconds": self.seconds,
        }
        if self.request.failover is not None and self.request.failover.tried:
            context["tried"] = list(self.request.failover.tried)
        return context

    @property
    def max_bytes(self) -> int:
        """The most bytes that the body of a whole reply may have."""
        return self._max_reply_bytes if self.request.max_bytes is None else self.request.max_bytes

    def too_large(self, status: int) -> LLMResponseError:
        """Returns the error for a reply that has more bytes than `max_bytes`."""
        if self.request.max_bytes is None:
            limit, hint = " (max_reply_bytes)", "raise the client's max_reply_bytes if such a reply is expected"
        else:
            limit, hint = "", "check that api_base is an OpenAI-compatible server"
        return LLMResponseError(
            f"the reply has more than {_describe_size(self.max_bytes)}{limit}",
            hint=hint,
            status=status,
            context=self.context(),
        )

    # Attempts

    def begin_attempt(self) -> Deadline:
        """Counts a new attempt, and returns a context manager that limits the wait for its reply."""
        self.attempts += 1
        self.arrived = None
        if self.watch is not None:
            self.watch.attempt(self.attempts)
        deadline = self.total_deadline
        limit = self.request.timeouts.first_byte
        if limit is not None and (first_byte := self.deadline_timer.time() + limit) < deadline:
            deadline = first_byte
        self.first_byte_deadline = deadline
        return Deadline(self.deadline_timer, deadline)

    def wait_before_next(self, verdict: Verdict, retry_after: float | None) -> float | None:
        """Returns the seconds to wait before the next attempt, or None if there must not be another one.

        Args:
            verdict: What to do about the last attempt.
            retry_after: The seconds that the server asked the client to wait, or None if it did not ask.

        Raises:
            LLMTimeoutError: With phase "load", if the server has been loading for longer than `Timeouts.load`.
        """
        now = self.deadline_timer.time()
        if self._waits is None:
            self._waits = RetryWaits(max_retries=self.request.max_retries, load_seconds=self.request.timeouts.load)
        if verdict is Verdict.POLL and self._waits.is_load_over(now):
            raise self.timed_out("load")
        wait = self._waits.next(verdict, retry_after, retries=self.retries, now=now, deadline=self.total_deadline)
        self.retries += verdict is Verdict.RETRY and wait is not None
        return wait

    def timed_out(self, phase: Phase, cause: BaseException | None = None) -> LLMTimeoutError:
        """Returns the error for one of this call's time limits that has run out."""
        return timed_out(phase, getattr(self.request.timeouts, phase), cause).completed(context=self.context())

    def attempt_timed_out(self, cause: BaseException) -> LLMTimeoutError:
        """Returns the error for an attempt whose deadline has passed."""
        is_total = self.first_byte_deadline == self.total_deadline
        return self.timed_out("total" if is_total else "first_byte", cause)

    # Reports to the scheduler

    @property
    def is_first_request(self) -> bool:
        """Whether other requests wait until the reply to this one shows that the model is loaded."""
        return self.permit is not None and self.permit.is_first_request

    def note_first_event(self, first: Event, *, is_stream: bool = True) -> None:
        """Records that the first event of a stream, or a whole plain reply, has arrived, so the model is loaded.

        If `first` reports an error, the model does not count as loaded, and the next request for it is sent alone.
        """
        if self.watch is not None:
            self.watch.first_event(is_stream=is_stream)
        self._mark_loaded(first)

    def note_events(self, events: Sequence[Event]) -> bool:
        """Records that the first events of a stream have arrived, as `note_first_event` does.

        Observers measure the time until the reply begins. Events that only report the progress of the prompt come
        before that, and are not a part of the reply.

        Args:
            events: The events that have arrived together, at least one.

        Returns:
            Whether the reply has begun. Otherwise this method has to be called with the next events as well.
        """
        self._mark_loaded(events[0])
        if self.watch is None:
            return True
        # The progress comes before everything else, so the last event shows whether anything has followed it.
        last = events[-1]
        if not isinstance(last, NamedEvent) and self.request.interpreter.reports_progress(last):
            return False
        self.watch.first_event(is_stream=True)
        return True

    def _mark_loaded(self, first: Event) -> None:
        if self.permit is None:
            return
        self.permit.has_answered = True
        if self.permit.is_first_request or self.permit.begins_run or self.permit.is_on_the_way:
            name, data = (first.name, first.data) if isinstance(first, NamedEvent) else ("", first)
            if name != "error" and not self.request.interpreter.is_error(data):
                self._admission.mark_loaded(self.permit)

    def mark_unloaded(self) -> None:
        """Records that the server has unloaded the model, so that the next request for it is sent alone."""
        if self.permit is not None:
            self._admission.mark_unloaded(self.request.model)

    def note_eviction(self, *, is_certain: bool) -> None:
        """Records that the server has killed the generation to load another model.

        Args:
            is_certain: Whether the server has reported it. Otherwise the call has an effect only if other models are in
                use.
        """
        if self.permit is not None:
            self._admission.note_eviction(self.permit, is_certain=is_certain)

    def note_streamed_reply(self) -> None:
        """Reports the tokens of a stream that has ended to the scheduler, if the stream belongs to a run.

        The scheduler learns from the conversation of an agent, and an agent streams all of its requests. A plain
        request in a run was sent by a tool, so it is not reported.
        """
        if self.permit is not None and self.permit.run is not None:
            usage = self.read_usage() if self.read_usage is not None else None
            self._admission.note_reply(
                self.permit,
                None if usage is None else (usage.prompt, usage.cached),
                is_first_attempt=self.attempts == 1,
            )

    # The end

    def release(self) -> None:
        """Gives the permit back. Calling it again does nothing."""
        if self.permit is not None:
            self._admission.release(self.permit)

    def finish(self, outcome: int | str) -> None:
        """Gives the permit back and writes the line about this call to the log. Calling it again does nothing.

        Args:
            outcome: The status of the reply. If the call ended in another way, the reason, such as the class of an
                error.
        """
        self.release()
        self.log(outcome)

    def log(self, outcome: int | str) -> None:
        """Writes the line about this call to the log. Calling it again does nothing."""
        if self._is_logged:
            return
        self._is_logged = True
        is_shown = logger.isEnabledFor(logging.INFO)
        if self.watch is None and not is_shown:
            return
        usage = self.read_usage() if self.read_usage is not None else None
        if self.watch is not None:
            tokens = None if usage is None else (usage.prompt, usage.completion, usage.cached)
            self.watch.ended(outcome, attempts=self.attempts, tokens=tokens)
        if not is_shown:
            return
        seconds = self.seconds
        logger.info(
            "%s %s model=%s %s in %.2f s%s, %d attempt%s",
            self.request.method,
            self.url,
            self.request.model,
            outcome,
            seconds,
            f", {usage.prompt} + {usage.completion} tokens" if usage is not None else "",
            self.attempts,
            "" if self.attempts == 1 else "s",
            extra={
                "lmbridge_operation": self.request.operation,
                "lmbridge_model": self.request.model,
                "lmbridge_outcome": outcome,
                "lmbridge_seconds": seconds,
                "lmbridge_attempts": self.attempts,
                "lmbridge_prompt_tokens": None if usage is None else usage.prompt,
                "lmbridge_completion_tokens": None if usage is None else usage.completion,
            },
        )


@attrs.define(eq=False)
class Reply:
    """A complete reply, whatever its status."""

    call: Call
    """The call that the reply belongs to."""
    status: int
    """The HTTP status of the reply."""
    headers: Mapping[str, str]
    """The headers of the reply. Their names are case-insensitive."""
    body: bytes
    """The whole body of the reply."""

    @property
    def plain_body(self) -> bytes:
        """The body in plain text.

        If the request left the body compressed, it is decompressed here, and only the beginning of a large body is
        returned. A body that cannot be decompressed counts as empty.
        """
        if not self.call.request.keeps_compression:
            return self.body
        return decompressed_beginning(self.body, self.headers.get("Content-Encoding"))

    @property
    def retry_after(self) -> float | None:
        """The seconds that the server asked the client to wait before the next attempt, or None if it did not ask."""
        return parse_retry_after(self.headers)


def _describe_size(size: int) -> str:
    mebibytes, rest = divmod(size, 1024**2)
    return f"{size} bytes" if rest else f"{mebibytes} MiB"


def _or_infinity(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds
