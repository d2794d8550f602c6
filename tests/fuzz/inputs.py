"""How the inputs of a target are made: from its fragments, from any bytes, and from what was found before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from hypothesis import strategies as st

from tests.fuzz.targets import Target

CORPUS: Final = Path(__file__).parent / "corpus"
"""The inputs that have once shown a fault, in a folder for each target. The tests run all of them."""
_LARGEST_NUMBER: Final = 2**70


def corpus_of(target: Target) -> Iterator[tuple[str, bytes]]:
    """Yields the names and the contents of the inputs that have been found."""
    for path in sorted((CORPUS / target.name).glob("*")):
        yield path.name, path.read_bytes()


def inputs_of(target: Target) -> st.SearchStrategy[bytes]:
    """Returns the inputs of a target."""
    if target.as_json:
        return _json_values(target).map(lambda value: json.dumps(value).encode())
    piece = st.one_of(st.sampled_from(list(target.fragments)), st.binary(max_size=4))
    return st.lists(piece, max_size=40).map(b"".join)


def _json_values(target: Target) -> st.SearchStrategy[Any]:
    words = st.sampled_from([each.decode() for each in target.fragments])
    scalars = st.one_of(
        words,
        st.text(max_size=4),
        st.none(),
        st.booleans(),
        st.integers(-_LARGEST_NUMBER, _LARGEST_NUMBER),
        st.floats(allow_nan=False, allow_infinity=False),
    )
    values = st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=5)),
        max_leaves=30,
    )
    return st.one_of(st.dictionaries(words, values, max_size=6), st.lists(values, max_size=8), values)
