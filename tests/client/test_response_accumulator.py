"""Events of a response that are told apart by their `output_index`, their ids, or by neither."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from lmbridge import LLMStreamError
from lmbridge.client.response_accumulator import ResponseAccumulator
from tests.support import assert_linear

Event = dict[str, Any]


def output_of(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Returns the output of a response whose last event has not arrived."""
    accumulator = ResponseAccumulator()
    for event in events:
        accumulator.add(event)
    output: Any = accumulator.reply()["output"]
    return list(output)


def texts_of(events: Iterable[Event]) -> list[str]:
    return ["".join(part.get("text", "") for part in item.get("content", ())) for item in output_of(events)]


def added(kind: str = "message", **fields: Any) -> Event:
    return {"type": "response.output_item.added", "item": {"type": kind}, **fields}


AT_0 = {"output_index": 0}


def message(item_id: Any = None, **fields: Any) -> Event:
    item = {"type": "message", "role": "assistant", "content": []} | ({"id": item_id} if item_id else {})
    return {"type": "response.output_item.added", "item": item, **fields}


def text(delta: Any, **fields: Any) -> Event:
    return {"type": "response.output_text.delta", "delta": delta, **fields}


def message_done(content: str, item_id: Any = None, **fields: Any) -> Event:
    part = {"type": "output_text", "text": content}
    item = {"type": "message", "role": "assistant", "content": [part]} | ({"id": item_id} if item_id else {})
    return {"type": "response.output_item.done", "item": item, **fields}


def call(item_id: Any, name: str, **fields: Any) -> Event:
    item = {"type": "function_call", "name": name, "arguments": ""} | ({"id": item_id} if item_id else {})
    return {"type": "response.output_item.added", "item": item, **fields}


def arguments(delta: str, **fields: Any) -> Event:
    return {"type": "response.function_call_arguments.delta", "delta": delta, **fields}


def call_done(item_id: Any, name: str, whole: str, **fields: Any) -> Event:
    item = {"type": "function_call", "name": name, "arguments": whole} | ({"id": item_id} if item_id else {})
    return {"type": "response.output_item.done", "item": item, **fields}


@pytest.mark.parametrize(
    "events",
    [
        [message("a", **AT_0), text("Hel", item_id="a", **AT_0), message_done("Hello", "a", **AT_0)],
        # Each event has another id.
        [message("a", **AT_0), text("Hel", item_id="b", **AT_0), text("lo", item_id="c", **AT_0)],
        [message("a", **AT_0), text("Hel", item_id="b", **AT_0), message_done("Hello", "c", **AT_0)],
        # There are no ids.
        [message(**AT_0), text("Hel", **AT_0), message_done("Hello", **AT_0)],
        # There are neither ids nor indices, or other ids and no indices.
        [message(), text("Hel"), message_done("Hello")],
        [message("a"), text("Hel", item_id="b"), text("lo", item_id="b"), message_done("Hello", "c")],
        [message("a"), text("Hel"), message_done("Hello", "b")],
        # The item is announced twice, or after its first piece.
        [message("a", **AT_0), text("Hello", item_id="a", **AT_0), message("a", **AT_0)],
        [text("Hello", item_id="a", **AT_0), message("a", **AT_0)],
        [text("Hello", item_id="a"), message("a")],
        [text("Hel", item_id="a"), message("a"), text("lo", item_id="a"), message_done("Hello", "a")],
        [text("Hello", item_id="a"), message("a", **AT_0)],
        [text("Hello", **AT_0), message("a", **AT_0), message_done("Hello", "a", **AT_0)],
        [text("Hello"), message()],
        # The index is missing in some events.
        [message("a", **AT_0), text("Hel", item_id="a"), text("lo", **AT_0)],
        [message("a"), text("Hel", item_id="a", **AT_0), text("lo", item_id="a", **AT_0)],
        # The index does not begin at 0.
        [message("a", output_index=7), text("Hello", item_id="b", output_index=7)],
        [message("a", output_index=-1), text("Hello", item_id="b", output_index=-1)],
        # A null between the pieces.
        [message("a"), text("Hel", item_id="a"), text(None, item_id="a"), text("lo", item_id="a")],
    ],
)
def test_the_text_of_one_item_is_not_doubled(events: list[Event]) -> None:
    assert texts_of(events) == ["Hello"]


@pytest.mark.parametrize(
    "first",
    [
        {"item_id": "x", "output_index": 0},
        {"output_index": 0},
        {"item_id": "x", "output_index": 3},
    ],
)
def test_two_items_with_one_id_or_none_are_told_apart_by_their_index(first: dict[str, Any]) -> None:
    second = {**first, "output_index": first["output_index"] + 1}
    item_id = first.get("item_id")
    begun = [
        call(item_id, "f", output_index=first["output_index"]),
        call(item_id, "g", output_index=second["output_index"]),
    ]
    pieces = [arguments("{", **first), arguments("[", **second), arguments("}", **first), arguments("]", **second)]
    done = [
        call_done(item_id, "f", "{}", output_index=first["output_index"]),
        call_done(item_id, "g", "[]", output_index=second["output_index"]),
    ]
    for events in ([*begun, *pieces], [*begun, *pieces, *done], [*begun, pieces[0], *done]):
        calls = [(item["name"], item["arguments"]) for item in output_of(events)]
        assert calls == [("f", "{}"), ("g", "[]")]


def test_two_items_with_one_index_are_told_apart_by_their_ids() -> None:
    events = [
        call("a", "f", output_index=0),
        arguments("{", item_id="a", output_index=0),
        call("b", "g", output_index=0),
        arguments("[", item_id="b", output_index=0),
        arguments("}", item_id="a", output_index=0),
        arguments("]", item_id="b", output_index=0),
        call_done("a", "f", "{}", output_index=0),
    ]
    assert [(item["name"], item["arguments"]) for item in output_of(events)] == [("f", "{}"), ("g", "[]")]


def test_two_items_without_ids_and_indices_follow_each_other() -> None:
    events = [call(None, "f"), arguments("{}"), call(None, "g"), arguments("["), arguments("]")]
    assert [(item["name"], item["arguments"]) for item in output_of(events)] == [("f", "{}"), ("g", "[]")]


@pytest.mark.parametrize("where", [{}, {"output_index": 0}])
def test_an_announcement_after_the_first_piece_says_what_the_item_is(where: dict[str, Any]) -> None:
    events = [arguments('{"a"', item_id="c", **where), call("c", "f", **where), arguments(": 1}", item_id="c", **where)]
    assert [(item["type"], item["name"], item["arguments"]) for item in output_of(events)] == [
        ("function_call", "f", '{"a": 1}')
    ]


def test_pieces_of_items_that_were_not_announced_are_kept_apart() -> None:
    by_id = [text("a", item_id="x"), text("b", item_id="y"), text("c", item_id="x")]
    by_index = [text("a", output_index=0), text("b", output_index=1), text("c", output_index=0)]
    assert texts_of(by_id) == texts_of(by_index) == ["ac", "b"]


def test_a_finished_item_is_not_the_one_that_a_new_id_means() -> None:
    events = [message("a"), text("One", item_id="a"), message_done("One", "a"), message_done("Two", "b")]
    assert texts_of(events) == ["One", "Two"]


def test_parts_that_are_not_counted_from_0_are_kept_whole() -> None:
    events = [
        message("a"),
        *(text(each, item_id="a", content_index=index) for each, index in [("a", 5), ("x", 9), ("b", 5)]),
    ]
    (item,) = output_of(events)
    assert [part["text"] for part in item["content"]] == ["ab", "x"]


@pytest.mark.parametrize(
    "event",
    [
        text({"text": "x"}),
        text(7),
        text(["x"]),
        text("x", item_id=["a"]),
        text("x", item_id={}),
        message(["a"]),
        {"type": "response.output_item.added", "item": None},
        {"type": "response.output_item.added", "item": ["a"]},
        {"type": "response.output_item.added", "item": {"content": 7}},
        {"type": "response.output_item.done", "item": "a"},
        {"type": "response.content_part.added", "part": None},
        {"type": "response.content_part.added", "part": "a"},
        {"type": "response.completed", "response": None},
        {"type": "response.completed", "response": []},
        {"type": "response.completed", "response": {"output": 7}},
        arguments({"a": 1}),  # type: ignore[arg-type]  # what the test is about
    ],
)
def test_an_event_of_another_shape_is_a_named_error(event: Event) -> None:
    for before in ([], [message("a", output_index=0), text("Hello", item_id="a")]):
        accumulator = ResponseAccumulator()
        for each in before:
            accumulator.add(each)
        with pytest.raises(LLMStreamError, match="an event of an unknown shape"):
            accumulator.add(event)
        accumulator.reply()


@pytest.mark.parametrize("index", [[0], {}, "0", 0.5, True])
def test_an_index_that_is_not_a_number_counts_as_missing(index: Any) -> None:
    assert texts_of([message("a", output_index=index), text("Hello", item_id="a", content_index=index)]) == ["Hello"]


@pytest.mark.parametrize("key", ["item_id", "output_index"])
def test_the_time_for_many_items_grows_with_their_number(key: str) -> None:
    def accumulate(count: int) -> None:
        accumulator = ResponseAccumulator()
        for number in range(count):
            for delta in "{}":
                accumulator.add(arguments(delta, **{key: number}))
        assert len(accumulator.reply()["output"]) == count

    assert_linear(accumulate, 200)
