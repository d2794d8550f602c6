"""Arguments of tool calls against JSON schemas: coercion of values, and validation with its error texts."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge.agent.coercion import coerce_to_schema
from lmbridge.agent.schemas import build_validator
from lmbridge.client.schemas import simplify_parameters
from tests.client.test_schemas import SCHEMAS
from tests.client.test_subschemas import KEYWORDS_AS_NAMES


def validate(schema: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    return build_validator(schema, simplify_parameters(schema))(arguments)


def error_of(schema: dict[str, Any], arguments: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"^\$") as caught:
        validate(schema, arguments)
    return str(caught.value)


# Coercion


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, " -5 ", -5),
        ({"type": "integer"}, "5.0", 5),
        ({"type": "integer"}, 5.0, 5),
        ({"type": "number"}, "2.5", 2.5),
        ({"type": "number"}, "1e3", 1000.0),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "object"}, '{"a": 1}', {"a": 1}),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "5", 5),
        ({"enum": [1, 2, None]}, "2", 2),
        ({"type": "array", "items": {"type": "integer"}}, '["1", 2]', [1, 2]),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": "1", "b": "2"}, {"a": 1, "b": "2"}),
        ({"type": "object", "additionalProperties": {"type": "boolean"}}, {"a": "true"}, {"a": True}),
    ],
)
def test_a_string_is_decoded_where_the_schema_accepts_no_string(schema: Any, value: Any, expected: Any) -> None:
    coerced = coerce_to_schema(value, schema)
    assert coerced == expected
    assert type(coerced) is type(expected)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, "5"),
        ({"type": "string"}, 5),
        ({"type": "string"}, "true"),
        ({"type": "string"}, '{"a": 1}'),
        ({}, "5"),
        (True, "5"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5"),
        ({"anyOf": [{"type": "boolean"}, {"type": "integer"}]}, "5"),
        ({"enum": ["1", "2"]}, "1"),
        ({"enum": ["1", 1]}, "1"),
        ({"type": "integer"}, "5.5"),
        ({"type": "integer"}, 5.5),
        ({"type": "integer"}, "five"),
        ({"type": "integer"}, "0x10"),
        ({"type": "integer"}, "1_000"),
        ({"type": "integer"}, "05"),
        ({"type": "integer"}, "\u0665"),
        ({"type": "integer"}, ""),
        ({"type": "integer"}, True),
        ({"type": "number"}, "NaN"),
        ({"type": "number"}, "1e999"),
        ({"type": "boolean"}, "yes"),
        ({"type": "boolean"}, 1),
        ({"type": "boolean"}, "1"),
        ({"type": "null"}, "null"),
        ({"type": "array"}, "1, 2"),
        ({"type": "array"}, '{"a": 1}'),
        ({"type": "array"}, "a"),
        ({"type": "object"}, "[1]"),
        ({"type": "object"}, "{'a': 1}"),
        ({"type": "object"}, "[" * 100_000),
    ],
)
def test_every_other_value_is_unchanged(schema: Any, value: Any) -> None:
    coerced = coerce_to_schema(value, schema)
    assert coerced == value
    assert type(coerced) is type(value)


def test_coercion_does_not_modify_its_input() -> None:
    value = {"a": ["1"]}
    schema = {"properties": {"a": {"items": {"type": "integer"}}}}
    assert coerce_to_schema(value, schema) == {"a": [1]}
    assert value == {"a": ["1"]}


# Validation

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}


def test_valid_arguments_are_returned_with_unknown_ones() -> None:
    assert validate(CITY, {"city": "Ulm", "days": 2, "more": None}) == {"city": "Ulm", "days": 2, "more": None}


def test_every_mismatch_is_listed_with_its_path() -> None:
    assert error_of(CITY, {"days": "two"}) == "$: 'city' is a required property; $.days: 'two' is not of type 'integer'"
    nested = {"type": "object", "properties": {"to": {"type": "array", "items": {"enum": ["a", "b"]}}}}
    assert error_of(nested, {"to": ["a", "c"]}) == "$.to[1]: 'c' is not one of ['a', 'b']"


def test_a_long_list_of_mismatches_is_shortened() -> None:
    schema = {"type": "object", "additionalProperties": {"type": "integer"}}
    text = error_of(schema, dict.fromkeys("abcdef", "x" * 5_000))
    assert text.endswith("; 3 more")
    assert len(text) < 2_000


def test_a_value_that_fits_no_alternative_is_described_for_each_of_them() -> None:
    schema = {"type": "object", "properties": {"x": {"anyOf": [{"type": "integer"}, {"required": ["y"]}]}}}
    assert validate(schema, {"x": 1})
    schema["properties"]["x"]["anyOf"][1]["type"] = "object"  # type: ignore[index]  # a literal of many types
    assert error_of(schema, {"x": "a"}).startswith(
        "$.x: no alternative fits ($.x: 'a' is not of type 'integer' or $.x: 'a'"
    )


def test_the_original_schema_decides_and_not_the_version_that_is_sent() -> None:
    schema = {"type": "object", "properties": {"id": {"type": "string", "pattern": r"^\d+$", "not": {"const": "0"}}}}
    assert simplify_parameters(schema)["properties"] == {"id": {"type": "string"}}
    assert validate(schema, {"id": "12"})
    assert "does not match" in error_of(schema, {"id": "a"})
    assert "should not be valid" in error_of(schema, {"id": "0"})


def test_a_schema_is_read_by_its_own_draft() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "array", "items": [{"type": "integer"}]}}}
    assert "is not of type" in error_of({"$schema": "http://json-schema.org/draft-07/schema#", **schema}, {"x": ["a"]})
    old = {"type": "object", "properties": {"n": {"type": "number", "minimum": 0, "exclusiveMinimum": True}}}
    assert error_of({"$schema": "http://json-schema.org/draft-04/schema#", **old}, {"n": 0})


@pytest.mark.parametrize("draft", ["https://example.com/unknown-draft", 5, None])
def test_an_unknown_draft_is_read_as_the_newest(draft: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error_of({"$schema": draft, **CITY}, {}) == "$: 'city' is a required property"


def test_a_recursive_schema_is_validated_at_every_depth() -> None:
    node = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/Node"}}}
    schema = {"type": "object", "properties": {"list": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": node}}
    value: dict[str, Any] = {"v": "x"}
    for _ in range(5):
        value = {"v": 1, "next": value}
    assert error_of(schema, {"list": value}) == "$.list.next.next.next.next.next.v: 'x' is not of type 'integer'"


@pytest.mark.parametrize("ref", ["http://127.0.0.1:9/x.json", "other.json", "#/$defs/None", "#/$defs/a", "#anchor"])
def test_a_reference_that_cannot_be_resolved_accepts_anything_and_fetches_nothing(ref: str) -> None:
    schema = {
        "$id": "http://127.0.0.1:9/root.json",
        "type": "object",
        "properties": {"x": {"$ref": ref}, "y": {"type": "integer"}},
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    }
    assert validate(schema, {"x": 1, "y": 1})
    assert error_of(schema, {"x": 1, "y": "a"}) == "$.y: 'a' is not of type 'integer'"


def test_references_are_resolved_from_the_root_in_spite_of_ids() -> None:
    part = {"$id": "https://example.com/part", "properties": {"x": {"$ref": "#/$defs/Int"}}}
    schema = {"type": "object", "properties": {"part": part}, "$defs": {"Int": {"type": "integer"}}}
    assert error_of(schema, {"part": {"x": "a"}}) == "$.part.x: 'a' is not of type 'integer'"


def test_an_invalid_schema_is_replaced_by_the_version_that_is_sent() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "any"}, "y": {"type": "integer"}}, "required": True}
    assert validate(schema, {"x": 1})
    assert error_of(schema, {"y": "a"}) == "$.y: 'a' is not of type 'integer'"


def test_a_pattern_that_python_cannot_compile_accepts_every_string() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": r"\p{L}"}}}
    assert validate(schema, {"x": "a"})
    assert error_of(schema, {"x": 1}) == "$.x: 1 is not of type 'string'"


def test_values_within_a_schema_are_not_read_as_schemas() -> None:
    schema = {"type": "object", "properties": {"x": {"const": {"$ref": "nowhere", "pattern": "["}}}}
    assert validate(schema, {"x": {"$ref": "nowhere", "pattern": "["}})


@pytest.mark.parametrize("name", KEYWORDS_AS_NAMES)
def test_a_parameter_may_have_the_name_of_a_keyword(name: str) -> None:
    schema = {
        "type": "object",
        "properties": {name: {"type": "array", "items": {"$ref": "#/$defs/Number"}}},
        "required": [name],
        "additionalProperties": False,
        "$defs": {"Number": {"type": "integer"}},
    }
    assert validate(schema, {name: [1]}) == {name: [1]}
    assert error_of(schema, {name: ["a"]}).endswith(": 'a' is not of type 'integer'")
    assert error_of(schema, {}) == f"$: {name!r} is a required property"
    nested = {"type": "object", "properties": {"outer": schema, "$defs": True}, "$defs": schema["$defs"]}
    assert validate(nested, {"outer": {name: [1]}})
    assert error_of(nested, {"outer": {name: ["a"]}}).endswith(": 'a' is not of type 'integer'")


@pytest.mark.parametrize("name", ["default", "const", "enum", "examples", "$schema"])
def test_a_reference_of_a_parameter_with_the_name_of_a_keyword_is_never_fetched(name: str) -> None:
    schema = {"type": "object", "properties": {name: {"$ref": "http://127.0.0.1:9/x.json"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert validate(schema, {name: 1}) == {name: 1}


@pytest.mark.parametrize("keyword", ["default", "examples", "const", "enum"])
def test_a_reference_in_data_is_not_followed(keyword: str) -> None:
    data = {"$ref": "http://127.0.0.1:9/x.json", "pattern": "["}
    part = {keyword: [data] if keyword in ("enum", "examples") else data}
    schema = {"type": "object", "properties": {"x": part}}
    assert validate(schema, {"x": data}) == {"x": data}
    if keyword in ("const", "enum"):
        assert error_of(schema, {"x": {}}).startswith("$.x: ")


def test_an_id_in_the_style_of_draft_4_does_not_change_where_references_lead() -> None:
    schema = {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "id": "http://example.com/root",
        "type": "object",
        "properties": {"id": {"id": "http://example.com/part", "allOf": [{"$ref": "#/definitions/Int"}]}},
        "definitions": {"Int": {"type": "integer"}},
    }
    assert error_of(schema, {"id": "a"}) == "$.id: 'a' is not of type 'integer'"


@given(SCHEMAS, st.dictionaries(st.sampled_from(["a", "b"]), st.none() | st.integers() | st.text(max_size=3)))
def test_validation_raises_only_value_errors_with_a_path(schema: dict[str, Any], arguments: dict[str, Any]) -> None:
    try:
        sent = simplify_parameters(schema)
    except ValueError:
        return
    try:
        assert build_validator(schema, sent)(coerce_to_schema(arguments, sent)) == coerce_to_schema(arguments, sent)
    except ValueError as exc:
        assert str(exc).startswith("$")  # noqa: PT017 - most examples raise nothing
