"""Finds names that are similar to one that does not exist, for the "did you mean" of errors.

`errors.py` imports this module, and belongs to the ground floor, so this module imports only the standard library. The
work is limited, because a server decides how many names there are and how long they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

_NAMES_COMPARED: Final = 10_000
"""The most names that `close_matches` looks at."""
_COMPARED_CHARACTERS: Final = 100
"""The most characters of a name that `close_matches` compares. Longer names are never close."""
_COMPARISON_BUDGET: Final = 300_000
"""The most pairs of characters that `close_matches` compares, which takes about 50 ms at worst."""
_COMPARISON_OVERHEAD: Final = 200
"""How much of the budget each name uses up in addition, because it takes time whatever its length."""


def close_matches(name: str, names: Iterable[str]) -> list[str]:
    """Returns up to three names that are similar to a name, the most similar one first. Case does not matter.

    The work is limited, because a server may list any number of models. Names that contain the first characters of the
    name are compared first, so that the limit leaves out less similar ones.
    """
    # Imported here because it is not needed until something is missing.
    import difflib  # noqa: PLC0415

    asked = name[:_COMPARED_CHARACTERS].casefold()
    looked_at = (each for each in islice(names, _NAMES_COMPARED) if len(each) <= _COMPARED_CHARACTERS)
    by_folded_name = {each.casefold(): each for each in looked_at}
    candidates = []
    budget = _COMPARISON_BUDGET
    for folded in sorted(by_folded_name, key=lambda folded: asked[:3] not in folded):
        budget -= len(folded) * len(asked) + _COMPARISON_OVERHEAD
        if budget < 0:
            break
        candidates.append(folded)
    return [by_folded_name[each] for each in difflib.get_close_matches(asked, candidates)]
