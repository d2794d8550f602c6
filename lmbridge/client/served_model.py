"""Compares the model that answered with the one that was asked for.

`ReplyStream` notices when the name changes within one stream.
"""

from __future__ import annotations

import logging
import re
from typing import Final, Literal, get_args

from lmbridge._checks import check_choice
from lmbridge.errors import ModelMismatchError

logger: logging.Logger = logging.getLogger("lmbridge.client")

MismatchMode = Literal["warn", "raise", "ignore"]
"""The values of the option `model_mismatch`."""

_MISMATCH_HINT: Final = (
    "LM Studio, and a llama.cpp server with one model, answer with whatever model is loaded; load the right model, or"
    " ask for the one that is loaded (model_mismatch='ignore' accepts any)"
)


def is_same_model(asked: str, served: str) -> bool:
    """Returns whether a reply names the model that was asked for. LM Studio may add `@quant:instance` to its name."""
    if served == asked:
        return True
    return served.startswith(asked) and re.fullmatch(r"(@[^@:]+)?(:\d+)?", served[len(asked) :]) is not None


def are_different_models(old: str, new: str) -> bool:
    """Returns whether two names in one reply belong to different models.

    Unlike in `is_same_model`, neither of them is the name that was asked for, so either may have the suffix.
    """
    return not (is_same_model(old, new) or is_same_model(new, old))


class MismatchPolicy:
    """Decides what happens if the model that answers is not the one that was asked for.

    A pair of names is logged once, even if several clients share the policy.

    Args:
        mode: "warn" logs a warning, "raise" raises `ModelMismatchError`, "ignore" does nothing.

    Raises:
        LLMValidationError: The mode is unknown.
    """

    def __init__(self, mode: MismatchMode) -> None:
        self._mode: Final = check_choice("model_mismatch", mode, get_args(MismatchMode))
        self._logged_pairs: set[tuple[str, str]] = set()

    @property
    def ignores_names(self) -> bool:
        """Whether the mode is "ignore": no model name in a reply is an error."""
        return self._mode == "ignore"

    def check(self, asked: str | None, served: object) -> bool:
        """Returns whether the two names may belong to the same model. A missing name may belong to any model.

        Args:
            asked: The name of the model that was asked for, or None if the server chooses.
            served: The name of the model in the reply.

        Raises:
            ModelMismatchError: The names differ, and the mode is "raise".
        """
        if self.ignores_names or not asked or not served or not isinstance(served, str):
            return True
        if is_same_model(asked, served):
            return True
        if self._mode == "raise":
            raise ModelMismatchError(asked=asked, served=served, hint=_MISMATCH_HINT)
        if (asked, served) not in self._logged_pairs:
            self._logged_pairs.add((asked, served))
            logger.warning("asked for model %r, but %r answered; %s", asked, served, _MISMATCH_HINT)
        return False
