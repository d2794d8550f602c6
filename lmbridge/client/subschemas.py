"""Walks JSON schemas: which parts of a schema are schemas themselves, and where a reference leads.

Every walk through a schema has to distinguish keywords from names. In `{"properties": {"default": {...}}}`, `default`
is the name of a parameter and holds a schema; in `{"default": {...}}`, it is a keyword and holds data, in which a
`$ref` means nothing. This module is the only place that knows the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import unquote

_DATA_KEYWORDS: Final = frozenset({"const", "default", "enum", "examples"})
"""The keywords whose values are data, and never contain schemas."""
_NAME_KEYWORDS: Final = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
)
"""The keywords whose values are objects that have names as their keys, and schemas as their values."""

_LONGEST_INDEX: Final = 10
"""A number of this many digits or more is not read as an index, because Python refuses to read thousands of digits."""


def map_subschemas(schema: Mapping[str, Any], change: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
    """Returns a copy of a schema in which each schema directly within it is replaced.

    Objects in keywords that the standard does not know count as schemas, because a reference may lead to them. The
    schemas `true` and `false` remain as they are.

    Args:
        schema: The schema.
        change: Returns the replacement of a schema. To go deeper, it has to call `map_subschemas` itself.
    """

    def changed(part: Any) -> Any:
        if isinstance(part, Mapping):
            return change(part)
        return [changed(each) for each in part] if isinstance(part, list | tuple) else part

    def replaced(keyword: str, value: Any) -> Any:
        if keyword in _DATA_KEYWORDS:
            return value
        if keyword in _NAME_KEYWORDS and isinstance(value, Mapping):
            return {name: changed(part) for name, part in value.items()}
        return changed(value)

    return {keyword: replaced(keyword, value) for keyword, value in schema.items()}


def subschemas(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the schemas directly within a schema."""
    found: list[Mapping[str, Any]] = []
    map_subschemas(schema, found.append)
    return found


def schemas_within(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yields a schema and all schemas in it, at any depth."""
    remaining = [schema] if isinstance(schema, Mapping) else []
    while remaining:
        part = remaining.pop()
        yield part
        remaining += subschemas(part)


def references_in(schema: Any) -> Iterator[str]:
    """Yields the references in a schema, at any depth."""
    for part in schemas_within(schema):
        if isinstance(reference := part.get("$ref"), str):
            yield reference


def resolve_reference(root: Mapping[str, Any], ref: str) -> Any:
    """Returns the target of a reference within a schema, such as `#/$defs/Point` or `#`, or None."""
    if not ref.startswith("#"):
        return None
    target: Any = root
    for segment in unquote(ref[1:]).split("/")[1:]:
        name = segment.replace("~1", "/").replace("~0", "~")
        if isinstance(target, Mapping):
            target = target.get(name)
        elif isinstance(target, list) and name.isdecimal() and len(name) < _LONGEST_INDEX and int(name) < len(target):
            target = target[int(name)]
        else:
            return None
    return target if ref == "#" or ref.startswith("#/") else None
