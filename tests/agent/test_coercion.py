"""Coercion of arguments to the types that a schema asks for."""

from __future__ import annotations

from typing import Any

import pytest

from lmbridge.agent.coercion import Coercer
from tests.support import assert_linear


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
        ({"enum": [1, 2.5]}, "2.5", 2.5),
        ({"const": 3}, "3", 3),
        ({"type": "integer", "enum": [1, 2]}, "2", 2),
        ({"type": ["integer", "null"]}, "5", 5),
        ({"type": ["boolean", "integer"]}, "5", 5),
        ({"type": ["boolean", "integer"]}, "true", True),
        ({"type": ["array", "object"]}, "[1]", [1]),
        ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, "5", 5),
        ({"type": ["integer", "null"]}, "null", None),
        ({"allOf": [{"type": "integer"}, {"minimum": 1}]}, "5", 5),
        ({"allOf": [{"type": "number"}, {"type": "integer"}]}, "5", 5),
        ({"$ref": "#/$defs/Count", "$defs": {"Count": {"type": "integer"}}}, "5", 5),
        ({"type": "number", "anyOf": [{"minimum": 1}, {"maximum": 0}]}, "5", 5),
        ({"type": "array", "items": {"type": "integer"}}, '["1", 2]', [1, 2]),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": "1", "b": "2"}, {"a": 1, "b": "2"}),
        ({"type": "object", "additionalProperties": {"type": "boolean"}}, {"a": "true"}, {"a": True}),
    ],
)
def test_a_string_is_decoded_where_the_schema_accepts_no_string(schema: Any, value: Any, expected: Any) -> None:
    coerced = Coercer(schema).coerce(value)
    assert coerced == expected
    assert type(coerced) is type(expected)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, "5"),
        ({"type": "string"}, True),
        ({"type": "string"}, None),
        ({"type": "string"}, [1]),
        ({"type": ["string", "number"]}, 5),
        ({"type": ["string", "boolean"]}, 1),
        ({"type": ["string", "boolean"]}, "true"),
        ({"type": ["array", "boolean"]}, "yes"),
        ({"enum": ["a", "b"]}, 1),
        ({"enum": [1, 2]}, "3"),
        ({"enum": [True]}, "1"),
        ({"enum": [True]}, 1),
        ({"const": 1}, True),
        (False, "5"),
        ({"$ref": "#/$defs/Unknown"}, "5"),
        ({"$ref": "http://127.0.0.1:9/x.json"}, "5"),
        ({"$ref": "#/$defs/Loop", "$defs": {"Loop": {"$ref": "#/$defs/Loop"}}}, "5"),
        ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "5"),
        ({"anyOf": [{"type": "integer"}, {}]}, "5"),
        ({"type": "array", "items": [{"type": "string"}]}, ["5", "5"]),
        ({"prefixItems": [{"type": "string"}]}, ["5", "5"]),
        ({"properties": {"a": {"type": "integer", "default": 5}}, "required": ["a"]}, {"a": ""}),
        ({"properties": {"a": {"type": "integer"}}}, {"a": ""}),
        ({"properties": {"a": {"type": "string", "default": "x"}}}, {"a": ""}),
        ({"properties": {"a": {"type": "string", "default": "x"}}}, {"a": "null"}),
        ({"properties": {"a": {"type": ["integer", "null"], "default": 5}}}, {"a": None}),
        ({"properties": {"a": {"enum": ["", "x"], "default": "x"}}}, {"a": ""}),
        ({"properties": {"a": {"default": 5}}}, {"a": None}),
        ({"properties": {"a": {"type": "integer", "default": 5}}}, {"a": "none"}),
        ({"type": "string"}, "true"),
        ({"type": "string"}, '{"a": 1}'),
        ({}, "5"),
        (True, "5"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5"),
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
        ({"type": "array"}, "1, 2"),
        ({"type": "array"}, '{"a": 1}'),
        ({"type": "array"}, "a"),
        ({"type": "object"}, "[1]"),
        ({"type": "object"}, "{'a': 1}"),
        ({"type": "object"}, "[" * 100_000),
    ],
)
def test_every_other_value_is_unchanged(schema: Any, value: Any) -> None:
    coerced = Coercer(schema).coerce(value)
    assert coerced == value
    assert type(coerced) is type(value)


def test_coercion_does_not_modify_its_input() -> None:
    value = {"a": ["1"]}
    schema = {"properties": {"a": {"items": {"type": "integer"}}}}
    assert Coercer(schema).coerce(value) == {"a": [1]}
    assert value == {"a": ["1"]}


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": "string"}, 1, "1"),
        ({"type": "string"}, -5, "-5"),
        ({"type": "string"}, 12345678901234567890123, "12345678901234567890123"),
        ({"type": "string"}, 2.5, "2.5"),
        ({"type": ["string", "null"]}, 1, "1"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, 1, "1"),
        ({"type": ["string", "array"]}, 1, "1"),
        ({"enum": ["1", "2"]}, 1, "1"),
        ({"type": "string", "enum": ["1", "2"]}, 2, "2"),
        ({"type": "array", "items": {"type": "string"}}, [1, "a"], ["1", "a"]),
        ({"properties": {"id": {"type": "string"}}}, {"id": 7}, {"id": "7"}),
    ],
)
def test_a_number_becomes_a_text_where_only_a_text_is_accepted(schema: Any, value: Any, expected: Any) -> None:
    assert Coercer(schema).coerce(value) == expected


def test_a_number_that_was_written_in_another_way_does_not_become_a_text() -> None:
    coercer = Coercer({"type": "object", "additionalProperties": {"type": "string"}})
    assert coercer.coerce({"version": 3.1}, inexact={3.1}) == {"version": 3.1}
    assert coercer.coerce({"version": 3.1}) == {"version": "3.1"}


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"prefixItems": [{"type": "integer"}, {"type": "string"}]}, ["1", 2], [1, "2"]),
        ({"prefixItems": [{"type": "integer"}], "items": {"type": "boolean"}}, ["1", "true"], [1, True]),
        ({"items": [{"type": "integer"}], "additionalItems": {"type": "boolean"}}, ["1", "true"], [1, True]),
        ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}, "[1, 2]", [1, "2"]),
        ({"items": {"items": {"type": "integer"}}}, [["1"], "a"], [[1], "a"]),
        ({"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]}, ["1"], [1]),
    ],
)
def test_items_are_coerced_place_by_place(schema: Any, value: Any, expected: Any) -> None:
    assert Coercer(schema).coerce(value) == expected


CIRCLE = {"type": "object", "properties": {"kind": {"const": "circle"}, "size": {"type": "integer"}}}
LABEL = {"type": "object", "properties": {"kind": {"const": "label"}, "size": {"type": "string"}}}
NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}}},
}


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"oneOf": [CIRCLE, LABEL]}, {"kind": "circle", "size": "5"}, {"kind": "circle", "size": 5}),
        ({"oneOf": [CIRCLE, LABEL]}, {"kind": "label", "size": 5}, {"kind": "label", "size": "5"}),
        ({"oneOf": [CIRCLE, LABEL]}, {"size": "5"}, {"size": "5"}),
        ({"anyOf": [CIRCLE, {"type": "null"}]}, '{"kind": "circle", "size": "5"}', {"kind": "circle", "size": 5}),
        ({"allOf": [CIRCLE, {"properties": {"x": {"type": "number"}}}]}, {"size": "5", "x": "1"}, {"size": 5, "x": 1}),
        ({"allOf": [CIRCLE, {"properties": {"size": {"minimum": 1}}}]}, {"size": "5"}, {"size": 5}),
        ({"patternProperties": {"^n_": {"type": "integer"}}}, {"n_a": "5", "b": "5"}, {"n_a": 5, "b": "5"}),
        (
            {**NODE, "$defs": {"Node": NODE}},
            {"children": [{"children": [{"children": [{"children": [{"value": "5"}]}]}]}]},
            {"children": [{"children": [{"children": [{"children": [{"value": 5}]}]}]}]},
        ),
        (
            {"properties": {"$ref": {"type": "integer"}, "properties": {"type": "integer"}}},
            {"$ref": "1", "properties": "2"},
            {"$ref": 1, "properties": 2},
        ),
    ],
)
def test_objects_are_coerced_by_the_alternatives_that_they_may_be(schema: Any, value: Any, expected: Any) -> None:
    assert Coercer(schema).coerce(value) == expected


@pytest.mark.parametrize("value", [None, "", "null", " ", " null "])
@pytest.mark.parametrize(
    "part",
    [
        {"type": "integer"},
        {"type": "boolean"},
        {"type": "array", "items": {"type": "string"}},
        {"enum": ["a", "b"]},
        {"type": "string", "enum": ["a", "b"]},
        {"type": "string", "format": "date"},
        {"type": "string", "minLength": 10},
        {"type": "string", "pattern": "^[0-9]+$"},
        {"anyOf": [{"type": "integer"}, {"type": "array"}]},
        {"$ref": "#/$defs/Count"},
    ],
)
def test_a_blank_value_of_an_optional_parameter_with_a_default_is_left_out(part: Any, value: Any) -> None:
    schema = {"properties": {"a": {**part, "default": 1}, "b": {}}, "$defs": {"Count": {"type": "integer"}}}
    assert Coercer(schema).coerce({"a": value, "b": value}) == {"b": value}
    nested = {"properties": {"outer": schema}, "$defs": schema["$defs"]}
    assert Coercer(nested).coerce({"outer": {"a": value}}) == {"outer": {}}


def test_null_for_an_optional_text_with_a_default_is_left_out() -> None:
    schema = {"properties": {"a": {"type": "string", "default": "x"}}}
    assert Coercer(schema).coerce({"a": None}) == {}


@pytest.mark.parametrize("count", [2, 65])
def test_a_schema_with_too_many_alternatives_leaves_values_as_they_are(count: int) -> None:
    schema: Any = {"anyOf": [{"type": "integer", "minimum": number} for number in range(count)]}
    assert Coercer(schema).coerce("5") == (5 if count == 2 else "5")
    for _ in range(40):
        schema = {"anyOf": [schema, schema], "allOf": [schema]}
    assert Coercer(schema).coerce("5") == "5"


def test_the_time_of_coercion_is_linear() -> None:
    coercer = Coercer({"type": "object", "additionalProperties": {"items": {"type": ["integer", "null"]}}})
    assert_linear(lambda size: coercer.coerce({"a": ["1"] * size, "b": "[1]" * size}), 300)


def test_the_parts_of_one_schema_do_not_count_for_another() -> None:
    class InterruptedSchema(dict[str, Any]):
        """A schema whose reading is interrupted by that of another schema, as a thread may do it."""

        def get(self, key: str, default: Any = None) -> Any:
            coercer.coerce({"b": 1})
            return super().get(key, default)

    half: dict[str, Any] = {"allOf": [{}] * 600}
    interrupted = {"allOf": [half, InterruptedSchema(type="integer"), half]}
    coercer = Coercer({"properties": {"a": interrupted, "b": {"type": "integer"}}})
    assert coercer.coerce({"a": "5"}) == {"a": "5"}
