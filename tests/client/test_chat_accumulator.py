# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge.client.chat_accumulator import ChatAccumulator, TextAccumulator
from lmbridge.errors import LLMStreamError
from tests.support import assert_linear

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


def accumulated(chunks: Iterable[Mapping[str, Any]]) -> ChatAccumulator:
    accumulator = ChatAccumulator()
    for chunk in chunks:
        accumulator.add(chunk)
    return accumulator


def reply_of(*chunks: Mapping[str, Any]) -> dict[str, Any]:
    return dict(accumulated(chunks).reply())


def message_of(*deltas: dict[str, Any]) -> dict[str, Any]:
    """Returns the message of a reply whose chunks have these deltas."""
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


def test_a_partial_reply_has_no_finish_reason() -> None:
    reply = reply_of(FIRST, text("Hel"))
    assert reply["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hel"},
        "finish_reason": None,
    }
    assert reply["usage"] is None
    assert reply_of() == {"object": "chat.completion", "choices": [], "usage": None}


def test_an_answer_without_a_role_is_kept_from_its_first_piece() -> None:
    for start in ([], [a_chunk()], [a_chunk(choices=None)], [a_chunk(a_choice({"content": "other"}, index=1))]):
        reply = reply_of(*start, text("Hel"), text("lo"))
        assert reply["choices"][0]["message"]["content"] == "Hello"


def test_a_single_chunk_may_hold_the_whole_answer() -> None:
    reply = reply_of(a_chunk(a_choice({"role": "assistant", "content": "Hello"}, "stop"), usage=USAGE))
    assert reply["choices"][0]["message"]["content"] == "Hello"
    assert (reply["choices"][0]["finish_reason"], reply["usage"]) == ("stop", USAGE)


def test_chunks_without_choices_or_without_a_delta_are_accepted() -> None:
    odd = [a_chunk(), a_chunk(choices=None), dict(HEAD), a_chunk(a_choice(None)), a_chunk({"index": 0}), a_chunk({})]
    for chunk in odd:
        reply = reply_of(chunk, FIRST, chunk, text("Hel"), chunk, text("lo"), chunk, LAST, chunk)
        assert [choice["message"]["content"] for choice in reply["choices"]] == ["Hello"]
        assert reply["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "key", ["content", "reasoning_content", "reasoning", "refusal", "thinking", "a_text_of_the_future"]
)
def test_texts_are_joined_and_fields_that_never_arrived_are_missing(key: str) -> None:
    message = message_of({"role": "assistant", key: "Hel"}, {key: None}, {key: "lo "}, {key: ""}, {key: "🙂"})
    assert message == {"role": "assistant", "content": "", key: "Hello 🙂"}


def test_reasoning_and_content_are_kept_apart() -> None:
    message = message_of({"reasoning_content": "Hm"}, {"content": "Hel", "reasoning_content": "m."}, {"content": "lo"})
    assert message == {"role": "assistant", "content": "Hello", "reasoning_content": "Hmm."}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "refusal"])
def test_texts_may_arrive_in_parts(key: str) -> None:
    parts = [{"type": "text", "text": "Hel"}, "l"]
    assert message_of({key: parts}, {key: {"text": "o"}}, {key: []}) == {
        "role": "assistant",
        "content": "",
        key: "Hello",
    }


def test_the_texts_inside_other_fields_are_joined_and_their_labels_kept() -> None:
    message = message_of(
        {"audio": {"id": "a", "format": "wav", "data": "UklG", "transcript": "Hel"}},
        {"audio": {"id": "a", "data": "AAAA", "transcript": "lo", "expires_at": 1}},
        {"audio": {"format": "wav", "data": None, "expires_at": 2}},
        {"thinking": {"text": "Hm", "signature": "x"}},
        {"thinking": {"text": "m.", "signature": "xy"}},
    )
    assert message == {
        "role": "assistant",
        "content": "",
        "audio": {"id": "a", "format": "wav", "data": "UklGAAAA", "transcript": "Hello", "expires_at": 2},
        "thinking": {"text": "Hmm.", "signature": "xy"},
    }


@pytest.mark.parametrize(
    "key", ["id", "type", "name", "object", "model", "format", "status", "item_id", "message_type", "stop_reason"]
)
def test_a_label_that_is_sent_again_is_not_joined(key: str) -> None:
    assert message_of({"content": "a", key: "x"}, {"content": "b", key: "x"}) == {
        "role": "assistant",
        "content": "ab",
        key: "x",
    }


def test_the_strings_of_a_choice_are_not_pieces_of_a_text() -> None:
    choices = [a_choice({"content": "a"}, native={"state": state}, state=state) for state in ("busy", "done")]
    (choice,) = reply_of(*map(a_chunk, choices))["choices"]
    assert (choice["state"], choice["native"]) == ("done", {"state": "done"})


@pytest.mark.parametrize("depth", [5, 19, 20, 21, 22, 500])
def test_deeply_nested_fields_are_kept(depth: int) -> None:
    value: Any = "x"
    for _ in range(depth):
        value = {"a": value}
    accumulator = accumulated([a_chunk(a_choice({"extra": value}), extra=value)])
    assert accumulator.reply()["choices"][0]["message"]["extra"] == value  # type: ignore[typeddict-item]  # not in the API


def test_the_role_is_kept_and_is_assistant_by_default() -> None:
    assert message_of({"role": "tool"}, {"role": None}, {"role": ""}, {"content": "x"})["role"] == "tool"
    assert message_of({"content": "x"})["role"] == "assistant"


def test_usage_is_that_of_the_last_chunk_with_usage() -> None:
    later = {**USAGE, "completion_tokens": 9}
    assert reply_of(FIRST, text("x"), LAST)["usage"] is None
    assert reply_of(FIRST, text("x", usage=None), a_chunk(usage={}))["usage"] is None
    assert reply_of(FIRST, a_chunk(a_choice({}, "stop"), usage=USAGE))["usage"] == USAGE
    assert reply_of(text("x", usage=USAGE), text("y", usage=None), a_chunk(usage=None))["usage"] == USAGE
    assert reply_of(text("x", usage=USAGE), text("y", usage=later))["usage"] == later
    assert reply_of(text("x", usage=None), text("y", usage=USAGE), text("z", usage=None))["usage"] == USAGE
    more = a_choice({"tool_calls": [{"index": 0, "function": {"arguments": "a"}}]})
    assert reply_of(a_chunk(more, usage=None), a_chunk(more, usage=USAGE), a_chunk(more, usage=None))["usage"] == USAGE


def test_several_answers_are_kept_apart_and_sorted_by_index() -> None:
    pieces = [(1, "b"), (0, "a"), (2, "c"), (0, "A"), (1, "B"), (0, "!"), (2, "C")]
    chunks = [a_chunk(a_choice({"content": piece}, index=index)) for index, piece in pieces]
    both = a_chunk(a_choice({"content": "?"}, "stop"), a_choice({"content": "?"}, "length", index=1))
    choices = reply_of(*chunks, both)["choices"]
    assert [(choice["index"], choice["message"]["content"], choice["finish_reason"]) for choice in choices] == [
        (0, "aA!?", "stop"),
        (1, "bB?", "length"),
        (2, "cC", None),
    ]


def test_an_answer_without_an_index_is_the_first() -> None:
    unnumbered = {"delta": {"content": "a"}, "finish_reason": None}
    (choice,) = reply_of(a_chunk(unnumbered), a_chunk({**unnumbered, "index": None}), text("b"))["choices"]
    assert (choice["index"], choice["message"]["content"]) == (0, "aab")


def test_logprobs_are_joined() -> None:
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


def test_unknown_fields_are_kept_in_their_place() -> None:
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


def test_chunks_are_not_changed() -> None:
    chunks = [
        a_chunk(
            a_choice({"annotations": [1], "tool_calls": [{"index": 0, "x": [1]}]}, logprobs={"content": [1]}),
            timings={"a": 1},
        )
        for _ in range(3)
    ]
    before = copy.deepcopy(chunks)
    accumulator = accumulated(chunks)
    accumulator.reply()["choices"][0]["message"]["annotations"].append(7)  # type: ignore[arg-type]  # any value does
    assert chunks == before


def test_later_chunks_do_not_change_a_reply_that_was_returned() -> None:
    chunk = a_chunk(a_choice({"content": "a", "annotations": [1]}, logprobs={"content": [1]}))
    accumulator = accumulated([chunk])
    reply, before = accumulator.reply(), copy.deepcopy(accumulator.reply())
    accumulator.add(chunk)
    assert reply == before
    assert accumulator.reply() != before


# Progress


def test_a_reply_has_begun_with_any_chunk_and_has_a_delta_with_any_piece_of_a_message() -> None:
    assert (ChatAccumulator().has_begun, ChatAccumulator().has_delta) == (False, False)
    for empty in (a_chunk(), LAST, a_chunk(a_choice(None)), a_chunk(usage=USAGE)):
        assert (accumulated([empty]).has_begun, accumulated([empty]).has_delta) == (True, False)
    for full in (FIRST, text(""), a_chunk(a_choice({"content": "x"}, index=1))):
        assert (accumulated([full]).has_begun, accumulated([full]).has_delta) == (True, True)
    assert accumulated([FIRST, LAST, a_chunk()]).has_delta


def test_only_texts_that_are_not_empty_tool_calls_and_finish_reasons_are_content() -> None:
    for empty in (a_chunk(), a_chunk(a_choice(None)), a_chunk(a_choice({"role": "assistant", "content": ""}))):
        assert not accumulated([empty]).has_content
    tool_call = a_chunk(a_choice({"tool_calls": [{"index": 0, "function": {"name": "f"}}]}))
    reasoning = a_chunk(a_choice({"reasoning_content": "x"}))
    for full in (text("x"), LAST, tool_call, reasoning, a_chunk(a_choice({"content": "x"}, index=1))):
        assert accumulated([full]).has_content


def test_a_reply_is_finished_when_every_answer_that_began_has_its_finish_reason() -> None:
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


# Malformed chunks


@pytest.mark.parametrize(
    "chunk",
    [
        None,
        "text",
        ["choices"],
        7,
        {"choices": 7},
        {"choices": "text"},
        {"choices": {"index": 0}},
        {"choices": [{"index": "first", "delta": {"content": "x"}}]},
        {"choices": [{"index": "9" * 50, "delta": {"content": "x"}}]},
        {"choices": [{"index": "\u0663", "delta": 7}]},
        {"choices": [{"index": [0], "delta": {"content": "x"}}]},
        {"choices": [{"index": {}, "delta": {"content": "x"}}]},
        {"choices": [{"index": -1, "delta": {"content": "x"}}]},
        {"choices": [{"index": 0.5, "delta": {"content": "x"}}]},
        {"choices": [{"index": math.inf, "delta": {"content": "x"}}]},
        {"choices": [{"index": math.nan, "delta": {"content": "x"}}]},
        {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": 7}]},
        {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": ["stop"]}]},
        {"choices": [{"index": 0, "delta": "text"}]},
        {"choices": [{"index": 0, "delta": ["text"]}]},
        {"choices": [{"index": 0, "delta": {"content": 7}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"reasoning": 7}}]},
        {"choices": [{"index": 0, "delta": {"function_call": "text"}}]},
        {"choices": [{"index": 0, "delta": {"function_call": {"name": 7}}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": 7}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"id": []}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"id": {}, "function": {"name": "f"}}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": [0], "function": {"name": "f"}}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": {}, "id": "a", "function": {"name": "f"}}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [None]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": ["text"]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": "text"}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"name": 7}}]}}]},
    ],
)
def test_a_malformed_chunk_raises_an_error_that_shows_it(chunk: Any) -> None:
    for accumulator in (ChatAccumulator(), accumulated([FIRST, text("x")])):
        with pytest.raises(LLMStreamError, match=r"a chunk of an unknown shape: ") as caught:
            accumulator.add(chunk)
        assert repr(chunk) in str(caught.value)
        accumulator.reply()


def test_an_error_shows_only_the_beginning_of_a_large_chunk() -> None:
    with pytest.raises(LLMStreamError) as caught:
        ChatAccumulator().add({"choices": [{"delta": "x" * 10_000}]})
    assert len(str(caught.value)) < 300


# The fast path of `add` gives the same result as the slow path

PLAIN = text("x")
# Each of these differs from a simple piece of text in one way.
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
def test_the_fast_path_for_text_gives_the_result_of_the_slow_path(usage: dict[str, Any] | None) -> None:
    for chunks in itertools.product([PLAIN, *NOT_SIMPLE], repeat=3):
        fast, slow = ChatAccumulator(), ChatAccumulator()
        for number, chunk in enumerate(chunks):
            sent = {**chunk, **({"usage": {"completion_tokens": number}} if usage is None else usage)}
            fast.add(sent)
            slow._add_by_slow_path(sent)
            assert (fast.has_begun, fast.has_delta, fast.is_finished) == (
                slow.has_begun,
                slow.has_delta,
                slow.is_finished,
            )
        assert _without_ids(fast.reply()) == _without_ids(slow.reply())


def test_the_fast_path_of_text_completions_gives_the_result_of_the_slow_path() -> None:
    pieces: list[dict[str, Any]] = [
        {"text": "a"},
        {"text": ""},
        {"text": None},
        {},
        {"text": ["b"]},
        {"text": "c", "index": 1},
        {"text": "d", "logprobs": None},
        {"text": "e", "logprobs": {"tokens": ["e"]}},
        {"text": "f", "more": 1},
        {"text": "g", "finish_reason": "stop"},
    ]
    for chosen in itertools.product(pieces, repeat=3):
        fast, slow = TextAccumulator(), TextAccumulator()
        for piece in chosen:
            chunk = a_chunk({"index": 0, "finish_reason": None, **piece})
            handed_out = slow._add_by_slow_path(chunk)
            assert fast.add(chunk) == handed_out
            assert (fast.has_begun, fast.has_delta, fast.is_finished) == (
                slow.has_begun,
                slow.has_delta,
                slow.is_finished,
            )
        assert fast.reply() == slow.reply()


# Each of these, except the first, differs in one way from a piece that holds only arguments.
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


def test_the_fast_path_for_arguments_gives_the_result_of_the_slow_path() -> None:
    for pieces in itertools.product(PIECES, repeat=3):
        fast, slow = ChatAccumulator(), ChatAccumulator()
        for piece in pieces:
            chunk = a_chunk(a_choice({"tool_calls": piece}))
            fast.add(chunk)
            slow._add_by_slow_path(chunk)
            assert (fast.has_begun, fast.has_delta, fast.is_finished) == (
                slow.has_begun,
                slow.has_delta,
                slow.is_finished,
            )
        assert _without_ids(fast.reply()) == _without_ids(slow.reply())


def test_arguments_among_other_fields_take_the_slow_path() -> None:
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
            slow._add_by_slow_path(chunk)
        assert _without_ids(fast.reply()) == _without_ids(slow.reply())


@pytest.mark.parametrize(
    "pieces", ["ab", {"a": 1}, 5, [5], [{"index": 0, "function": 5}], [{"index": 0, "function": "a"}]]
)
def test_malformed_pieces_of_calls_raise(pieces: Any) -> None:
    accumulator = accumulated(
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
"""The id, the name and the arguments of a call."""
Piece = dict[str, Any]
Stream = Iterator[list[Piece]]
"""The `tool_calls` of each delta."""
Cut = Callable[[str], list[str]]
"""A function that splits arguments into pieces."""

CALLS: list[Call] = [
    ("id-a", "get_weather", '{"city": "Paris", "days": [1, 2]}'),
    ("id-b", "get_time", "{}"),
    ("id-c", "get_time", "{}"),
    ("id-d", "weather", '{"text": "}{\\" \\u00e9", "nested": {"a": {}}}'),
]


def calls_of(stream: Iterable[list[Piece]]) -> list[dict[str, Any]]:
    chunks = [a_chunk(a_choice({"tool_calls": pieces})) for pieces in stream]
    reply = accumulated(copy.deepcopy(chunks)).reply()
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
    """Yields the calls one after the other, each in pieces.

    Args:
        calls: The calls.
        cut: Splits the arguments of a call.
        index: Returns the `index` field of a piece, from the number of its call and whether it is the first piece.
        ids: Returns the `id` field of a piece, from the id of its call and whether it is the first piece.
        name_again: Whether each piece has the name.
        name_later: The name in later pieces.
        name_apart: Whether the name has a separate piece, after the piece with the id.
        opening: Whether the first piece has empty arguments.
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


def _no_field(_: object, _first: bool) -> dict[str, Any]:
    return {}


def _index_zero(_: int, _first: bool) -> dict[str, Any]:
    return {"index": 0}


def _index_null(_: int, _first: bool) -> dict[str, Any]:
    return {"index": None}


def _index_from_one(number: int, _first: bool) -> dict[str, Any]:
    return {"index": number + 1}


def _index_in_first_piece(number: int, first: bool) -> dict[str, Any]:
    return {"index": number} if first else {}


def _index_in_later_pieces(number: int, first: bool) -> dict[str, Any]:
    return {} if first else {"index": number}


def _id_always(call_id: str, _first: bool) -> dict[str, Any]:
    return {"id": call_id, "type": "function"}


def _id_then_empty(call_id: str, first: bool) -> dict[str, Any]:
    return {"id": call_id if first else ""}


def _id_then_null(call_id: str, first: bool) -> dict[str, Any]:
    return {"id": call_id if first else None, "type": "function"}


def _id_empty(_: str, _first: bool) -> dict[str, Any]:
    return {"id": "", "type": "function"}


def in_turns(calls: Sequence[Call], cut: Cut) -> Stream:
    """Yields the pieces of all calls in turns, distinguished by their index."""
    streams = [
        in_pieces([call], cut, index=lambda _, first, number=number: {"index": number})  # type: ignore[misc]  # mypy infers no lambda with defaults
        for number, call in enumerate(calls)
    ]
    for deltas in itertools.zip_longest(*streams, fillvalue=()):
        yield from ([piece] for delta in deltas for piece in delta)


def three_pieces_per_delta(calls: Sequence[Call], cut: Cut) -> Stream:
    """Yields a delta for every three pieces."""
    pieces = [piece for delta in in_pieces(calls, cut) for piece in delta]
    for at in range(0, len(pieces), 3):
        yield pieces[at : at + 3]


def whole_calls(
    *,
    index: Callable[[int, bool], dict[str, Any]] = _no_field,
    ids: bool = True,
    as_object: bool = False,
    together: bool,
) -> Callable[[Sequence[Call], Cut], Stream]:
    """Returns a stream with each call in one piece, all of them in one delta or one by one."""

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
    "several pieces in a delta": three_pieces_per_delta,
    "calls in turns": in_turns,
    "no index": _quirk(index=_no_field),
    "index null": _quirk(index=_index_null),
    "index 0 for every call": _quirk(index=_index_zero),
    "first index 1": _quirk(index=_index_from_one),
    "index in the first piece only": _quirk(index=_index_in_first_piece),
    "index in later pieces only": _quirk(index=_index_in_later_pieces),
    "id in each piece": _quirk(ids=_id_always),
    "id in each piece and index 0": _quirk(ids=_id_always, index=_index_zero),
    "id in each piece and no index": _quirk(ids=_id_always, index=_no_field),
    "id empty in later pieces": _quirk(ids=_id_then_empty),
    "id empty in later pieces and index 0": _quirk(ids=_id_then_empty, index=_index_zero),
    "id null in later pieces": _quirk(ids=_id_then_null),
    "name empty in later pieces": _quirk(name_later="", index=_index_zero),
    "name null in later pieces": _quirk(name_later=None, index=_no_field),
    "id and name in separate deltas": _quirk(name_apart=True),
    "id and name in separate deltas and index 0": _quirk(name_apart=True, index=_index_zero),
    "id and name in separate deltas and no index": _quirk(name_apart=True, index=_no_field),
    "name and id in each piece": _quirk(name_again=True, ids=_id_always),
    "name and id in each piece and index 0": _quirk(name_again=True, ids=_id_always, index=_index_zero),
    "whole calls one by one": whole_calls(together=False),
    "whole calls at once": whole_calls(together=True),
    "whole calls with index 0": whole_calls(together=True, index=_index_zero),
    "whole calls with arguments as an object": whole_calls(together=False, as_object=True),
}
WITHOUT_IDS: dict[str, Callable[[Sequence[Call], Cut], Stream]] = {
    "no id": _quirk(ids=_no_field),
    "no id but an empty one": _quirk(ids=_id_empty),
    "no id and name empty in later pieces": _quirk(ids=_no_field, name_later="", index=_index_zero),
    "no id and no opening": _quirk(ids=_no_field, opening=False),
    "no id and no index": _quirk(ids=_no_field, index=_no_field),
    "no id, no index and no opening": _quirk(ids=_no_field, index=_no_field, opening=False),
    "no id and index 0": _quirk(ids=_no_field, index=_index_zero),
    "no id and index null": _quirk(ids=_no_field, index=_index_null),
    "no id and first index 1": _quirk(ids=_no_field, index=_index_from_one),
    "whole calls without id one by one": whole_calls(ids=False, together=False),
    "whole calls without id at once": whole_calls(ids=False, together=True),
    "whole calls without id and with index 0": whole_calls(ids=False, together=True, index=_index_zero),
    "whole calls without id and with arguments as an object": whole_calls(ids=False, together=False, as_object=True),
}
# If the name is repeated without an id, an empty piece after complete arguments begins another call.
WITHOUT_EMPTY_PIECES: dict[str, Callable[[Sequence[Call], Cut], Stream]] = {
    "name in each piece, id in the first": _quirk(name_again=True),
    "name in each piece and no id": _quirk(name_again=True, ids=_no_field),
    "name in each piece, no id and no index": _quirk(name_again=True, ids=_no_field, index=_no_field),
    "name in each piece, no id and index 0": _quirk(name_again=True, ids=_no_field, index=_index_zero),
}
QUIRKS = WITH_IDS | WITHOUT_IDS | WITHOUT_EMPTY_PIECES


def check_quirk(quirk: str, calls: Sequence[Call], cut: Cut) -> None:
    got = calls_of(QUIRKS[quirk](calls, cut))
    joined = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in got]
    assert joined == [(name, json.loads(arguments)) for _, name, arguments in calls]
    assert all(set(call) == {"id", "type", "function"} and call["type"] == "function" for call in got)
    if quirk in WITHOUT_IDS or "no id" in quirk:
        assert len({call["id"] for call in got}) == len(calls)
        assert all(call["id"].startswith("call_") for call in got)
    else:
        assert [call["id"] for call in got] == [call_id for call_id, _, _ in calls]
    if "object" not in quirk:
        assert [call["function"]["arguments"] for call in got] == [arguments for _, _, arguments in calls]


@pytest.mark.parametrize("quirk", QUIRKS)
def test_tool_calls_are_joined_under_every_quirk_of_servers(quirk: str) -> None:
    for calls in (CALLS[:1], CALLS[:2], CALLS[1:3], CALLS, CALLS[::-1]):
        check_quirk(quirk, calls, lambda arguments: [arguments])
        # `list` splits the arguments into single characters.
        check_quirk(quirk, calls, list)


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
def test_tool_calls_are_joined_however_their_arguments_are_split(
    quirk: str, calls: list[Call], cuts: list[int]
) -> None:
    def cut(arguments: str) -> list[str]:
        edges = [0, *sorted(at % (len(arguments) + 1) for at in cuts), len(arguments)]
        parts = [arguments[start:end] for start, end in itertools.pairwise(edges)]
        return parts if quirk not in WITHOUT_EMPTY_PIECES else [part for part in parts if part]

    check_quirk(quirk, calls, cut)


Pieces = list[dict[str, Any]]

ONE_ID: dict[str, tuple[Pieces, list[tuple[str, str]]]] = {
    "two indices": (
        [
            {"id": "x", "index": 0, "function": {"name": "f", "arguments": '{"a": 1}'}},
            {"id": "x", "index": 1, "function": {"name": "f", "arguments": '{"a": 2}'}},
        ],
        [("f", '{"a": 1}'), ("f", '{"a": 2}')],
    ),
    "two indices in turns": (
        [
            {"id": "x", "index": 0, "function": {"name": "f", "arguments": "["}},
            {"id": "x", "index": 1, "function": {"name": "f", "arguments": "{"}},
            {"id": "x", "index": 0, "function": {"arguments": "]"}},
            {"index": 1, "function": {"arguments": "}"}},
        ],
        [("f", "[]"), ("f", "{}")],
    ),
    "two names": (
        [
            {"id": "x", "function": {"name": "f", "arguments": '{"a": 1}'}},
            {"id": "x", "function": {"name": "g", "arguments": '{"a": 2}'}},
        ],
        [("f", '{"a": 1}'), ("g", '{"a": 2}')],
    ),
    "two names in turns": (
        [
            {"id": "x", "function": {"name": "f", "arguments": "["}},
            {"id": "x", "function": {"name": "g", "arguments": "{"}},
            {"id": "x", "function": {"name": "f", "arguments": "]"}},
            {"id": "x", "function": {"name": "g", "arguments": "}"}},
        ],
        [("f", "[]"), ("g", "{}")],
    ),
    "two names with index 0": (
        [
            {"id": "x", "index": 0, "function": {"name": "f", "arguments": ""}},
            {"id": "x", "index": 0, "function": {"arguments": "{}"}},
            {"id": "x", "index": 0, "function": {"name": "g", "arguments": ""}},
            {"id": "x", "index": 0, "function": {"arguments": "[]"}},
        ],
        [("f", "{}"), ("g", "[]")],
    ),
    "two names and two indices": (
        [
            {"id": "x", "index": 0, "function": {"name": "f", "arguments": "{}"}},
            {"id": "x", "index": 1, "function": {"name": "g", "arguments": "[]"}},
        ],
        [("f", "{}"), ("g", "[]")],
    ),
    "one name": (
        [
            {"id": "x", "function": {"name": "f", "arguments": '{"a": "}"}'}},
            {"id": "x", "function": {"name": "f", "arguments": ""}},
            {"id": "x", "function": {"name": "f", "arguments": ' {"a": 2}'}},
        ],
        [("f", '{"a": "}"}'), ("f", ' {"a": 2}')],
    ),
    "one name and objects": (
        [
            {"id": "x", "function": {"name": "f", "arguments": {"a": 1}}},
            {"id": "x", "function": {"name": "f", "arguments": {"a": 2}}},
        ],
        [("f", '{"a":1}'), ("f", '{"a":2}')],
    ),
    "id 0": (
        [
            {"id": 0, "index": 0, "function": {"name": "f", "arguments": "{}"}},
            {"id": 0, "index": 1, "function": {"name": "f", "arguments": "[]"}},
        ],
        [("f", "{}"), ("f", "[]")],
    ),
}


@pytest.mark.parametrize("name", ONE_ID)
def test_two_calls_with_one_id_but_another_index_or_name_are_two_calls(name: str) -> None:
    pieces, expected = ONE_ID[name]
    for calls in (calls_of([pieces]), calls_of([piece] for piece in pieces)):
        assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == expected
        assert {call["id"] for call in calls} == {str(pieces[0]["id"])}


def test_the_arguments_of_one_call_are_not_split_where_they_look_complete() -> None:
    arguments = '{"a": "{}", "b": "\\"}", "c": [{}, {"d": "\\\\"}]}'
    pieces = [[{"id": "x", "function": {"name": "f", "arguments": character}}] for character in arguments]
    (call,) = calls_of(pieces)
    assert call["function"] == {"name": "f", "arguments": arguments}


def many_calls(**fields: Any) -> Callable[[int], None]:
    """Returns a function that accumulates a number of calls, each in three pieces."""

    def accumulate(count: int) -> None:
        accumulator = ChatAccumulator()
        for number in range(count):
            same = {key: value(number) for key, value in fields.items()}
            for function in ({"name": f"f{number % 7}", "arguments": ""}, {"arguments": '{"a'}, {"arguments": '": 1}'}):
                accumulator.add(a_chunk(a_choice({"tool_calls": [{**same, "function": function}]})))
        calls: Any = accumulator.reply()["choices"][0]["message"]["tool_calls"]
        assert len(calls) == count
        assert calls[-1]["function"]["arguments"] == '{"a": 1}'

    return accumulate


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"id": lambda number: f"id-{number}", "index": lambda number: number},
        {"id": lambda _: "x", "index": lambda number: number},
        {"index": lambda number: number},
        {"id": lambda number: f"id-{number}", "index": lambda _: 0},
        {"id": lambda number: f"id-{number}"},
        {},
    ],
    ids=["ids and indices", "one id", "indices", "index 0", "ids", "names alone"],
)
def test_the_time_for_many_calls_grows_with_their_number(fields: dict[str, Any]) -> None:
    assert_linear(many_calls(**fields), 200)


@pytest.mark.slow
@pytest.mark.parametrize("character", ["x", "}", "{", '"', "[]", " "])
def test_the_time_for_a_long_call_grows_with_its_length(character: str) -> None:
    def accumulate(count: int) -> None:
        accumulator = ChatAccumulator()
        for _ in range(count):
            for piece in ({"id": "x", "function": {"name": "f", "arguments": character}}, {"function": {"name": "f"}}):
                accumulator.add(a_chunk(a_choice({"tool_calls": [piece]})))
        accumulator.reply()

    assert_linear(accumulate, 200)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["content", "reasoning", "thinking", "a_text_of_the_future", "audio"])
def test_the_time_for_a_long_text_grows_with_its_length(key: str) -> None:
    def accumulate(count: int) -> None:
        accumulator = ChatAccumulator()
        chunk = a_chunk(a_choice({"role": "assistant", key: {"data": "x" * 50} if key == "audio" else "x" * 50}))
        for _ in range(count):
            accumulator.add(chunk)
        accumulator.reply()

    assert_linear(accumulate, 2000)


def test_the_time_for_many_answers_grows_with_their_number() -> None:
    def accumulate(count: int) -> None:
        accumulator = ChatAccumulator(count)
        for index in range(count):
            accumulator.add(a_chunk(a_choice({"content": "x"}, "stop", index=index)))
            assert accumulator.is_finished is (index == count - 1)

    assert_linear(accumulate, 1000)


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
def test_two_calls_without_arguments_are_kept_apart(pieces: list[Piece]) -> None:
    names = [piece["function"]["name"] for piece in pieces]
    for calls in (calls_of([pieces]), calls_of([piece] for piece in pieces)):
        assert [call["function"] for call in calls] == [{"name": name, "arguments": ""} for name in names]
        assert calls[0]["id"] != calls[1]["id"]


def test_a_name_in_pieces_is_joined_if_the_server_sends_ids() -> None:
    pieces = [{"index": 0, "id": "a", "function": {"name": "get_"}}, {"index": 0, "function": {"name": "weather"}}]
    (call,) = calls_of([[piece] for piece in pieces])
    assert call == {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": ""}}


def test_arguments_of_an_incomplete_stream_are_kept() -> None:
    stream = list(in_pieces(CALLS[:1], list))
    for count in range(1, len(stream)):
        (call,) = calls_of(stream[:count])
        assert call["function"]["arguments"] == CALLS[0][2][: count - 1]


def test_a_generated_id_stays_the_same() -> None:
    accumulator = accumulated([a_chunk(a_choice({"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}))])
    assert accumulator.reply() == accumulator.reply()


def test_a_name_may_arrive_before_its_id() -> None:
    stream: list[list[Piece]] = [[{"function": {"name": "f"}}], [{"id": "a"}], [{"function": {"arguments": "{}"}}]]
    assert calls_of(stream) == [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_a_call_may_begin_with_only_its_index() -> None:
    (call,) = calls_of([[{"index": 0}], [{"index": 0, "function": {"name": "f"}}], [{"function": {"arguments": "{}"}}]])
    assert call["function"] == {"name": "f", "arguments": "{}"}


def test_unknown_fields_of_a_call_are_kept() -> None:
    stream = [
        [{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}, "extra_content": {"signature": "s"}}],
        [{"index": 0, "function": {"arguments": "{}"}, "extra_content": None}],
    ]
    (call,) = calls_of(stream)
    assert call["extra_content"] == {"signature": "s"}


def test_a_reply_may_have_text_and_calls_and_an_empty_list_adds_no_call() -> None:
    piece = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}
    message = message_of({"content": "Let me see.", "tool_calls": []}, {"content": "", "tool_calls": [piece]})
    assert message["content"] == "Let me see."
    assert message["tool_calls"] == [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert "tool_calls" not in message_of({"content": "Hello", "tool_calls": []}, {"tool_calls": None})


def test_calls_of_several_answers_are_kept_apart() -> None:
    def call(index: int, name: str) -> dict[str, Any]:
        return a_chunk(a_choice({"tool_calls": [{"function": {"name": name, "arguments": "{}"}}]}, index=index))

    choices = reply_of(call(0, "f"), call(1, "g"), call(0, "h"))["choices"]
    names = [[call["function"]["name"] for call in choice["message"]["tool_calls"]] for choice in choices]
    assert names == [["f", "h"], ["g"]]


def test_a_piece_of_a_name_is_kept_even_if_the_name_already_ends_with_it() -> None:
    first = {"index": 0, "id": "x", "function": {"name": "ad", "arguments": ""}}
    second = {"index": 0, "function": {"name": "d", "arguments": "{}"}}
    (call,) = calls_of([[first], [second]])
    assert call["function"] == {"name": "add", "arguments": "{}"}
