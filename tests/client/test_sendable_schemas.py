from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge.client.sendable_schemas import simplify_answer_schema, simplify_definition, simplify_parameters
from lmbridge.client.subschemas import resolve_reference
from tests.client.test_subschemas import KEYWORDS_AS_NAMES
from tests.support import assert_linear


def part(schema: Any, **root: Any) -> Any:
    """Returns the simplified schema of a parameter."""
    return simplify_parameters({"type": "object", "properties": {"x": schema}, **root})["properties"]["x"]


@pytest.mark.parametrize("schema", [{}, {"type": "object"}, {"properties": None}, {"type": "any"}, {"$schema": 5}])
def test_the_top_of_the_schema_is_an_object(schema: dict[str, Any]) -> None:
    assert simplify_parameters(schema) == {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    "schema", [{"type": "array"}, {"type": "string"}, {"anyOf": [{"type": "string"}, {"type": "null"}]}]
)
def test_parameters_that_are_not_an_object_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the schema is not that of an object"):
        simplify_parameters(schema)


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(2_000):
        schema = {"type": "object", "properties": {"x": schema}}
    with pytest.raises(ValueError, match="nested too deeply"):
        simplify_parameters(schema)


@pytest.mark.parametrize("place", ["$defs", "definitions"])
def test_references_are_replaced_by_their_targets(place: str) -> None:
    point = {"type": "object", "properties": {"x": {"type": "integer"}}, "title": "Point", "description": "A point."}
    sent = part({"$ref": f"#/{place}/Point", "description": "Where."}, **{place: {"Point": point}})
    assert sent == {"type": "object", "properties": {"x": {"type": "integer"}}, "description": "Where."}


def test_references_may_point_anywhere_in_the_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"$ref": "#/properties/a"}}}
    assert simplify_parameters(schema)["properties"]["b"] == {"type": "string"}
    assert part({"$ref": "#/$defs/a~1b~0%20c"}, **{"$defs": {"a/b~ c": {"type": "null"}}}) == {"type": "null"}
    assert part({"$ref": "#/$defs/x/anyOf/1"}, **{"$defs": {"x": {"anyOf": [{}, {"type": "null"}]}}}) == {
        "type": "null"
    }


@pytest.mark.parametrize(
    "ref", ["http://127.0.0.1:9/x.json", "other.json#/a", "#/$defs/None", "#anchor", "#/properties/x/5", "#/type/y", ""]
)
def test_references_without_a_target_accept_anything(ref: str) -> None:
    assert part({"$ref": ref}) == {}


def test_a_recursive_type_is_written_out_twice() -> None:
    node = {"type": "object", "properties": {"value": {}, "next": {"$ref": "#/$defs/Node"}}}
    once = {"type": "object", "properties": {"value": {}, "next": {"type": "object"}}}
    twice = {"type": "object", "properties": {"value": {}, "next": once}}
    assert part({"$ref": "#/$defs/Node"}, **{"$defs": {"Node": node}}) == twice
    assert simplify_parameters(node | {"$defs": {"Node": node}})["properties"]["next"] == twice
    assert "$ref" not in json.dumps(simplify_parameters({"properties": {"child": {"$ref": "#"}}}))


@pytest.mark.parametrize("name", KEYWORDS_AS_NAMES)
def test_a_parameter_may_have_the_name_of_a_keyword(name: str) -> None:
    schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
    assert simplify_parameters(schema) == schema
    assert part(schema) == schema
    assert part({"$ref": "#/$defs/Odd"}, **{"$defs": {"Odd": schema}}) == schema
    assert simplify_answer_schema(schema) == {**schema, "additionalProperties": False}


def test_a_reference_in_data_is_kept() -> None:
    data = {"$ref": "#/$defs/Node"}
    schema = {"type": "object", "default": data, "examples": [data]}
    assert part(schema, **{"$defs": {"Node": {"type": "integer"}}}) == schema
    assert part({"const": data}) == {"enum": [data]}
    node = {"type": "object", "properties": {"x": {"default": data, "type": "object"}}}
    sent = simplify_answer_schema({"$ref": "#/$defs/Node", "$defs": {"Node": node}})
    assert "$defs" not in sent


def test_the_time_for_many_branches_is_linear() -> None:
    def simplify(size: int) -> None:
        branches = [{"properties": {"x": {"const": number}}} for number in range(size)]
        simplify_parameters({"type": "object", "allOf": branches})

    assert_linear(simplify, 250)


def test_circular_references_accept_anything() -> None:
    assert part({"$ref": "#/$defs/a"}, **{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}) == {}


def test_references_that_multiply_are_limited() -> None:
    names = [f"n{number}" for number in range(40)]
    definitions: dict[str, Any] = {
        name: {"type": "object", "properties": {each: {"$ref": f"#/$defs/{following}"} for each in "ab"}}
        for name, following in zip(names, [*names[1:], "n0"], strict=True)
    }
    sent = part({"$ref": "#/$defs/n0"}, **{"$defs": definitions})
    assert 1_000 < len(json.dumps(sent)) < 500_000


def test_keywords_that_some_server_refuses_are_left_out() -> None:
    assert part(
        {
            "$id": "x",
            "$schema": "y",
            "$comment": "z",
            "title": "X",
            "type": "string",
            "format": "email",
            "pattern": r"\d",
            "not": {},
            "if": {},
            "then": {},
            "propertyNames": {},
            "x-order": 1,
            "default": None,
            "nullable": True,
            "maxLength": 10_000,
        }
    ) == {"type": "string"}
    known = {"type": "string", "format": "date", "pattern": "^a$", "maxLength": 10, "default": "a", "examples": ["b"]}
    assert part(known) == known


@pytest.mark.parametrize(
    ("schema", "sent"),
    [
        (True, {}),
        ({"const": 1}, {"enum": [1]}),
        ({"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        (
            {"type": ["integer", "null", "any"], "minimum": 0, "description": "How many."},
            {"description": "How many.", "anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
        ),
        ({"type": ["string"]}, {"type": "string"}),
        ({"type": ["string", "null"], "enum": ["a", None]}, {"enum": ["a", None]}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        ({"oneOf": [{"type": "string"}, True, False, 5]}, {"anyOf": [{"type": "string"}, {}]}),
        ({"type": "any"}, {}),
        ({"type": "string", "enum": []}, {"type": "string"}),
        ({"type": "integer", "enum": list(range(1000))}, {"type": "integer"}),
        ({"type": "object", "properties": None}, {"type": "object", "properties": {}}),
        ({"type": "object", "additionalProperties": {}}, {"type": "object", "additionalProperties": True}),
        (
            {"type": "object", "additionalProperties": {"type": ["string"]}},
            {"type": "object", "additionalProperties": {"type": "string"}},
        ),
        ({"type": "object", "additionalProperties": False}, {"type": "object", "additionalProperties": False}),
        ({"type": "object", "properties": {"a": False, "b": {}}}, {"type": "object", "properties": {"b": {}}}),
        (
            {"type": "object", "properties": {"a": {}}, "required": ["a", "b", 1]},
            {"type": "object", "properties": {"a": {}}, "required": ["a"]},
        ),
        ({"type": "string", "required": True}, {"type": "string"}),
        ({"type": "array", "items": {"const": 1}}, {"type": "array", "items": {"enum": [1]}}),
        ({"type": "array", "items": [{"type": "string"}]}, {"type": "array"}),
        ({"type": "array", "prefixItems": [{}], "items": False}, {"type": "array", "prefixItems": [{}]}),
        ({"type": "number", "minimum": 0, "exclusiveMinimum": True}, {"type": "number", "minimum": 0}),
        (
            {"type": "object", "properties": {"$ref": {"type": "string"}}},
            {"type": "object", "properties": {"$ref": {"type": "string"}}},
        ),
    ],
)
def test_parts_are_rewritten_so_that_every_server_accepts_them(schema: Any, sent: Any) -> None:
    assert part(schema) == sent


def test_all_of_is_merged_into_one_part() -> None:
    named = {"allOf": [{"$ref": "#/$defs/Kind"}], "description": "Which.", "default": "a"}
    assert part(named, **{"$defs": {"Kind": {"enum": ["a", "b"], "title": "Kind"}}}) == {
        "enum": ["a", "b"],
        "description": "Which.",
        "default": "a",
    }
    first = {"properties": {"a": {}}, "required": ["a"], "additionalProperties": False}
    second = {"properties": {"b": {}}, "required": ["b", "a"]}
    assert simplify_parameters({"type": "object", "allOf": [first, second]}) == {
        "type": "object",
        "properties": {"a": {}, "b": {}},
        "required": ["a", "b"],
    }


@pytest.mark.parametrize("value", [object(), {1, 2}, "\ud83d", b"a", 1j, float("nan"), 2**70, {(1, 2): 3}])
@pytest.mark.parametrize("keyword", ["allOf", "anyOf"])
def test_parts_may_have_defaults_that_json_does_not_have(value: Any, keyword: str) -> None:
    parts = [{"type": "object", "properties": {"a": {"type": "string", "default": value}}} for _ in range(2)]
    parts.append({"type": "object", "properties": {"a": {"type": "integer"}}})
    schema = simplify_parameters({"type": "object", keyword: parts})
    first, second = schema["properties"]["a"]["anyOf"]
    assert (first["type"], second["type"]) == ("string", "integer")


def test_alternatives_at_the_top_are_merged_into_one_object() -> None:
    circle = {"type": "object", "properties": {"kind": {"const": "circle"}, "r": {}}, "required": ["kind", "r"]}
    square = {"type": "object", "properties": {"kind": {"const": "square"}, "a": {}}, "required": ["kind", "a"]}
    assert simplify_parameters({"oneOf": [circle, square, {"type": "null"}], "description": "A shape."}) == {
        "type": "object",
        "properties": {"kind": {"anyOf": [{"enum": ["circle"]}, {"enum": ["square"]}]}, "r": {}, "a": {}},
        "description": "A shape.",
        "required": ["kind"],
    }


def test_additional_properties_are_kept() -> None:
    assert part({"type": "object", "properties": {"a": {}}}) == {"type": "object", "properties": {"a": {}}}


def test_a_definition_has_its_keywords_in_the_order_of_examples_and_a_type_for_each_enum_of_texts() -> None:
    schema = {
        "additionalProperties": False,
        "required": ["unit"],
        "properties": {
            "unit": {"description": "Of what.", "enum": ["C", "F"], "default": "C"},
            "places": {"items": {"description": "A name.", "type": "string"}, "type": "array"},
            "level": {"enum": [1, "high"]},
        },
        "type": "object",
    }
    wanted = {
        "type": "object",
        "properties": {
            "unit": {"type": "string", "enum": ["C", "F"], "description": "Of what.", "default": "C"},
            "places": {"type": "array", "items": {"type": "string", "description": "A name."}},
            "level": {"enum": [1, "high"]},
        },
        "required": ["unit"],
        "additionalProperties": False,
    }
    assert json.dumps(simplify_definition(schema)) == json.dumps(wanted)


@pytest.mark.parametrize(
    ("part", "defined"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}, {"type": "string"}),
        ({"type": ["integer", "null"], "minimum": 0, "default": None}, {"type": "integer", "minimum": 0}),
        ({"$ref": "#/$defs/a", "default": None}, {"type": "string"}),
        (
            {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}], "default": None},
            {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        ),
        ({"type": "null", "default": None}, {"type": "null"}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        (
            {"anyOf": [{"type": "string"}, {"type": "null"}], "default": "a"},
            {"anyOf": [{"type": "string"}, {"type": "null"}], "default": "a"},
        ),
    ],
)
def test_a_definition_does_not_mention_null_where_it_is_the_default(
    part: dict[str, Any], defined: dict[str, Any]
) -> None:
    schema = {"properties": {"a": part}, "$defs": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
    assert simplify_definition(schema)["properties"]["a"] == defined
    # A parameter that must not be left out may have to be null.
    required = {**schema, "required": ["a"]}
    assert simplify_definition(required)["properties"]["a"] == simplify_parameters(required)["properties"]["a"]


def test_the_original_is_not_changed() -> None:
    schema = {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"x": {"const": 1}}}}}
    before = json.dumps(schema)
    simplify_parameters(schema)
    assert json.dumps(schema) == before


def test_a_reference_without_a_target_resolves_to_none() -> None:
    root = {"$defs": {"A": {"type": "null"}}}
    assert resolve_reference(root, "#/$defs/A") == {"type": "null"}
    assert resolve_reference(root, "#") == root
    assert resolve_reference(root, "#A") is None


_KEYWORDS = [
    "$ref", "$defs", "definitions", "type", "properties", "required", "items", "prefixItems", "anyOf", "oneOf", "allOf",
    "not", "enum", "const", "additionalProperties", "minimum", "exclusiveMinimum", "maxLength", "multipleOf", "pattern",
    "format", "description", "default", "title", "$schema", "$id",
]  # fmt: skip
_TEXTS = ["#", "#/$defs/a", "#/definitions/a", "#/properties/a", "http://x/y", "object", "string", "any", "^a$", "["]
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.floats(allow_nan=False) | st.sampled_from(_TEXTS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2)
        | st.dictionaries(st.sampled_from(_KEYWORDS), inner, max_size=4)
    ),
    max_leaves=25,
)
SCHEMAS = st.dictionaries(st.sampled_from(_KEYWORDS), _VALUES, max_size=6)
"""Schemas, and dicts that merely look like one."""


@given(SCHEMAS)
def test_every_schema_becomes_a_valid_schema_of_an_object_or_is_refused(schema: dict[str, Any]) -> None:
    try:
        sent = simplify_parameters(schema)
    except ValueError as exc:
        assert str(exc) == "the schema is not that of an object"  # noqa: PT017 - it need not be raised
        return
    assert sent["type"] == "object"
    jsonschema.Draft202012Validator.check_schema(sent)
    assert simplify_parameters(sent) == sent
    definition = simplify_definition(schema)
    jsonschema.Draft202012Validator.check_schema(definition)
    assert simplify_definition(definition) == definition
