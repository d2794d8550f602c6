"""Reads the parts of a docstring that describe a function or a class to a model.

The three common styles are recognized: sections with a colon (Google), sections that are underlined (NumPy), and
fields such as `:param name:` (Sphinx). Everything before the first section or field is the description. A library for
docstrings would know more styles, but the description and the entries for parameters are all that is needed here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

_TITLES: Final = (
    r"(Args|Arguments|Parameters|Params|Returns?|Yields?|Raises|Examples?|Notes?|Warnings?|Warns|See Also|Todo"
    r"|Attributes|Keyword Args|Keyword Arguments|Other Parameters|References)"
)
_HEADING: Final = re.compile(rf"{_TITLES}:\s*")
_UNDERLINED_TITLE: Final = re.compile(rf"{_TITLES}\s*")
_UNDERLINE: Final = re.compile(r"-{3,}\s*|={3,}\s*")
_ENTRY_SECTIONS: Final = (
    "Args",
    "Arguments",
    "Parameters",
    "Params",
    "Keyword Args",
    "Keyword Arguments",
    "Other Parameters",
    "Attributes",
)
"""The sections that have an entry for each parameter or field."""
_STARS: Final = r"(?:\\?\*){0,2}"
"""What stands before the names of `*args` and `**kwargs`. Sphinx needs backslashes there."""
_TYPE: Final = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
"""A type in parentheses, which may have other parentheses in it, such as `(Callable[[int], tuple(int)])`."""
_GOOGLE_ENTRY: Final = re.compile(rf"{_STARS}(?P<name>\w+)\s*(?:{_TYPE})?:\s*(?P<text>.*)")
_NUMPY_ENTRY: Final = re.compile(rf"(?P<names>{_STARS}\w+(?:\s*,\s*{_STARS}\w+)*)\s*(?::.*)?")
_SPHINX_FIELD: Final = re.compile(r":(?P<kind>\w+)(?P<argument>[^:]*):\s*(?P<text>.*)")
_SPHINX_ENTRIES: Final = ("param", "parameter", "arg", "argument", "key", "keyword", "ivar", "cvar", "var")
"""The kinds of Sphinx fields that describe a parameter or a field."""
_SPHINX_OTHERS: Final = (
    "type",
    "vartype",
    "return",
    "returns",
    "rtype",
    "raise",
    "raises",
    "except",
    "exception",
    "yield",
)


class Docstring(NamedTuple):
    """The parts of a docstring that a model gets to see."""

    description: str
    """All text before the first section. It is empty for a function without a docstring."""
    parameters: dict[str, str]
    """The descriptions of the parameters of a function, or of the fields of a class, by name."""


class _Section(NamedTuple):
    title: str
    is_underlined: bool
    lines: list[str]


def read_docstring(text: str | None) -> Docstring:
    """Splits a docstring into its description and the descriptions of parameters and fields.

    Args:
        text: The docstring with its indentation, or None for an object without a docstring.
    """
    lines = inspect.cleandoc(text or "").splitlines()
    description: list[str] = []
    sections: list[_Section] = []
    for line, next_line in zip(lines, [*lines, ""][1:], strict=True):
        if heading := _HEADING.fullmatch(line):
            sections.append(_Section(heading[1], False, []))
        elif (title := _UNDERLINED_TITLE.fullmatch(line)) and _UNDERLINE.fullmatch(next_line):
            sections.append(_Section(title[1], True, []))
        elif _is_sphinx_field(line):
            sections.append(_Section("", False, [line]))
        else:
            (sections[-1].lines if sections else description).append(line)
    parameters: dict[str, str] = {}
    for section in sections:
        parameters |= _read_section(section)
    return Docstring("\n".join(description).strip(), parameters)


def _is_sphinx_field(line: str) -> bool:
    field = _SPHINX_FIELD.fullmatch(line)
    return field is not None and field["kind"] in (*_SPHINX_ENTRIES, *_SPHINX_OTHERS)


def _read_section(section: _Section) -> dict[str, str]:
    """Returns the entries of a section, or of one Sphinx field."""
    if not section.title:
        return _read_sphinx_field(section.lines)
    if section.title not in _ENTRY_SECTIONS:
        return {}
    entries = _numpy_entries(section.lines[1:]) if section.is_underlined else _google_entries(section.lines)
    return {name: _joined(texts) for name, texts in entries if _joined(texts)}


def _read_sphinx_field(lines: Sequence[str]) -> dict[str, str]:
    field = _SPHINX_FIELD.fullmatch(lines[0])
    if field is None or field["kind"] not in _SPHINX_ENTRIES or not field["argument"].strip():
        return {}
    # A type may stand before the name: `:param int days: The number of days.`
    name = field["argument"].split()[-1].lstrip("\\*")
    # A paragraph that is not indented does not belong to the field.
    text = _joined([field["text"], *_indented_lines(lines[1:])])
    return {name: text} if text else {}


def _indented_lines(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if line.strip() and not line[0].isspace():
            return
        yield line


def _google_entries(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields the entries of a section in Google style. Lines that are indented further continue the entry above."""
    texts: list[str] | None = None
    name = ""
    indentation = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    for line in lines:
        if (entry := _GOOGLE_ENTRY.fullmatch(line[indentation:])) is not None:
            if texts is not None:
                yield name, texts
            name, texts = entry["name"], [entry["text"]]
        elif texts is not None:
            texts.append(line)
    if texts is not None:
        yield name, texts


def _numpy_entries(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields the entries of a section in NumPy style: a line with names and a type, and an indented text below it."""
    names: list[str] = []
    texts: list[str] = []
    for line in lines:
        if line.strip() and not line[0].isspace():
            yield from ((name, texts) for name in names)
            entry = _NUMPY_ENTRY.fullmatch(line.strip())
            names, texts = (re.findall(r"\w+", entry["names"]) if entry else []), []
        else:
            texts.append(line)
    yield from ((name, texts) for name in names)


def _joined(lines: Iterable[str]) -> str:
    return " ".join(line.strip() for line in lines if line.strip())
