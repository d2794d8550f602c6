"""The statistics that `client.stats()` returns."""

from __future__ import annotations

from collections.abc import Mapping

import attrs


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


@attrs.frozen(kw_only=True)
class ClientStats:
    """What a client does at the moment and has done before, together with all clients that share its transport."""

    in_flight: int
    """The number of generations that are in flight at the moment."""
    queued: int
    """The number of generations that wait for a permit at the moment."""
    swaps: int
    """How often a model became active in the place of another one. Each swap may have made the server load a model."""
    retries: int
    """How often a request was sent again. Polls of a server that is loading do not count."""
    by_model: Mapping[str | None, ModelStats]
    """The same numbers for each model that was asked for. The key None stands for requests that name no model."""
