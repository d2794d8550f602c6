from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge.client.chat_accumulator import ChatAccumulator
from lmbridge.errors import LLMStreamError

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def a_choice(delta: dict[str, Any] | None, finish_reason: str | None = None, index: int = 0, **more: Any) -> Any:
    return {"index": index, "delta": delta, "finish_reason": finish_reason, **more}


def a_chunk(*choices: Any, **fields: Any) -> dict[str, Any]:
    return {**HEAD, "choices": list(choices), **fields}


def text(content: str, **fields: Any) -> dict[str, Any]:
    return a_chunk(a_choice({"content": content}), **fields)


FIRST = a_chunk(a_choice({"role": "assistant", "content": None}))
LAST = a_chunk(a_choice({}, "stop"))


def accumulate(chunks: Iterable[Mapping[str, Any]]) -> ChatAccumulator:
    accumulator = ChatAccumulator()
    for chunk in chunks:
        accumulator.add(chunk)
    return accumulator


def reply_of(*chunks: Mapping[str, Any]) -> dict[str, Any]:
    return dict(accumulate(chunks).reply())


def message_of(*deltas: dict[str, Any]) -> dict[str, Any]:
    """The message of a reply whose chunks have these deltas."""
    message: dict[str, Any] = reply_of(*(a_chunk(a_choice(delta)) for delta in deltas))["choices"][0]["message"]
    return message


# The whole reply


def test_a_stream_becomes_the_reply_that_the_plain_call_would_have_given() -> None:
    assert reply_of(FIRST, text("Hel"), text("lo"), LAST, a_chunk(usage=USAGE)) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
        "usage": USAGE,
    }


def test_what_had_arrived_of_a_stream_is_a_reply_without_an_end() -> None:
    reply = reply_of(FIRST, text("Hel"))
    assert reply["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hel"},
        "finish_reason": None,
    }
    assert reply["usage"] is None
    assert reply_of() == {"object": "chat.completion", "choices": [], "usage": None}


def test_an_answer_that_begins_with_text_and_no_role_is_kept_from_its_first_piece() -> None:
    for start in ([], [a_chunk()], [a_chunk(choices=None)], [a_chunk(a_choice({"content": "other"}, index=1))]):
        reply = reply_of(*start, text("Hel"), text("lo"))
        assert reply["choices"][0]["message"]["content"] == "Hello"


def test_a_whole_answer_in_one_chunk_is_a_reply() -> None:
    reply = reply_of(a_chunk(a_choice({"role": "assistant", "content": "Hello"}, "stop"), usage=USAGE))
    assert reply["choices"][0]["message"]["content"] == "Hello"
    assert (reply["choices"][0]["finish_reason"], reply["usage"]) == ("stop", USAGE)


def test_chunks_without_choices_or_without_a_delta_are_no_obstacle() -> None:
    odd = [a_chunk(), a_chunk(choices=None), dict(HEAD), a_chunk(a_choice(None)), a_chunk({"index": 0}), a_chunk({})]
    for chunk in odd:
        reply = reply_of(chunk, FIRST, chunk, text("Hel"), chunk, text("lo"), chunk, LAST, chunk)
        assert [choice["message"]["content"] for choice in reply["choices"]] == ["Hello"]
        assert reply["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("key", ["content", "reasoning_content", "reasoning", "refusal"])
def test_texts_are_joined_and_those_that_never_came_are_not_there(key: str) -> None:
    message = message_of({"role": "assistant", key: "Hel"}, {key: None}, {key: "lo "}, {key: ""}, {key: "🙂"})
    assert message == {"role": "assistant", "content": "", key: "Hello 🙂"}


def test_reasoning_and_content_do_not_mix() -> None:
    message = message_of({"reasoning_content": "Hm"}, {"content": "Hel", "reasoning_content": "m."}, {"content": "lo"})
    assert message == {"role": "assistant", "content": "Hello", "reasoning_content": "Hmm."}


def test_a_role_is_kept_as_it_came() -> None:
    assert message_of({"role": "tool"}, {"role": None}, {"role": ""}, {"content": "x"})["role"] == "tool"
    assert message_of({"content": "x"})["role"] == "assistant"


def test_usage_is_what_the_last_chunk_that_told_it_said() -> None:
    later = {**USAGE, "completion_tokens": 9}
    assert reply_of(FIRST, text("x"), LAST)["usage"] is None
    assert reply_of(FIRST, text("x", usage=None), a_chunk(usage={}))["usage"] is None
    assert reply_of(FIRST, a_chunk(a_choice({}, "stop"), usage=USAGE))["usage"] == USAGE
    assert reply_of(text("x", usage=USAGE), text("y", usage=None), a_chunk(usage=None))["usage"] == USAGE
    assert reply_of(text("x", usage=USAGE), text("y", usage=later))["usage"] == later
    assert reply_of(text("x", usage=None), text("y", usage=USAGE), text("z", usage=None))["usage"] == USAGE
    more = a_choice({"tool_calls": [{"index": 0, "function": {"arguments": "a"}}]})
    assert reply_of(a_chunk(more, usage=None), a_chunk(more, usage=USAGE), a_chunk(more, usage=None))["usage"] == USAGE


def test_several_answers_are_kept_apart_and_in_the_order_of_their_numbers() -> None:
    pieces = [(1, "b"), (0, "a"), (2, "c"), (0, "A"), (1, "B"), (0, "!"), (2, "C")]
    chunks = [a_chunk(a_choice({"content": piece}, index=index)) for index, piece in pieces]
    both = a_chunk(a_choice({"content": "?"}, "stop"), a_choice({"content": "?"}, "length", index=1))
    choices = reply_of(*chunks, both)["choices"]
    assert [(choice["index"], choice["message"]["content"], choice["finish_reason"]) for choice in choices] == [
        (0, "aA!?", "stop"),
        (1, "bB?", "length"),
        (2, "cC", None),
    ]


def test_an_answer_without_a_number_is_the_first() -> None:
    unnumbered = {"delta": {"content": "a"}, "finish_reason": None}
    (choice,) = reply_of(a_chunk(unnumbered), a_chunk({**unnumbered, "index": None}), text("b"))["choices"]
    assert (choice["index"], choice["message"]["content"]) == (0, "aab")


def test_logprobs_grow() -> None:
    def with_logprobs(content: str, logprobs: Any) -> dict[str, Any]:
        return a_chunk(a_choice({"content": content}, logprobs=logprobs))

    chunks = [
        with_logprobs("a", {"content": [{"token": "a"}], "refusal": None}),
        with_logprobs("b", {"content": [{"token": "b"}, {"token": "c"}], "refusal": None}),
        with_logprobs("", None),
        with_logprobs("d", {"content": [{"token": "d"}]}),
        with_logprobs("", {"content": None, "refusal": None}),
    ]
    (choice,) = reply_of(*chunks)["choices"]
    assert choice["message"]["content"] == "abd"
    assert choice["logprobs"] == {"content": [{"token": letter} for letter in "abcd"], "refusal": None}
    assert "logprobs" not in reply_of(with_logprobs("a", None), with_logprobs("b", None))["choices"][0]


def test_fields_that_are_not_known_are_kept_where_they_were() -> None:
    reply = reply_of(
        a_chunk(a_choice({"role": "assistant", "annotations": [1]}, token_ids=[1]), system_fingerprint="f"),
        a_chunk(a_choice({"content": "x"}, token_ids=[2, 3])),
        a_chunk(a_choice({"annotations": [2], "thinking_time": 3}, stop_reason="</s>"), timings={"predicted_n": 1}),
        a_chunk(a_choice({"annotations": None, "audio": {"id": "a"}}, "stop", stop_reason=None)),
        a_chunk(a_choice({"audio": {"expires": 1}}), timings={"predicted_n": 2}, system_fingerprint=None, model=""),
        a_chunk(model=""),
    )
    (choice,) = reply["choices"]
    assert choice.pop("message") == {
        "role": "assistant",
        "content": "x",
        "annotations": [1, 2],
        "thinking_time": 3,
        "audio": {"id": "a", "expires": 1},
    }
    assert choice == {"index": 0, "finish_reason": "stop", "token_ids": [1, 2, 3], "stop_reason": "</s>"}
    assert (reply["timings"], reply["system_fingerprint"], reply["model"]) == ({"predicted_n": 2}, "f", "m")


def test_chunks_are_left_as_they_are() -> None:
    chunks = [
        a_chunk(
            a_choice({"annotations": [1], "tool_calls": [{"index": 0, "x": [1]}]}, logprobs={"content": [1]}),
            timings={"a": 1},
        )
        for _ in range(3)
    ]
    before = copy.deepcopy(chunks)
    accumulator = accumulate(chunks)
    accumulator.reply()["choices"][0]["message"]["annotations"].append(7)  # type: ignore[typeddict-item]  # more than the type tells
    assert chunks == before


def test_a_reply_does_not_change_with_what_comes_later() -> None:
    chunk = a_chunk(a_choice({"content": "a", "annotations": [1]}, logprobs={"content": [1]}))
    accumulator = accumulate([chunk])
    reply, before = accumulator.reply(), copy.deepcopy(accumulator.reply())
    accumulator.add(chunk)
    assert reply == before
    assert accumulator.reply() != before


# How far it is


def test_a_reply_has_begun_with_any_chunk_and_has_a_delta_with_any_piece_of_a_message() -> None:
    assert (ChatAccumulator().has_begun, ChatAccumulator().has_delta) == (False, False)
    for empty in (a_chunk(), LAST, a_chunk(a_choice(None)), a_chunk(usage=USAGE)):
        assert (accumulate([empty]).has_begun, accumulate([empty]).has_delta) == (True, False)
    for full in (FIRST, text(""), a_chunk(a_choice({"content": "x"}, index=1))):
        assert (accumulate([full]).has_begun, accumulate([full]).has_delta) == (True, True)
    assert accumulate([FIRST, LAST, a_chunk()]).has_delta


def test_a_reply_is_finished_when_every_answer_that_began_has_its_reason() -> None:
    accumulator = ChatAccumulator()
    assert not accumulator.is_finished
    other = a_chunk(a_choice({"content": "x"}, index=1))
    for chunk, finished in [
        (a_chunk(), False),
        (FIRST, False),
        (text("x"), False),
        (LAST, True),
        (a_chunk(usage=USAGE), True),
        (other, False),
        (a_chunk(a_choice({}, "length", index=1)), True),
        (a_chunk(a_choice({}, None)), True),
    ]:
        accumulator.add(chunk)
        assert accumulator.is_finished is finished


# What is no chunk


@pytest.mark.parametrize(
    "chunk",
    [
        None,
        "text",
        ["choices"],
        7,
        {"choices": 7},
        {"choices": "text"},
        {"choices": [None]},
        {"choices": ["text"]},
        {"choices": {"index": 0}},
        {"choices": [{"index": "0", "delta": {"content": "x"}}]},
        {"choices": [{"index": [0], "delta": {"content": "x"}}]},
        {"choices": [{"index": 0, "delta": "text"}]},
        {"choices": [{"index": 0, "delta": ["text"]}]},
        {"choices": [{"index": 0, "delta": {"content": 7}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": [{"type": "text", "text": "x"}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": 7}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [None]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": ["text"]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": "text"}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"name": 7}}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"arguments": {"half": "\ud83d"}}}]}}]},
    ],
)
def test_what_is_no_chunk_is_an_error_that_shows_it(chunk: Any) -> None:
    for accumulator in (ChatAccumulator(), accumulate([FIRST, text("x")])):
        with pytest.raises(LLMStreamError, match=r"a chunk of an unknown shape: ") as caught:
            accumulator.add(chunk)
        assert repr(chunk) in str(caught.value)
        accumulator.reply()


def test_a_large_chunk_is_shown_in_part() -> None:
    with pytest.raises(LLMStreamError) as caught:
        ChatAccumulator().add({"choices": [{"delta": "x" * 10_000}]})
    assert len(str(caught.value)) < 300


# The fast way of `add`

PLAIN = text("x")
# Each differs from a plain piece of text in one way.
NOT_SIMPLE = [
    a_chunk(a_choice({})),
    a_chunk(a_choice({"content": ""})),
    a_chunk(a_choice({"content": None})),
    a_chunk(a_choice({"role": "assistant", "content": "a"})),
    a_chunk(a_choice({"content": "b", "reasoning": "c"})),
    a_chunk(a_choice({"reasoning_content": "d"})),
    a_chunk(a_choice({"tool_calls": [{"function": {"name": "e"}}]})),
    a_chunk(a_choice({"content": "f"}, logprobs=None)),
    a_chunk(a_choice({"content": "g"}, logprobs={"content": [1]})),
    a_chunk(a_choice({"content": "h"}, token_ids=[1])),
    a_chunk(a_choice({"content": "i"}, "stop")),
    a_chunk(a_choice({"content": "j"}, index=1)),
    a_chunk(a_choice({"content": "k"}), a_choice({"content": "l"}, index=1)),
    a_chunk({"index": 0, "delta": {"content": "m"}}),
    a_chunk(),
    text("n", timings={"n": 1}),
]


@pytest.mark.parametrize("usage", [{}, {"usage": None}, {"usage": USAGE}, None])
def test_chunks_that_only_add_text_are_added_as_any_others_are(usage: dict[str, Any] | None) -> None:
    for chunks in itertools.product([PLAIN, *NOT_SIMPLE], repeat=3):
        fast, slow = ChatAccumulator(), ChatAccumulator()
        for number, chunk in enumerate(chunks):
            told = {**chunk, **({"usage": {"completion_tokens": number}} if usage is None else usage)}
            fast.add(told)
            slow._add_slowly(told)
            assert (fast.has_begun, fast.has_delta, fast.is_finished) == (
                slow.has_begun,
                slow.has_delta,
                slow.is_finished,
            )
        assert _without_ids(fast.reply()) == _without_ids(slow.reply())


# Each differs in one way from a piece of a call that brings nothing but arguments.
PIECES = [
    [{"index": 0, "function": {"arguments": "a"}}],
    [{"index": 1, "function": {"arguments": "b"}}],
    [{"index": None, "function": {"arguments": "c"}}],
    [{"function": {"arguments": "d"}}],
    [{"id": "e", "function": {"arguments": "e"}}],
    [{"index": 0, "id": "f", "function": {"arguments": "f"}}],
    [{"index": 0, "function": {"name": "g", "arguments": "g"}}],
    [{"index": 0, "function": {"arguments": {"h": 1}}}],
    [{"index": 0, "function": {"arguments": None}}],
    [{"index": 0, "function": {"name": "i"}}],
    [{"index": 0, "function": None}],
    [{"index": 0, "function": {"arguments": "j"}, "extra": 1}],
    [{"index": 0, "function": {"arguments": "k"}}, {"index": 1, "function": {"arguments": "l"}}],
    [],
]


def test_chunks_that_only_add_arguments_are_added_as_any_others_are() -> None:
    for pieces in itertools.product(PIECES, repeat=3):
        fast, slow = ChatAccumulator(), ChatAccumulator()
        for piece in pieces:
            chunk = a_chunk(a_choice({"tool_calls": piece}))
            fast.add(chunk)
            slow._add_slowly(chunk)
            assert (fast.has_begun, fast.has_delta, fast.is_finished) == (
                slow.has_begun,
                slow.has_delta,
                slow.is_finished,
            )
        assert _without_ids(fast.reply()) == _without_ids(slow.reply())


def test_arguments_in_an_unusual_chunk_are_added_as_any_others_are() -> None:
    more = {"tool_calls": [{"index": 0, "function": {"arguments": "a"}}]}
    unusual = [
        a_chunk(a_choice(more, index=1)),
        a_chunk(a_choice(more, "tool_calls")),
        a_chunk(a_choice({**more, "content": "b"})),
        a_chunk(a_choice(more, token_ids=[1])),
        a_chunk(a_choice(more), a_choice(more, index=1)),
        a_chunk(a_choice(more), usage=USAGE),
        a_chunk(a_choice(more), timings={"n": 1}),
    ]
    for chunks in itertools.product([a_chunk(a_choice(more)), PLAIN, *unusual], repeat=3):
        fast, slow = ChatAccumulator(), ChatAccumulator()
        for chunk in chunks:
            fast.add(chunk)
            slow._add_slowly(chunk)
        assert _without_ids(fast.reply()) == _without_ids(slow.reply())


@pytest.mark.parametrize(
    "pieces", ["ab", {"a": 1}, 5, [5], [{"index": 0, "function": 5}], [{"index": 0, "function": "a"}]]
)
def test_pieces_of_calls_that_are_none_are_an_error_wherever_they_come(pieces: Any) -> None:
    accumulator = accumulate(
        [a_chunk(a_choice({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "{"}}]}))]
    )
    with pytest.raises(LLMStreamError, match="unknown shape"):
        accumulator.add(a_chunk(a_choice({"tool_calls": pieces})))
    assert accumulator.reply()["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == "{"


def _without_ids(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    for choice in reply["choices"]:
        for call in choice["message"].get("tool_calls", ()):
            del call["id"]
    return reply


# Tool calls

Call = tuple[str, str, str]
"""Id, name, arguments."""
Piece = dict[str, Any]
Stream = Iterator[list[Piece]]
"""The `tool_calls` of each delta."""
Cut = Callable[[str], list[str]]
"""Cuts arguments into pieces."""

CALLS: list[Call] = [
    ("id-a", "get_weather", '{"city": "Paris", "days": [1, 2]}'),
    ("id-b", "get_time", "{}"),
    ("id-c", "get_time", "{}"),
    ("id-d", "weather", '{"text": "}{\\" \\u00e9", "nested": {"a": {}}}'),
]


def calls_of(stream: Iterable[list[Piece]]) -> list[dict[str, Any]]:
    chunks = [a_chunk(a_choice({"tool_calls": pieces})) for pieces in stream]
    reply = accumulate(copy.deepcopy(chunks)).reply()
    calls: list[dict[str, Any]] = reply["choices"][0]["message"]["tool_calls"]  # type: ignore[assignment]  # as plain dicts
    return calls


def in_pieces(
    calls: Sequence[Call],
    cut: Cut,
    *,
    index: Callable[[int, bool], dict[str, Any]] = lambda number, first: {"index": number},
    ids: Callable[[str, bool], dict[str, Any]] = lambda call_id, first: {"id": call_id} if first else {},
    name_again: bool = False,
    name_later: str | None = "no such field",
    name_apart: bool = False,
    opening: bool = True,
) -> Stream:
    """The calls one after the other, each in pieces.

    Args:
        calls: The calls.
        cut: How arguments are cut.
        index: The field with a call's number, in its first piece and in later ones.
        ids: The field with its id.
        name_again: Whether each piece has the name.
        name_later: What later pieces have for a name.
        name_apart: Whether the name comes in a piece of its own, behind the one with the id.
        opening: Whether the first piece has no arguments yet.
    """
    for number, (call_id, name, arguments) in enumerate(calls):
        parts = cut(arguments)
        if opening:
            parts = ["", *parts]
        if name_apart:
            yield [{**index(number, True), **ids(call_id, True)}]
        for at, part in enumerate(parts):
            first = at == 0
            named = {"name": name if first or name_again else name_later}
            if named["name"] == "no such field":
                named = {}
            opens = first and not name_apart
            yield [{**index(number, opens), **ids(call_id, opens), "function": {**named, "arguments": part}}]


def _nothing(_: object, _first: bool) -> dict[str, Any]:
    return {}


def _zero(_: int, _first: bool) -> dict[str, Any]:
    return {"index": 0}


def _null(_: int, _first: bool) -> dict[str, Any]:
    return {"index": None}


def _from_one(number: int, _first: bool) -> dict[str, Any]:
    return {"index": number + 1}


def _at_first(number: int, first: bool) -> dict[str, Any]:
    return {"index": number} if first else {}


def _later(number: int, first: bool) -> dict[str, Any]:
    return {} if first else {"index": number}


def _always(call_id: str, _first: bool) -> dict[str, Any]:
    return {"id": call_id, "type": "function"}


def _then_empty(call_id: str, first: bool) -> dict[str, Any]:
    return {"id": call_id if first else ""}


def _then_null(call_id: str, first: bool) -> dict[str, Any]:
    return {"id": call_id if first else None, "type": "function"}


def _empty(_: str, _first: bool) -> dict[str, Any]:
    return {"id": "", "type": "function"}


def in_turns(calls: Sequence[Call], cut: Cut) -> Stream:
    """All calls at the same time, told apart by their index."""
    streams = [
        in_pieces([call], cut, index=lambda _, first, number=number: {"index": number})  # type: ignore[misc]  # mypy infers no lambda with defaults
        for number, call in enumerate(calls)
    ]
    for deltas in itertools.zip_longest(*streams, fillvalue=()):
        yield from ([piece] for delta in deltas for piece in delta)


def batched(calls: Sequence[Call], cut: Cut) -> Stream:
    """A delta for every three pieces."""
    pieces = [piece for delta in in_pieces(calls, cut) for piece in delta]
    for at in range(0, len(pieces), 3):
        yield pieces[at : at + 3]


def whole(
    *,
    index: Callable[[int, bool], dict[str, Any]] = _nothing,
    ids: bool = True,
    as_object: bool = False,
    together: bool,
) -> Callable[[Sequence[Call], Cut], Stream]:
    """Each call in one piece; all of them in one delta, or one by one."""

    def stream(calls: Sequence[Call], _: Cut) -> Stream:
        pieces = [
            {
                **index(number, True),
                **({"id": call_id} if ids else {}),
                "function": {"name": name, "arguments": json.loads(arguments) if as_object else arguments},
            }
            for number, (call_id, name, arguments) in enumerate(calls)
        ]
        return iter([pieces] if together else [[piece] for piece in pieces])

    return stream


def _quirk(**options: Any) -> Callable[[Sequence[Call], Cut], Stream]:
    return lambda calls, cut: in_pieces(calls, cut, **options)


WITH_IDS: dict[str, Callable[[Sequence[Call], Cut], Stream]] = {
    "as OpenAI does": _quirk(),
    "arguments from the first piece on": _quirk(opening=False),
    "several pieces in a delta": batched,
    "calls in turns": in_turns,
    "no index": _quirk(index=_nothing),
    "index null": _quirk(index=_null),
    "index 0 for every call": _quirk(index=_zero),
    "first index 1": _quirk(index=_from_one),
    "index in the first piece only": _quirk(index=_at_first),
    "index in later pieces only": _quirk(index=_later),
    "id in each piece": _quirk(ids=_always),
    "id in each piece and index 0": _quirk(ids=_always, index=_zero),
    "id in each piece and no index": _quirk(ids=_always, index=_nothing),
    "id empty in later pieces": _quirk(ids=_then_empty),
    "id empty in later pieces and index 0": _quirk(ids=_then_empty, index=_zero),
    "id null in later pieces": _quirk(ids=_then_null),
    "name empty in later pieces": _quirk(name_later="", index=_zero),
    "name null in later pieces": _quirk(name_later=None, index=_nothing),
    "id and name in separate deltas": _quirk(name_apart=True),
    "id and name in separate deltas and index 0": _quirk(name_apart=True, index=_zero),
    "id and name in separate deltas and no index": _quirk(name_apart=True, index=_nothing),
    "name and id in each piece": _quirk(name_again=True, ids=_always),
    "name and id in each piece and index 0": _quirk(name_again=True, ids=_always, index=_zero),
    "whole calls one by one": whole(together=False),
    "whole calls at once": whole(together=True),
    "whole calls with index 0": whole(together=True, index=_zero),
    "whole calls with arguments as an object": whole(together=False, as_object=True),
}
WITHOUT_IDS: dict[str, Callable[[Sequence[Call], Cut], Stream]] = {
    "no id": _quirk(ids=_nothing),
    "no id but an empty one": _quirk(ids=_empty),
    "no id and name empty in later pieces": _quirk(ids=_nothing, name_later="", index=_zero),
    "no id and no opening": _quirk(ids=_nothing, opening=False),
    "no id and no index": _quirk(ids=_nothing, index=_nothing),
    "no id, no index and no opening": _quirk(ids=_nothing, index=_nothing, opening=False),
    "no id and index 0": _quirk(ids=_nothing, index=_zero),
    "no id and index null": _quirk(ids=_nothing, index=_null),
    "no id and first index 1": _quirk(ids=_nothing, index=_from_one),
    "whole calls without id one by one": whole(ids=False, together=False),
    "whole calls without id at once": whole(ids=False, together=True),
    "whole calls without id and with index 0": whole(ids=False, together=True, index=_zero),
    "whole calls without id and with arguments as an object": whole(ids=False, together=False, as_object=True),
}
# Where the name comes again without an id, an empty piece behind whole arguments is the beginning of another call.
WITHOUT_EMPTY_PIECES: dict[str, Callable[[Sequence[Call], Cut], Stream]] = {
    "name in each piece, id in the first": _quirk(name_again=True),
    "name in each piece and no id": _quirk(name_again=True, ids=_nothing),
    "name in each piece, no id and no index": _quirk(name_again=True, ids=_nothing, index=_nothing),
    "name in each piece, no id and index 0": _quirk(name_again=True, ids=_nothing, index=_zero),
}
QUIRKS = WITH_IDS | WITHOUT_IDS | WITHOUT_EMPTY_PIECES


def check(quirk: str, calls: Sequence[Call], cut: Cut) -> None:
    got = calls_of(QUIRKS[quirk](calls, cut))
    told = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in got]
    assert told == [(name, json.loads(arguments)) for _, name, arguments in calls]
    assert all(set(call) == {"id", "type", "function"} and call["type"] == "function" for call in got)
    if quirk in WITHOUT_IDS or "no id" in quirk:
        assert len({call["id"] for call in got}) == len(calls)
        assert all(call["id"].startswith("call_") for call in got)
    else:
        assert [call["id"] for call in got] == [call_id for call_id, _, _ in calls]
    if "object" not in quirk:
        assert [call["function"]["arguments"] for call in got] == [arguments for _, _, arguments in calls]


@pytest.mark.parametrize("quirk", QUIRKS)
def test_tool_calls_are_put_together_whatever_the_server_leaves_out(quirk: str) -> None:
    for calls in (CALLS[:1], CALLS[:2], CALLS[1:3], CALLS, CALLS[::-1]):
        check(quirk, calls, lambda arguments: [arguments])
        check(quirk, calls, list)  # letter by letter


_arguments = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=6), lambda inner: st.lists(inner, max_size=3), max_leaves=4
    ),
    max_size=3,
).map(json.dumps)
_calls = st.lists(
    st.tuples(st.sampled_from(["get", "get_weather", "weather", "f"]), _arguments), min_size=1, max_size=4
).map(lambda calls: [(f"id-{number}", *call) for number, call in enumerate(calls)])


@settings(deadline=None, max_examples=300)
@given(
    quirk=st.sampled_from(sorted(QUIRKS)),
    calls=_calls,
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
def test_the_same_calls_come_out_of_any_pieces_under_any_quirk(quirk: str, calls: list[Call], cuts: list[int]) -> None:
    def cut(arguments: str) -> list[str]:
        edges = [0, *sorted(at % (len(arguments) + 1) for at in cuts), len(arguments)]
        parts = [arguments[start:end] for start, end in itertools.pairwise(edges)]
        return parts if quirk not in WITHOUT_EMPTY_PIECES else [part for part in parts if part]

    check(quirk, calls, cut)


@pytest.mark.parametrize(
    "pieces",
    [
        [{"index": 0, "id": "a", "function": {"name": "f"}}, {"index": 1, "id": "b", "function": {"name": "g"}}],
        [{"id": "a", "function": {"name": "f", "arguments": ""}}, {"id": "b", "function": {"name": "f"}}],
        [{"function": {"name": "f", "arguments": ""}}, {"function": {"name": "g", "arguments": ""}}],
        [{"index": 0, "function": {"name": "f"}}, {"index": 0, "function": {"name": "g", "arguments": None}}],
        [{"index": 0, "function": {"name": "f"}}, {"index": 1, "function": {"name": "f", "arguments": None}}],
    ],
)
def test_two_calls_without_arguments_stay_two(pieces: list[Piece]) -> None:
    names = [piece["function"]["name"] for piece in pieces]
    for calls in (calls_of([pieces]), calls_of([piece] for piece in pieces)):
        assert [call["function"] for call in calls] == [{"name": name, "arguments": ""} for name in names]
        assert calls[0]["id"] != calls[1]["id"]


def test_a_name_that_a_server_with_ids_sends_in_pieces_is_one_name() -> None:
    pieces = [{"index": 0, "id": "a", "function": {"name": "get_"}}, {"index": 0, "function": {"name": "weather"}}]
    (call,) = calls_of([[piece] for piece in pieces])
    assert call == {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": ""}}


def test_arguments_that_were_cut_are_kept_as_far_as_they_came() -> None:
    stream = list(in_pieces(CALLS[:1], list))
    for count in range(1, len(stream)):
        (call,) = calls_of(stream[:count])
        assert call["function"]["arguments"] == CALLS[0][2][: count - 1]


def test_an_id_that_was_made_up_stays_the_same() -> None:
    accumulator = accumulate([a_chunk(a_choice({"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}))])
    assert accumulator.reply() == accumulator.reply()


def test_a_name_that_came_before_its_id_belongs_to_it() -> None:
    stream: list[list[Piece]] = [[{"function": {"name": "f"}}], [{"id": "a"}], [{"function": {"arguments": "{}"}}]]
    assert calls_of(stream) == [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_a_call_may_begin_with_nothing_but_its_number() -> None:
    (call,) = calls_of([[{"index": 0}], [{"index": 0, "function": {"name": "f"}}], [{"function": {"arguments": "{}"}}]])
    assert call["function"] == {"name": "f", "arguments": "{}"}


def test_fields_of_a_call_that_are_not_known_are_kept() -> None:
    stream = [
        [{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}, "extra_content": {"signature": "s"}}],
        [{"index": 0, "function": {"arguments": "{}"}, "extra_content": None}],
    ]
    (call,) = calls_of(stream)
    assert call["extra_content"] == {"signature": "s"}


def test_calls_and_text_of_one_reply_are_both_kept_and_an_empty_list_is_no_call() -> None:
    piece = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}
    message = message_of({"content": "Let me see.", "tool_calls": []}, {"content": "", "tool_calls": [piece]})
    assert message["content"] == "Let me see."
    assert message["tool_calls"] == [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert "tool_calls" not in message_of({"content": "Hello", "tool_calls": []}, {"tool_calls": None})


def test_the_calls_of_several_answers_are_kept_apart() -> None:
    def call(index: int, name: str) -> dict[str, Any]:
        return a_chunk(a_choice({"tool_calls": [{"function": {"name": name, "arguments": "{}"}}]}, index=index))

    choices = reply_of(call(0, "f"), call(1, "g"), call(0, "h"))["choices"]
    names = [[call["function"]["name"] for call in choice["message"]["tool_calls"]] for choice in choices]
    assert names == [["f", "h"], ["g"]]


def test_a_name_in_pieces_keeps_one_that_is_how_it_already_ends() -> None:
    first = {"index": 0, "id": "x", "function": {"name": "ad", "arguments": ""}}
    second = {"index": 0, "function": {"name": "d", "arguments": "{}"}}
    (call,) = calls_of([[first], [second]])
    assert call["function"] == {"name": "add", "arguments": "{}"}
