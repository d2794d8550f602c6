"""Recognizes a text whose end repeats itself.

Small models may fall into a loop, and write the same words until they reach the token limit. This happens above all
with a temperature of 0, and with a grammar, which does not let them stop in the middle of a string.
"""

from __future__ import annotations

import math
from typing import Final

_LONGEST_PERIOD: Final = 250
"""The most characters that a repeated part may have in order to be recognized."""
_FEWEST_TIMES: Final = 4
_FEWEST_CHARACTERS: Final = 200
"""The least number of characters in all repetitions together, so that a row of zeros in a table does not count."""


def ends_in_repetition(text: str) -> bool:
    """Returns whether the end of a text is the same part over and over again."""
    for period in range(1, _LONGEST_PERIOD + 1):
        times = max(_FEWEST_TIMES, math.ceil(_FEWEST_CHARACTERS / period))
        end = text[-times * period :]
        if len(end) == times * period and end == end[-period:] * times:
            return True
    return False
