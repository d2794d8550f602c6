"""Docstrings, read for what a model should know of a function."""

from __future__ import annotations

import inspect
import re
from typing import Final, NamedTuple

_SECTION: Final = re.compile(
    r"(Args|Arguments|Parameters|Params|Returns?|Yields?|Raises|Examples?|Notes?|Warnings?|See Also|Todo|Attributes"
    r"|Keyword Args|Keyword Arguments|Other Parameters|References):\s*"
)
_PARAMETERS: Final = ("Args", "Arguments", "Parameters", "Params", "Keyword Args", "Keyword Arguments")
_PARAMETER: Final = re.compile(r"(?P<name>\w+)\s*(?:\([^)]*\))?:\s*(?P<text>.*)")


class Docstring(NamedTuple):
    """What a docstring says."""

    description: str
    """All that stands before its first section."""
    parameters: dict[str, str]
    """Parameters' names to what is said about them."""


def read_docstring(text: str | None) -> Docstring:
    """Reads a docstring in the style of Google; of any other it is the description.

    Args:
        text: As written, with its indentation.
    """
    before: list[str] = []
    parameters: dict[str, str] = {}
    section: str | None = None
    block: list[str] = []
    for line in [*inspect.cleandoc(text or "").splitlines(), "Returns:"]:  # any section ends the one before
        if (found := _SECTION.fullmatch(line)) is None:
            (before if section is None else block).append(line)
            continue
        if section in _PARAMETERS:
            parameters |= _parameters(block)
        section, block = found[1], []
    return Docstring("\n".join(before).strip(), parameters)


def _parameters(block: list[str]) -> dict[str, str]:
    """The entries of a section; lines that are indented further belong to the entry before them."""
    told: dict[str, list[str]] = {}
    name: str | None = None
    indent = min((len(line) - len(line.lstrip()) for line in block if line.strip()), default=0)
    for line in block:
        entry = _PARAMETER.fullmatch(line[indent:])
        if entry is not None:
            name = entry["name"]
            told[name] = [entry["text"]]
        elif name is not None and line.strip():
            told[name].append(line.strip())
    return {name: " ".join(lines).strip() for name, lines in told.items()}
