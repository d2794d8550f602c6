"""Arguments against a schema: values of the wrong JSON type that can mean one thing only, and what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from lmbridge._text import excerpt
from lmbridge.client.schemas import resolved

if TYPE_CHECKING:
    from jsonschema import ValidationError
    from jsonschema.protocols import Validator

_SHOWN: Final = 3
"""Faults that a model is told at a time."""
_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_VALUES: Final = ("const", "default", "enum", "examples")
"""What holds values, not schemas."""
_TYPES: Final[Mapping[type, str]] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}


def coerced(value: Any, schema: Any) -> Any:
    """The value, with texts made what they spell where the schema takes no text.

    Small models send `"5"`, `"true"` or `"[1, 2]"` where a number, a boolean or a list is asked for. Where the schema
    takes one type only (or that one and null), and it is none of text, that is what is meant. A `5.0` is the integer 5
    where one is asked for. Everything else stays.

    Args:
        value: A JSON value; it is not changed.
        schema: As made by `digestible_parameters`.
    """
    if value is None or isinstance(value, int):
        return value
    schema = _only(schema)
    wanted = _type_of(schema)
    if isinstance(value, str) and wanted is not None:
        value = _read(value, wanted)
    if isinstance(value, float) and wanted == "integer" and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        return {
            # Most values are numbers, which stay as they are.
            name: each if isinstance(each, int) else coerced(each, known.get(name, others))
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [coerced(each, schema.get("items")) for each in value]
    return value


def _only(schema: Any) -> Mapping[str, Any]:
    """The schema, or the only one of its alternatives that is not null."""
    if not isinstance(schema, Mapping):
        return {}
    branches = [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]
    return branches[0] if len(branches) == 1 else schema


def _type_of(schema: Mapping[str, Any]) -> str | None:
    """The only type that a schema takes."""
    if isinstance(kind := schema.get("type"), str):
        return kind
    kinds = {_TYPES.get(type(each)) for each in schema.get("enum", ())} - {"null"}
    return kinds.pop() if len(kinds) == 1 else None


def _read(text: str, wanted: str) -> Any:
    """What a text spells, if it is of the type that is wanted; else the text."""
    spelled = text.strip()
    if wanted == "boolean":
        return {"true": True, "false": False}.get(spelled.lower(), text)
    if wanted in ("integer", "number") and not _NUMBER.fullmatch(spelled):
        return text
    if wanted not in ("integer", "number", "array", "object"):
        return text
    try:
        value = msgspec.json.decode(spelled)
    except (ValueError, RecursionError):
        return text
    kinds = {"integer": (int, float), "number": (int, float), "array": (list,), "object": (dict,)}[wanted]
    is_whole = wanted != "integer" or isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return value if isinstance(value, kinds) and is_whole else text


def validator(
    schema: Mapping[str, Any], digestible: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What passes arguments that a schema takes, and raises a `ValueError` that says what is wrong where.

    References that lead nowhere, or out of the schema, may be anything: nothing is fetched. A schema that is none by
    its own draft does not validate; what was made of it for servers does.

    Args:
        schema: A JSON schema of any draft; without a `$schema` of 2020-12.
        digestible: As made of it by `digestible_parameters`.
    """
    judge = _judge(schema, digestible)

    def validate(arguments: Mapping[str, Any]) -> dict[str, Any]:
        errors = sorted(judge.iter_errors(arguments), key=lambda error: error.json_path)
        if errors:
            told = [_told(error) for error in errors[:_SHOWN]]
            more = [f"{len(errors) - _SHOWN} more"] if len(errors) > _SHOWN else []
            raise ValueError("; ".join(told + more))
        return dict(arguments)

    return validate


def _told(error: ValidationError) -> str:
    """What is wrong, and where; of alternatives, what is wrong with the value as each of them."""
    if not error.context:
        return f"{error.json_path}: {excerpt(error.message)}"
    first = {each.schema_path[0]: each for each in reversed(error.context)}  # the number of the alternative
    each_told = " or ".join(_told(first[number]) for number in sorted(first)[:_SHOWN])
    return f"{error.json_path}: no alternative fits ({each_told})"


def _judge(schema: Mapping[str, Any], digestible: Mapping[str, Any]) -> Validator:
    from jsonschema import Draft202012Validator, SchemaError  # noqa: PLC0415 - 35 ms, for who has such tools only
    from jsonschema.validators import validator_for  # noqa: PLC0415 - as above

    sealed = _sealed(schema, schema)
    kind = validator_for(sealed, default=Draft202012Validator)
    try:
        kind.check_schema(sealed)
    except (SchemaError, RecursionError):
        return Draft202012Validator(digestible)
    return kind(sealed)


def _sealed(part: Any, root: Mapping[str, Any]) -> Any:
    """A schema that refers to nothing outside of it, and holds no pattern that Python cannot read."""
    if isinstance(part, Sequence) and not isinstance(part, str):
        return [_sealed(each, root) for each in part]
    if not isinstance(part, Mapping):
        return part
    if isinstance(ref := part.get("$ref"), str) and not _leads_somewhere(root, ref):
        return {}
    kept = {key: value for key, value in part.items() if _is_kept(key, value)}
    return {key: value if key in _VALUES else _sealed(value, root) for key, value in kept.items()}


def _is_kept(key: str, value: Any) -> bool:
    if key == "pattern" and isinstance(value, str):
        try:
            re.compile(value)
        except re.error:  # JavaScript's may be others
            return False
    if key == "$schema":
        return isinstance(value, str)
    # With an id, references would start from it; the dynamic ones are for schemas of schemas.
    return not (key in ("$id", "$dynamicRef", "$recursiveRef") and isinstance(value, str))


def _leads_somewhere(root: Mapping[str, Any], ref: str) -> bool:
    """Whether there is a schema at the end of a reference, and of those that it leads to."""
    seen: set[str] = set()
    while ref not in seen:
        seen.add(ref)
        target = resolved(root, ref)
        if not isinstance(target, Mapping) or not isinstance(following := target.get("$ref"), str):
            return isinstance(target, Mapping | bool)
        ref = following
    return False
