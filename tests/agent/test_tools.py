"""`Tool`: tools made from functions and by hand, their schemas, and the docstrings that describe them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import functools
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Literal, Optional, TypedDict

import attrs
import msgspec
import pytest
from msgspec import Meta

from lmbridge import LLMValidationError, Tool, ToolContext
from lmbridge._docstrings import read_docstring
from lmbridge.agent.tools import as_tool


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


@dataclasses.dataclass
class Place:
    city: str
    country: str = "DE"


class Range(TypedDict, total=False):
    low: float
    high: float


@attrs.frozen
class Point:
    x: int
    y: int = 0


class Node(msgspec.Struct):
    value: int
    children: list[Node] = []


async def weather(
    place: Place,
    days: Annotated[int, Meta(ge=1, le=14, description="How many.")] = 3,
    unit: Unit = Unit.CELSIUS,
    detail: Literal["low", "high"] = "low",
    note: str | None = None,
    temperatures: Range | None = None,
) -> str:
    """Forecasts the weather.

    For anywhere on Earth.

    Args:
        place: Where,
            on Earth.
        days (int): Ignored, because the annotation wins.
        note: What for.

    Returns:
        A forecast.
    """
    return f"{place} {days} {unit} {detail} {note} {temperatures}"


def converted(function: Callable[..., Any], /, **values: Any) -> dict[str, Any]:
    """Returns the keyword arguments that a function receives for JSON values."""
    return Tool.from_function(function).convert(values)


def properties(function: Callable[..., Any]) -> Any:
    return Tool.from_function(function).sent_parameters["properties"]


# From a function


def test_a_tool_takes_everything_from_its_function() -> None:
    tool = Tool.from_function(weather)
    assert tool.name == "weather"
    assert tool.description == "Forecasts the weather.\n\nFor anywhere on Earth."
    assert tool.server is None
    assert tool.annotations == {}
    assert tool.function is weather
    assert tool.sent_parameters == {
        "type": "object",
        "properties": {
            "place": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "country": {"type": "string", "default": "DE"}},
                "required": ["city"],
                "description": "Where, on Earth.",
            },
            "days": {"type": "integer", "minimum": 1, "maximum": 14, "description": "How many.", "default": 3},
            "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
            "detail": {"type": "string", "enum": ["low", "high"], "default": "low"},
            "note": {"type": "string", "description": "What for."},
            "temperatures": {
                "type": "object",
                "properties": {"low": {"type": "number"}, "high": {"type": "number"}},
            },
        },
        "required": ["place"],
        "additionalProperties": False,
    }


def test_a_name_and_a_description_replace_those_of_the_function() -> None:
    tool = Tool.from_function(weather, name="forecast", description="")
    assert (tool.name, tool.description) == ("forecast", "")
    assert Tool.from_function(lambda: 1, name="one").name == "one"


def test_arguments_are_converted_to_the_annotated_types() -> None:
    assert converted(weather, place={"city": "Ulm"}, unit="F", note=None) == {
        "place": Place("Ulm"),
        "unit": Unit.FAHRENHEIT,
        "note": None,
    }

    def f(at: dt.datetime, key: uuid.UUID, where: Point, tree: Node, sizes: dict[int, float], raw: Any) -> None: ...

    node = {"value": 1, "children": [{"value": 2}]}
    key = uuid.uuid4()
    values = {"at": "2026-01-01T00:00:00Z", "key": str(key), "where": {"x": 1}, "tree": node, "sizes": {"1": 2}}
    assert converted(f, **values, raw=[1]) == {
        "at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        "key": key,
        "where": Point(1),
        "tree": Node(1, [Node(2)]),
        "sizes": {1: 2.0},
        "raw": [1],
    }


def test_omitted_arguments_get_the_default_of_the_function() -> None:
    missing = object()

    def f(a: int, b: list[int] = [1], c: Any = missing, d: float = float("nan")) -> None: ...  # noqa: B006 - what users write

    assert converted(f, a=1) == {"a": 1}
    assert properties(f)["b"] == {"type": "array", "items": {"type": "integer"}, "default": [1]}
    assert properties(f)["c"] == {}
    assert properties(f)["d"] == {"type": "number"}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, r"\$: object missing required field `place`"),
        ({"place": {"city": 5}}, r"\$\.place\.city: expected `str`, got `int`"),
        ({"place": {"city": "Ulm"}, "days": 99}, r"\$\.days: expected `int` <= 14"),
        ({"place": {"city": "Ulm"}, "detail": "mid"}, r"\$\.detail: invalid enum value 'mid'"),
        ({"place": {"city": "Ulm"}, "when": 1}, r"\$: object contains unknown field `when`"),
    ],
)
def test_arguments_of_the_wrong_type_are_reported_with_their_path(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        converted(weather, **values)


def test_a_parameter_is_described_by_its_annotation_or_else_the_docstring() -> None:
    def f(
        a: Annotated[int, "From the hint."],
        b: Annotated[int, Meta(description="From Meta.")],
        c: Annotated[str | None, "Of both."] = None,
        d: int = 0,
    ) -> None:
        """Does it.

        Args:
            a: Ignored.
            b: Ignored.
            c: Ignored.
            d: From the docstring.
        """

    found = {name: part["description"] for name, part in properties(f).items()}
    assert found == {"a": "From the hint.", "b": "From Meta.", "c": "Of both.", "d": "From the docstring."}


class Clock:
    """A clock."""

    def __call__(self, zone: str) -> str:
        """Tells the time."""
        return zone

    def wait(self, seconds: float) -> None:
        """Waits."""

    @staticmethod
    def static(a: int) -> int:
        return a

    @classmethod
    def of(cls, b: int) -> int:
        return b


@functools.cache
def cached(unit: Unit) -> str:
    """Looks it up."""
    return unit.value


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    ("function", "name", "description", "parameters"),
    [
        (Clock().wait, "wait", "Waits.", ["seconds"]),
        (Clock.static, "static", "", ["a"]),
        (Clock.of, "of", "", ["b"]),
        (Clock(), "clock", "Tells the time.", ["zone"]),
        (cached, "cached", "Looks it up.", ["unit"]),
        (wrapped(cached), "cached", "Looks it up.", ["unit"]),
        (functools.partial(weather, days=1), "weather", "Forecasts the weather.\n\nFor anywhere on Earth.",
         ["place", "unit", "detail", "note", "temperatures"]),
        (functools.partial(weather, Place("Ulm")), "weather", "Forecasts the weather.\n\nFor anywhere on Earth.",
         ["days", "unit", "detail", "note", "temperatures"]),
        (functools.partial(Clock(), zone="CET"), "clock", "Tells the time.", []),
    ],
)  # fmt: skip
def test_any_callable_that_takes_keywords_can_be_a_tool(
    function: Callable[..., Any], name: str, description: str, parameters: list[str]
) -> None:
    tool = as_tool(function)
    assert (tool.name, tool.description, list(tool.sent_parameters["properties"])) == (name, description, parameters)


def star(*cities: str) -> None: ...
def stars(**cities: str) -> None: ...
def positional(city: str, /) -> None: ...
def untyped(city) -> None: ...  # type: ignore[no-untyped-def]  # an error on purpose
def unknown(city: Unheard) -> None: ...  # type: ignore[name-defined]  # noqa: F821 - an error on purpose
def plain(clock: Clock) -> None: ...
def contexts(many: list[ToolContext]) -> None: ...
def generator(city: str) -> Iterator[str]:
    yield city


async def async_generator(city: str) -> AsyncIterator[str]:
    yield city


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (star, r"'star' cannot be a tool: its parameter '\*cities' cannot be passed by keyword; name its"),
        (
            stars,
            r"'stars' cannot be a tool: its parameter '\*\*cities' cannot be passed by keyword; name its parameters",
        ),
        (positional, "'positional' cannot be a tool: its parameter 'city' cannot be passed by keyword"),
        (untyped, "'untyped' cannot be a tool: its parameter 'city' has no type hint; annotate it"),
        (unknown, "'unknown' cannot be a tool: name 'Unheard' is not defined; annotate its parameters"),
        (plain, "'plain' cannot be a tool: type <class '.*Clock'> is not supported; annotate its parameters"),
        (contexts, "'contexts' cannot be a tool: "),
        (generator, "'generator' cannot be a tool: it is a generator; return a list"),
        (async_generator, "'async_generator' cannot be a tool: it is a generator"),
        (lambda: 1, "a tool has no name: it is a lambda.*; write a function, or pass a name"),
        (dict.get, "'get' cannot be a tool: .*; "),
        (Clock, "<class '.*Clock'> is not a tool; pass an async or plain function"),
        ("weather", "'weather' is not a tool; pass an async or plain function"),
        (None, "None is not a tool; pass an async or plain function"),
    ],
)
def test_a_function_that_json_cannot_call_is_refused(function: Any, text: str) -> None:
    with pytest.raises(LLMValidationError, match=f"^{text}") as caught:
        as_tool(function)
    assert "\n" not in str(caught.value)


def test_an_unknown_return_type_does_not_matter() -> None:
    def f(a: int) -> Unheard: ...  # type: ignore[name-defined]  # noqa: F821 - an error on purpose

    assert converted(f, a=1) == {"a": 1}


def test_a_parameter_for_the_context_is_not_in_the_schema() -> None:
    old = Optional[ToolContext]  # noqa: UP045 - the old spelling is tested

    def f(a: int, context: ToolContext, other: ToolContext | None = None, third: Any = None) -> None: ...

    f.__annotations__["third"] = old

    tool = Tool.from_function(f)
    assert list(tool.sent_parameters["properties"]) == ["a"]
    assert tool.context_names == ("context", "other", "third")
    by_hand = Tool("f", "", {}, f)
    assert by_hand.context_names == ("context", "other", "third")
    assert Tool("g", "", {}, lambda **_: 1).context_names == ()


def test_the_context_identifies_the_call() -> None:
    context = ToolContext("run", "call", "weather", lambda: False)
    assert (context.run_id, context.call_id, context.tool, context.cancelled()) == ("run", "call", "weather", False)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        context.tool = "other"  # type: ignore[misc]  # an error on purpose


# Tools with their own schema


def test_a_tool_with_its_own_schema_gets_plain_json_values() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tool = Tool("My tool", "Does it.", schema, print, annotations={"readOnlyHint": True}, server="files")
    assert tool.parameters is schema
    assert tool.convert({"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match=r"^\$: 'a' is a required property$"):
        tool.convert({})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("", "", {}, print), "a tool's name must be a non-empty text, not ''; pass a name"),
        ((None, "", {}, print), "a tool's name must be a non-empty text, not None"),
        (("x", None, {}, print), "tool 'x': its description must be a text, not None; it may be empty"),
        (("x", "", {}, "print"), "tool 'x': its function cannot be called: 'print'"),
        (("x", "", None, print), "tool 'x': its parameters must be a JSON schema, not None; pass a dict"),
        (("x", "", [], print), r"tool 'x': its parameters must be a JSON schema, not \[\]"),
        (
            ("x", "", {"type": "array"}, print),
            "tool 'x': its parameters cannot be sent: the schema is not that of an object",
        ),
        (
            ("x", "", {"properties": {"a": {"enum": [object()]}}}, print),
            "tool 'x': its parameters cannot be sent: properties.a.enum",
        ),
    ],
)
def test_a_tool_that_cannot_work_is_refused_with_its_name(arguments: Any, text: str) -> None:
    with pytest.raises(LLMValidationError, match=f"^{text}"):
        Tool(*arguments)


def test_tools_are_compared_by_identity() -> None:
    schema: dict[str, Any] = {"type": "object"}
    tool = Tool("now", "", schema, cached)
    assert tool != Tool("now", "", schema, cached)
    assert len({tool, tool}) == 1
    assert repr(tool) == "Tool(name='now', description='', server=None, timeout='agent')"


# Docstrings

LONG = """Does it.

    Arguments:
        a: One.
        b (int, optional): Two: more,
            note: and more.

        c:
            Three.

    Returns:
        d: A returned value.
    """


NUMPY = """Does it.

    With a second paragraph.

    Parameters
    ----------
    a : int
        One.
    b, c : str, optional
        Two: more,
        and more.

    d
        Four.

    Returns
    -------
    e : int
        A returned value.

    Other Parameters
    ----------------
    f : int
    g : int
        Seven.
    """

STARS = """Args:
    a: One.
    *rest: Others.
    \\**options (dict[str, int]): More.
    x (Callable[[int], tuple(f(int))], optional): A call (see: y).
    y: Z (a): b.
"""

NUMPY_STARS = """Does it.

Parameters
----------
a : int
    One.
*rest
    Others.
*args, \\**options : int
    More.
"""

SPHINX = """Does it.

    :param a: One.
    :param int b: Two: more,
        and more.
    :type b: int
    :ivar c: Three.
    :param d:
    :returns: A returned value.
    :raises OSError: never.

    The end.
    """


@pytest.mark.parametrize(
    ("text", "description", "parameters"),
    [
        (
            NUMPY,
            "Does it.\n\nWith a second paragraph.",
            {"a": "One.", "b": "Two: more, and more.", "c": "Two: more, and more.", "d": "Four.", "g": "Seven."},
        ),
        (SPHINX, "Does it.", {"a": "One.", "b": "Two: more, and more.", "c": "Three."}),
        ("Parameters\n\nThese are described elsewhere.", "Parameters\n\nThese are described elsewhere.", {}),
        ("Does it: :param is a word.", "Does it: :param is a word.", {}),
        ("A class.\n\n    Attributes:\n        a: One.\n    ", "A class.", {"a": "One."}),
        (None, "", {}),
        ("", "", {}),
        ("Does it.", "Does it.", {}),
        ("Does it.\n\n    Note: not a section.\n", "Does it.\n\nNote: not a section.", {}),
        ("Does it.\n\n    Raises:\n        OSError: never.\n", "Does it.", {}),
        (LONG, "Does it.", {"a": "One.", "b": "Two: more, note: and more.", "c": "Three."}),
        ("Args:\n  a: One.\n", "", {"a": "One."}),
        (STARS, "", {"a": "One.", "rest": "Others.", "options": "More.", "x": "A call (see: y).", "y": "Z (a): b."}),
        (NUMPY_STARS, "Does it.", {"a": "One.", "rest": "Others.", "args": "More.", "options": "More."}),
        (
            ":param a: One.\n:param \\*rest: Others.\n:param **options: More.",
            "",
            {"a": "One.", "rest": "Others.", "options": "More."},
        ),
        ("Does it.\n\nArgs:\n    a line without a name\n    a: One.", "Does it.", {"a": "One."}),
    ],
)
def test_a_docstring_is_split_into_description_and_parameters(
    text: str | None, description: str, parameters: dict[str, str]
) -> None:
    assert read_docstring(text) == (description, parameters)


def test_a_function_that_was_made_in_a_loop_has_the_name_that_it_was_given() -> None:
    def make(name: str) -> Callable[..., str]:
        def tool() -> str:
            return name

        tool.__name__ = name
        return tool

    assert [Tool.from_function(make(name)).name for name in ("open_door", "close_door")] == ["open_door", "close_door"]
