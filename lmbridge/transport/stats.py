"""What a transport is doing, and has done."""

from __future__ import annotations

from collections.abc import Mapping

import attrs


@attrs.frozen(kw_only=True)
class ModelStats:
    """The part of one model in `ClientStats`."""

    in_flight: int = 0
    queued: int = 0
    swaps: int = 0
    retries: int = 0


@attrs.frozen(kw_only=True)
class ClientStats:
    """What a client, and those that share its transport, are doing at the moment, and how often they had to."""

    in_flight: int
    """Generations under way."""
    queued: int
    """Generations that wait to be admitted."""
    swaps: int
    """How often a model became active in the place of another."""
    retries: int
    """Attempts beyond the first of each request; polls of a loading server are none."""
    by_model: Mapping[str | None, ModelStats]
    """The same for each model that was asked for; None is the server's choice."""
