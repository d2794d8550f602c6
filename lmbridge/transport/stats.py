"""The statistics that `client.stats()` returns.

The swaps in them are counted by the scheduler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import attrs

from lmbridge.config import Limits


@attrs.frozen(kw_only=True)
class ModelStats:
    """The part of `ClientStats` that belongs to one model."""

    in_flight: int = 0
    """The number of generations with the model that are in flight at the moment."""
    queued: int = 0
    """The number of generations with the model that wait for a permit at the moment."""
    swaps: int = 0
    """How often the model became active in the place of another one, since the transport was created."""
    retries: int = 0
    """How often a request for the model was sent again, since the transport was created."""
    evictions: int = 0
    """How many generations with the model the server has killed to load another one, since the transport was created.
    """


@attrs.frozen(kw_only=True)
class ServerStats:
    """The part of `ClientStats` that belongs to one server."""

    in_flight: int
    """The number of generations that are in flight at the moment."""
    queued: int
    """The number of generations that wait for a permit at the moment."""
    swaps: int
    """How often a model became active in the place of another one."""
    retries: int
    """How often a request was sent again to this server."""
    evictions: int = 0
    """How many generations the server has killed to load another model."""
    limits: Limits = attrs.field(factory=Limits, eq=False)
    """The limits that are in force: those that were given, or that the server has reported, with no more
    `max_loaded_models` than the server is known to hold. They do not count when two of these objects are compared."""
    is_available: bool = True
    """Whether the server gets requests. If one of several servers has failed, it gets none until it answers again."""
    by_model: Mapping[str | None, ModelStats]
    """The same numbers for each model that this server was asked for."""


@attrs.frozen(kw_only=True)
class ClientStats:
    """What a client, together with all clients that share its transport, is doing now and has done so far."""

    in_flight: int
    """The number of generations that are in flight at the moment."""
    queued: int
    """The number of generations that wait for a permit at the moment."""
    swaps: int
    """How often a model became active in the place of another one. Each swap may have made the server load a model."""
    retries: int
    """How often a request was sent again. Polls of a server that is loading do not count."""
    evictions: int = 0
    """How many generations were killed by a server that loaded another model. The first one makes the client schedule
    requests to that server by model, whatever the limits were; see `ServerStats.limits`."""
    by_model: Mapping[str | None, ModelStats]
    """The same numbers for each model that was asked for. The key None stands for requests that name no model."""
    by_server: Mapping[str, ServerStats] = attrs.field(factory=dict, eq=False)
    """The numbers of each server, by its URL with `/v1`. A client of one server has one entry. Two `ClientStats` are
    equal if their other fields are."""


_NUMBERS: Final = ("in_flight", "queued", "swaps", "retries", "evictions")


def combined_stats(
    parts: Sequence[ClientStats], *, unavailable: Collection[str], moves: Mapping[str | None, int]
) -> ClientStats:
    """Returns the statistics of several servers together.

    Args:
        parts: The statistics of each server.
        unavailable: The URLs of the servers that get no requests at the moment.
        moves: How often a request for each model was passed on to another server. The statistics count each time as a
            retry, even if it did not use up any of the request's `max_retries`.
    """
    sums: dict[str, Counter[str | None]] = {name: Counter() for name in _NUMBERS}
    models: dict[str | None, None] = dict.fromkeys(moves)
    for part in parts:
        for model, numbers in part.by_model.items():
            models[model] = None
            for name, counter in sums.items():
                counter[model] += getattr(numbers, name)
    sums["retries"].update(moves)
    return ClientStats(
        **{name: counter.total() for name, counter in sums.items()},
        by_model={model: ModelStats(**{name: counter[model] for name, counter in sums.items()}) for model in models},
        by_server={
            url: attrs.evolve(numbers, is_available=url not in unavailable)
            for part in parts
            for url, numbers in part.by_server.items()
        },
    )
