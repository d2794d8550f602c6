"""Checks the arguments of a tool call against the tool's JSON schema.

There are two steps. `coerce_to_schema` repairs values of the wrong JSON type where the schema allows only one
interpretation. Then the function made by `build_validator` accepts the result or describes what is wrong with it.
Coercion follows the schema and never the text of a value alone, because a guess would call a tool with arguments that
the model did not mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from lmbridge._text import excerpt
from lmbridge.client.subschemas import map_subschemas, resolve_reference

if TYPE_CHECKING:
    from jsonschema import ValidationError
    from jsonschema.protocols import Validator

_LISTED_MISMATCHES: Final = 3
"""The largest number of mismatches that one error text lists, and of alternatives that one mismatch describes."""
_JSON_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_JSON_TYPES: Final[Mapping[type, str]] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}


def coerce_to_schema(value: Any, schema: Any) -> Any:
    """Returns the value with strings decoded wherever the schema asks for another type.

    Small models send `"5"`, `"true"` or `"[1, 2]"` where the schema asks for a number, a boolean or a list. A string
    is decoded if the schema accepts exactly one type (besides null) and that type is not a string. A float such as
    `5.0` becomes an integer where the schema asks for one. All other values are returned unchanged.

    Args:
        value: A JSON value. It is not modified.
        schema: The schema of the value, as `simplify_parameters` returns it.
    """
    if value is None or isinstance(value, int):
        return value
    schema = _without_null(schema)
    expected = _single_type(schema)
    if isinstance(value, str) and expected is not None:
        value = _decode_string(value, expected)
    if isinstance(value, float) and expected == "integer" and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        return {
            # Integers never change, so they skip the call. They are the most frequent values.
            name: item if isinstance(item, int) else coerce_to_schema(item, properties.get(name, others))
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [coerce_to_schema(item, schema.get("items")) for item in value]
    return value


def _without_null(schema: Any) -> Mapping[str, Any]:
    """Returns the schema, or its only alternative besides null if it has just one."""
    if not isinstance(schema, Mapping):
        return {}
    alternatives = [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]
    return alternatives[0] if len(alternatives) == 1 else schema


def _single_type(schema: Mapping[str, Any]) -> str | None:
    """Returns the only JSON type that the schema accepts, or None if it accepts several or does not say."""
    if isinstance(json_type := schema.get("type"), str):
        return json_type
    json_types = {_JSON_TYPES.get(type(each)) for each in schema.get("enum", ())} - {"null"}
    return json_types.pop() if len(json_types) == 1 else None


def _decode_string(text: str, expected: str) -> Any:
    """Returns the value that a text represents if it has the expected JSON type, and otherwise the text itself."""
    spelled = text.strip()
    if expected == "boolean":
        return {"true": True, "false": False}.get(spelled.lower(), text)
    if expected in ("integer", "number") and not _JSON_NUMBER.fullmatch(spelled):
        return text
    if expected not in ("integer", "number", "array", "object"):
        return text
    try:
        value = msgspec.json.decode(spelled)
    except (ValueError, RecursionError):
        return text
    accepted = {"integer": (int, float), "number": (int, float), "array": (list,), "object": (dict,)}[expected]
    is_whole = expected != "integer" or isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return value if isinstance(value, accepted) and is_whole else text


def build_validator(
    schema: Mapping[str, Any], sent_schema: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Returns a function that copies valid arguments, and raises a `ValueError` that lists the mistakes otherwise.

    The original schema decides, because the version that servers receive accepts more. Nothing is ever fetched: a
    reference that cannot be resolved within the schema accepts any value. If the schema is invalid by the rules of
    its own draft, the version that servers receive decides instead.

    Args:
        schema: A JSON schema of any draft; without `$schema`, draft 2020-12.
        sent_schema: The version of it that servers receive, as `simplify_parameters` returns it.
    """
    jsonschema_validator = _jsonschema_validator(schema, sent_schema)

    def validate(arguments: Mapping[str, Any]) -> dict[str, Any]:
        mismatches = sorted(jsonschema_validator.iter_errors(arguments), key=lambda error: error.json_path)
        if mismatches:
            listed = [_describe_mismatch(error) for error in mismatches[:_LISTED_MISMATCHES]]
            omitted = len(mismatches) - len(listed)
            raise ValueError("; ".join([*listed, f"{omitted} more"] if omitted else listed))
        return dict(arguments)

    return validate


def _describe_mismatch(error: ValidationError) -> str:
    """Describes a mismatch and its place. If a value fits no alternative, the first few reasons are listed."""
    if not error.context:
        return f"{error.json_path}: {excerpt(error.message)}"
    # The first part of an error's schema path is the number of the alternative that it belongs to.
    first_errors = {each.schema_path[0]: each for each in reversed(error.context)}
    reasons = [_describe_mismatch(first_errors[number]) for number in sorted(first_errors)[:_LISTED_MISMATCHES]]
    return f"{error.json_path}: no alternative fits ({' or '.join(reasons)})"


def _jsonschema_validator(schema: Mapping[str, Any], sent_schema: Mapping[str, Any]) -> Validator:
    # Importing jsonschema takes 35 ms, which only programs with tools that bring their own schema should pay.
    from jsonschema import Draft202012Validator, SchemaError  # noqa: PLC0415
    from jsonschema.validators import validator_for  # noqa: PLC0415

    schema = _self_contained(schema, schema)
    validator_class: Any = validator_for(schema, default=Draft202012Validator)
    try:
        validator_class.check_schema(schema)
    except (SchemaError, RecursionError):
        return Draft202012Validator(sent_schema)
    return validator_class(schema)


def _self_contained(part: Mapping[str, Any], root: Mapping[str, Any]) -> dict[str, Any]:
    """Copies a schema, leaving out references to other documents and patterns that Python cannot compile."""
    if isinstance(reference := part.get("$ref"), str) and not _can_be_resolved(root, reference):
        return {}
    usable = {key: value for key, value in part.items() if _is_usable(key, value)}
    return map_subschemas(usable, lambda each: _self_contained(each, root))


def _is_usable(keyword: str, value: Any) -> bool:
    if keyword == "pattern" and isinstance(value, str):
        try:
            re.compile(value)
        except re.error:
            # JSON schema uses the syntax of JavaScript, which has constructs that Python does not.
            return False
    if keyword == "$schema":
        return isinstance(value, str)
    # An `$id`, or an `id` in draft 4, would change the base of the references below it. Only meta-schemas need dynamic
    # references.
    return not (keyword in ("$id", "id", "$dynamicRef", "$recursiveRef") and isinstance(value, str))


def _can_be_resolved(root: Mapping[str, Any], reference: str) -> bool:
    """Follows a chain of references, and returns whether it ends at a schema."""
    followed: set[str] = set()
    while reference not in followed:
        followed.add(reference)
        target = resolve_reference(root, reference)
        if not isinstance(target, Mapping) or not isinstance(next_reference := target.get("$ref"), str):
            return isinstance(target, Mapping | bool)
        reference = next_reference
    return False
