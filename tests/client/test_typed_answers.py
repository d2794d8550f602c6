"""`client.parse` with pydantic models, and with types that are not an object in JSON."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import json
import re
import subprocess
import sys
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, Generic, Literal, NotRequired, TypedDict, TypeVar, assert_type

import attrs
import msgspec
import pydantic
import pytest
from pydantic import BaseModel, Field
from pydantic.v1 import BaseModel as OldModel

from lmbridge import LLMClient, LLMValidationError
from lmbridge.client.structured import answer_format_of
from lmbridge.client.typed_json import TypedJson
from lmbridge.testing import ScriptedServer, answer
from tests.support import MESSAGES


class Mood(enum.StrEnum):
    GLAD = "glad"
    SAD = "sad"


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


class Author(BaseModel):
    name: str = Field(description="The full name.")
    born: dt.date | None = None


class Book(BaseModel):
    """A book."""

    model_config = pydantic.ConfigDict(extra="forbid")

    title: str = Field(min_length=1)
    year: int = Field(alias="publishedIn", ge=1450)
    authors: list[Author] = []


class Chapter(BaseModel):
    title: str
    parts: list[Chapter] = []


class Cat(BaseModel):
    meows: int


class Dog(BaseModel):
    barks: int


@dataclasses.dataclass
class Circle:
    radius: float


@dataclasses.dataclass
class Square:
    side: float


@dataclasses.dataclass
class Shelf:
    """A shelf.

    Attributes:
        books: The books, from left to right,
            without gaps.
        pet: The animal that sleeps on it.
    """

    books: list[Book]
    pet: Cat | Dog | None = None
    shape: Circle | Square | str = "none"
    width: Annotated[int, Field(ge=10, description="In centimetres.")] = 80
    folder: Path = Path()
    next: Shelf | None = None


@attrs.frozen
class Library:
    shelves: list[Shelf]
    _city: str = attrs.field(default="Ulm", metadata={"description": "Where it is."})
    opened: dt.date | None = attrs.field(default=None, kw_only=True)


class Order(TypedDict, total=False):
    book: Book
    count: Annotated[int, "How many."]


class Package(msgspec.Struct):
    order: Order
    pet: Cat | Dog


@pydantic.dataclasses.dataclass
class Even:
    number: int

    @pydantic.field_validator("number")
    @classmethod
    def is_even(cls, number: int) -> int:
        if number % 2:
            raise ValueError("odd numbers are not even")
        return number


T = TypeVar("T")


class Odd(enum.Enum):
    """An enum with values of several types."""

    NUMBER = 7
    TEXT = "a"
    RATIO = 2.0
    FLAG = True
    NOTHING = None
    DAY = dt.date(2001, 2, 3)


class Planet(enum.Enum):
    """An enum with values that JSON does not have, so its names count."""

    EARTH = (5.97e24, 6.3e6)
    MARS = (6.4e23, 3.3e6)


class Huge(enum.IntEnum):
    ALL = 2**70


class OldAuthor(OldModel):
    name: str


class OldBook(OldModel):
    """A model of pydantic 1."""

    title: str
    authors: list[OldAuthor] = []


@dataclasses.dataclass
class Page(Generic[T]):
    """A page with items of any type."""

    items: list[T]
    first: T | None = None
    cover: Book | None = None


class Pair(TypedDict, Generic[T]):
    one: T
    other: NotRequired[T]


BOOK_JSON = {"title": "Emma", "publishedIn": 1815, "authors": [{"name": "Jane Austen", "born": "1775-12-16"}]}
BOOK = Book(title="Emma", publishedIn=1815, authors=[Author(name="Jane Austen", born=dt.date(1775, 12, 16))])


def schema_of(type_: Any) -> dict[str, Any]:
    return dict(answer_format_of(type_).schema)


# Objects


@pytest.mark.parametrize(
    ("type_", "value", "instance"),
    [
        (Book, BOOK_JSON, BOOK),
        (Chapter, {"title": "1", "parts": [{"title": "1.1"}]}, Chapter(title="1", parts=[Chapter(title="1.1")])),
        (dict[str, Book], {"emma": BOOK_JSON}, {"emma": BOOK}),
        (Shelf, {"books": [BOOK_JSON], "pet": {"barks": 2}}, Shelf([BOOK], Dog(barks=2))),
        (Shelf, {"books": [], "shape": {"side": 2}, "folder": "a/b"}, Shelf([], None, Square(2.0), folder=Path("a/b"))),
        (Shelf, {"books": [], "next": {"books": [BOOK_JSON]}}, Shelf([], next=Shelf([BOOK]))),
        (
            Library,
            {"shelves": [{"books": [BOOK_JSON]}], "city": "Bonn", "opened": "2001-02-03"},
            Library([Shelf([BOOK])], "Bonn", opened=dt.date(2001, 2, 3)),
        ),
        (Order, {"book": BOOK_JSON}, {"book": BOOK}),
        (Package, {"order": {"count": 1}, "pet": {"meows": 1}}, Package({"count": 1}, Cat(meows=1))),
        (Even, {"number": 2}, Even(2)),
        (OldBook, {"title": "A", "authors": [{"name": "B"}]}, OldBook(title="A", authors=[OldAuthor(name="B")])),
        (dict[str, Odd], {"a": 2, "b": True, "c": None}, {"a": Odd.RATIO, "b": Odd.FLAG, "c": Odd.NOTHING}),
        (Page[int], {"items": [1]}, Page([1])),
        (Page[Book], {"items": [BOOK_JSON], "cover": BOOK_JSON}, Page([BOOK], cover=BOOK)),
        (Page[Page[Cat]], {"items": [{"items": [{"meows": 1}]}]}, Page([Page([Cat(meows=1)])])),
        (Pair[Book], {"one": BOOK_JSON}, {"one": BOOK}),
        (Pair[int], {"one": 1, "other": 2}, {"one": 1, "other": 2}),
    ],
)
async def test_an_answer_becomes_an_instance_with_the_models_within_it(
    scripted_server: ScriptedServer, client: LLMClient, type_: Any, value: Any, instance: Any
) -> None:
    scripted_server.default = answer(json.dumps(value))
    parsed = await client.parse(MESSAGES, type_)
    assert parsed == instance
    assert type(parsed) is type(instance)
    (request,) = scripted_server.requests
    assert request.json["response_format"]["json_schema"]["schema"] == schema_of(type_)
    assert schema_of(type_)["type"] == "object"


def test_the_schema_of_a_model_is_one_that_local_servers_accept() -> None:
    assert schema_of(Book) == {
        "type": "object",
        "description": "A book.",
        "properties": {
            "title": {"type": "string", "minLength": 1},
            "publishedIn": {"type": "integer", "minimum": 1450},
            "authors": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "description": "The full name."},
                        "born": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
                    },
                    "required": ["name"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["title", "publishedIn"],
        "additionalProperties": False,
    }


def test_a_recursive_model_keeps_its_reference() -> None:
    schema = schema_of(Chapter)
    (name,) = schema["$defs"]
    assert schema["properties"]["parts"]["items"] == {"$ref": f"#/$defs/{name}"}
    assert schema["$defs"][name]["properties"]["parts"]["items"] == {"$ref": f"#/$defs/{name}"}


def test_fields_are_described_by_annotations_metadata_and_docstrings() -> None:
    shelf = schema_of(Shelf)
    assert shelf["description"] == "A shelf."
    assert shelf["properties"]["books"]["description"] == "The books, from left to right, without gaps."
    assert shelf["properties"]["pet"]["description"] == "The animal that sleeps on it."
    assert shelf["properties"]["width"] == {"type": "integer", "minimum": 10, "description": "In centimetres."}
    assert schema_of(Library)["properties"]["city"]["description"] == "Where it is."
    assert schema_of(Order)["properties"]["count"]["description"] == "How many."


def test_two_models_of_the_same_name_are_kept_apart() -> None:
    other = pydantic.create_model("Author", age=(int, ...))
    type_ = dataclasses.make_dataclass("Both", [("one", Author), ("other", other), ("circle", Circle)])
    properties = schema_of(type_)["properties"]
    assert list(properties["one"]["properties"]) == ["name", "born"]
    assert list(properties["other"]["properties"]) == ["age"]


@pytest.mark.parametrize(
    ("type_", "value", "text"),
    [
        (dict[str, Odd], {"a": 3}, "$[...]: invalid enum value 3"),
        (OldBook, {"title": "A", "authors": [{}]}, "$.authors[0].name: field required"),
        (Page[int], {"items": ["a"]}, "$.items[0]: expected `int`, got `str`"),
        (Page[Book], {"items": [BOOK_JSON, {}]}, "$.items[1].title: field required"),
    ],
)
def test_an_answer_that_does_not_fit_is_reported_with_its_path(type_: Any, value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        answer_format_of(type_).decode(json.dumps(value))


# Types that are not an object


@pytest.mark.parametrize(
    ("type_", "value", "instance"),
    [
        (int, 3, 3),
        (float, 1.5, 1.5),
        (bool, True, True),
        (Odd, "2001-02-03", Odd.DAY),
        (Odd, 7, Odd.NUMBER),
        (list[Odd], [True, 2.0, "a"], [Odd.FLAG, Odd.RATIO, Odd.TEXT]),
        (Odd | int, 9, 9),
        (Planet, "MARS", Planet.MARS),
        (Huge, "ALL", Huge.ALL),
        (list[OldAuthor], [{"name": "A"}], [OldAuthor(name="A")]),
        (list[Page[Path]], [{"items": ["a"]}], [Page([Path("a")])]),
        (str, "yes", "yes"),
        (Mood, "sad", Mood.SAD),
        (Level, 2, Level.HIGH),
        (Literal["a", "b"], "b", "b"),
        (list[Book], [BOOK_JSON], [BOOK]),
        (list[int], [1, 2], [1, 2]),
        (Cat | Dog, {"barks": 1}, Dog(barks=1)),
        (Circle | Square, {"side": 1}, Square(1.0)),
        (Circle | str, "round", "round"),
        (Book | None, None, None),
        (list[Circle | Dog], [{"barks": 1}, {"radius": 1}], [Dog(barks=1), Circle(1.0)]),
        (tuple[int, Mood], [1, "glad"], (1, Mood.GLAD)),
        (Annotated[int, Field(gt=1)], 2, 2),
    ],
)
@pytest.mark.parametrize("is_wrapped", [True, False])
async def test_a_type_that_is_not_an_object_is_wrapped_on_the_wire(
    scripted_server: ScriptedServer, client: LLMClient, type_: Any, value: Any, instance: Any, is_wrapped: bool
) -> None:
    # A server without grammars does not show the model the name of the field.
    scripted_server.default = answer(json.dumps({"answer": value} if is_wrapped else value))
    parsed = await client.parse(MESSAGES, type_)
    assert parsed == instance
    assert type(parsed) is type(instance)
    (request,) = scripted_server.requests
    schema = request.json["response_format"]["json_schema"]["schema"]
    assert schema["type"] == "object"
    assert list(schema["properties"]) == schema["required"] == ["answer"]
    assert schema["additionalProperties"] is False


def test_the_wrapper_has_a_name_that_servers_accept_and_people_can_read() -> None:
    assert answer_format_of(Annotated[int, Field(gt=1)]).name == "int"
    format_ = answer_format_of(list[Book] | None)
    assert format_.name == "list[Book] | None"
    assert format_.response_format["json_schema"]["name"] == "list_Book_None"


# The order of alternatives


@dataclasses.dataclass
class Disc:
    radius: float


def _page_of(parts: Any) -> Any:
    # The module `typing` returns the same object for equal parameters, unless it has forgotten it.
    return GenericAlias(Page, (parts,))


@pytest.mark.parametrize(
    ("make", "value", "read"),
    [
        (lambda parts: parts, {"radius": 1}, lambda answer: answer),
        (lambda parts: GenericAlias(list, (parts,)), [{"radius": 1}], lambda answer: answer[0]),
        (
            lambda parts: GenericAlias(dict, (str, GenericAlias(tuple, (parts, int)))),
            {"a": [{"radius": 1}, 2]},
            lambda answer: answer["a"][0],
        ),
        (
            lambda parts: GenericAlias(list, (Annotated[parts, Field()],)),
            [{"radius": 1}],
            lambda answer: answer[0],
        ),
        (_page_of, {"items": [{"radius": 1}]}, lambda answer: answer.items[0]),
    ],
    ids=["a union", "a list", "a dict", "an annotated type", "a generic class"],
)
def test_the_first_alternative_that_fits_counts_whichever_order_was_read_before(
    make: Any, value: Any, read: Any
) -> None:
    for _ in range(2):
        for parts, class_ in ((Circle | Disc, Circle), (Disc | Circle, Disc)):
            answer = answer_format_of(make(parts)).decode(json.dumps(value))
            assert type(read(answer)) is class_


def test_a_format_is_computed_once_for_each_type() -> None:
    for type_ in (Circle | Disc, list[Book], Annotated[int, Field(gt=1)], Literal["a", "b"], Page[Disc | Circle]):
        assert answer_format_of(type_) is answer_format_of(type_)
    assert answer_format_of(list[Circle | Disc]) is answer_format_of(list[Circle | Disc])


# Wrong answers


@pytest.mark.parametrize(
    ("type_", "value", "path", "fault"),
    [
        (Book, {**BOOK_JSON, "publishedIn": 1}, "$.publishedIn", "input should be greater than or equal to 1450"),
        (Book, {}, "$.title", "field required; .publishedIn: Field required"),
        (Book, {**BOOK_JSON, "authors": [{}]}, "$.authors[0].name", "field required"),
        (Book, {**BOOK_JSON, "isbn": 1}, "$.isbn", "extra inputs are not permitted"),
        (Shelf, {"books": [BOOK_JSON, {**BOOK_JSON, "title": ""}]}, "$.books[1].title", "string should have at least"),
        (Shelf, {"books": [], "width": 5}, "$.width", "input should be greater than or equal to 10"),
        (Library, {"shelves": [{"books": []}, {"books": 1}]}, "$.shelves[1].books", "expected `array`, got `int`"),
        (Even, {"number": 3}, "$.number", "odd numbers are not even"),
        (list[Book], {"answer": [{**BOOK_JSON, "publishedIn": "x"}]}, "$.answer[0].publishedIn", "valid integer"),
        (list[Book], [{**BOOK_JSON, "publishedIn": "x"}], "$[0].publishedIn", "valid integer"),
        (Cat | Dog, {"answer": {"barks": "x"}}, "$.answer", "no alternative fits (barks: input should be a valid"),
        (Mood, {"answer": "angry"}, "$.answer", "invalid enum value 'angry'"),
        (int, {"answer": 1.5}, "$.answer", "expected `int`, got `float`"),
        (int, {"number": 1}, "$", "expected `int`, got `object`"),
    ],
)
async def test_a_wrong_answer_is_repaired_once_and_the_error_has_the_path(
    scripted_server: ScriptedServer, client: LLMClient, type_: Any, value: Any, path: str, fault: str
) -> None:
    scripted_server.default = answer(json.dumps(value))
    with pytest.raises(LLMValidationError) as caught:
        await client.parse(MESSAGES, type_)
    error = caught.value
    first, second = scripted_server.requests
    assert first.json["response_format"] == second.json["response_format"]
    assert f": {path}: " in second.json["messages"][-1]["content"]
    assert fault in second.json["messages"][-1]["content"]
    assert error.context["path"] == path
    assert fault in str(error)
    assert error.body == json.dumps(value)
    assert error.partial["choices"][0]["message"]["content"] == error.body


async def test_a_repaired_answer_is_returned(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer('{"title": "Emma"}'), answer(json.dumps(BOOK_JSON)))
    assert await client.parse(MESSAGES, Book) == BOOK


@pytest.mark.parametrize("annotation", [pydantic.create_model("Odd", call=(Any, ...)), list[Book]])
def test_a_type_is_prepared_once(annotation: Any) -> None:
    assert answer_format_of(annotation) is answer_format_of(annotation)


async def test_a_model_that_json_has_nothing_for_is_refused(scripted_server: ScriptedServer, client: LLMClient) -> None:
    class Handler(BaseModel):
        model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
        handler: ScriptedServer

    for type_ in (Handler, list[Handler]):
        with pytest.raises(LLMValidationError, match=r"^cannot parse an answer as"):
            await client.parse(MESSAGES, type_)
    assert not scripted_server.requests


# Type checkers


async def test_type_checkers_know_the_type_of_the_answer(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(
        answer('{"meows": 1}'), answer("[]"), answer("1"), answer('{"a": 1}'), answer('"glad"'), answer("[]")
    )
    assert_type(await client.parse(MESSAGES, Cat), Cat)
    assert_type(await client.parse(MESSAGES, list[Cat]), list[Cat])
    assert_type(await client.parse(MESSAGES, int), int)
    assert_type(await client.parse(MESSAGES, dict[str, int]), dict[str, int])
    assert_type(await client.parse(MESSAGES, Mood), Mood)
    assert_type(await client.parse(MESSAGES, list[Cat | Dog]), list[Cat | Dog])


# Duck typing


class Celsius:
    """A class with the methods of a pydantic model, as other libraries have them."""

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    @classmethod
    def model_json_schema(cls, **_options: Any) -> dict[str, Any]:
        return {"type": "object", "properties": {"degrees": {"type": "number"}}, "required": ["degrees"]}

    @classmethod
    def model_validate_json(cls, text: bytes) -> Celsius:
        return cls(json.loads(text)["degrees"])


def test_a_class_with_the_methods_of_a_model_is_one() -> None:
    (read,) = TypedJson[list[Celsius]](list[Celsius]).decode('[{"degrees": 20}]')
    assert read.degrees == 20


def test_pydantic_is_never_imported_by_the_library() -> None:
    program = (
        "import sys, dataclasses, lmbridge\n"
        "from lmbridge.client.structured import answer_format_of\n"
        "Point = dataclasses.make_dataclass('Point', [('x', int)])\n"
        "print(answer_format_of(list[Point]).decode('[{\"x\": 1}]'), 'pydantic' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[Point(x=1)] False\n"


def test_a_type_that_is_nested_too_deeply_is_refused() -> None:
    class Deep(pydantic.BaseModel):
        @classmethod
        def model_json_schema(cls, *_args: Any, **_options: Any) -> dict[str, Any]:
            schema: dict[str, Any] = {"type": "string"}
            for _ in range(5_000):
                schema = {"type": "object", "properties": {"x": schema}}
            return schema

    with pytest.raises(LLMValidationError, match="cannot parse an answer as Deep: it is nested too deeply"):
        answer_format_of(Deep)
