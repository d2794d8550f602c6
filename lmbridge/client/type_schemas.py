"""The JSON schemas of Python types, with the descriptions that classes give their fields.

msgspec generates the schemas; `type_stand_ins` provides the parts for types that it does not support.

Types that are not objects, such as lists and unions, are wrapped in one by `structured`.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from lmbridge._docstrings import read_docstring
from lmbridge.client.subschemas import map_subschemas
from lmbridge.client.type_stand_ins import StandInType, annotations_of, classes_within, has_fields, supported_type


def json_schema(annotation: Any) -> dict[str, Any]:
    """Returns the JSON schema of a type. Its fields have the descriptions that the classes give them.

    Raises:
        TypeError: The type, or a part of it, cannot be expressed in JSON.
        NameError: An annotation of a class refers to a name that does not exist.
    """
    names: dict[Any, str] = {}
    parts = [supported_type(annotation)]

    def refer(type_: Any) -> dict[str, Any]:
        if not isinstance(type_, StandInType):
            raise NotImplementedError
        name = names.setdefault(type_, f"type-{len(names) + 1}")
        return {"$ref": f"#/$defs/{name}"}

    parts += classes_within(parts)
    while True:
        # All parts are passed in one call, so that two classes with the same name get different names.
        schemas, definitions = msgspec.json.schema_components(parts, schema_hook=refer)
        needed = [each for stand_in in list(names) for each in stand_in.reader.parts]
        missing = [each for each in (*needed, *classes_within(needed)) if not _is_among(each, parts)]
        if not missing:
            break
        parts += missing
    by_part = list(zip(parts, schemas, strict=True))
    for part, schema in by_part:
        if has_fields(part) and "$ref" in schema:
            _describe_fields(definitions[schema["$ref"].removeprefix("#/$defs/")], part)
    for stand_in, name in names.items():
        of_parts = [next(schema for part, schema in by_part if part is each) for each in stand_in.reader.parts]
        definitions[name], further = stand_in.reader.schema(of_parts, name)
        definitions |= further
    whole = _without_aliases({**with_literals_as_written(schemas[0], annotation), "$defs": definitions})
    if not whole["$defs"]:
        del whole["$defs"]
    return whole


def _without_aliases(whole: dict[str, Any]) -> dict[str, Any]:
    """Returns a schema without the definitions that only refer to another definition."""
    aliases = {f"#/$defs/{name}": part["$ref"] for name, part in whole["$defs"].items() if list(part) == ["$ref"]}

    def resolve(schema: Mapping[str, Any]) -> dict[str, Any]:
        resolved = map_subschemas(schema, resolve)
        while isinstance(reference := resolved.get("$ref"), str) and reference in aliases:
            resolved["$ref"] = aliases[reference]
        return resolved

    definitions = {name: part for name, part in whole["$defs"].items() if f"#/$defs/{name}" not in aliases}
    return resolve({**whole, "$defs": definitions})


def _is_among(part: Any, parts: Sequence[Any]) -> bool:
    return any(each is part for each in parts)


def _describe_fields(definition: dict[str, Any], class_: Any) -> None:
    """Adds the descriptions of a class and of its fields to its schema."""
    class_ = getattr(class_, "_described_class", class_)
    docstring = read_docstring(None if _is_generated(class_) else class_.__doc__)
    definition.pop("description", None)
    if docstring.description:
        definition["description"] = docstring.description
    properties = definition.get("properties", {})
    encoded = getattr(class_, "__struct_encode_fields__", ())
    wire_names: dict[str, str] = dict(zip(getattr(class_, "__struct_fields__", ()), encoded, strict=True))
    fields: dict[str, Any] = {**getattr(class_, "__dataclass_fields__", {})}
    for each in getattr(class_, "__attrs_attrs__", ()):
        fields[each.name] = each
        # A stand-in has the names that the constructor accepts, which are without the underscore of private fields.
        wire_names[each.name] = each.alias if each.alias in properties else each.name
    for name, annotation in annotations_of(class_).items():
        metadata = getattr(fields.get(name), "metadata", None) or {}
        text = description_of(annotation) or metadata.get("description") or docstring.parameters.get(name)
        part = properties.get(wire_names.get(name, name))
        if part is None:
            continue
        properties[wire_names.get(name, name)] = part = with_literals_as_written(part, annotation)
        if isinstance(text, str):
            part.setdefault("description", text)


def _is_generated(class_: type) -> bool:
    """Returns whether a class has the docstring that `dataclass` or a named tuple gives to a class without one."""
    return (class_.__doc__ or "").startswith(f"{class_.__name__}(")


def with_literals_as_written(part: Mapping[str, Any], annotation: Any) -> dict[str, Any]:
    """Returns the schema of an annotation, with the values of each `Literal` in the order in which they are written.

    msgspec sorts the values, but their order may mean something to the author of the program, and so to a model.
    """
    literals = list(_literals_within(annotation))

    def ordered(schema: Mapping[str, Any]) -> dict[str, Any]:
        schema = map_subschemas(schema, ordered)
        values = schema.get("enum")
        written = next(
            (each for each in literals if values and sorted(map(repr, values)) == sorted(map(repr, each))), None
        )
        return schema if written is None else {**schema, "enum": list(written)}

    return ordered(part) if literals else dict(part)


def _literals_within(annotation: Any) -> Iterator[tuple[Any, ...]]:
    """Yields the values of each `Literal` in an annotation, but not those in its classes."""
    values = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        yield values
        return
    for each in values:
        yield from _literals_within(each)


def description_of(annotation: Any) -> str | None:
    """Returns the description in `Annotated`: a string, or that of pydantic's `Field` or of a similar object."""
    for each in getattr(annotation, "__metadata__", ()):
        text = each if isinstance(each, str) else getattr(each, "description", None)
        text = text or getattr(each, "documentation", None)
        if isinstance(text, str) and text:
            return " ".join(text.split())
    return None
