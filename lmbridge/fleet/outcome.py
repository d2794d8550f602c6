"""What a fleet reports: the outcome of each task, and the progress of all tasks."""

from __future__ import annotations

import attrs

from lmbridge.agent.result import RunResult
from lmbridge.agent.settings import Task


@attrs.frozen(kw_only=True)
class Outcome:
    """The outcome of one task of a fleet: either a result or an error."""

    index: int
    """The position of the task among all tasks; the first one is 0."""
    task: Task
    """The task."""
    result: RunResult | None = None
    """The result of the run; None if the run failed."""
    error: Exception | None = None
    """The error of the last attempt; None if there is a result."""
    attempts: int = 1
    """How many times this call of `map_runs` began or resumed the run."""


@attrs.frozen(kw_only=True)
class FleetProgress:
    """The progress of a fleet."""

    total: int | None
    """How many tasks there are; None if the tasks are an iterator without a length."""
    done: int
    """How many tasks have a result."""
    failed: int
    """How many tasks have failed."""
    in_flight: int
    """How many runs are in progress."""
