"""Observers, which get the events of clients and agents: for logs, traces, metrics and timelines.

`LLMClient(observers=[...])` notifies its observers of requests, and `Agent(observers=[...])` of runs. An observer
has one method, `on_event`, and the events are in this module. Pass the same observer to both, and each request names
the run that it belongs to.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from lmbridge.observe.observer import ContextPropagator, Observer

if TYPE_CHECKING:
    from lmbridge.observe.events import (
        AttemptBegun,
        FirstEventArrived,
        McpRequestSent,
        ModelLoadProgressed,
        ModelSwapped,
        ObservedEvent,
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
    from lmbridge.observe.otel import OpenTelemetryObserver
    from lmbridge.observe.timeline import Bar, Row, Timeline
    from lmbridge.observe.timeline_observer import TimelineObserver

__all__ = [
    "AttemptBegun",
    "Bar",
    "ContextPropagator",
    "FirstEventArrived",
    "McpRequestSent",
    "ModelLoadProgressed",
    "ModelSwapped",
    "ObservedEvent",
    "Observer",
    "OpenTelemetryObserver",
    "PromptProgressed",
    "RequestAdmitted",
    "RequestEnded",
    "RequestOutcome",
    "RequestQueued",
    "RetryPlanned",
    "RoundBegun",
    "RoundEnded",
    "Row",
    "RunBegun",
    "RunEnded",
    "Timeline",
    "TimelineObserver",
    "ToolCallBegun",
    "ToolCallEnded",
]

# Every client imports this package, so what most programs do not use is imported at its first use. Names that are not
# listed here come from `events`.
_LAZY: Final = {
    "Bar": "lmbridge.observe.timeline",
    "OpenTelemetryObserver": "lmbridge.observe.otel",
    "Row": "lmbridge.observe.timeline",
    "Timeline": "lmbridge.observe.timeline",
    "TimelineObserver": "lmbridge.observe.timeline_observer",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY.get(name, "lmbridge.observe.events")), name)
