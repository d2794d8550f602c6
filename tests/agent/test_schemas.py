from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge.agent.schemas import coerced, validator
from lmbridge.client.schemas import digestible_parameters
from tests.client.test_schemas import SCHEMAS


def check(schema: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    return validator(schema, digestible_parameters(schema))(arguments)


def wrong(schema: dict[str, Any], arguments: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"^\$") as caught:
        check(schema, arguments)
    return str(caught.value)


# Coercion


@pytest.mark.parametrize(
    ("schema", "value", "meant"),
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
def test_a_text_is_what_it_spells_where_no_text_is_taken(schema: Any, value: Any, meant: Any) -> None:
    made = coerced(value, schema)
    assert made == meant
    assert type(made) is type(meant)


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
def test_everything_else_stays(schema: Any, value: Any) -> None:
    made = coerced(value, schema)
    assert made == value
    assert type(made) is type(value)


def test_coercion_does_not_change_what_it_is_given() -> None:
    value = {"a": ["1"]}
    schema = {"properties": {"a": {"items": {"type": "integer"}}}}
    assert coerced(value, schema) == {"a": [1]}
    assert value == {"a": ["1"]}


# Validation

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}


def test_arguments_that_fit_are_passed() -> None:
    assert check(CITY, {"city": "Ulm", "days": 2, "more": None}) == {"city": "Ulm", "days": 2, "more": None}


def test_all_faults_are_told_with_their_places() -> None:
    assert wrong(CITY, {"days": "two"}) == "$: 'city' is a required property; $.days: 'two' is not of type 'integer'"
    nested = {"type": "object", "properties": {"to": {"type": "array", "items": {"enum": ["a", "b"]}}}}
    assert wrong(nested, {"to": ["a", "c"]}) == "$.to[1]: 'c' is not one of ['a', 'b']"


def test_many_faults_are_told_in_part() -> None:
    schema = {"type": "object", "additionalProperties": {"type": "integer"}}
    told = wrong(schema, dict.fromkeys("abcdef", "x" * 5_000))
    assert told.endswith("; 3 more")
    assert len(told) < 2_000


def test_of_alternatives_it_is_told_why_each_does_not_fit() -> None:
    schema = {"type": "object", "properties": {"x": {"anyOf": [{"type": "integer"}, {"required": ["y"]}]}}}
    assert check(schema, {"x": 1})
    schema["properties"]["x"]["anyOf"][1]["type"] = "object"  # type: ignore[index]  # a literal of many types
    assert wrong(schema, {"x": "a"}).startswith(
        "$.x: no alternative fits ($.x: 'a' is not of type 'integer' or $.x: 'a'"
    )


def test_the_original_judges_not_what_was_sent() -> None:
    schema = {"type": "object", "properties": {"id": {"type": "string", "pattern": r"^\d+$", "not": {"const": "0"}}}}
    assert digestible_parameters(schema)["properties"] == {"id": {"type": "string"}}
    assert check(schema, {"id": "12"})
    assert "does not match" in wrong(schema, {"id": "a"})
    assert "should not be valid" in wrong(schema, {"id": "0"})


def test_a_schema_is_read_by_its_own_draft() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "array", "items": [{"type": "integer"}]}}}
    assert "is not of type" in wrong({"$schema": "http://json-schema.org/draft-07/schema#", **schema}, {"x": ["a"]})
    old = {"type": "object", "properties": {"n": {"type": "number", "minimum": 0, "exclusiveMinimum": True}}}
    assert wrong({"$schema": "http://json-schema.org/draft-04/schema#", **old}, {"n": 0})


@pytest.mark.parametrize("draft", ["https://example.com/nobody-knows-it", 5, None])
def test_an_unknown_draft_is_the_newest(draft: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wrong({"$schema": draft, **CITY}, {}) == "$: 'city' is a required property"


def test_recursion_is_followed_to_the_end() -> None:
    node = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/Node"}}}
    schema = {"type": "object", "properties": {"list": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": node}}
    value: dict[str, Any] = {"v": "x"}
    for _ in range(5):
        value = {"v": 1, "next": value}
    assert wrong(schema, {"list": value}) == "$.list.next.next.next.next.next.v: 'x' is not of type 'integer'"


@pytest.mark.parametrize("ref", ["http://127.0.0.1:9/x.json", "other.json", "#/$defs/None", "#/$defs/a", "#anchor"])
def test_nothing_is_fetched_and_what_leads_nowhere_is_anything(ref: str) -> None:
    schema = {
        "$id": "http://127.0.0.1:9/root.json",
        "type": "object",
        "properties": {"x": {"$ref": ref}, "y": {"type": "integer"}},
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    }
    assert check(schema, {"x": 1, "y": 1})
    assert wrong(schema, {"x": 1, "y": "a"}) == "$.y: 'a' is not of type 'integer'"


def test_references_start_from_the_whole_schema_whatever_ids_there_are() -> None:
    part = {"$id": "https://example.com/part", "properties": {"x": {"$ref": "#/$defs/Int"}}}
    schema = {"type": "object", "properties": {"part": part}, "$defs": {"Int": {"type": "integer"}}}
    assert wrong(schema, {"part": {"x": "a"}}) == "$.part.x: 'a' is not of type 'integer'"


def test_what_is_no_schema_is_judged_by_what_was_sent() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "any"}, "y": {"type": "integer"}}, "required": True}
    assert check(schema, {"x": 1})
    assert wrong(schema, {"y": "a"}) == "$.y: 'a' is not of type 'integer'"


def test_a_pattern_that_python_cannot_read_lets_everything_through() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": r"\p{L}"}}}
    assert check(schema, {"x": "a"})
    assert wrong(schema, {"x": 1}) == "$.x: 1 is not of type 'string'"


def test_values_in_a_schema_are_no_schemas() -> None:
    schema = {"type": "object", "properties": {"x": {"const": {"$ref": "nowhere", "pattern": "["}}}}
    assert check(schema, {"x": {"$ref": "nowhere", "pattern": "["}})


@given(SCHEMAS, st.dictionaries(st.sampled_from(["a", "b"]), st.none() | st.integers() | st.text(max_size=3)))
def test_no_schema_makes_validation_fail_in_another_way(schema: dict[str, Any], arguments: dict[str, Any]) -> None:
    try:
        sent = digestible_parameters(schema)
    except ValueError:
        return
    try:
        assert validator(schema, sent)(coerced(arguments, sent)) == coerced(arguments, sent)
    except ValueError as exc:
        assert str(exc).startswith("$")  # noqa: PT017 - it need not be raised
