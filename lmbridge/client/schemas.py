"""JSON schemas as local servers take them, and what msgspec says of a value that does not fit its type."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote

import msgspec

from lmbridge._checks import is_integer, is_number
from lmbridge._text import excerpt

_FAULT: Final = re.compile(r"(?P<what>.*) - at (?P<path>`.*`)", re.DOTALL)

_TYPES: Final = ("string", "number", "integer", "boolean", "array", "object", "null")
_FORMATS: Final = ("date", "date-time", "time", "uuid")
"""What llama.cpp and llguidance know; the latter refuses any other."""
_PATTERN: Final = re.compile(r"\^(?:[^\\(]|\((?!\?)|\\[^a-zA-Z0-9])*\$", re.DOTALL)
"""Patterns that every llama.cpp knows; to any other, older ones answer 400."""
_LARGEST: Final = 1_000
"""Larger bounds of lengths run into the limit of llama.cpp's grammars, where each is that many rules."""
_CHOICES: Final = 200
"""Values of an enum that a model is told."""
_PARTS: Final = 2_000
"""Parts of a tool's schema; beyond it, references are no longer replaced: each may hold any number of others."""
_DEPTH: Final = 2
"""How often a type that holds itself is written out within itself."""


def _is_size(value: Any) -> bool:
    return is_integer(value) and value >= 0


_SIZES: Final = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_KNOWN: Final[Mapping[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_SIZES, _is_size),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), is_number),
    "multipleOf": lambda value: is_number(value) and value > 0,
    "type": lambda value: value in _TYPES,
    "enum": lambda value: isinstance(value, list) and bool(value),
    "pattern": lambda value: isinstance(value, str) and _PATTERN.fullmatch(value) is not None,
    "format": lambda value: value in _FORMATS,
    "uniqueItems": lambda value: isinstance(value, bool),
    "description": lambda value: isinstance(value, str),
    "examples": lambda value: isinstance(value, list),
    "contentEncoding": lambda value: isinstance(value, str),
}
"""What is sent, and of which values: no server trips over it, and it says something to a model or a grammar."""
_NOTES: Final = ("description", "default", "examples")


def digestible(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a type, as local servers take it in a `response_format`.

    Every `$ref` is replaced by what it points to, but those of types that hold themselves: llama.cpp follows these.
    Objects take no other fields than theirs, and what some grammar trips over is left out: it narrows what a model can
    write, while the type itself judges what it wrote. Source: llama.cpp's converter, and issues of LM Studio.

    Args:
        schema: What `msgspec.json.schema` returns.
    """
    digest = _Digest(schema, closes=True, keeps=True)
    whole = digest.part({key: value for key, value in schema.items() if key != "$defs"}, ())
    if digest.endless:
        whole["$defs"] = {name: digest.part(schema["$defs"][name], ("",)) for name in sorted(digest.endless)}
    return whole


def digestible_parameters(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's parameters, from wherever it comes, as local servers take it.

    One schema that a server does not take makes it refuse the whole request, or all tools of it. So here is no
    reference (a type that holds itself is written out twice; what is not in the schema, and nothing is ever fetched,
    may be anything), an object at the top, one type a part, and no keyword but those that every server takes. The
    result lets through what the original may refuse, so the original judges what a model wrote.

    Args:
        schema: A JSON schema of any draft.

    Raises:
        ValueError: it is none of an object.
    """
    digest = _Digest(schema, closes=False, keeps=False)
    try:
        whole = digest.part(schema, ("#",))
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc
    return _of_an_object(whole)


class _Digest:
    """A schema while it is made digestible.

    Args:
        root: The schema, for references.
        closes: Whether objects take no other fields than theirs.
        keeps: Whether references of types that hold themselves are kept.

    Attributes:
        endless: The definitions whose references are kept.
    """

    def __init__(self, root: Mapping[str, Any], *, closes: bool, keeps: bool) -> None:
        self._root = root
        self._closes = closes
        self._keeps = keeps
        self._left = _PARTS
        self.endless = set(_endless(root.get("$defs", {}))) if keeps else set()

    def part(self, part: Any, path: tuple[str, ...]) -> dict[str, Any]:
        """A part of the schema, digested.

        Args:
            part: Anything that stands where a schema should.
            path: The references that led here.
        """
        if not isinstance(part, Mapping):
            return {}  # True, or garbage: anything
        self._left -= 1
        if isinstance(ref := part.get("$ref"), str):
            part = {key: value for key, value in part.items() if key != "$ref"}
            if path and ref.removeprefix("#/$defs/") in self.endless:
                return {"$ref": ref, **self._digested(part, path)}
            return self.part({**self._target(ref, path), **part}, (*path, ref))
        if parts := _schemas(part.get("allOf")):
            rest = {key: value for key, value in part.items() if key != "allOf"}
            return _merged([self.part(each, path) for each in (rest, *parts)])
        return _one_type(self._digested(part, path or ("",)))

    def _target(self, ref: str, path: tuple[str, ...]) -> Mapping[str, Any]:
        target = resolved(self._root, ref)
        if not isinstance(target, Mapping):
            return {}
        if not self._keeps and (path.count(ref) >= _DEPTH or self._left <= 0):
            return {"type": target["type"]} if "type" in target else {}
        return target

    def _digested(self, part: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        digested: dict[str, Any] = {}
        for key, value in part.items():
            if key in _HOLDERS:
                if (made := _HOLDERS[key](self, value, path)) is not None:
                    digested.setdefault("anyOf" if key == "oneOf" else key, made)
            elif key == "const":
                digested["enum"] = [value]
            elif key == "type" and isinstance(value, list):
                digested[key] = [each for each in _TYPES if each in value]
            elif self._is_sent(key, value):
                digested[key] = value
        return self._as_object_or_list(digested, part)

    def _is_sent(self, key: str, value: Any) -> bool:
        if self._keeps:
            return key in _KNOWN and _KNOWN[key](value)
        if key == "default":
            return value is not None  # that one breaks chat templates
        if (key in _SIZES and _is_size(value) and value > _LARGEST) or (key == "enum" and _is_too_long(value)):
            return False
        return key in _KNOWN and _KNOWN[key](value)

    def _as_object_or_list(self, digested: dict[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
        """Sets right what keywords mean together."""
        if "prefixItems" in digested and part.get("items") is False:
            digested.pop("items", None)  # llama.cpp answers 400 to the two together
        if "required" in digested:
            known = digested.get("properties", {})
            required = [name for name in digested.pop("required") if name in known]
            digested |= {"required": required} if required else {}
        if self._closes and "properties" in digested:
            digested.setdefault("additionalProperties", False)
        return digested

    def properties(self, value: Any, path: tuple[str, ...]) -> dict[str, Any]:
        """What `properties` holds; a property that must not be there is left out."""
        known = value if isinstance(value, Mapping) else {}
        return {str(name): self.part(each, path) for name, each in known.items() if each is not False}

    def branches(self, value: Any, path: tuple[str, ...]) -> list[Any] | None:
        """What a list of schemas holds."""
        return [self.part(each, path) for each in _schemas(value)] or None

    def items(self, value: Any, path: tuple[str, ...]) -> Any:
        """What `items` holds; as a list (drafts before 2020) it may be anything."""
        return self.part(value, path) if isinstance(value, Mapping) else None

    def additional(self, value: Any, path: tuple[str, ...]) -> Any:
        """What `additionalProperties` holds."""
        if isinstance(value, bool):
            return value
        return (self.part(value, path) or True) if isinstance(value, Mapping) else None

    def required(self, value: Any, _path: tuple[str, ...]) -> list[str] | None:
        """What `required` holds; in old drafts it could be a bool."""
        return [each for each in value if isinstance(each, str)] if isinstance(value, list) else None


_HOLDERS: Final[Mapping[str, Callable[[_Digest, Any, tuple[str, ...]], Any]]] = {
    "properties": _Digest.properties,
    "anyOf": _Digest.branches,
    "oneOf": _Digest.branches,
    "prefixItems": _Digest.branches,
    "items": _Digest.items,
    "additionalProperties": _Digest.additional,
    "required": _Digest.required,
}


def _schemas(value: Any) -> list[Any]:
    """The schemas of a list that can be met at all."""
    return [each for each in value if isinstance(each, Mapping) or each is True] if isinstance(value, list) else []


def _is_too_long(value: Any) -> bool:
    return isinstance(value, list) and len(value) > _CHOICES


def _one_type(part: dict[str, Any]) -> dict[str, Any]:
    """A part whose list of types is written as alternatives: MLX in LM Studio does not take lists."""
    if not isinstance(types := part.get("type"), list):
        return part
    if len(types) == 1:
        return {**part, "type": types[0]}
    rest = {key: value for key, value in part.items() if key != "type"}
    if not types or "enum" in part or "anyOf" in part:
        return rest
    notes = {key: value for key, value in rest.items() if key in _NOTES}
    bounds = {key: value for key, value in rest.items() if key not in _NOTES}
    return notes | {"anyOf": [{"type": "null"} if each == "null" else {"type": each, **bounds} for each in types]}


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all the parts ask for. The first one wins, but properties and what is required are those of all."""
    merged: dict[str, Any] = {}
    for part in parts:
        merged = {**part, **merged}
    if any("properties" in part for part in parts):
        merged["properties"] = _alternatives(parts)
        merged.pop("additionalProperties", None)  # each part meant those that it does not know
    if required := list(dict.fromkeys(name for part in parts for name in part.get("required", ()))):
        merged["required"] = required
    return merged


def _alternatives(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The properties of all the parts; one that differs between them may be as in any."""
    found: dict[str, list[Any]] = {}
    for part in parts:
        for name, schema in part.get("properties", {}).items():
            if schema not in (known := found.setdefault(name, [])):
                known.append(schema)
    return {name: known[0] if len(known) == 1 else {"anyOf": known} for name, known in found.items()}


def _of_an_object(whole: dict[str, Any]) -> dict[str, Any]:
    """A schema with an object at its top, and no alternatives there.

    Raises:
        ValueError: it is of something else.
    """
    branches = whole.pop("anyOf", [])
    objects = [each for each in branches if each.get("type", "object") == "object"]
    if whole.get("type", "object") != "object" or (branches and not objects):
        raise ValueError("it is not of an object")
    if objects:
        required = set.intersection(*(set(each.get("required", ())) for each in objects))
        keep = [name for name in objects[0].get("required", ()) if name in required]
        merged = _merged([whole, *({**each, "required": keep} for each in objects)])
        whole = {key: merged[key] for key in dict.fromkeys((*whole, "properties", "required")) if merged.get(key)}
    first = {"type": "object", "properties": whole.get("properties", {})}
    return first | {key: value for key, value in whole.items() if key != "enum"}


def resolved(root: Mapping[str, Any], ref: str) -> Any:
    """What a reference within a schema points to, or None: `#/$defs/Point`, `#/properties/from`, `#`."""
    if not ref.startswith("#"):
        return None
    target: Any = root
    for segment in unquote(ref[1:]).split("/")[1:]:
        name = segment.replace("~1", "/").replace("~0", "~")
        if isinstance(target, Mapping):
            target = target.get(name)
        elif isinstance(target, list) and name.isdecimal() and int(name) < len(target):
            target = target[int(name)]
        else:
            return None
    return target if ref == "#" or ref.startswith("#/") else None


def _endless(definitions: Mapping[str, Any]) -> Iterator[str]:
    """The definitions of msgspec that refer to themselves, directly or not."""
    for name in definitions:
        reached: set[str] = set()
        left = list(_references(definitions[name]))
        while left:
            if (each := left.pop()) not in reached:
                reached.add(each)
                left += _references(definitions[each])
        if name in reached:
            yield name


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, Mapping):
        if isinstance(ref := part.get("$ref"), str):
            yield ref.removeprefix("#/$defs/")
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            yield from _references(each)


def fault(error: Exception) -> tuple[str, str]:
    """The path of a fault, like `$.items[2].price`, and what is wrong there. msgspec tells both in its text only."""
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return "$", f"it is no JSON: {text}"
    found = _FAULT.fullmatch(text)
    path, what = (found["path"].replace("`", ""), found["what"]) if found else ("$", text)
    return path, excerpt(what[:1].lower() + what[1:])
