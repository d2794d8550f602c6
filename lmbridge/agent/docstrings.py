"""Reads the docstring of a function for the parts that describe it to a model.

Only the sections of Google style are recognized, which is what most functions with typed parameters use. A docstring
in any other style becomes the description as a whole, so that the model still sees all of it.
"""

from __future__ import annotations

import inspect
import re
from typing import Final, NamedTuple

_SECTION_HEADING: Final = re.compile(
    r"(Args|Arguments|Parameters|Params|Returns?|Yields?|Raises|Examples?|Notes?|Warnings?|See Also|Todo|Attributes"
    r"|Keyword Args|Keyword Arguments|Other Parameters|References):\s*"
)
_PARAMETER_SECTIONS: Final = ("Args", "Arguments", "Parameters", "Params", "Keyword Args", "Keyword Arguments")
_PARAMETER_ENTRY: Final = re.compile(r"(?P<name>\w+)\s*(?:\([^)]*\))?:\s*(?P<text>.*)")


class Docstring(NamedTuple):
    """The parts of a docstring that a model gets to see."""

    description: str
    """All text before the first section; empty if there is no docstring."""
    parameters: dict[str, str]
    """The descriptions of the parameters, by name."""


def read_docstring(text: str | None) -> Docstring:
    """Splits a docstring into its description and the descriptions of the parameters.

    Args:
        text: The docstring with its indentation, or None if the function has none.
    """
    description: list[str] = []
    parameters: dict[str, str] = {}
    section: str | None = None
    section_lines: list[str] = []
    # A section ends where the next one begins, so an additional heading ends the last one.
    for line in [*inspect.cleandoc(text or "").splitlines(), "Returns:"]:
        if (heading := _SECTION_HEADING.fullmatch(line)) is None:
            (description if section is None else section_lines).append(line)
            continue
        if section in _PARAMETER_SECTIONS:
            parameters |= _read_parameter_section(section_lines)
        section, section_lines = heading[1], []
    return Docstring("\n".join(description).strip(), parameters)


def _read_parameter_section(lines: list[str]) -> dict[str, str]:
    """Returns the entries of a section. Lines that are indented further continue the entry before them."""
    entries: dict[str, list[str]] = {}
    name: str | None = None
    indentation = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    for line in lines:
        entry = _PARAMETER_ENTRY.fullmatch(line[indentation:])
        if entry is not None:
            name = str(entry["name"])
            entries[name] = [entry["text"]]
        elif name is not None and line.strip():
            entries[name].append(line.strip())
    return {name: " ".join(texts).strip() for name, texts in entries.items()}
