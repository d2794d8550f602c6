"""Simplifies JSON schemas, so that every local server accepts them.

Servers turn a schema into a grammar, and each kind of server has its own limits. llama.cpp refuses patterns that are
not anchored, large bounds and some combinations of keywords, llguidance refuses unknown formats, and MLX in LM Studio
refuses a list of types. If one schema is refused, the whole request fails, with all of its tools. Therefore everything
that a server may refuse is left out. The result accepts more than the original schema, so the answer of the model is
validated with the original.

The rules are written here by hand, because a library that only inlines references would solve the smallest part of
the problem. Their sources are llama.cpp's converter and the issues of LM Studio.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from lmbridge._checks import is_integer, is_number
from lmbridge.client.subschemas import map_subschemas, references_in, resolve_reference

_TYPES: Final = ("string", "number", "integer", "boolean", "array", "object", "null")
_STRING_FORMATS: Final = ("date", "date-time", "time", "uuid")
"""The formats that both llama.cpp and llguidance know. llguidance refuses a schema with any other format."""
_SIMPLE_PATTERN: Final = re.compile(r"\^(?:[^\\(]|\((?!\?)|\\[^a-zA-Z0-9])*\$", re.DOTALL)
"""Patterns that every version of llama.cpp knows. Older ones answer 400 to any other."""
_LARGEST_BOUND: Final = 1_000
"""The largest bound of a length that is sent in the parameters of a tool. llama.cpp makes a grammar rule for each unit
of a length, and limits the number of rules."""
_LONGEST_ENUM: Final = 200
"""The largest number of values of an enum that is sent in the parameters of a tool."""
_MOST_PARTS: Final = 2_000
"""The number of parts after which references are no longer replaced, because the schema could become huge."""
_RECURSION_DEPTH: Final = 2
"""The number of levels to which a type that contains itself is written out."""


def _is_size(value: Any) -> bool:
    return is_integer(value) and value >= 0


_SIZE_KEYWORDS: Final = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_KEYWORDS: Final[Mapping[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_SIZE_KEYWORDS, _is_size),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), is_number),
    "multipleOf": lambda value: is_number(value) and value > 0,
    "type": lambda value: value in _TYPES,
    "enum": lambda value: isinstance(value, list) and bool(value),
    "pattern": lambda value: isinstance(value, str) and _SIMPLE_PATTERN.fullmatch(value) is not None,
    "format": lambda value: value in _STRING_FORMATS,
    "uniqueItems": lambda value: isinstance(value, bool),
    "description": lambda value: isinstance(value, str),
    "examples": lambda value: isinstance(value, list),
    "contentEncoding": lambda value: isinstance(value, str),
}
"""The keywords that are sent, besides those that hold schemas, each with a check of its value.

Every server accepts them, and they mean something to a model or to a grammar.
"""
_USUAL_ORDER: Final = ("type", "enum", "description", "items", "properties", "required", "additionalProperties")
"""The order of keywords in OpenAI's examples of tools. All other keywords come after these."""
_ANNOTATIONS: Final = ("description", "default", "examples")


def simplify_answer_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the schema of a type as local servers accept it in a `response_format`.

    References are replaced by their targets, except references to types in `$defs` that contain themselves, which
    llama.cpp follows. Other parts that contain themselves are written out twice. Objects allow no additional fields.

    Args:
        schema: The schema of the type, as `json_schema` returns it.
    """
    simplifier = _Simplifier(schema, close_objects=True, keep_recursion=True)
    whole = simplifier.simplify({key: value for key, value in schema.items() if key != "$defs"}, ())
    if simplifier.recursive:
        whole["$defs"] = {
            name: simplifier.simplify(schema["$defs"][name], ("",)) for name in sorted(simplifier.recursive)
        }
    return whole


def simplify_definition(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the schema of a tool's parameters as it stands in a definition, written like the examples of OpenAI.

    This is the form that models are most likely to know. The type comes first, and `required` comes after the
    properties. An enum of strings has a type. A parameter that may be left out, and whose default is null, is described
    as if it did not accept null. So the result may accept less than that of `simplify_parameters`, and serves only to
    describe a tool.

    Args:
        schema: A JSON schema of any draft.

    Raises:
        ValueError: The schema is not that of an object.
    """
    return _in_usual_form(_simplify_parameters(schema, omit_null_defaults=True))


def simplify_parameters(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the schema of a tool's parameters in the form that local servers accept.

    The result contains no reference: a type that contains itself is written out twice, and a reference to something
    outside of the schema, which is never fetched, becomes a part that accepts anything. It has an object at the top,
    one type in each part, and only keywords that every server accepts.

    Args:
        schema: A JSON schema of any draft.

    Raises:
        ValueError: The schema is not that of an object.
    """
    return _simplify_parameters(schema, omit_null_defaults=False)


def _simplify_parameters(schema: Mapping[str, Any], *, omit_null_defaults: bool) -> dict[str, Any]:
    simplifier = _Simplifier(schema, close_objects=False, keep_recursion=False, omit_null_defaults=omit_null_defaults)
    try:
        whole = simplifier.simplify(schema, ("#",))
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc
    return _as_object_schema(whole)


class _Simplifier:
    """Simplifies the parts of one schema.

    Args:
        root: The whole schema, in which references are resolved.
        close_objects: Whether objects allow no additional fields.
        keep_recursion: Whether references to types that contain themselves are kept. If so, defaults are left out, and
            the bounds of lengths and the sizes of enums are not limited.
        omit_null_defaults: Whether a property that may be left out, and whose default is null, loses the alternative
            null.

    Attributes:
        recursive: The names of the definitions to which references are kept.
    """

    def __init__(
        self,
        root: Mapping[str, Any],
        *,
        close_objects: bool,
        keep_recursion: bool,
        omit_null_defaults: bool = False,
    ) -> None:
        self._root = root
        self._omit_null_defaults = omit_null_defaults
        self._close_objects = close_objects
        self._keep_recursion = keep_recursion
        self._parts_left = _MOST_PARTS
        self.recursive = set(_recursive_definitions(root.get("$defs", {}))) if keep_recursion else set()

    def simplify(self, part: Any, path: tuple[str, ...]) -> dict[str, Any]:
        """Returns a part of the schema, simplified.

        Args:
            part: The value in the place of a schema, which may not be a valid one.
            path: The references that led to this part.
        """
        if not isinstance(part, Mapping):
            # The schema `True`, or an invalid one, accepts any value.
            return {}
        self._parts_left -= 1
        if isinstance(ref := part.get("$ref"), str):
            part = {key: value for key, value in part.items() if key != "$ref"}
            if path and ref.removeprefix("#/$defs/") in self.recursive:
                return {"$ref": ref, **self._simplify_keywords(part, path)}
            return self.simplify({**self._target_of(ref, path), **part}, (*path, ref))
        if branches := _possible_schemas(part.get("allOf")):
            rest = {key: value for key, value in part.items() if key != "allOf"}
            return _merge_schemas([self.simplify(branch, path) for branch in (rest, *branches)])
        return _with_one_type(self._simplify_keywords(part, path or ("",)))

    def _target_of(self, ref: str, path: tuple[str, ...]) -> Mapping[str, Any]:
        target = resolve_reference(self._root, ref)
        if not isinstance(target, Mapping):
            return {}
        is_too_large = self._parts_left <= 0 and (ref in path or not self._keep_recursion)
        if path.count(ref) >= _RECURSION_DEPTH or is_too_large:
            return {"type": target["type"]} if "type" in target else {}
        return target

    def _simplify_keywords(self, part: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        simplified: dict[str, Any] = {}
        for key, value in part.items():
            if key in _SCHEMA_KEYWORDS:
                if (schemas := _SCHEMA_KEYWORDS[key](self, value, path)) is not None:
                    simplified.setdefault("anyOf" if key == "oneOf" else key, schemas)
            elif key == "const":
                simplified["enum"] = [value]
            elif key == "type" and isinstance(value, list):
                simplified[key] = [name for name in _TYPES if name in value]
            elif self._is_sent(key, value):
                simplified[key] = value
        return self._reconcile(simplified, part)

    def _is_sent(self, key: str, value: Any) -> bool:
        if not self._keep_recursion:
            if key == "default":
                # A default of null breaks chat templates.
                return value is not None
            if key in _SIZE_KEYWORDS and _is_size(value) and value > _LARGEST_BOUND:
                return False
            if key == "enum" and isinstance(value, list) and len(value) > _LONGEST_ENUM:
                return False
        return key in _KEYWORDS and _KEYWORDS[key](value)

    def _reconcile(self, simplified: dict[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
        """Adjusts keywords whose meaning depends on another keyword."""
        if "prefixItems" in simplified and part.get("items") is False:
            # llama.cpp answers 400 if both are there.
            simplified.pop("items", None)
        if "required" in simplified:
            known = simplified.get("properties", {})
            required = [name for name in simplified.pop("required") if name in known]
            simplified |= {"required": required} if required else {}
        if self._omit_null_defaults and (known := simplified.get("properties")):
            for name, given in part["properties"].items():
                is_optional = name in known and name not in simplified.get("required", ())
                if is_optional and isinstance(given, Mapping) and given.get("default", "") is None:
                    known[name] = _without_null(known[name])
        if self._close_objects and "properties" in simplified:
            simplified.setdefault("additionalProperties", False)
        return simplified

    # Keywords that hold schemas

    def properties(self, value: Any, path: tuple[str, ...]) -> dict[str, Any]:
        """Simplifies `properties`; a property that is `false`, and so must not exist, is left out."""
        properties = value if isinstance(value, Mapping) else {}
        return {str(name): self.simplify(part, path) for name, part in properties.items() if part is not False}

    def branches(self, value: Any, path: tuple[str, ...]) -> list[Any] | None:
        """Simplifies a list of schemas."""
        return [self.simplify(part, path) for part in _possible_schemas(value)] or None

    def items(self, value: Any, path: tuple[str, ...]) -> Any:
        """Simplifies `items`; a list of schemas, as in drafts before 2020, is dropped."""
        return self.simplify(value, path) if isinstance(value, Mapping) else None

    def additional_properties(self, value: Any, path: tuple[str, ...]) -> Any:
        """Simplifies `additionalProperties`."""
        if isinstance(value, bool):
            return value
        return (self.simplify(value, path) or True) if isinstance(value, Mapping) else None

    def required(self, value: Any, _path: tuple[str, ...]) -> list[str] | None:
        """Simplifies `required`; a bool, as in old drafts, is dropped."""
        return [name for name in value if isinstance(name, str)] if isinstance(value, list) else None


_SCHEMA_KEYWORDS: Final[Mapping[str, Callable[[_Simplifier, Any, tuple[str, ...]], Any]]] = {
    "properties": _Simplifier.properties,
    "anyOf": _Simplifier.branches,
    "oneOf": _Simplifier.branches,
    "prefixItems": _Simplifier.branches,
    "items": _Simplifier.items,
    "additionalProperties": _Simplifier.additional_properties,
    "required": _Simplifier.required,
}


def _possible_schemas(value: Any) -> list[Any]:
    """Returns those schemas of a list that at least one value can satisfy."""
    return [part for part in value if isinstance(part, Mapping) or part is True] if isinstance(value, list) else []


def _with_one_type(part: dict[str, Any]) -> dict[str, Any]:
    """Returns a part whose list of types is written as alternatives, because MLX in LM Studio accepts no list."""
    if not isinstance(types := part.get("type"), list):
        return part
    if len(types) == 1:
        return {**part, "type": types[0]}
    rest = {key: value for key, value in part.items() if key != "type"}
    if not types or "enum" in part or "anyOf" in part:
        return rest
    annotations = {key: value for key, value in rest.items() if key in _ANNOTATIONS}
    bounds = {key: value for key, value in rest.items() if key not in _ANNOTATIONS}
    return annotations | {"anyOf": [{"type": "null"} if name == "null" else {"type": name, **bounds} for name in types]}


def _without_null(part: dict[str, Any]) -> dict[str, Any]:
    """Returns a part without the alternative that accepts only null."""
    branches = [branch for branch in part.get("anyOf", ()) if branch != {"type": "null"}]
    if not branches:
        return part
    rest = {key: value for key, value in part.items() if key != "anyOf"}
    return {**branches[0], **rest} if len(branches) == 1 else {**rest, "anyOf": branches}


def _in_usual_form(part: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a part, and all parts within it, with a type for each enum of texts and with its keywords in order."""
    part = map_subschemas(part, _in_usual_form)
    if "type" not in part and part.get("enum") and all(isinstance(each, str) for each in part["enum"]):
        part = {"type": "string", **part}
    usual = {key: part[key] for key in _USUAL_ORDER if key in part}
    return usual | {key: value for key, value in part.items() if key not in usual}


def _merge_schemas(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one schema for an `allOf`: the first part wins, but properties and required names are those of all."""
    merged: dict[str, Any] = {}
    for part in parts:
        merged = {**part, **merged}
    if any("properties" in part for part in parts):
        merged["properties"] = _merge_properties(parts)
        # A part forbids properties that it does not list, but another part may list them.
        merged.pop("additionalProperties", None)
    if required := list(dict.fromkeys(name for part in parts for name in part.get("required", ()))):
        merged["required"] = required
    return merged


def _merge_properties(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the properties of all parts. If a property differs between them, any of its schemas is accepted."""
    schemas_by_name: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, schema in part.get("properties", {}).items():
            schemas_by_name.setdefault(name, {}).setdefault(_schema_text(schema), schema)
    return {
        name: next(iter(known.values())) if len(known) == 1 else {"anyOf": list(known.values())}
        for name, known in schemas_by_name.items()
    }


def _schema_text(schema: Any) -> str:
    """Returns a text that is the same for equal schemas, even with defaults that JSON does not have."""
    return json.dumps(schema, default=repr, skipkeys=True)


def _as_object_schema(whole: dict[str, Any]) -> dict[str, Any]:
    """Returns a schema with an object at its top, and no alternatives there.

    Raises:
        ValueError: The schema is not that of an object.
    """
    branches = whole.pop("anyOf", [])
    objects = [branch for branch in branches if branch.get("type", "object") == "object"]
    if whole.get("type", "object") != "object" or (branches and not objects):
        raise ValueError("the schema is not that of an object")
    if objects:
        required = set.intersection(*(set(branch.get("required", ())) for branch in objects))
        kept = [name for name in objects[0].get("required", ()) if name in required]
        merged = _merge_schemas([whole, *({**branch, "required": kept} for branch in objects)])
        whole = {key: merged[key] for key in dict.fromkeys((*whole, "properties", "required")) if merged.get(key)}
    first = {"type": "object", "properties": whole.get("properties", {})}
    return first | {key: value for key, value in whole.items() if key != "enum"}


def _recursive_definitions(definitions: Mapping[str, Any]) -> Iterator[str]:
    """Yields the names of the definitions that refer to themselves, directly or not."""
    direct = {name: {ref.removeprefix("#/$defs/") for ref in references_in(part)} for name, part in definitions.items()}
    for name, references in direct.items():
        reached: set[str] = set()
        remaining = list(references)
        while remaining:
            if (reference := remaining.pop()) not in reached:
                reached.add(reference)
                remaining += direct.get(reference, ())
        if name in reached:
            yield name
