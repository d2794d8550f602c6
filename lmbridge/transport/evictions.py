"""`Evictions`: what a transport has learned from generations that its server has killed to load another model.

`lmbridge.client.failures` recognizes the error of such a generation, reports it here, and writes its hint.
"""

from __future__ import annotations

import logging
from collections import Counter

import attrs

from lmbridge.config import Limits

logger: logging.Logger = logging.getLogger("lmbridge.transport")


class Evictions:
    """The generations that a server has killed, and what they show about the number of models that it can hold.

    Whatever the limits say, a server that kills a generation cannot hold all the models that were in use. So from then
    on, requests are scheduled by model, even if the user has not asked for that.
    """

    def __init__(self) -> None:
        self.counts: Counter[str | None] = Counter()
        """How many generations with each model were killed."""
        self.max_loaded_models: int | None = None
        """The most models that the server seems to hold: the number that it held when it killed a generation, or the
        lowest such number if it has killed several. None if it has never killed one."""

    def add(self, model: str | None, loaded: int, limits: Limits) -> bool:
        """Records that a generation was killed.

        Args:
            model: The model of the generation.
            loaded: The number of models that the server held at that time, including this one.
            limits: The limits that are in force.

        Returns:
            Whether the limits are too high, so that they have to be replaced by what `lowered` returns.
        """
        self.counts[model] += 1
        is_first = self.max_loaded_models is None
        self.max_loaded_models = loaded if self.max_loaded_models is None else min(loaded, self.max_loaded_models)
        lowered = self.lowered(limits)
        if lowered == limits:
            return False
        logger.log(
            logging.WARNING if is_first else logging.INFO,
            "the server dropped model %r in the middle of a generation to load another one, so requests are scheduled"
            " by model from now on, with max_loaded_models=%s; pass Limits(max_loaded_models=...) to do so from the"
            " beginning",
            model,
            lowered.max_loaded_models,
        )
        return True

    def lowered(self, limits: Limits) -> Limits:
        """Returns limits that do not exceed the number of models that the server is known to hold."""
        known, limit = self.max_loaded_models, limits.max_loaded_models
        if known is None or (limit is not None and limit <= known):
            return limits
        return attrs.evolve(limits, max_loaded_models=known)
