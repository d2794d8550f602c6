"""Names of models: the one that was asked for, and the one that answered."""

from __future__ import annotations

import logging
import re
from typing import Literal, get_args

from lmbridge._checks import check_choice
from lmbridge.errors import ModelMismatchError

logger = logging.getLogger("lmbridge.client")

Mismatch = Literal["warn", "raise", "ignore"]

_HINT = (
    "LM Studio and a llama.cpp server with one model answer with whatever is loaded; load the model, or ask for the"
    " one that is there (model_mismatch='ignore' accepts any)"
)


def is_same_model(asked: str, served: str) -> bool:
    """Whether a reply's name is the one asked for, or that with LM Studio's `@quant` or `:instance` behind it."""
    return served == asked or (
        served.startswith(asked) and re.fullmatch(r"(@[^@:]+)?(:\d+)?", served[len(asked) :]) is not None
    )


class ModelNames:
    """What to do if another model answers; it logs each pair of names once.

    Args:
        mode: "warn" logs a line, "raise" raises, "ignore" does nothing.

    Raises:
        LLMValidationError: the mode is none of these.
    """

    def __init__(self, mode: Mismatch) -> None:
        self._mode = check_choice("model_mismatch", mode, get_args(Mismatch))
        self._logged: set[tuple[str, str]] = set()

    def check(self, asked: str | None, served: object) -> bool:
        """Compares the two and tells whether they fit; nothing to compare, or no name at all, is no mismatch.

        Raises:
            ModelMismatchError: they differ, and that is to be an error.
        """
        if self._mode == "ignore" or not asked or not served or not isinstance(served, str):
            return True
        if is_same_model(asked, served):
            return True
        if self._mode == "raise":
            raise ModelMismatchError(asked=asked, served=served, hint=_HINT)
        if (asked, served) not in self._logged:
            self._logged.add((asked, served))
            logger.warning("asked for model %r, but %r answered; %s", asked, served, _HINT)
        return False
