"""Checks the arguments of a tool call against the tool's JSON schema, in bounded time.

jsonschema does the work, except for the keywords that it implements in an unsafe way: those with patterns
(backtracking) and `uniqueItems` (quadratic time). The work of all keywords is counted, because a schema of a few lines
can have millions of alternatives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import urlsplit

import attrs

from lmbridge._text import excerpt
from lmbridge.agent.pattern_syntax import UnsupportedPatternError
from lmbridge.agent.patterns import compile_pattern
from lmbridge.agent.schema_check_limit import STEPS_FOR_SCHEMA, StepLimit, StepLimitError, spend_steps
from lmbridge.client.subschemas import map_subschemas, resolve_reference, schemas_within

if TYPE_CHECKING:
    from jsonschema import ValidationError
    from jsonschema.protocols import Validator

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_Keyword: TypeAlias = "Callable[[Any, Any, Any, Any], Iterator[ValidationError] | None]"

_LISTED_MISMATCHES: Final = 3
"""The largest number of mismatches that one error text lists, and of alternatives that one mismatch describes."""
_MOST_MISMATCHES: Final = 100
"""The number of mismatches after which the search for more of them ends."""
_LONGEST_CHAIN: Final = 100
"""The number of references that may lead to one another. A longer chain counts as one that cannot be resolved."""
_STEPS_OF_KEYWORD: Final = 10
"""How many steps of `schema_check_limit` the check of one keyword costs."""
_STEPS_OF_MISMATCH: Final = 100
"""How many steps a mismatch costs. It is a large object that is kept, and many of them slow the garbage collector."""
_CHARACTERS_OF_STEP: Final = 200
"""How many characters of the message of a mismatch cost one step. jsonschema quotes the whole value in the message."""


def build_validator(
    schema: Mapping[str, Any], simplified: Mapping[str, Any], *, owner: str = "a tool"
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Returns a function that copies valid arguments, and raises a `ValueError` for invalid ones, with their mistakes.

    The arguments are checked against the original schema, because the simplified version accepts more. Nothing is ever
    fetched: a reference that cannot be resolved within the schema accepts any value, as does a pattern that is not
    supported. If the schema is too large, is invalid by the rules of the draft that it names, refers to itself without
    end, or makes jsonschema fail, the arguments are checked against the simplified version, and a warning is logged.

    Args:
        schema: A JSON schema of any draft. A schema without `$schema` is taken for one of draft 2020-12.
        simplified: The version of the schema without unusual keywords, as `simplify_parameters` returns it.
        owner: The owner of the schema, as the warning names it, such as "tool 'add'". Default: "a tool".
    """
    jsonschema_validator = _jsonschema_validator(schema, simplified, owner)

    def validate(arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            mismatches = _mismatches(jsonschema_validator, arguments)
        except BaseException as exc:
            if not _is_failure_of_jsonschema(exc):
                raise
            reason = f"{type(exc).__name__}: {excerpt(str(exc))}"
            logger.warning("the schema of %s cannot be used, so values are checked less strictly: %s", owner, reason)
            mismatches = _mismatches(_lenient_validator(simplified), arguments)
        if mismatches:
            listed = [_describe_mismatch(error) for error in mismatches[:_LISTED_MISMATCHES]]
            omitted = len(mismatches) - len(listed)
            raise ValueError("; ".join([*listed, f"{omitted} more"] if omitted else listed))
        return dict(arguments)

    return validate


def _mismatches(validator: Validator, arguments: Mapping[str, Any]) -> list[ValidationError]:
    found = list(islice(validator.iter_errors(arguments), _MOST_MISMATCHES))
    return sorted(found, key=lambda error: error.json_path)


def _describe_mismatch(error: ValidationError) -> str:
    """Describes a mismatch and where it is. If a value fits no alternative, the first few reasons are listed."""
    if not error.context:
        return f"{error.json_path}: {excerpt(error.message)}"
    # The first part of an error's schema path is the number of the alternative that it belongs to.
    first_errors = {each.schema_path[0]: each for each in reversed(error.context)}
    reasons = [_describe_mismatch(first_errors[number]) for number in sorted(first_errors)[:_LISTED_MISMATCHES]]
    return f"{error.json_path}: no alternative fits ({' or '.join(reasons)})"


# The validator


def _jsonschema_validator(schema: Mapping[str, Any], simplified: Mapping[str, Any], owner: str) -> Validator:
    # Importing jsonschema takes 35 ms, which only programs with tools that bring their own schema should pay.
    from jsonschema import Draft202012Validator  # noqa: PLC0415
    from jsonschema.validators import validator_for  # noqa: PLC0415 - see above

    try:
        with StepLimit(STEPS_FOR_SCHEMA):
            usable = _usable_schema(schema)
            validator_class: Any = validator_for(usable, default=Draft202012Validator)
            rules = validator_class.META_SCHEMA
            if _bounded(validator_for(rules, default=validator_class))(rules).is_valid(usable):
                return _bounded(validator_class)(usable)
    except BaseException as exc:
        if not isinstance(exc, StepLimitError) and not _is_failure_of_jsonschema(exc):
            raise
    logger.warning("the schema of %s is invalid or too large, so values are checked less strictly", owner)
    return _lenient_validator(simplified)


def _lenient_validator(simplified: Mapping[str, Any]) -> Validator:
    """Returns a validator of the simplified version of a schema, which has no keyword with a wrong value."""
    from jsonschema import Draft202012Validator  # noqa: PLC0415 - importing it is slow

    return _bounded(Draft202012Validator)(simplified)


def _is_failure_of_jsonschema(exc: BaseException) -> bool:
    """Returns whether an exception means that jsonschema cannot use a schema.

    jsonschema assumes that a schema is valid, and may raise any exception if it is not. Its own check of schemas does
    not find every fault: in draft 3, any string is accepted as a type, and in every draft, a part in an unknown place
    is not checked even if a reference leads to it. If the recursion limit is reached in the Rust code that jsonschema
    uses, the exception is a `pyo3_runtime.PanicException`, which cannot be imported and is not an `Exception`.
    """
    if isinstance(exc, StepLimitError):
        return False
    return isinstance(exc, Exception) or type(exc).__name__ == "PanicException"


@lru_cache
def _bounded(validator_class: Any) -> Callable[[Mapping[str, Any]], Validator]:
    """Returns a version of a validator class of jsonschema that counts its work and fetches nothing."""
    from jsonschema.validators import extend  # noqa: PLC0415 - importing it is slow
    from referencing import Registry  # noqa: PLC0415 - importing it is slow

    original = validator_class.VALIDATORS
    own: dict[str, _Keyword] = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": partial(_additional_properties, original["additionalProperties"]),
        "uniqueItems": _unique_items,
    }
    keywords = {name: _counted(check) for name, check in {**original, **own}.items()}
    bounded: Any = extend(validator_class, keywords)
    # By default, a part with a `$schema` would be checked by the class of that draft, whose work is not counted.
    bounded.evolve = attrs.evolve
    return partial(bounded, registry=Registry())


def _counted(check: _Keyword) -> _Keyword:
    def check_and_count(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        spend_steps(_STEPS_OF_KEYWORD + (len(value) if isinstance(value, list | dict) else 0))
        try:
            for error in check(validator, value, instance, schema) or ():
                spend_steps(_STEPS_OF_MISMATCH + len(error.message) // _CHARACTERS_OF_STEP)
                yield error
        except OverflowError:
            # `multipleOf` has divided an integer of hundreds of digits by a float, or a float by such an integer. The
            # value is then accepted.
            return

    return check_and_count


def _pattern(validator: Any, value: Any, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    from jsonschema import ValidationError  # noqa: PLC0415 - importing it is slow

    # Patterns that are not supported were removed from the tool's own schema, but not from the simplified version.
    if validator.is_type(instance, "string") and _is_supported(value) and not compile_pattern(value).search(instance):
        yield ValidationError(f"{instance!r} does not match {value!r}")


def _pattern_properties(validator: Any, value: Any, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if not validator.is_type(instance, "object"):
        return
    for pattern, part in value.items():
        for name, item in instance.items():
            if compile_pattern(pattern).search(name):
                yield from validator.descend(item, part, path=name, schema_path=pattern)


def _additional_properties(
    check: _Keyword, validator: Any, value: Any, instance: Any, schema: Any
) -> Iterator[ValidationError]:
    """Leaves the check to jsonschema, but only for the properties that match no pattern."""
    if validator.is_type(instance, "object") and (patterns := schema.get("patternProperties")):
        compiled = [compile_pattern(each) for each in patterns]
        instance = {name: item for name, item in instance.items() if not any(each.search(name) for each in compiled)}
        schema = {key: part for key, part in schema.items() if key != "patternProperties"}
    yield from check(validator, value, instance, schema) or ()


def _unique_items(validator: Any, value: Any, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    from jsonschema import ValidationError  # noqa: PLC0415 - importing it is slow

    if value and validator.is_type(instance, "array"):
        spend_steps(len(instance))
        if len({_hashable(each) for each in instance}) < len(instance):
            yield ValidationError(f"{instance!r} has non-unique elements")


def _hashable(value: Any) -> Hashable:
    """Returns an object that is equal only for equal JSON values. In Python, 1 and True are equal as well."""
    if isinstance(value, dict):
        return "object", frozenset((name, _hashable(item)) for name, item in value.items())
    if isinstance(value, list):
        return "array", tuple(map(_hashable, value))
    return type(value) if isinstance(value, bool) else "", value


# The schema


def _usable_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a schema without references to other documents, and without unsupported patterns."""
    dropped = {"$dynamicRef", "$recursiveRef"}
    if any("patternProperties" in part for part in schemas_within(schema)):
        # For this keyword, jsonschema would match the patterns itself.
        dropped.add("unevaluatedProperties")

    def usable(part: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(reference := part.get("$ref"), str) and not _can_be_resolved(schema, reference):
            return {}
        kept = {key: value for key, value in part.items() if key not in dropped and _is_usable(key, value)}
        patterns = kept.get("patternProperties")
        if isinstance(patterns, Mapping):
            kept["patternProperties"] = {key: value for key, value in patterns.items() if _is_supported(key)}
        return map_subschemas(kept, usable)

    return usable(schema)


def _is_usable(keyword: str, value: Any) -> bool:
    if keyword == "pattern" and isinstance(value, str):
        return _is_supported(value)
    if keyword == "$schema":
        return isinstance(value, str) and _is_url(value)
    # An `$id`, or an `id` in draft 4, would change the base of the references below it.
    return not (keyword in ("$id", "id") and isinstance(value, str))


def _is_url(text: str) -> bool:
    try:
        urlsplit(text)
    except ValueError:
        return False
    return True


def _is_supported(pattern: str) -> bool:
    try:
        compile_pattern(pattern)
    except UnsupportedPatternError as exc:
        logger.warning("a pattern in the schema of a tool is not checked, because %s: %.200s", exc, pattern)
        return False
    return True


def _can_be_resolved(root: Mapping[str, Any], reference: str) -> bool:
    """Follows a chain of references, and returns whether it ends at a schema."""
    for _ in range(_LONGEST_CHAIN):
        spend_steps(1 + len(reference) // _CHARACTERS_OF_STEP)
        target = resolve_reference(root, reference)
        if not isinstance(target, Mapping) or not isinstance(next_reference := target.get("$ref"), str):
            return isinstance(target, Mapping | bool)
        reference = next_reference
    return False
