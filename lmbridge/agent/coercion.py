"""Repairs arguments of the wrong JSON type, where the schema leaves only one way to read them.

Small models send `"5"`, `"true"` or `"[1, 2]"` where the schema asks for a number, a boolean or a list, and 5 where it
asks for a text. Coercion follows the schema, and never the value alone, because a guess would call a tool with
arguments that the model did not mean. A value that the schema accepts is not changed.

The schema is the tool's own, and not the simplified version that servers receive. The simplified version leaves out
what some servers do not understand. For example, a type that contains itself has only two levels in it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from lmbridge.agent.argument_json import decode_argument_json
from lmbridge.agent.pattern_syntax import UnsupportedPatternError
from lmbridge.agent.patterns import compile_pattern
from lmbridge.agent.schema_check_limit import spend_steps
from lmbridge.client.subschemas import resolve_reference

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
_TYPE_NAMES: Final = frozenset(_JSON_TYPES.values())
_MOST_ALTERNATIVES: Final = 64
"""The number of alternatives in a schema beyond which values are not coerced to it."""
_STEPS_OF_SCHEMA: Final = 10
"""How many steps of `schema_check_limit` it costs to find the alternatives of a schema for the first time."""
_MOST_PARTS: Final = 1_000
"""The number of parts of a schema beyond which its alternatives are not determined. References can multiply parts."""
_SCALARS: Final = ("", True, 1, 1.5, None)
"""A value of each class that is neither a list nor an object."""
_FORMATS_OF_VALUES: Final = ("date", "date-time", "time", "duration", "uuid", "uri", "url", "email", "ipv4", "ipv6")
"""Formats that an empty text and "null" do not satisfy."""


@attrs.frozen(eq=False)
class _Alternative:
    """One of the ways in which a value can satisfy a schema."""

    keywords: Mapping[str, Any]
    """The keywords that apply together, without `$ref`, `allOf`, `anyOf` and `oneOf`."""
    types: frozenset[str] | None
    """The JSON types that are accepted; None for all of them."""
    values: Sequence[Any] | None
    """The only values that are accepted; None if they are not listed."""
    required: frozenset[str]
    """The names of the properties that an object must have."""

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> _Alternative:
        """Reads the keywords of an alternative."""
        required = frozenset(each for each in _list(keywords.get("required")) if isinstance(each, str))
        return cls(keywords, _types_of(keywords), _values_of(keywords), required)

    def fits(self, value: Any) -> bool:
        """Returns whether the type of a value is accepted, and the value is among those that are listed.

        A float such as 5.0 is not an integer here, so that it becomes one where the schema asks for an integer.
        """
        name = _JSON_TYPES.get(type(value))
        if self.types is not None and name not in self.types and not (name == "integer" and "number" in self.types):
            return False
        if self.values is None:
            return True
        spend_steps(len(self.values))
        return any(_is_same(value, each) for each in self.values)

    def accepts_blank(self, value: str | None) -> bool:
        """Returns whether an empty text, "null" or None is accepted.

        Besides the type, a format, a minimum length or a pattern may forbid it.
        """
        if not self.fits(value):
            return False
        if value is None:
            return True
        pattern, least = self.keywords.get("pattern"), self.keywords.get("minLength")
        return (
            self.keywords.get("format") not in _FORMATS_OF_VALUES
            and not (isinstance(least, int) and len(value) < least)
            and not (isinstance(pattern, str) and not _matches(pattern, value))
        )

    def schemas_of(self, name: str) -> Sequence[Any]:
        """Returns the schemas of a property; an empty list if the property is not allowed."""
        properties = _mapping(self.keywords.get("properties"))
        if name in properties:
            return [properties[name]]
        patterns = _mapping(self.keywords.get("patternProperties"))
        if matching := [schema for pattern, schema in patterns.items() if _matches(pattern, name)]:
            return matching[:1] if len(matching) == 1 else [True]
        others = self.keywords.get("additionalProperties", True)
        return [] if others is False else [others]

    @property
    def first_items(self) -> Sequence[Any]:
        """The schemas of the first items of a list, by position. It is empty if all items share one schema."""
        # Drafts before 2020 have them in `items`.
        return _list(self.keywords.get("prefixItems")) or _list(self.keywords.get("items"))

    def schema_at(self, index: int) -> Any:
        """Returns the schema of an item of a list."""
        first = self.first_items
        if index < len(first):
            return first[index]
        items = self.keywords.get("items", True)
        return self.keywords.get("additionalItems", True) if isinstance(items, list) else items


class Coercer:
    """Coerces values to one schema.

    Args:
        schema: The schema, which may be invalid. What cannot be understood accepts any value.
    """

    def __init__(self, schema: Any) -> None:
        self._root = schema
        # The keys are the ids of schemas, which stay alive because the values contain them.
        self._known: dict[int, tuple[Any, Sequence[_Alternative]]] = {}
        # For each property that has been looked up, the classes of the values that stay as they are.
        self._unchanged_types_of: dict[str, frozenset[type]] = {}

    def coerce(self, value: Any, *, inexact: Collection[float] = ()) -> Any:
        """Returns the value, converted to the types of the schema wherever there is only one way to read it.

        - A text becomes the number, boolean, null, list or object that it contains, where no text is accepted.
        - An integer becomes a text where neither a number nor a boolean is accepted. So does any other number, if
          Python writes it as the model wrote it.
        - A number such as 5.0 becomes an integer where an integer is required.
        - A parameter that has a default and is not required is left out if its value is null, `"null"` or empty, and
          the schema does not accept that.

        Args:
            value: A JSON value. It is not modified.
            inexact: Numbers whose text in the JSON differs from their `repr` in Python, such as 3.10. They never become
                a text.
        """
        if type(value) is dict and all(type(item) in self._find_unchanged_types(name) for name, item in value.items()):
            return value
        return self._coerce(value, self._alternatives(self._root), set(inexact))

    def _find_unchanged_types(self, name: str) -> frozenset[type]:
        """Returns the classes of values of a property that are certain to need no coercion.

        This is the fast path of nearly all calls. It is not used for properties that the schema does not list, nor for
        lists and objects.
        """
        known = self._unchanged_types_of.get(name)
        if known is not None:
            return known
        roots = self._alternatives(self._root)
        properties = _mapping(roots[0].keywords.get("properties")) if len(roots) == 1 and roots[0].fits({}) else {}
        if name not in properties:
            return frozenset()
        alternatives = [each for each in self._alternatives(properties[name]) if each.values is None]
        types = {type(scalar) for scalar in _SCALARS if any(each.fits(scalar) for each in alternatives)}
        if not any(each.accepts_blank("") and "pattern" not in each.keywords for each in alternatives):
            # A blank text may stand for the default.
            types.discard(str)
        return self._unchanged_types_of.setdefault(name, frozenset(types))

    def _coerce(self, value: Any, alternatives: Sequence[_Alternative], inexact: set[float]) -> Any:
        spend_steps(1)
        fitting = [each for each in alternatives if each.fits(value)]
        if not fitting:
            value = self._fitting_reading(value, alternatives, inexact)
            fitting = [each for each in alternatives if each.fits(value)]
        if isinstance(value, dict):
            return self._coerce_object(value, fitting, inexact)
        if isinstance(value, list):
            return self._coerce_list(value, fitting, inexact)
        return value

    def _fitting_reading(self, value: Any, alternatives: Sequence[_Alternative], inexact: set[float]) -> Any:
        """Returns the first other value that a value may stand for and that fits; the value itself if none does."""
        is_boolean = any(each.fits(truth) for each in alternatives for truth in (True, False))
        # 1 may stand for true, so it does not become a text where the schema accepts a boolean.
        may_be_text = not is_boolean and not (isinstance(value, int | float) and value in inexact)
        readings = (each for each in _readings(value, inexact) if may_be_text or not isinstance(each, str))
        return next((each for each in readings if any(one.fits(each) for one in alternatives)), value)

    def _coerce_object(
        self, value: Mapping[str, Any], fitting: Sequence[_Alternative], inexact: set[float]
    ) -> dict[str, Any]:
        if len(fitting) > 1:
            fitting = [each for each in fitting if self._is_possible(value, each)]
        coerced: dict[str, Any] = {}
        for name, item in value.items():
            alternatives = self._alternatives_of(schema for each in fitting for schema in each.schemas_of(name))
            if _is_unset(item, alternatives) and not any(name in each.required for each in fitting):
                continue
            coerced[name] = self._coerce(item, alternatives, inexact)
        return coerced

    def _coerce_list(self, value: Sequence[Any], fitting: Sequence[_Alternative], inexact: set[float]) -> Sequence[Any]:
        if not any("items" in each.keywords or "prefixItems" in each.keywords for each in fitting):
            return value
        first_count = max((len(each.first_items) for each in fitting), default=0)
        first = [
            self._coerce(item, self._alternatives_of(each.schema_at(index) for each in fitting), inexact)
            for index, item in enumerate(value[:first_count])
        ]
        others = self._alternatives_of(each.schema_at(first_count) for each in fitting)
        return first + [self._coerce(item, others, inexact) for item in value[first_count:]]

    def _is_possible(self, value: Mapping[str, Any], alternative: _Alternative) -> bool:
        """Returns whether an object may be meant for an alternative.

        The alternative must allow all properties of the object. If it lists the only values that a property may have,
        the object must have one of these values.
        """
        for name, item in value.items():
            spend_steps(1)
            schemas = alternative.schemas_of(name)
            if not schemas:
                return False
            listed = self._alternatives_of(schemas)
            if listed and all(each.values is not None for each in listed):
                reading = self._fitting_reading(item, listed, set())
                if not any(each.fits(item) or each.fits(reading) for each in listed):
                    return False
        return True

    # Alternatives

    def _alternatives_of(self, schemas: Iterable[Any]) -> Sequence[_Alternative]:
        """Returns the alternatives of a value that has to satisfy one of several schemas."""
        return [each for schema in schemas for each in self._alternatives(schema)]

    def _alternatives(self, schema: Any) -> Sequence[_Alternative]:
        known = self._known.get(id(schema))
        if known is None:
            spend_steps(_STEPS_OF_SCHEMA)
            try:
                expanded = self._expand(schema, (), iter(range(_MOST_PARTS)))
            except _TooManyAlternativesError:
                expanded = [{}]
            known = schema, [_Alternative.of(each) for each in expanded]
            self._known[id(schema)] = known
        return known[1]

    def _expand(self, schema: Any, references: tuple[str, ...], parts_left: Iterator[int]) -> list[Mapping[str, Any]]:
        """Returns the alternatives of a schema, each with the keywords of all its parts that apply together.

        Args:
            schema: The schema or a part of it.
            references: The references that lead to it.
            parts_left: Yields a number for each part that may still be examined.

        Raises:
            _TooManyAlternativesError: The schema has too many parts or alternatives.
        """
        if not isinstance(schema, Mapping):
            return [] if schema is False else [{}]
        if next(parts_left, None) is None:
            raise _TooManyAlternativesError
        alternatives: list[Mapping[str, Any]] = [
            {key: value for key, value in schema.items() if key not in ("$ref", "allOf", "anyOf", "oneOf")}
        ]
        for group in self._groups(schema, references, parts_left):
            merged = [_merge(one, other) for one in alternatives for other in group]
            alternatives = [each for each in merged if each is not None]
            if len(alternatives) > _MOST_ALTERNATIVES:
                raise _TooManyAlternativesError
        return alternatives

    def _groups(
        self, schema: Mapping[str, Any], references: tuple[str, ...], parts_left: Iterator[int]
    ) -> Iterator[list[Mapping[str, Any]]]:
        """Yields, for each part of a schema that applies beside its other keywords, the alternatives of that part."""
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in references and isinstance(self._root, Mapping):
            target = resolve_reference(self._root, reference)
            yield self._expand(True if target is None else target, (*references, reference), parts_left)
        for part in _list(schema.get("allOf")):
            yield self._expand(part, references, parts_left)
        for keyword in ("anyOf", "oneOf"):
            if branches := _list(schema.get(keyword)):
                yield [each for branch in branches for each in self._expand(branch, references, parts_left)]


class _TooManyAlternativesError(Exception):
    """A schema has more alternatives than are worth the time."""


def _readings(value: Any, inexact: set[float]) -> Iterator[Any]:
    """Yields the other values that a value may stand for, the likeliest first."""
    if isinstance(value, str):
        yield from _readings_of_text(value.strip(), inexact)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and value.is_integer():
            yield int(value)
        yield repr(value)


def _readings_of_text(text: str, inexact: set[float]) -> Iterator[Any]:
    if (truth := {"true": True, "false": False}.get(text.lower())) is not None:
        yield truth
    elif text == "null":
        yield None
    elif text[:1] in ("[", "{") or _JSON_NUMBER.fullmatch(text):
        try:
            value = decode_argument_json(text, inexact)
        except (ValueError, RecursionError):
            return
        yield value
        if isinstance(value, float) and value.is_integer():
            yield int(value)


def _is_unset(value: Any, alternatives: Sequence[_Alternative]) -> bool:
    """Returns whether a blank value stands for the default, because there is one and no alternative accepts blanks."""
    if not (value is None or (isinstance(value, str) and value.strip() in ("", "null"))):
        return False
    has_default = any("default" in each.keywords for each in alternatives)
    return has_default and not any(each.accepts_blank(value) for each in alternatives)


def _is_same(one: Any, other: Any) -> bool:
    """Returns whether two JSON values are the same. In Python, 1 equals True, but in JSON they are different values."""
    return isinstance(one, bool) is isinstance(other, bool) and bool(one == other)


def _types_of(schema: Mapping[str, Any]) -> frozenset[str] | None:
    """Returns the JSON types that the keywords of a schema accept, or None if they accept all."""
    given = schema.get("type")
    names = [given] if isinstance(given, str) else _list(given)
    if types := frozenset(name for name in names if isinstance(name, str)) & _TYPE_NAMES:
        return types
    values = _values_of(schema)
    return None if values is None else frozenset(_JSON_TYPES.get(type(each), "object") for each in values)


def _values_of(schema: Mapping[str, Any]) -> Sequence[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return _list(schema.get("enum")) or None


def _merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the keywords of two schemas that apply together, or None if no value has a type that both accept."""
    merged = {**other, **one}
    types = [each for each in (_types_of(one), _types_of(other)) if each is not None]
    if len(types) > 1:
        if any("number" in each for each in types):
            types = [each | {"integer"} if "number" in each else each for each in types]
        common = types[0] & types[1]
        if not common:
            return None
        merged["type"] = sorted(common)
    if "properties" in one and "properties" in other:
        first, second = _mapping(one["properties"]), _mapping(other["properties"])
        both = {name: {"allOf": [first[name], second[name]]} for name in first if name in second}
        merged["properties"] = {**second, **first, **both}
    if "required" in one and "required" in other:
        merged["required"] = [*_list(one["required"]), *_list(other["required"])]
    return merged


def _matches(pattern: str, text: str) -> bool:
    """Returns whether a text matches a pattern; True if the pattern is not supported."""
    try:
        return compile_pattern(pattern).search(text)
    except UnsupportedPatternError:
        return True


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []
