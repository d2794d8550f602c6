"""What a fleet reports: the outcome of each task, and the progress of all."""

from __future__ import annotations

import attrs

from lmbridge.agent.result import RunResult
from lmbridge.agent.settings import Task


@attrs.frozen(kw_only=True)
class Outcome:
    """The outcome of one task of a fleet: either a result or an error."""

    index: int
    """The place of the task among the tasks; the first one is 0."""
    task: Task
    """The task."""
    result: RunResult | None = None
    """The result of the run; None if it failed."""
    error: Exception | None = None
    """The error of the last attempt; None if there is a result."""
    attempts: int = 1
    """How many times this call of `map_runs` has begun or continued the run."""


@attrs.frozen(kw_only=True)
class FleetProgress:
    """How far a fleet is."""

    total: int | None
    """How many tasks there are; None if the tasks are an iterator without a length."""
    done: int
    """How many tasks have a result."""
    failed: int
    """How many tasks have failed."""
    in_flight: int
    """How many runs are in progress."""
