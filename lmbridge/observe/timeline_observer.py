"""`TimelineObserver`: collects events, and makes a `Timeline` of them."""

from __future__ import annotations

import json
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
    RequestAdmitted,
    RequestEnded,
    RequestQueued,
    RetryPlanned,
    RoundEnded,
    RunBegun,
    RunEnded,
    ToolCallBegun,
    ToolCallEnded,
)
from lmbridge.observe.timeline import Bar, BarKind, Row, Timeline


@attrs.define(eq=False)
class _OpenRow:
    """A row that is being filled."""

    label: str
    bars: list[Bar] = attrs.field(factory=list)
    has_failed: bool = False
    has_ended: bool = False


@attrs.define(eq=False)
class _OpenRequest:
    """A request that has not ended, and the bar that began with its last event."""

    row: _OpenRow
    label: str
    kind: BarKind
    since: float

    def close(self, at: float, text: str = "") -> None:
        """Ends the current bar."""
        self.row.bars.append(Bar(kind=self.kind, start=self.since, end=at, label=self.label, text=text))

    def begin_next_bar(self, kind: BarKind, at: float, text: str = "") -> None:
        """Ends the current bar and begins another one."""
        self.close(at, text)
        self.kind, self.since = kind, at


class TimelineObserver:
    """An observer that shows what happened on a time axis.

    ::

        observer = TimelineObserver()
        async with LLMClient(observers=[observer]) as client:
            agent = Agent(client, tools=[...], observers=[observer])
            ...
        observer.write("session.html")

    Each run has a row, which shows its requests and tool calls. Each request outside of a run has a row of its own. The
    page also shows how many requests waited and ran at each time. If there are many rows, it shows only those that
    failed or took longest.

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
            case RoundEnded() | ToolCallBegun() | ToolCallEnded():
                self._note_step(event)
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

        The bar of a request that has not ended yet ends at the present moment. A tool call has a bar only once it has
        ended.
        """
        now = monotonic()
        unfinished: dict[int, list[Bar]] = {}
        for request in self._requests.values():
            bar = Bar(kind=request.kind, start=request.since, end=now, label=request.label, text="not ended yet")
            unfinished.setdefault(id(request.row), []).append(bar)
        rows = [
            Row(label=row.label, bars=[*row.bars, *unfinished.get(id(row), ())], has_failed=row.has_failed)
            for row in self._rows.values()
        ]
        return Timeline(title=title, rows=rows)

    def write(self, path: str | PathLike[str], title: str = "lmbridge session") -> Path:
        """Writes what has happened so far to an HTML file, and returns its path."""
        return self.timeline(title).write(path)

    def _repr_html_(self) -> str:
        return self.timeline()._repr_html_()

    def _add_row(self, key: str | int, label: str) -> _OpenRow:
        self._rows[key] = row = _OpenRow(label)
        if len(self._rows) > self._max_rows:
            oldest = next((each for each, old in self._rows.items() if old.has_ended), None)
            if oldest is not None:
                del self._rows[oldest]
        return row

    def _begin_request(self, event: RequestQueued) -> None:
        label = event.operation if event.model is None else f"{event.operation} {event.model}"
        row = self._rows.get(event.run_id) if event.run_id is not None else None
        row = row or self._add_row(event.request_id, label)
        self._requests[event.request_id] = _OpenRequest(row, label, "queue", event.at)

    def _end_request(self, event: RequestEnded) -> None:
        request = self._requests.pop(event.request_id, None)
        if request is None:
            return
        tokens = ""
        if event.prompt_tokens is not None:
            tokens = f"\n{event.prompt_tokens} + {event.completion_tokens} tokens"
        request.close(event.at, f"{event.outcome}, {event.attempts} attempt(s){tokens}")
        if event.outcome == "error":
            reason = event.error or f"status {event.status}"
            request.row.bars.append(Bar(kind="error", start=event.at, end=event.at, label=reason))
        if self._rows.get(event.request_id) is request.row:
            # The request has its own row.
            request.row.has_ended, request.row.has_failed = True, event.outcome == "error"

    def _note_step(self, event: RoundEnded | ToolCallBegun | ToolCallEnded) -> None:
        row = self._rows.get(event.run_id)
        if row is None:
            return
        if isinstance(event, ToolCallBegun):
            self._calls[event.run_id, event.call_id] = event
        elif isinstance(event, ToolCallEnded):
            if (begun := self._calls.pop((event.run_id, event.call_id), None)) is not None:
                arguments = json.dumps(dict(begun.arguments), ensure_ascii=False, default=repr)
                text = f"{event.name}({arguments})\n{event.outcome}: {event.text}"
                row.bars.append(Bar(kind="tool", start=begun.at, end=event.at, label=event.name, text=text))
        elif event.text:
            # The answer belongs to the last reply of the round. Runs stream all their replies.
            place = next((at for at in range(len(row.bars) - 1, -1, -1) if row.bars[at].kind == "tokens"), None)
            if place is not None:
                row.bars[place] = attrs.evolve(row.bars[place], text=f"{row.bars[place].text}\n\n{event.text}")

    def _end_run(self, event: RunEnded) -> None:
        row = self._rows.get(event.run_id)
        if row is None:
            return
        row.has_ended, row.has_failed = True, event.error is not None and event.stop_reason != "cancelled"
        if event.error is not None:
            row.bars.append(Bar(kind="error", start=event.at, end=event.at, label=event.error, text=event.stop_reason))


def _note_progress(
    request: _OpenRequest, event: RequestAdmitted | ModelSwapped | AttemptBegun | RetryPlanned | FirstEventArrived
) -> None:
    match event:
        case AttemptBegun():
            request.begin_next_bar("prompt", event.at)
        case FirstEventArrived(is_stream=True):
            request.begin_next_bar("tokens", event.at)
        case FirstEventArrived():
            # The whole reply has arrived at once, so the bar that began with the attempt stands for all of it.
            request.kind = "reply"
        case RetryPlanned():
            request.begin_next_bar("retry", event.at, event.reason)
        case ModelSwapped():
            label = f"{event.before} -> {event.after}"
            request.row.bars.append(Bar(kind="swap", start=event.at, end=event.at, label=label))
        case RequestAdmitted():
            # The attempt follows at once.
            pass
