"""`RequestWatch`, `RunWatch` and `CallWatch` notify the observers of a request, a run or a tool call."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextvars import ContextVar
from time import monotonic
from typing import Any, Final, Literal

from lmbridge.observe.events import (
    AttemptBegun,
    FirstEventArrived,
    McpRequestSent,
    ModelLoadProgressed,
    ModelSwapped,
    PromptProgressed,
    RequestAdmitted,
    RequestEnded,
    RequestOutcome,
    RequestQueued,
    RetryPlanned,
    RoundBegun,
    RoundEnded,
    RunBegun,
    RunEnded,
    ToolCallBegun,
    ToolCallEnded,
)
from lmbridge.observe.observer import Observers

observed_run: Final[ContextVar[str | None]] = ContextVar("lmbridge_observed_run", default=None)
"""The id of the run to which the current task belongs, if that run has observers; otherwise None."""
observed_call: Final[ContextVar[CallWatch | None]] = ContextVar("lmbridge_observed_call", default=None)
"""The tool call to which the current task belongs, if its run has observers; otherwise None."""
_numbers: Final = itertools.count(1)
_OUTCOMES: Final[Mapping[str, RequestOutcome]] = {
    "closed early": "cancelled",
    "dropped unclosed": "dropped",
    "CancelledError": "cancelled",
    "TaskCancelledError": "cancelled",
    "GeneratorExit": "cancelled",
    "MovedToAnotherServer": "moved",
}
"""The outcomes of requests without a status, by the argument of `Call.finish`. Any other argument means an error."""


class RequestWatch:
    """Notifies the observers of one request. Creating the object notifies them that the request was made.

    Args:
        observers: The observers to notify.
        operation: What the request is for, such as "chat completion".
        url: The absolute URL, without query parameters.
        model: The model that the request names, or None.
    """

    __slots__ = ("_has_begun", "_has_ended", "_id", "_observers", "_queued_at")

    def __init__(self, observers: Observers, *, operation: str, url: str, model: str | None) -> None:
        self._observers = observers
        self._id = next(_numbers)
        self._has_begun = self._has_ended = False
        self._queued_at = monotonic()
        observers.notify(
            RequestQueued(
                at=self._queued_at,
                request_id=self._id,
                operation=operation,
                url=url,
                model=model,
                run_id=observed_run.get(),
            )
        )

    def admitted(self) -> None:
        """Notifies the observers that the request has its permit."""
        now = monotonic()
        self._observers.notify(RequestAdmitted(at=now, request_id=self._id, waited=now - self._queued_at))

    def swapped(self, before: str | None, after: str | None) -> None:
        """Notifies the observers that the request makes the server swap models."""
        self._observers.notify(ModelSwapped(at=monotonic(), request_id=self._id, before=before, after=after))

    def attempt(self, number: int) -> None:
        """Notifies the observers that the request is being sent."""
        self._observers.notify(AttemptBegun(at=monotonic(), request_id=self._id, number=number))

    def retry(self, *, reason: str, wait: float, is_poll: bool) -> None:
        """Notifies the observers that the request will be sent again."""
        self._observers.notify(
            RetryPlanned(at=monotonic(), request_id=self._id, reason=reason, wait=wait, is_poll=is_poll)
        )

    def first_event(self, *, is_stream: bool) -> None:
        """Notifies the observers that the reply has begun. Calling this method again does nothing."""
        if not self._has_begun:
            self._has_begun = True
            self._observers.notify(FirstEventArrived(at=monotonic(), request_id=self._id, is_stream=is_stream))

    def trace_context(self) -> dict[str, str]:
        """Returns the headers that observers add to the request."""
        return self._observers.trace_context(self._id)

    def ended(self, outcome: int | str, *, attempts: int, tokens: tuple[int, int, int | None] | None) -> None:
        """Notifies the observers that the request has ended. Calling this method again does nothing.

        Args:
            outcome: The status of the reply, or why there is no reply, as it is passed to `Call.finish`.
            attempts: How often the request was sent.
            tokens: The numbers of tokens in the prompt, in the completion, and in the part of the prompt that came from
                the cache; None if they are not known.
        """
        if self._has_ended:
            return
        self._has_ended = True
        kind: RequestOutcome
        if isinstance(outcome, int):
            status, error = outcome, None
            kind = "answer" if outcome < 400 else "error"
        else:
            status, kind = None, _OUTCOMES.get(outcome, "error")
            error = outcome if kind == "error" else None
        prompt, completion, cached = tokens or (None, None, None)
        self._observers.notify(
            RequestEnded(
                at=monotonic(),
                request_id=self._id,
                outcome=kind,
                status=status,
                error=error,
                attempts=attempts,
                prompt_tokens=prompt,
                completion_tokens=completion,
                cached_tokens=cached,
            )
        )


class CallWatch:
    """Lets the code that makes a tool call notify the observers of the run.

    Args:
        observers: The observers to notify.
        run_id: The id of the run.
        call_id: The id of the tool call.
    """

    __slots__ = ("_call_id", "_observers", "_run_id")

    def __init__(self, observers: Observers, run_id: str, call_id: str) -> None:
        self._observers, self._run_id, self._call_id = observers, run_id, call_id

    def trace_context(self) -> dict[str, str]:
        """Returns the metadata that observers add to a request that the current task sends."""
        return self._observers.trace_context(None)

    def mcp_request(
        self,
        request_id: object,
        *,
        method: str,
        server: str,
        transport: Literal["stdio", "http", "sse"],
        host: str | None,
        port: int | None,
        protocol: str,
    ) -> None:
        """Notifies the observers that a request to an MCP server is being sent."""
        self._observers.notify(
            McpRequestSent(
                at=monotonic(),
                run_id=self._run_id,
                call_id=self._call_id,
                method=method,
                request_id=str(request_id),
                server=server,
                transport=transport,
                host=host,
                port=port,
                protocol=protocol,
            )
        )


class RunWatch:
    """Notifies the observers of one run.

    Args:
        observers: The observers to notify.
        run_id: The id of the run.
    """

    __slots__ = ("_observers", "_parent", "_round", "run_id")

    def __init__(self, observers: Observers, run_id: str) -> None:
        self._observers = observers
        self._parent = observed_run.get()
        self._round: int | None = None
        self.run_id: Final = run_id
        """The id of the run."""

    def begun(self, *, model: str | None, task: str) -> None:
        """Notifies the observers that the run has begun.

        Call it in the asyncio task of the run, whose context it changes.
        """
        observed_run.set(self.run_id)
        self._observers.notify(
            RunBegun(at=monotonic(), run_id=self.run_id, parent_run_id=self._parent, model=model, task=task)
        )

    def round_begun(self, number: int, model: str | None) -> None:
        """Notifies the observers that a round has begun."""
        self._round = number
        self._observers.notify(RoundBegun(at=monotonic(), run_id=self.run_id, number=number, model=model))

    def model_load_progressed(self, model: str | None, fraction: float | None) -> None:
        """Notifies the observers that the run waits for its model to be loaded."""
        self._observers.notify(ModelLoadProgressed(at=monotonic(), run_id=self.run_id, model=model, fraction=fraction))

    def prompt_progressed(self, *, processed: int, total: int, cached: int) -> None:
        """Notifies the observers that a part of the prompt has been processed."""
        self._observers.notify(
            PromptProgressed(at=monotonic(), run_id=self.run_id, processed=processed, total=total, cached=cached)
        )

    def round_ended(self, text: str, *, is_complete: bool = True) -> None:
        """Notifies the observers that the current round has ended, if there is one."""
        number, self._round = self._round, None
        if number is not None:
            self._observers.notify(
                RoundEnded(at=monotonic(), run_id=self.run_id, number=number, text=text, is_complete=is_complete)
            )

    def call_begun(self, call_id: str, name: str, arguments: Mapping[str, Any]) -> None:
        """Notifies the observers that a tool is called.

        Call it in the asyncio task that calls the tool, whose context it changes.
        """
        observed_call.set(CallWatch(self._observers, self.run_id, call_id))
        self._observers.notify(
            ToolCallBegun(at=monotonic(), run_id=self.run_id, call_id=call_id, name=name, arguments=arguments)
        )

    def call_ended(
        self, call_id: str, name: str, outcome: Literal["result", "error", "cancelled"], text: str = ""
    ) -> None:
        """Notifies the observers that a tool call has ended."""
        observed_call.set(None)
        self._observers.notify(
            ToolCallEnded(at=monotonic(), run_id=self.run_id, call_id=call_id, name=name, outcome=outcome, text=text)
        )

    def ended(
        self, stop_reason: str, error: BaseException | None, *, model: str | None, rounds: int, usage: Mapping[str, Any]
    ) -> None:
        """Notifies the observers that the open round has ended, if there is one, and that the run has ended."""
        self.round_ended("", is_complete=False)
        self._observers.notify(
            RunEnded(
                at=monotonic(),
                run_id=self.run_id,
                stop_reason=stop_reason,
                error=None if error is None else type(error).__name__,
                model=model,
                rounds=rounds,
                prompt_tokens=usage["prompt_tokens"],
                completion_tokens=usage["completion_tokens"],
            )
        )
