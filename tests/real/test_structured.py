"""`parse()` on a real llama.cpp server, whose grammar has to accept the schema of every type."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import uuid
from typing import Annotated, Any, Literal, TypedDict

import attrs
import msgspec
import pytest
from msgspec import Meta
from pydantic import BaseModel, Field

from lmbridge import LLMClient, LLMValidationError

pytestmark = [pytest.mark.real, pytest.mark.slow]

ORDER = [{"role": "user", "content": "Order two red pens for Ada, at 1.50 each, as JSON."}]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Item:
    name: Annotated[str, Meta(max_length=20)]
    amount: Annotated[int, Meta(ge=1, le=9)]
    colour: Colour


@dataclasses.dataclass
class Order:
    customer: Annotated[str, Meta(pattern="^[A-Z][a-z]{1,9}$")]
    items: Annotated[list[Item], Meta(min_length=1, max_length=2)]
    price: tuple[int, int]
    kind: Literal["sale", "gift"]


@attrs.frozen
class Event:
    day: dt.date
    start: Annotated[dt.datetime, Meta(tz=True)]
    key: uuid.UUID
    is_public: bool | None


class Stock(TypedDict):
    amounts: dict[str, int]


class Node(msgspec.Struct):
    value: int
    children: list[Node]


class Circle(msgspec.Struct, tag=True):
    radius: int


class Square(msgspec.Struct, tag=True):
    side: int


class Drawing(msgspec.Struct):
    shape: Circle | Square
    code: Annotated[str, Meta(pattern=r"^\d*", max_length=8)]


@pytest.mark.parametrize("type_", [Order, Event, Drawing])
async def test_the_model_answers_with_a_valid_instance(client: LLMClient, type_: Any) -> None:
    instance = await client.parse(ORDER, type_, temperature=0, seed=1, max_tokens=400)
    assert msgspec.convert(msgspec.to_builtins(instance), type_) == instance


class Pen(BaseModel):
    name: str = Field(min_length=1, max_length=20)
    colour: Colour
    price: float | None = None


@dataclasses.dataclass
class Refusal:
    reason: Annotated[str, Meta(max_length=40)]


@pytest.mark.parametrize(
    ("type_", "classes"),
    [
        (Pen, Pen),
        (Annotated[list[Pen], Meta(min_length=1, max_length=2)], list),
        (Pen | Refusal, Pen | Refusal),
        (Refusal | None, Refusal | None),
        (Colour, Colour),
        (int, int),
        (bool, bool),
        (Literal["pens", "books"], str),
    ],
)
async def test_the_server_accepts_models_and_types_that_are_not_an_object(
    client: LLMClient, type_: Any, classes: Any
) -> None:
    answer = await client.parse(ORDER, type_, temperature=0, seed=1, max_tokens=200)
    assert isinstance(answer, classes)


@pytest.mark.parametrize("type_", [Stock, Node])
async def test_the_server_accepts_types_whose_values_can_grow_without_end(client: LLMClient, type_: Any) -> None:
    try:
        await client.parse(ORDER, type_, temperature=0, seed=1, max_tokens=60)
    except LLMValidationError as error:
        assert "the answer was cut off" in str(error)  # noqa: PT017 - the answer may also be complete


async def test_an_answer_that_is_cut_off_raises_with_the_partial_answer(client: LLMClient) -> None:
    with pytest.raises(LLMValidationError, match="the answer was cut off") as caught:
        await client.parse(ORDER, Order, temperature=0, max_tokens=5)
    assert caught.value.body
    assert caught.value.partial["choices"][0]["finish_reason"] == "length"
