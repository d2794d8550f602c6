from __future__ import annotations

import asyncio
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import json
import pickle
import uuid
from typing import Annotated, Any, Generic, Literal, NamedTuple, Required, TypedDict, TypeVar

import attrs
import msgspec
import pytest
from msgspec import Meta

from lmbridge import LLMClient, LLMError, LLMResponseError, LLMStreamError, LLMValidationError
from lmbridge.client.sendable_schemas import simplify_answer_schema
from lmbridge.client.structured import answer_format_of
from lmbridge.testing import ScriptedServer, answer, reply, sse
from tests.support import MESSAGES, cancel_at_each_step, in_flight, piece

T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Item:
    name: str
    price: Annotated[float, Meta(ge=0, description="In euros.")]
    colour: Colour = Colour.RED
    tags: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Order:
    items: list[Item]
    customer: str | None = None
    stock: dict[str, int] = dataclasses.field(default_factory=dict)
    kind: Literal["sale", "gift"] = "sale"
    when: Annotated[dt.datetime, Meta(tz=True)] | None = None


@attrs.frozen
class Point:
    x: int = attrs.field(validator=attrs.validators.lt(100))
    y: int = 0


class Person(TypedDict, total=False):
    name: Required[str]
    age: int


class Reading(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    sensor_name: Annotated[str, Meta(pattern="^[a-z]+$", max_length=10)]
    value: float


class Node(msgspec.Struct):
    value: int
    children: list[Node] = []


class Folder(TypedDict):
    files: list[File]


class File(TypedDict):
    folder: Folder | None
    owner: Person


class Pair(msgspec.Struct, Generic[T]):
    left: T
    right: T


class Circle(msgspec.Struct, tag=True):
    radius: float


class Square(msgspec.Struct, tag=True):
    side: float


class Drawing(msgspec.Struct):
    shapes: list[Circle | Square]


class Corner(NamedTuple):
    x: int


class Plain:
    x: int


@dataclasses.dataclass
class HoldsPlain:
    plain: Plain


@dataclasses.dataclass
class HoldsUnknown:
    unknown: Unknown  # type: ignore[name-defined]  # noqa: F821 - that is what is tested


@dataclasses.dataclass
class Even:
    number: int

    def __post_init__(self) -> None:
        if self.number % 2:
            raise ValueError("Odd numbers are not even")


def schema_of(type_: Any) -> dict[str, Any]:
    schema: dict[str, Any] = answer_format_of(type_).response_format["json_schema"]["schema"]
    return schema


def field(annotation: Any) -> Any:
    """Returns the schema of a field with this annotation."""
    return schema_of(dataclasses.make_dataclass("Holder", [("field", annotation)]))["properties"]["field"]


ORDER = {"items": [{"name": "pen", "price": 1.5, "colour": "blue"}], "when": "2026-01-01T12:00:00Z"}
NOON = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)


# Answers


@pytest.mark.parametrize(
    ("type_", "text", "instance"),
    [
        (Order, json.dumps(ORDER), Order([Item("pen", 1.5, Colour.BLUE)], when=NOON)),
        (Point, '{"x": 1, "y": 2}', Point(1, 2)),
        (Person, '{"name": "Ada", "age": 36}', {"name": "Ada", "age": 36}),
        (Reading, '{"sensorName": "roof", "value": 1}', Reading("roof", 1.0)),
        (Node, '{"value": 1, "children": [{"value": 2}]}', Node(1, [Node(2)])),
        (Pair[int], '{"left": 1, "right": 2}', Pair(1, 2)),
        (Drawing, '{"shapes": [{"type": "Square", "side": 2}]}', Drawing([Square(2.0)])),
        (dict[str, int], '{"a": 1}', {"a": 1}),
    ],
)
async def test_an_answer_becomes_an_instance(
    scripted_server: ScriptedServer, client: LLMClient, type_: Any, text: str, instance: Any
) -> None:
    scripted_server.default = answer(text)
    parsed = await client.parse(MESSAGES, type_, temperature=0)
    assert parsed == instance
    assert type(parsed) is type(instance)
    (request,) = scripted_server.requests
    name = type_.__name__
    wire = {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema_of(type_)}}
    assert request.json == {
        "messages": MESSAGES,
        "temperature": 0,
        "response_format": wire,
        "model": "test-model",
        "stream": True,
    }


async def test_the_model_can_be_chosen_for_a_call(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = answer('{"x": 1}')
    assert await client.parse(MESSAGES, Point, model="other") == Point(1)
    assert scripted_server.requests[0].json["model"] == "other"


@pytest.mark.parametrize(
    "text",
    [
        '\n {"x": 1} \n',
        '```json\n{"x": 1}\n```',
        '\n```\n{"x": 1}```\n',
        '```JSON \r\n{\n"x": 1\n}\r\n```',
        '<think>{"x": 5}?</think>\n\n{"x": 1}',
        'So {"x": 5}, or else ...\n</think>\n{"x": 1}',
        '<think>\n```json\n{}\n```\n</think>\n```json\n{"x": 1}\n```',
        '{"x": 1, "note": "</think>"}',
        '{"x": 1, "note": "```"}',
    ],
)
async def test_reasoning_before_the_answer_and_a_fence_around_it_are_removed(
    scripted_server: ScriptedServer, client: LLMClient, text: str
) -> None:
    scripted_server.default = answer(text)
    assert await client.parse(MESSAGES, Point) == Point(1)
    assert len(scripted_server.requests) == 1


@pytest.mark.parametrize(
    "text",
    [
        'Here you are: {"x": 1}',
        '{"x": 1}\nI hope that helps!',
        'Of course!\n\n```json\n{"x": 1}\n```\n\nThat is all.',
        'See [1] and [2, 3] for it: {"x": 1}',
        'As in {curly} [square] (round): {"x": 1} :-}',
        '{"x": 1}\n\nOnce more:\n```\n{ "x": 1 }\n```',
        '```json\n{"x": 1}\n',
        '<think>{"x": 5}?</think>The answer is {"x": 1}.',
        '{"x": 1}<|im_end|>',
    ],
)
async def test_prose_around_the_only_value_is_ignored(
    scripted_server: ScriptedServer, client: LLMClient, text: str
) -> None:
    scripted_server.default = answer(text)
    assert await client.parse(MESSAGES, Point) == Point(1)
    assert len(scripted_server.requests) == 1


@pytest.mark.parametrize(
    ("type_", "text", "expected"),
    [
        (list[int], "Sure: [1, 2]", [1, 2]),
        (list[int], 'Sure: {"answer": [1, 2]}.', [1, 2]),
        (Literal["a", "b"], '```json\n{"answer": "a"}\n``` is it.', "a"),
        (list[Point], 'Both: [{"x": 1}, {"x": 2}]', [Point(1), Point(2)]),
    ],
)
async def test_prose_is_ignored_around_values_that_are_not_objects(
    scripted_server: ScriptedServer, client: LLMClient, type_: Any, text: str, expected: Any
) -> None:
    scripted_server.default = answer(text)
    assert await client.parse(MESSAGES, type_) == expected
    assert len(scripted_server.requests) == 1


@pytest.mark.parametrize("text", ['["use </think> to close"]', '{"answer": ["use </think> to close"]}'])
@pytest.mark.parametrize("fence", ["{}", "```json\n{}\n```", "```\n{}\n```\n", "\n {}\n"])
async def test_a_tag_in_a_string_of_the_answer_is_kept(
    scripted_server: ScriptedServer, client: LLMClient, text: str, fence: str
) -> None:
    scripted_server.default = answer(fence.format(text))
    assert await client.parse(MESSAGES, list[str]) == ["use </think> to close"]
    assert len(scripted_server.requests) == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"x": 1} or {"x": 2}',
        '{} is empty, but {"x": 1} is not.',
        '{"x": 1} and then {"x": ',
        '{"points": [{"x": 1}, {"x": oops}]}',
        '{answer: {"x": 1}}',
        'Both: [{"x": 1}]',
        'It is {"x": 1}, or else: [{"y": ',
        '```json\n{"x": 1}\n```\n```json\n{"x": 2}\n```',
    ],
)
async def test_nothing_is_guessed_if_the_value_is_not_the_only_one(
    scripted_server: ScriptedServer, client: LLMClient, text: str
) -> None:
    scripted_server.script(answer(text), answer('{"x": 7}'))
    assert await client.parse(MESSAGES, Point) == Point(7)
    assert len(scripted_server.requests) == 2


@pytest.mark.parametrize("content", ["", " \n", None])
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize(
    "reasoning", ['{"x": 1}', '```json\n{"x": 1}\n```', 'I think that it is:\n```json\n{"x": 1}\n```\n', '{"x": 1}\n']
)
async def test_an_answer_that_the_server_took_for_reasoning_is_read(
    scripted_server: ScriptedServer, client: LLMClient, content: str | None, key: str, reasoning: str
) -> None:
    delta = {"role": "assistant", "content": content, key: reasoning}
    choice = {"index": 0, "delta": delta, "finish_reason": "stop"}
    scripted_server.default = sse({**piece(), "choices": [choice]}, done=True)
    assert await client.parse(MESSAGES, Point) == Point(1)
    assert len(scripted_server.requests) == 1


async def test_a_wrong_answer_that_the_server_took_for_reasoning_is_sent_back(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer("", reasoning='{"x": "one"}'), answer('{"x": 1}'))
    assert await client.parse(MESSAGES, Point) == Point(1)
    assert scripted_server.requests[1].json["messages"][-2] == {"role": "assistant", "content": '{"x": "one"}'}


async def test_reasoning_in_a_separate_field_is_ignored(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = answer('{"x": 1}', reasoning='Maybe {"x": 2}?')
    assert await client.parse(MESSAGES, Point) == Point(1)


async def test_a_complete_answer_counts_even_if_the_model_was_cut_off_after_it(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.default = answer('{"x": 1}\n\n\n', finish_reason="length")
    assert await client.parse(MESSAGES, Point) == Point(1)


# Correcting a wrong answer


async def test_a_wrong_answer_is_sent_back_once_with_what_is_wrong(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    wrong = '{"items": [{"name": "pen", "price": 1}, {"name": "ink", "price": "2.50"}]}'
    scripted_server.script(answer(f"<think>Hm.</think>\n{wrong}"), answer(json.dumps(ORDER)))
    messages = tuple(copy.deepcopy(MESSAGES))
    assert (await client.parse(messages, Order, seed=1)).items == [Item("pen", 1.5, Colour.BLUE)]
    first, second = scripted_server.requests
    expected_text = (
        "That is wrong: the answer is not a valid Order: $.items[1].price: expected `float`, got `str`."
        " Answer again, with the whole JSON object."
    )
    repair = [{"role": "assistant", "content": wrong}, {"role": "user", "content": expected_text}]
    assert second.json == {**first.json, "messages": [*MESSAGES, *repair]}
    assert messages == tuple(MESSAGES)


@pytest.mark.parametrize(
    ("type_", "text", "path", "reason"),
    [
        (
            Order,
            '{"items": [{"name": "a", "price": 1}, {"name": "b"}]}',
            "$.items[1]",
            "missing required field `price`",
        ),
        (Order, '{"items": [{"name": "a", "price": -1}]}', "$.items[0].price", "expected `float` >= 0.0"),
        (Order, '{"items": [], "kind": "loan"}', "$.kind", "invalid enum value 'loan'"),
        (Order, '{"items": [], "when": "noon"}', "$.when", "invalid RFC3339 encoded datetime"),
        (Order, '{"items": [], "when": "2026-01-01T12:00:00"}', "$.when", "expected `datetime` with a timezone"),
        (Order, '{"items": [], "stock": {"pen": "two"}}', "$.stock[...]", "expected `int`, got `str`"),
        (dict[int, int], '{"a": 1}', "key in $", "expected `int`, got `str`"),
        (Person, '{"age": 1}', "$", "missing required field `name`"),
        (Reading, '{"sensorName": "Roof", "value": 1}', "$.sensorName", "matching regex '^[a-z]+$'"),
        (Reading, '{"sensorName": "a", "value": 1, "unit": "C"}', "$", "object contains unknown field `unit`"),
        (Node, '{"value": 1, "children": [{"value": 2, "children": [{}]}]}', "$.children[0].children[0]", "`value`"),
        (Point, '{"x": 100}', "$", "'x' must be < 100: 100"),
        (Pair[Even], '{"left": {"number": 2}, "right": {"number": 3}}', "$.right", "odd numbers are not even"),
        (Point, '{"x": "1"}', "$.x", "expected `int`, got `str`"),
        (Point, "[1, 2]", "$", "expected `object`, got `array`"),
        (Point, "Here you are: x is 1.", "$", "it is not valid JSON: JSON is malformed"),
        (Point, '{"x": 1} {"x": 2}', "$", "it is not valid JSON: JSON is malformed: trailing characters"),
        (Point, '{"x": 1', "$", "it is not valid JSON: Input data was truncated"),
        (
            Point,
            '{"x": 1, "z": ' + "[" * 1_000_000 + "]" * 1_000_000 + "}",
            "$",
            # The words for this have changed in Python 3.14, and since then the size of the stack is the limit.
            "it is not valid JSON: ",
        ),
    ],
)
async def test_a_second_wrong_answer_raises_with_its_text_and_the_path_of_the_mistake(
    scripted_server: ScriptedServer, client: LLMClient, type_: Any, text: str, path: str, reason: str
) -> None:
    scripted_server.default = answer("", chunks=[text])
    with pytest.raises(LLMValidationError) as caught:
        await client.parse(MESSAGES, type_)
    error = caught.value
    assert len(scripted_server.requests) == 2
    assert f"the answer is not a valid {type_.__name__}: {path}: " in str(error)
    assert reason in str(error)
    assert "(after 2 attempts)" in str(error)
    assert error.body == text
    assert error.partial["choices"][0]["message"]["content"] == text
    url = scripted_server.api_base
    operation = {"operation": "structured answer", "url": url, "model": "test-model"}
    assert error.context == {**operation, "attempts": 2, "path": path}
    assert error.hint
    assert isinstance(error.__cause__, ValueError | RecursionError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


async def test_an_answer_with_half_a_character_has_a_question_mark_and_can_be_sent_back(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    # Some servers cut an emoji in two.
    delta = '{"index": 0, "delta": {"content": "{\\ud83d"}, "finish_reason": "stop"}'
    scripted_server.default = sse(f'data: {{"choices": [{delta}]}}\n\n')
    with pytest.raises(LLMValidationError, match=r"\$: it is not valid JSON: ") as caught:
        await client.parse(MESSAGES, Point)
    assert caught.value.body == "{?"
    assert scripted_server.requests[1].json["messages"][1]["content"] == "{?"


async def test_the_error_describes_the_last_answer(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer('{"x": "a"}'), answer('{"x": 1, "y": "b"}'))
    with pytest.raises(LLMValidationError, match=r"\$\.y: expected `int`") as caught:
        await client.parse(MESSAGES, Point)
    assert caught.value.body == '{"x": 1, "y": "b"}'


async def test_only_the_beginning_of_a_long_wrong_answer_is_sent_back(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer("", chunks=["no " * 50_000]), answer('{"x": 1}'))
    assert await client.parse(MESSAGES, Point) == Point(1)
    shown = scripted_server.requests[1].json["messages"][1]["content"]
    assert (len(shown), shown[-6:]) == (8003, " no...")


async def test_a_failed_request_is_not_corrected(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = reply(400, {"error": "failed to parse grammar"})
    with pytest.raises(LLMResponseError, match="failed to parse grammar"):
        await client.parse(MESSAGES, Point)
    assert len(scripted_server.requests) == 1


async def test_an_incomplete_stream_raises(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = sse(piece('{"x": 1}'), end=False)
    with pytest.raises(LLMStreamError) as caught:
        await client.parse(MESSAGES, Point)
    assert caught.value.partial["choices"][0]["message"]["content"] == '{"x": 1}'
    assert len(scripted_server.requests) == 1


CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("behaviour", "expected_text"),
    [
        (answer('{"x": 1', finish_reason="length"), "the answer was cut off (after 1 attempt); raise max_tokens"),
        (answer('{"x": "a', finish_reason="length"), "the answer was cut off"),
        (answer("<think>Let me see", finish_reason="length"), "the answer was cut off"),
        (answer("", tool_calls=[CALL]), "the model called a tool instead of answering"),
        (answer(""), "the answer is empty"),
        (answer(" \n"), "the answer is empty"),
        (answer("", reasoning='{"x": 1} or {"x": 2}'), "the model reasoned, but did not answer"),
        (answer("", reasoning='Perhaps {"x": 1}. Let me see.'), "the model reasoned, but did not answer"),
        (answer("", reasoning='{"x": 1', finish_reason="length"), "the answer was cut off"),
        (answer('So {"x": 1} and', finish_reason="length"), "the answer was cut off"),
        (answer("", reasoning='{"x": 1}', tool_calls=[CALL]), "the model called a tool instead of answering"),
        (answer('<think>{"x": 1}'), "the model reasoned, but did not answer"),
        (sse(piece(finish_reason="stop"), done=True), "the stream ended without any part of an answer"),
        (
            sse({**piece(), "choices": [{"index": 0, "delta": {"refusal": "No way."}, "finish_reason": "stop"}]}),
            "the model refused: No way.",
        ),
    ],
)
async def test_the_model_is_not_asked_again_if_there_is_nothing_to_correct(
    scripted_server: ScriptedServer, client: LLMClient, behaviour: Any, expected_text: str
) -> None:
    scripted_server.default = behaviour
    with pytest.raises(LLMError) as caught:
        await client.parse(MESSAGES, Point)
    assert expected_text in str(caught.value)
    assert caught.value.hint
    assert caught.value.partial is not None
    assert "path" not in caught.value.context
    assert len(scripted_server.requests) == 1


LOOP = '{"x": "' + "la la " * 50


@pytest.mark.parametrize(
    "behaviour",
    [
        answer(LOOP, finish_reason="length"),
        answer("", reasoning="I wait. " * 40, finish_reason="length"),
        answer("\n\n", reasoning="I wait. " * 40, finish_reason="length"),
        answer(" " * 300, finish_reason="length"),
        answer("<think>" + "I wait. " * 40, finish_reason="length"),
    ],
)
async def test_a_model_that_repeats_itself_is_asked_once_more_with_a_penalty(
    scripted_server: ScriptedServer, client: LLMClient, behaviour: Any
) -> None:
    scripted_server.script(behaviour, answer('{"x": 1, "y": 2}'))
    assert await client.parse(MESSAGES, Point, temperature=0) == Point(1, 2)
    first, second = (request.json for request in scripted_server.requests)
    assert second == {**first, "frequency_penalty": 0.6}


async def test_a_model_that_repeats_itself_again_is_not_asked_a_third_time(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.default = answer(LOOP, finish_reason="length")
    with pytest.raises(LLMValidationError, match="the model repeated itself until its answer was cut off") as caught:
        await client.parse(MESSAGES, Point)
    assert caught.value.body == LOOP.strip()
    assert caught.value.context["attempts"] == len(scripted_server.requests) == 2


async def test_a_server_that_refuses_the_penalty_does_not_hide_the_answer_that_was_cut_off(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(
        answer(LOOP, finish_reason="length"), reply(400, {"error": {"message": "unsupported: frequency_penalty"}})
    )
    with pytest.raises(LLMValidationError, match="the model repeated itself until its answer was cut off") as caught:
        await client.parse(MESSAGES, Point)
    assert caught.value.body == LOOP.strip()
    assert "frequency_penalty" in str(caught.value.__cause__)


async def test_a_penalty_of_the_caller_is_not_replaced(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = answer(LOOP, finish_reason="length")
    with pytest.raises(LLMValidationError, match="repeated itself"):
        await client.parse(MESSAGES, Point, frequency_penalty=0.2)
    assert [request.json["frequency_penalty"] for request in scripted_server.requests] == [0.2]


async def test_an_answer_may_be_both_corrected_and_asked_for_with_a_penalty(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer('{"x": "a"}'), answer(LOOP, finish_reason="length"), answer('{"x": 1, "y": 2}'))
    assert await client.parse(MESSAGES, Point) == Point(1, 2)
    _, second, third = (request.json for request in scripted_server.requests)
    assert third == {**second, "frequency_penalty": 0.6}
    assert len(third["messages"]) == len(MESSAGES) + 2


# Cancellation


async def test_cancelling_parse_stops_the_server(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = answer("", chunks=['{"x":', " 1}"], gate=asyncio.Event())
    task = asyncio.create_task(client.parse(MESSAGES, Point))
    await scripted_server.wait_until(lambda: scripted_server.requests)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    assert in_flight(client) == 0


async def test_cancelling_at_any_step_leaves_nothing_behind(scripted_server: ScriptedServer, client: LLMClient) -> None:
    async def run() -> None:
        scripted_server._script.clear()
        scripted_server.script(answer('{"x": "a"}'), answer('{"x": 1}'))
        assert await client.parse(MESSAGES, Point) == Point(1)

    async def after() -> None:
        assert in_flight(client) == 0

    await cancel_at_each_step(run, after, at_least=4)


# Arguments


@pytest.mark.parametrize("param", ["n", "response_format", "stream"])
async def test_parameters_that_parse_sets_itself_are_refused(
    scripted_server: ScriptedServer, client: LLMClient, param: str
) -> None:
    with pytest.raises(LLMValidationError, match=rf"^parse\(\) does not accept {param}, because"):
        await client.parse(MESSAGES, Point, **dict[str, Any]({param: 1}))
    with pytest.raises(LLMValidationError, match="messages is empty"):
        await client.parse([], Point)
    assert not scripted_server.requests


@pytest.mark.parametrize(
    ("type_", "expected_text"),
    [
        (Plain, "Plain: type <class '.*Plain'> is not supported"),
        (HoldsPlain, "HoldsPlain: type <class '.*Plain'> is not supported"),
        (HoldsUnknown, "HoldsUnknown: name 'Unknown' is not defined"),
        (dataclasses.make_dataclass("Odd", [("x", Annotated[str, Meta(ge=0)])]), "Odd: Can only set `ge` on a numeric"),
        ("Point", "Point: Type '.*Point.*' is not supported"),
        ({"type": "object"}, "unhashable type: 'dict'"),
        (None, "None: it has no value but null"),
    ],
)
async def test_a_type_that_cannot_be_used_is_refused_before_anything_is_sent(
    scripted_server: ScriptedServer, client: LLMClient, type_: Any, expected_text: str
) -> None:
    with pytest.raises(
        LLMValidationError, match=f"^cannot parse an answer as .*{expected_text}.*; give a dataclass"
    ) as caught:
        await client.parse(MESSAGES, type_)
    assert "\n" not in str(caught.value)
    assert not scripted_server.requests


# Schemas


def test_the_schema_is_one_that_local_servers_accept() -> None:
    item = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "price": {"type": "number", "minimum": 0, "description": "In euros."},
            "colour": {"enum": ["blue", "red"]},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "price"],
        "additionalProperties": False,
    }
    assert schema_of(Order) == {
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": item},
            "customer": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "stock": {"type": "object", "additionalProperties": {"type": "integer"}},
            "kind": {"enum": ["sale", "gift"]},
            "when": {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]},
        },
        "required": ["items"],
        "additionalProperties": False,
    }


def test_a_recursive_type_keeps_its_reference() -> None:
    node = {
        "type": "object",
        "properties": {
            "value": {"type": "integer"},
            "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}},
        },
        "required": ["value"],
        "additionalProperties": False,
    }
    assert schema_of(Node) == {**node, "$defs": {"Node": node}}
    # The order depends on the version of msgspec.
    assert field(Node | None) in (
        {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
        {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/Node"}]},
    )


@pytest.mark.parametrize("reference", ["#", "#/definitions/Node", "#/properties/next"])
def test_a_schema_that_contains_itself_outside_of_defs_is_written_out_twice(reference: str) -> None:
    """Pydantic models may have a schema of their own, of any draft."""
    node = {"type": "object", "properties": {"next": {"$ref": reference}, "value": {"type": "string"}}}
    following = {"anyOf": [{"$ref": reference}, {"type": "null"}]}
    schema = {"type": "object", "properties": {"next": following}, "definitions": {"Node": node}}
    simplified = simplify_answer_schema(schema)
    assert "$ref" not in json.dumps(simplified)
    assert json.dumps(simplified).count('"next"') <= 4


def test_mutually_recursive_types_keep_their_references() -> None:
    schema = schema_of(Folder)
    assert schema["properties"]["files"]["items"] == {"$ref": "#/$defs/File"}
    assert sorted(schema["$defs"]) == ["File", "Folder"]
    assert schema["$defs"]["File"]["properties"]["owner"] == schema_of(Person)


def test_constraints_that_servers_refuse_are_left_to_the_validation() -> None:
    assert field(tuple[int, str]) == {
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "prefixItems": [{"type": "integer"}, {"type": "string"}],
    }
    assert field(tuple[Point, int])["prefixItems"] == [schema_of(Point), {"type": "integer"}]
    assert field(Circle | Square) == {"anyOf": [schema_of(Circle), schema_of(Square)]}
    assert field(decimal.Decimal) == {"type": "string"}
    assert field(dt.timedelta) == {"type": "string"}
    assert field(uuid.UUID) == {"type": "string", "format": "uuid"}
    assert field(dt.date) == {"type": "string", "format": "date"}


@pytest.mark.parametrize(
    ("pattern", "is_sent"),
    [
        ("^[a-z]{3}$", True),
        ("^(ab|c)+$", True),
        (r"^a\.b$", True),
        ("[a-z]", False),
        ("^a", False),
        (r"^\d+$", False),
        ("^(?=a)b$", False),
        ("^(?:a)$", False),
        (r"^\(?$", True),
        (r"^a\$", False),
    ],
)
def test_a_pattern_is_sent_only_if_every_server_accepts_it(pattern: str, is_sent: bool) -> None:
    assert ("pattern" in field(Annotated[str, Meta(pattern=pattern)])) is is_sent


def test_fields_may_have_the_names_of_keywords() -> None:
    names = ["title", "default", "discriminator", "format", "pattern", "items", "properties", "anyOf"]
    type_ = TypedDict("type_", dict.fromkeys(names, int) | {"$ref": int})  # type: ignore[misc]  # made of a list
    schema = schema_of(type_)
    assert schema["properties"] == {name: {"type": "integer"} for name in [*names, "$ref"]}


def test_descriptions_are_sent_and_titles_are_not() -> None:
    assert field(Annotated[Point, Meta(title="A point", description="Where it is.", examples=[{"x": 1}])]) == {
        **schema_of(Point),
        "description": "Where it is.",
        "examples": [{"x": 1}],
    }


@pytest.mark.parametrize("type_", [Pair[int], dataclasses.make_dataclass("Größe" * 20, [("x", int)])])
def test_the_name_is_one_that_servers_accept(type_: Any) -> None:
    name = answer_format_of(type_).response_format["json_schema"]["name"]
    assert name.isascii()
    assert name.replace("_", "").isalnum()
    assert len(name) <= 64


@pytest.mark.parametrize(
    ("type_", "values"),
    [
        (Literal["yes", "no"], ["yes", "no"]),
        (Literal["no", "yes"], ["no", "yes"]),
        (list[Literal["yes", "no"]], ["yes", "no"]),
        (list[Literal["no", "yes"]], ["no", "yes"]),
    ],
)
def test_the_values_of_a_literal_are_in_the_order_in_which_they_are_written(type_: Any, values: list[str]) -> None:
    assert f"'enum': {values}" in str(answer_format_of(type_).schema)


def test_a_schema_is_computed_once_for_a_type() -> None:
    assert answer_format_of(Order) is answer_format_of(Order)
    assert answer_format_of(Literal["a", "b"]) is answer_format_of(Literal["a", "b"])
    assert answer_format_of(Pair[int]) is not answer_format_of(Pair[str])
