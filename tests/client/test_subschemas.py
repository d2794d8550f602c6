"""Walks through JSON schemas: keywords, names of parameters, and data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from lmbridge.client.subschemas import map_subschemas, references_in, resolve_reference, subschemas

KEYWORDS_AS_NAMES = [
    "$schema", "$id", "$ref", "$defs", "$dynamicRef", "definitions", "default", "const", "enum", "examples", "title",
    "description", "properties", "patternProperties", "additionalProperties", "items", "prefixItems", "type",
    "required", "anyOf", "oneOf", "allOf", "not", "if", "then", "else", "pattern", "format", "nullable", "minimum",
    "dependencies",
]  # fmt: skip
"""Names of parameters that are also keywords of JSON schema."""


@pytest.mark.parametrize("keyword", ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"])
@pytest.mark.parametrize("name", KEYWORDS_AS_NAMES)
def test_a_name_is_not_taken_for_a_keyword(keyword: str, name: str) -> None:
    schema = {keyword: {name: {"type": "string"}, "other": {"type": "integer"}}}
    assert subschemas(schema) == [{"type": "string"}, {"type": "integer"}]
    assert map_subschemas(schema, lambda _: {}) == {keyword: {name: {}, "other": {}}}


@pytest.mark.parametrize("keyword", ["const", "default", "enum", "examples"])
def test_data_is_not_taken_for_a_schema(keyword: str) -> None:
    value: Any = {"$ref": "#/x", "properties": {"a": {"$ref": "#/y"}}}
    schema = {keyword: [value] if keyword in ("enum", "examples") else value}
    assert subschemas(schema) == []
    assert map_subschemas(schema, lambda _: {}) == schema
    assert list(references_in(schema)) == []


@pytest.mark.parametrize(
    "keyword",
    ["items", "contains", "not", "if", "then", "else", "additionalProperties", "propertyNames", "unevaluatedItems"],
)
def test_the_schema_in_a_keyword_is_found(keyword: str) -> None:
    assert subschemas({keyword: {"type": "string"}}) == [{"type": "string"}]
    assert map_subschemas({keyword: True}, lambda _: {}) == {keyword: True}


@pytest.mark.parametrize("keyword", ["anyOf", "oneOf", "allOf", "prefixItems", "items"])
def test_the_schemas_in_a_list_are_found(keyword: str) -> None:
    assert subschemas({keyword: [{"type": "string"}, True, {}]}) == [{"type": "string"}, {}]


def test_references_are_found_at_any_depth_and_also_within_unknown_keywords() -> None:
    deep: dict[str, Any] = {"$ref": "#/deep"}
    for _ in range(5_000):
        deep = {"items": deep}
    schema = {
        "properties": {"$ref": {"$ref": "#/a"}, "b": {"anyOf": [{"$ref": "#/b"}, deep]}},
        "components": {"schemas": {"X": {"$ref": "#/c"}}},
        "$ref": {"type": "string"},
    }
    assert sorted(references_in(schema)) == ["#/a", "#/b", "#/c", "#/deep"]


def test_something_that_is_not_a_schema_in_the_place_of_one_is_kept() -> None:
    schema: Mapping[str, Any] = {"properties": None, "items": 5, "anyOf": "x", "dependencies": {"a": ["b"]}}
    assert map_subschemas(schema, lambda _: {}) == schema


def test_an_index_with_too_many_digits_leads_nowhere() -> None:
    assert resolve_reference({"anyOf": [1, 2]}, "#/anyOf/1") == 2
    assert resolve_reference({"anyOf": [1, 2]}, f"#/anyOf/{'1' * 5_000}") is None
