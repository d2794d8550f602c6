"""Tools whose parameters and results are pydantic models, paths, or objects of numpy and other libraries."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import json
import re
import types
import uuid
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypedDict

import attrs
import pytest
from pydantic import BaseModel, Field
from pydantic.v1 import BaseModel as OldModel

from lmbridge import Agent, LLMClient, Tool, ToolError
from lmbridge.agent.tool_results import result_as_text
from lmbridge.testing import ScriptedServer, answer
from tests.agent.support import asks, calls, tool_texts


class Address(BaseModel):
    """Where a person lives."""

    street: str = Field(description="With the number of the house.")
    since: dt.date | None = None


class Person(BaseModel):
    name: str
    addresses: list[Address] = []


class Company(BaseModel):
    employees: int


@dataclasses.dataclass
class Team:
    """A team.

    Attributes:
        members: All who belong to it.
    """

    members: list[Person]
    owner: Person | Company


@attrs.frozen
class Score:
    points: int


class Row(TypedDict):
    name: str


class Colour(enum.Enum):
    RED = "red"


class Mixed(enum.Enum):
    """Values of several types, one of which JSON does not have."""

    NUMBER = 7
    TEXT = "a"
    RATIO = 1.5
    FLAG = True
    NOTHING = None


class Direction(enum.Enum):
    NORTH = (0, 1)
    SOUTH = (0, -1)


class Old(OldModel):
    """A model of pydantic 1."""

    size: int


@attrs.frozen
class Visit:
    when: dt.datetime
    price: decimal.Decimal
    photo: Path
    score: Score


# Parameters


def invite(
    person: Person,
    others: list[Person],
    team: Team,
    host: Person | Company | None = None,
    folder: Path = Path(),
    count: Annotated[int, Field(description="How many.", le=9)] = 1,
) -> str:
    """Invites people.

    :param person: Who is invited
        first.
    :param others: Who else.
    :type others: list
    :returns: Nothing of interest.
    """
    return f"{person!r} {others!r} {team!r} {host!r} {folder!r} {count!r}"


def test_parameters_that_are_models_are_described_by_their_schemas() -> None:
    tool = Tool.from_function(invite)
    assert tool.description == "Invites people."
    properties = tool.sent_parameters["properties"]
    assert tool.sent_parameters["required"] == ["person", "others", "team"]
    assert properties["person"]["description"] == "Who is invited first."
    assert properties["person"]["properties"]["addresses"]["items"]["properties"]["street"] == {
        "type": "string",
        "description": "With the number of the house.",
    }
    assert properties["others"]["items"]["properties"]["name"] == {"type": "string"}
    assert properties["team"]["properties"]["members"]["description"] == "All who belong to it."
    assert properties["folder"] == {"type": "string", "default": "."}
    assert properties["count"] == {"type": "integer", "maximum": 9, "description": "How many.", "default": 1}
    assert "$ref" not in str(tool.sent_parameters)


def test_the_function_receives_instances_of_the_models() -> None:
    ada = {"name": "Ada", "addresses": [{"street": "Main Street 1", "since": "1840-01-02"}]}
    arguments = Tool.from_function(invite).convert(
        {
            "person": ada,
            "others": [{"name": "Bob"}],
            "team": {"members": [ada], "owner": {"employees": 3}},
            "host": {"name": "Eve"},
            "folder": "a/b",
        }
    )
    person = Person(name="Ada", addresses=[Address(street="Main Street 1", since=dt.date(1840, 1, 2))])
    assert arguments == {
        "person": person,
        "others": [Person(name="Bob")],
        "team": Team([person], Company(employees=3)),
        "host": Person(name="Eve"),
        "folder": Path("a/b"),
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"person": {"addresses": []}, "others": []}, "$.person.name: field required"),
        ({"person": {"name": "A", "addresses": [{}]}, "others": []}, "$.person.addresses[0].street: field required"),
        ({"person": {"name": "A"}, "others": [1]}, "$.others[0]: input should be an object"),
        ({"person": {"name": "A"}, "others": [], "count": 10}, "$.count: input should be less than or equal to 9"),
        ({"person": {"name": "A"}, "others": [], "town": 1}, "object contains unknown field `town`"),
    ],
)
def test_a_model_that_does_not_fit_is_reported_with_its_path(arguments: dict[str, Any], text: str) -> None:
    team = {"members": [], "owner": {"employees": 3}}
    with pytest.raises(ValueError, match=re.escape(text)):
        Tool.from_function(invite).convert({**arguments, "team": team})


async def test_a_model_goes_to_the_tool_and_back(scripted_server: ScriptedServer, client: LLMClient) -> None:
    async def rename(person: Person, name: str) -> Person:
        """Renames a person."""
        return person.model_copy(update={"name": name})

    scripted_server.script(
        calls(asks("rename", "1", person={"name": "Ada"}, name="Bob")),
        calls(asks("rename", "2", person={"nom": "Ada"}, name="Bob")),
        answer("Done."),
    )
    result = await Agent(client, tools=[rename]).run("Rename Ada.")
    first, second = tool_texts(result.messages)
    assert first == '{"name":"Bob","addresses":[]}'
    assert "$.person.name: field required" in second


def test_enums_with_values_of_any_type_and_models_of_pydantic_1_are_parameters() -> None:
    def move(direction: Direction, old: Old, mixed: list[Mixed], ways: dict[str, Direction] | None = None) -> None:
        """Moves."""

    tool = Tool.from_function(move)
    properties = tool.sent_parameters["properties"]
    assert properties["direction"]["enum"] == ["NORTH", "SOUTH"]
    assert properties["mixed"]["items"]["enum"] == [7, "a", 1.5, True, None]
    assert properties["old"]["properties"] == {"size": {"type": "integer"}}
    arguments = {"direction": "SOUTH", "old": {"size": 1}, "mixed": [True, 7, None], "ways": {"home": "NORTH"}}
    assert tool.convert(arguments) == {
        "direction": Direction.SOUTH,
        "old": Old(size=1),
        "mixed": [Mixed.FLAG, Mixed.NUMBER, Mixed.NOTHING],
        "ways": {"home": Direction.NORTH},
    }
    for wrong, text in (
        ({"direction": "UP"}, "$.direction: invalid enum value 'UP'"),
        ({"mixed": [2]}, "$.mixed[0]: invalid enum value 2"),
        ({"old": {"size": "large"}}, "$.old.size: value is not a valid integer"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            tool.convert({**arguments, **wrong})


# Results


class Array:
    """An array as numpy has it."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def tolist(self) -> Any:
        return self.values


class LongDouble:
    """A scalar that has no equal among the types of Python."""

    def tolist(self) -> LongDouble:
        return self


class Name(str):
    __slots__ = ()


UUID = uuid.UUID("12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (Address(street="A 1", since=dt.date(2001, 2, 3)), '{"street":"A 1","since":"2001-02-03"}'),
        ([Person(name="Ada")], '[{"name":"Ada","addresses":[]}]'),
        (
            Team([Person(name="Ada")], Company(employees=3)),
            '{"members":[{"name":"Ada","addresses":[]}],"owner":{"employees":3}}',
        ),
        (Score(3), '{"points":3}'),
        (Row(name="a"), '{"name":"a"}'),
        (PurePosixPath("/a/b"), '"/a/b"'),
        ({"paths": [PurePosixPath("a")]}, '{"paths":["a"]}'),
        (dt.datetime(2001, 2, 3, 4, 5, tzinfo=dt.UTC), '"2001-02-03T04:05:00Z"'),
        (dt.date(2001, 2, 3), '"2001-02-03"'),
        (dt.time(4, 5), '"04:05:00"'),
        (dt.timedelta(hours=1, seconds=5), '"PT3605S"'),
        (UUID, f'"{UUID}"'),
        (decimal.Decimal("1.50"), '"1.50"'),
        (Colour.RED, '"red"'),
        ({"colours": {Colour.RED}}, '{"colours":["red"]}'),
        (Old(size=1), '{"size":1}'),
        ({"old": [Old(size=1)]}, '{"old":[{"size":1}]}'),
        (list(Mixed), '[7,"a",1.5,true,null]'),
        (Direction.NORTH, "[0,1]"),
        (frozenset({1}), "[1]"),
        ((1, 2), "[1,2]"),
        (Array([[1, 2], [3, 4]]), "[[1,2],[3,4]]"),
        ({"mean": Array(1.5)}, '{"mean":1.5}'),
        (Array([dt.date(2001, 2, 3)]), '["2001-02-03"]'),
        ([float("nan"), float("inf")], "[null,null]"),
        (b"text", "text"),
        ({"stdout": "ä".encode()}, '{"stdout":"ä"}'),
        (bytearray(b"text"), "text"),
        ([Name("Ada")], '["Ada"]'),
        (range(3), "[0,1,2]"),
        (collections.deque([1]), "[1]"),
        (collections.Counter("aa"), '{"a":2}'),
        (types.MappingProxyType({"a": 1}), '{"a":1}'),
        ({1: "a", dt.date(2001, 2, 3): "b"}, '{"1":"a","2001-02-03":"b"}'),
        ({"a": 1}.values(), "[1]"),
    ],
)
def test_a_result_reaches_the_model_as_json(result: Any, text: str) -> None:
    assert result_as_text(result) == text


def test_the_fields_of_a_result_may_have_different_types() -> None:
    visit = Visit(dt.datetime(2001, 2, 3, 4, 5, tzinfo=dt.UTC), decimal.Decimal("1.50"), Path("a.png"), Score(1))
    expected = {"when": "2001-02-03T04:05:00Z", "price": "1.50", "photo": "a.png", "score": {"points": 1}}
    assert json.loads(result_as_text(visit)) == expected


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (object(), "it contains an object of type object, which JSON does not have"),
        ({"a": [object()]}, "it contains an object of type object, which JSON does not have"),
        (LongDouble(), "it contains an object of type LongDouble, which JSON does not have"),
        (Person, "it contains an object of type ModelMetaclass, which JSON does not have"),
        (iter([1]), "it contains an object of type list_iterator, which JSON does not have"),
        (1j, "it contains an object of type complex, which JSON does not have"),
        (b"\xff\xfe", "it contains bytes that are not text in UTF-8"),
        ({"image": b"\xff\xfe"}, "it contains bytes that are not text in UTF-8"),
        ({(1, 2): 3}, ""),
    ],
)
def test_a_result_that_json_does_not_have_is_an_error(result: Any, reason: str) -> None:
    with pytest.raises(ToolError, match=r"^it ran, but its result \(\w+\) is not JSON: .") as caught:
        result_as_text(result)
    assert reason in str(caught.value)
