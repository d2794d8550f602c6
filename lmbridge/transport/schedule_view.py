"""What a schedule looks like from outside at one moment: its models, and the swaps that it has caused.

The error of a wait that cannot end, which lists the holders of the permits, is made in `admission`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

if TYPE_CHECKING:
    from lmbridge.transport.scheduler import Scheduler

ScheduledModelState: TypeAlias = Literal["loaded", "loading", "draining", "cold"]
"""What the schedule knows about a model: the server has loaded it, is loading it, is about to unload it, or has not
loaded it."""


@attrs.frozen(kw_only=True)
class ScheduledModel:
    """A model that has requests, or that is loaded as far as the schedule knows."""

    name: str | None
    """The name, or None for requests that name no model."""
    state: ScheduledModelState | None
    """The state of the model, or None if the number of models is not limited, so that the schedule does not know it."""
    in_flight: int
    """The number of requests that hold a permit."""
    queued: int
    """The number of requests that wait for a permit."""


@attrs.frozen(kw_only=True)
class Swap:
    """A model that became active in the place of another one."""

    at: float
    """The time of the swap, by the clock of the event loop."""
    before: str | None
    """The model that gave way."""
    after: str | None
    """The model that became active."""


def models_in(scheduler: Scheduler) -> list[ScheduledModel]:
    """Returns the models that a scheduler knows at the moment."""
    in_flight = Counter(permit.model for permit in scheduler.in_flight)
    queued = Counter(permit.model for permit in scheduler.waiting)
    states = scheduler.model_states()
    return [
        ScheduledModel(
            name=model,
            state=None if states is None else states.get(model, "cold"),
            in_flight=in_flight[model],
            queued=queued[model],
        )
        for model in dict.fromkeys([*(states or ()), *in_flight, *queued])
    ]
