"""`TimelineObserver`: collects events, and makes a `Timeline` of them."""

from __future__ import annotations

import json
from itertools import islice
from os import PathLike
from pathlib import Path
from time import monotonic
from typing import Final

import attrs

from lmbridge._checks import check_integer
from lmbridge.observe.events import (
    AttemptBegun,
    FirstEventArrived,
    ModelSwapped,
    ObservedEvent,
    PromptProgressed,
    RequestAdmitted,
    RequestEnded,
    RequestQueued,
    RetryPlanned,
    RoundBegun,
    RoundEnded,
    RunBegun,
    RunEnded,
    ToolCallBegun,
    ToolCallEnded,
)
from lmbridge.observe.timeline import Bar, BarKind, Row, Timeline

_PROBES: Final = frozenset(("server info", "model list"))
"""Operations that find out what kind of server it is. Status 404 is an answer to them, and not an error."""
_NOT_FOUND: Final = 404
_SWAP: Final = "The server loads the model. The bar ends when the reply begins, so it includes the time for the prompt."


@attrs.define(eq=False)
class _OpenRow:
    """A row that is being filled."""

    label: str
    bars: list[Bar] = attrs.field(factory=list)
    round: RoundBegun | None = None
    """The round of the run that has not ended."""
    has_failed: bool = False
    has_ended: bool = False


@attrs.define(eq=False)
class _OpenRequest:
    """A request that has not ended, and the bar that began with its last event."""

    row: _OpenRow
    label: str
    operation: str
    kind: BarKind
    since: float
    swaps: list[ModelSwapped] = attrs.field(factory=list)
    """The swaps of models for which the request waits."""
    progress: str = ""
    """How many tokens of the prompt the server has processed, as far as it says so."""

    def current_bar(self, at: float, text: str = "") -> Bar:
        """Returns the current bar, which ends at a given time, with the progress of the prompt in its text."""
        text = "\n".join(filter(None, (text, self.progress)))
        return Bar(kind=self.kind, start=self.since, end=at, label=self.label, text=text)

    def swap_bars(self, at: float) -> list[Bar]:
        """Returns the bars of the swaps, which end at a given time."""
        return [
            Bar(kind="swap", start=swap.at, end=at, label=f"{swap.before} -> {swap.after}", text=_SWAP)
            for swap in self.swaps
        ]

    def close(self, at: float, text: str = "") -> None:
        """Ends the current bar."""
        self.row.bars.append(self.current_bar(at, text))
        self.progress = ""

    def end_swaps(self, at: float) -> None:
        """Ends the bars of the swaps, if there are any."""
        self.row.bars += self.swap_bars(at)
        self.swaps.clear()

    def begin_next_bar(self, kind: BarKind, at: float, text: str = "") -> None:
        """Ends the current bar and begins another one."""
        self.close(at, text)
        self.kind, self.since = kind, at


class TimelineObserver:
    """An observer that shows on a time axis what happened.

    ::

        observer = TimelineObserver()
        async with LLMClient(observers=[observer]) as client:
            agent = Agent(client, tools=[...], observers=[observer])
            ...
        observer.write("session.html")

    Each run has a row, which shows its rounds and tool calls, and its requests if the client has the observer as well.
    Each request outside of a run has a separate row. The page also shows how many requests waited and ran at each time.
    If there are many rows, it shows only those that failed or took longest.

    Args:
        max_rows: How many rows are kept at most. If there are more, the oldest rows that have ended are dropped.
            Default: 5000.

    Raises:
        LLMValidationError: `max_rows` is not a positive integer.
    """

    def __init__(self, *, max_rows: int = 5000) -> None:
        check_integer("max_rows", max_rows)
        self._max_rows: Final = max_rows
        self._rows: dict[str | int, _OpenRow] = {}
        self._requests: dict[int, _OpenRequest] = {}
        self._calls: dict[tuple[str, str], ToolCallBegun] = {}

    def on_event(self, event: ObservedEvent) -> None:
        """Adds an event to the timeline."""
        match event:
            case RunBegun():
                self._add_row(event.run_id, f"run: {event.task}")
            case RunEnded():
                self._end_run(event)
            case RoundBegun() | RoundEnded() | ToolCallBegun() | ToolCallEnded():
                self._note_step(event)
            case PromptProgressed():
                self._note_prompt(event)
            case RequestQueued():
                self._begin_request(event)
            case RequestEnded():
                self._end_request(event)
            case RequestAdmitted() | ModelSwapped() | AttemptBegun() | RetryPlanned() | FirstEventArrived():
                if (request := self._requests.get(event.request_id)) is not None:
                    _note_progress(request, event)
            case _:
                pass

    def timeline(self, title: str = "lmbridge session") -> Timeline:
        """Returns the timeline of what has happened so far.

        The bar of a round or a request that has not ended yet ends at the present moment. A tool call has a bar only
        once it has ended.
        """
        now = monotonic()
        unfinished: dict[int, list[Bar]] = {}
        for row in self._rows.values():
            if row.round is not None:
                unfinished[id(row)] = [_round_bar(row.round, now, "not ended yet")]
        for request in self._requests.values():
            bars = [request.current_bar(now, "not ended yet"), *request.swap_bars(now)]
            unfinished.setdefault(id(request.row), []).extend(bars)
        rows = [
            Row(label=row.label, bars=[*row.bars, *unfinished.get(id(row), ())], has_failed=row.has_failed)
            for row in self._rows.values()
        ]
        return Timeline(title=title, rows=rows)

    def write(self, path: str | PathLike[str], title: str = "lmbridge session") -> Path:
        """Writes what has happened so far to an HTML file, and returns its path.

        Raises:
            LLMValidationError: `path` is neither a string nor a path object.
            OSError: The file cannot be written.
        """
        return self.timeline(title).write(path)

    def _repr_html_(self) -> str:
        return self.timeline()._repr_html_()

    def _add_row(self, key: str | int, label: str) -> _OpenRow:
        self._rows[key] = row = _OpenRow(label)
        self._drop_old_rows()
        return row

    def _drop_old_rows(self) -> None:
        excess = len(self._rows) - self._max_rows
        if excess > 0:
            ended = (key for key, row in self._rows.items() if row.has_ended)
            for key in list(islice(ended, excess)):
                del self._rows[key]

    def _begin_request(self, event: RequestQueued) -> None:
        label = event.operation if event.model is None else f"{event.operation} {event.model}"
        row = self._rows.get(event.run_id) if event.run_id is not None else None
        row = row or self._add_row(event.request_id, label)
        self._requests[event.request_id] = _OpenRequest(row, label, event.operation, "queue", event.at)

    def _end_request(self, event: RequestEnded) -> None:
        request = self._requests.pop(event.request_id, None)
        if request is None:
            return
        tokens = ""
        if event.prompt_tokens is not None:
            tokens = f"\n{event.prompt_tokens} + {event.completion_tokens} tokens"
        is_missing = request.operation in _PROBES and event.status == _NOT_FOUND
        has_failed = event.outcome == "error" and not is_missing
        outcome = "status 404: the server does not have it" if is_missing else event.outcome
        request.close(event.at, f"{outcome}, {event.attempts} attempt(s){tokens}")
        request.end_swaps(event.at)
        if has_failed:
            reason = event.error or f"status {event.status}"
            request.row.bars.append(Bar(kind="error", start=event.at, end=event.at, label=reason))
        if self._rows.get(event.request_id) is request.row:
            # The request has its own row.
            request.row.has_ended, request.row.has_failed = True, has_failed
            self._drop_old_rows()

    def _note_step(self, event: RoundBegun | RoundEnded | ToolCallBegun | ToolCallEnded) -> None:
        row = self._rows.get(event.run_id)
        if row is None:
            return
        if isinstance(event, RoundBegun):
            row.round = event
        elif isinstance(event, RoundEnded):
            _end_round(row, event)
        elif isinstance(event, ToolCallBegun):
            self._calls[event.run_id, event.call_id] = event
        elif (begun := self._calls.pop((event.run_id, event.call_id), None)) is not None:
            arguments = json.dumps(dict(begun.arguments), ensure_ascii=False, default=repr)
            text = f"{event.name}({arguments})\n{event.outcome}: {event.text}"
            row.bars.append(Bar(kind="tool", start=begun.at, end=event.at, label=event.name, text=text))

    def _note_prompt(self, event: PromptProgressed) -> None:
        row = self._rows.get(event.run_id)
        for request in self._requests.values():
            if request.row is row and request.kind == "prompt" and request.operation == "chat completion":
                request.progress = f"{event.processed} of {event.total} tokens, {event.cached} of them from the cache"

    def _end_run(self, event: RunEnded) -> None:
        row = self._rows.get(event.run_id)
        if row is None:
            return
        row.has_ended, row.has_failed = True, event.error is not None and event.stop_reason != "cancelled"
        if event.error is not None:
            row.bars.append(Bar(kind="error", start=event.at, end=event.at, label=event.error, text=event.stop_reason))
        self._drop_old_rows()


def _round_bar(begun: RoundBegun, end: float, text: str) -> Bar:
    return Bar(kind="round", start=begun.at, end=end, label=f"round {begun.number}", text=text)


def _end_round(row: _OpenRow, event: RoundEnded) -> None:
    """Adds the bar of a round, and its answer to the bar of the reply."""
    if row.round is not None:
        row.bars.append(_round_bar(row.round, event.at, event.text if event.is_complete else "not completed"))
        row.round = None
    if event.text:
        # The answer belongs to the last reply of the round. Runs stream all their replies.
        place = next((at for at in range(len(row.bars) - 1, -1, -1) if row.bars[at].kind == "tokens"), None)
        if place is not None:
            row.bars[place] = attrs.evolve(row.bars[place], text=f"{row.bars[place].text}\n\n{event.text}")


def _note_progress(
    request: _OpenRequest, event: RequestAdmitted | ModelSwapped | AttemptBegun | RetryPlanned | FirstEventArrived
) -> None:
    match event:
        case AttemptBegun():
            request.begin_next_bar("prompt", event.at)
        case FirstEventArrived():
            request.end_swaps(event.at)
            if event.is_stream:
                request.begin_next_bar("tokens", event.at)
            else:
                # The whole reply has arrived at once, so the bar that began with the attempt stands for all of it.
                request.kind = "reply"
        case RetryPlanned():
            request.begin_next_bar("retry", event.at, event.reason)
        case ModelSwapped():
            request.swaps.append(event)
        case RequestAdmitted():
            # The attempt follows at once.
            pass
