"""Arguments of tool calls against JSON schemas: validation, its error texts, and its limits."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft3Validator, Draft7Validator, Draft202012Validator

from lmbridge.agent.argument_checks import build_validator
from lmbridge.agent.coercion import Coercer
from lmbridge.agent.schema_check_limit import StepLimit, StepLimitError
from lmbridge.client.sendable_schemas import simplify_parameters
from tests.client.test_sendable_schemas import SCHEMAS
from tests.client.test_subschemas import KEYWORDS_AS_NAMES
from tests.support import assert_linear


def validate(schema: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    return build_validator(schema, simplify_parameters(schema))(arguments)


def error_of(schema: dict[str, Any], arguments: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"^\$") as caught:
        validate(schema, arguments)
    return str(caught.value)


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


@pytest.mark.parametrize("draft", ["https://example.com/unknown-draft", "http://[bad", 5, None])
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


# Schemas and values that would take for ever

EVIL = "^(a+)+$"


@pytest.mark.parametrize("draft", ["draft-04", "draft-06", "draft-07", "2019-09", "2020-12"])
@pytest.mark.parametrize(
    ("keywords", "good", "bad"),
    [
        ({"properties": {"x": {"type": "string", "pattern": EVIL}}}, {"x": "aaa"}, {"x": "a" * 500 + "!"}),
        ({"patternProperties": {EVIL: {"type": "integer"}}}, {"a" * 500 + "!": "x", "a": 1}, {"aa": "x"}),
        (
            {"patternProperties": {EVIL: {}}, "additionalProperties": False},
            {"aaa": 1},
            {"a" * 500 + "!": 1},
        ),
        (
            {"patternProperties": {EVIL: {}}, "additionalProperties": {"type": "integer"}},
            {"aaa": "x", "b": 1},
            {"a" * 500 + "!": "x"},
        ),
        (
            {"properties": {"x": {"allOf": [{"not": {"pattern": EVIL}}]}}},
            {"x": "a" * 500 + "!"},
            {"x": "aaa"},
        ),
    ],
)
def test_a_pattern_that_re_would_never_finish_is_checked(keywords: Any, good: Any, bad: Any, draft: str) -> None:
    place = f"draft/{draft}" if draft.startswith("20") else draft
    schema = {"$schema": f"http://json-schema.org/{place}/schema#", "type": "object", **keywords}
    if draft.startswith("20"):
        schema["$schema"] = f"https://json-schema.org/draft/{draft}/schema"
    assert validate(schema, good) == good
    assert error_of(schema, bad)


def test_a_draft_that_is_named_within_a_schema_does_not_bring_back_re() -> None:
    part = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "string", "pattern": EVIL}
    schema = {"$schema": part["$schema"], "type": "object", "properties": {"x": part, "again": {"$ref": "#"}}}
    assert error_of(schema, {"x": "a" * 500 + "!"})
    assert error_of(schema, {"again": {"x": "a" * 500 + "!"}})


def test_unevaluated_properties_are_not_checked_beside_patterns() -> None:
    schema = {"type": "object", "unevaluatedProperties": False, "properties": {"a": {}}}
    assert error_of(schema, {"b": 1})
    assert validate({**schema, "allOf": [{"patternProperties": {EVIL: {}}}]}, {"a" * 500 + "!": 1})


@pytest.mark.parametrize("pattern", [r"(a)\1", "a{99999999999999999999}", "(" * 2_000, "(?<=a)b", "[", "*"])
def test_a_pattern_that_is_not_supported_accepts_everything_and_is_logged(
    pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": pattern}}}
    assert validate(schema, {"x": "anything"})
    assert error_of(schema, {"x": 1})
    assert any(record.getMessage().startswith("a pattern in the schema") for record in caplog.records)
    names = {
        "type": "object",
        "patternProperties": {pattern: {"type": "integer"}},
        "properties": {"y": {"type": "string"}},
    }
    assert validate(names, {"x": "anything"})
    assert error_of(names, {"y": 1})


@pytest.mark.parametrize(
    "items", [[1, 2], [1, True], [0, False], [{"a": 1}, {"a": True}], [[1], 1], [None, ""], [{}, []]]
)
def test_different_items_are_unique(items: list[Any]) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    assert validate(schema, {"x": items})
    for each in items:
        assert error_of(schema, {"x": [*items, each]}).endswith("has non-unique elements")
    assert error_of(schema, {"x": [{"a": 1, "b": [2]}, {"b": [2.0], "a": 1}]})


@pytest.mark.parametrize(
    ("part", "value_of"),
    [
        ({"type": "array", "uniqueItems": True}, lambda size: [{"a": number} for number in range(size)]),
        ({"type": "array", "items": {"type": "integer"}}, lambda size: list(range(size))),
        ({"type": "array", "items": {"type": "integer"}}, lambda size: ["x"] * size),
        ({"anyOf": [{"items": {"type": "integer"}}, {"type": "string"}]}, lambda size: ["x"] * size),
        ({"additionalProperties": {"type": "integer"}}, lambda size: {str(number): "x" for number in range(size)}),
        ({"type": "string", "pattern": r"\\s+$"}, lambda size: " " * 20 * size + "x"),
        ({"enum": ["a"]}, lambda size: ["x"] * size),
    ],
)
def test_the_time_of_validation_is_linear(part: Any, value_of: Any) -> None:
    schema = {"type": "object", "properties": {"x": part}}
    validator = build_validator(schema, simplify_parameters(schema))

    def run(size: int) -> None:
        with contextlib.suppress(ValueError):
            validator({"x": value_of(size)})

    assert_linear(run, 150)


def test_work_that_multiplies_ends_at_the_limit() -> None:
    definitions: dict[str, Any] = {"n0": {"type": "integer"}}
    for number in range(1, 40):
        definitions[f"n{number}"] = {"anyOf": [{"$ref": f"#/$defs/n{number - 1}"}, {"$ref": f"#/$defs/n{number - 1}"}]}
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/n39"}}, "$defs": definitions}
    validator = build_validator(schema, simplify_parameters(schema))
    with StepLimit(20_000), pytest.raises(StepLimitError):
        validator({"x": "a"})
    with StepLimit(20_000):
        assert validator({"x": 1})


@pytest.mark.parametrize("keyword", ["allOf", "anyOf", "oneOf"])
def test_a_schema_that_refers_to_itself_without_end_is_replaced_by_the_version_that_is_sent(keyword: str) -> None:
    loop = {keyword: [{"$ref": "#/$defs/Loop"}]}
    schema = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/Loop"}, "y": {"type": "integer"}},
        "$defs": {"Loop": loop},
    }
    assert validate(schema, {"x": 1, "y": 1})
    assert error_of(schema, {"x": 1, "y": "a"}) == "$.y: 'a' is not of type 'integer'"


def test_a_schema_that_is_too_deep_or_too_large_is_replaced_by_the_version_that_is_sent(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep: dict[str, Any] = {}
    for _ in range(2_000):
        deep = {"not": deep}
    schema = {"type": "object", "properties": {"y": {"type": "integer"}}, "$defs": {"deep": deep}}
    assert error_of(schema, {"y": "a"}) == "$.y: 'a' is not of type 'integer'"
    assert "the schema of a tool is invalid or too large" in caplog.text
    monkeypatch.setattr("lmbridge.agent.argument_checks.STEPS_FOR_SCHEMA", 100)
    assert error_of({**CITY, "required": ["days"]}, {}) == "$: 'days' is a required property"


def test_a_long_chain_of_references_is_not_followed_to_its_end() -> None:
    chain: dict[str, Any] = {f"n{number}": {"$ref": f"#/$defs/n{number + 1}"} for number in range(300)}
    schema = {"type": "object", "properties": {"y": {"type": "integer"}}, "$defs": {**chain, "n300": {}}}
    assert error_of(schema, {"y": "a"}) == "$.y: 'a' is not of type 'integer'"


# Schemas that are not valid

KEYWORDS = sorted(
    {"$id", "id", "$schema", "$ref", "$defs", "definitions", "$anchor", "$dynamicAnchor", "$dynamicRef", "$vocabulary"}
    | {name for draft in (Draft3Validator, Draft7Validator, Draft202012Validator) for name in draft.VALIDATORS}
)
WRONG_VALUES: list[Any] = [
    *(None, True, 4, 10**400, "x", "http://[bad", "#", "("),
    *([], [4], [[]], ["x"], [{"$ref": 5}]),
    *({}, {"a": 4}, {"a": {"$ref": 5}}, {"a": {"$id": 4}}, {"(": {}}, {"a": {"$schema": "http://[bad"}}),
]
ARGUMENTS: list[dict[str, Any]] = [{}, {"x": 1}, {"x": "a", "a": [1]}, {"x": [1.5], "a": {"b": 1}}]


@pytest.mark.parametrize(
    "draft", [None, "http://json-schema.org/draft-03/schema", "http://json-schema.org/draft-07/schema"]
)
def test_a_value_of_the_wrong_type_for_any_keyword_makes_no_call_impossible(draft: str | None) -> None:
    for keyword, value in itertools.product(KEYWORDS, WRONG_VALUES):
        part = {keyword: value}
        places: list[dict[str, Any]] = [
            part,
            {"properties": {"x": part}},
            {"properties": {"x": {"$ref": "#/$defs/D"}}, "$defs": {"D": part}},
        ]
        for place in places:
            schema = {"type": "object", **({} if draft is None else {"$schema": draft}), **place}
            try:
                validator = build_validator(schema, simplify_parameters(schema))
            except ValueError as exc:
                # Such a schema cannot be sent either.
                assert keyword == "type", exc  # noqa: PT017 - most keywords raise nothing
                continue
            for arguments in ARGUMENTS:
                try:
                    assert validator(arguments) == arguments
                except ValueError as exc:
                    assert str(exc).startswith("$"), (schema, arguments)  # noqa: PT017 - see above


@pytest.mark.parametrize(
    "part",
    [
        {"$schema": "http://json-schema.org/draft-07/schema#", "$defs": {"D": {"type": "string", "minLength": "x"}}},
        {"elsewhere": {"D": {"multipleOf": "x"}}, "$defs": {"D": {"$ref": "#/elsewhere/D"}}},
    ],
)
def test_a_schema_whose_faults_only_a_call_finds_is_replaced_by_the_version_that_is_sent(
    part: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    properties = {"x": {"$ref": "#/$defs/D"}, "y": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["y"], **part}
    validator = build_validator(schema, simplify_parameters(schema), owner="tool 'mend'")
    value: Any = 5 if "elsewhere" in part else "a"
    assert validator({"x": value, "y": 1})
    assert "the schema of tool 'mend' cannot be used" in caplog.text
    with pytest.raises(ValueError, match="'y' is a required property"):
        validator({"x": value})


def test_a_pattern_that_is_not_supported_accepts_everything_in_the_version_that_is_sent_as_well() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": "^[$"}}, "required": 5}
    assert validate(schema, {"x": "anything"})


@pytest.mark.parametrize("loop", [{"allOf": [{"$ref": "#"}]}, {"anyOf": [{"$ref": "#"}]}, {"not": {"$ref": "#"}}])
def test_a_schema_that_refers_to_itself_without_end_is_replaced_wherever_the_stack_ends(loop: dict[str, Any]) -> None:
    schema = {"type": "object", **loop}
    validator = build_validator(schema, simplify_parameters(schema))

    def validate_below(levels: int) -> dict[str, Any]:
        return validate_below(levels - 1) if levels else validator({"x": 1})

    # At some of these places, code of Rust meets the end of the stack.
    for levels in range(40):
        assert validate_below(levels) == {"x": 1}


# Names and data in schemas


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
        assert build_validator(schema, sent)(Coercer(sent).coerce(arguments)) == Coercer(sent).coerce(arguments)
    except ValueError as exc:
        assert str(exc).startswith("$")  # noqa: PT017 - most examples raise nothing
