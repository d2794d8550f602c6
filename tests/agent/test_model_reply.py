"""What a run reads from a reply, whatever shape the server gave it."""

from __future__ import annotations

from typing import Any

import pytest

from lmbridge.agent.model_reply import ModelReply
from tests.agent.support import asks, asks_raw, read_reply


def read(message: Any, finish_reason: Any = "stop", **fields: Any) -> ModelReply:
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return read_reply({"choices": [choice], **fields})


def test_two_calls_with_one_id_are_two_calls() -> None:
    listed = [asks("f", "x", a=1), asks("g", "x"), asks("f", "x", a=1), asks("h", "y")]
    reply = read({"tool_calls": listed})
    assert [call["function"] for call in reply.calls] == [call["function"] for call in listed]
    ids = [call["id"] for call in reply.calls]
    assert (ids[0], ids[3], len(set(ids))) == ("x", "y", 4)


@pytest.mark.parametrize("call_id", [None, "", {}, [], 1.5])
def test_an_id_that_cannot_be_used_is_replaced(call_id: Any) -> None:
    reply = read({"tool_calls": [{**asks("f"), "id": call_id}, {**asks("f"), "id": call_id}]})
    first, second = (call["id"] for call in reply.calls)
    assert first != second
    assert all(isinstance(each, str) and each.startswith("call_") for each in (first, second))


def test_a_number_as_id_becomes_its_text() -> None:
    assert read({"tool_calls": [{**asks("f"), "id": 7}]}).calls[0]["id"] == "7"


def test_a_legacy_function_call_is_a_call() -> None:
    reply = read({"content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}, "function_call")
    assert [call["function"] for call in reply.calls] == [{"name": "f", "arguments": '{"a": 1}'}]
    assert reply.calls[0]["id"]
    assert not reply.announces_calls


@pytest.mark.parametrize("legacy", [None, {}, "f", [], {"name": "", "arguments": ""}])
def test_an_empty_function_call_is_not_a_call(legacy: Any) -> None:
    assert read({"content": "Hi.", "function_call": legacy}).calls == []


def test_a_function_call_beside_tool_calls_is_the_same_call() -> None:
    call = asks("f", a=1)
    assert len(read({"tool_calls": [call], "function_call": call["function"]}).calls) == 1


@pytest.mark.parametrize("reason", ["tool_calls", "tool_call", "function_call", "tool_use"])
@pytest.mark.parametrize("text", ["", "Let me see."])
def test_a_finish_reason_that_announces_a_call_which_is_not_there_is_noticed(reason: str, text: str) -> None:
    for listed in (None, [], [None]):
        assert read({"content": text, "tool_calls": listed}, reason).announces_calls


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", None, "banana", 3, {}])
def test_a_call_is_a_call_whatever_the_finish_reason_is(reason: Any) -> None:
    reply = read({"tool_calls": [asks("f")]}, reason)
    assert len(reply.calls) == 1
    assert not reply.announces_calls
    assert not reply.has_cut_call


@pytest.mark.parametrize("arguments", ['{"a": ', "", None, '{"a": 1}}'])
def test_a_call_that_was_cut_is_recognized(arguments: Any) -> None:
    assert read({"tool_calls": [asks("f"), asks_raw("f", arguments, "2")]}, "length").has_cut_call
    assert not read({"tool_calls": [asks("f"), asks_raw("f", arguments, "2")]}, "stop").has_cut_call


@pytest.mark.parametrize(
    ("name", "arguments", "is_dropped"),
    [
        ("f", '{"city": "Oslo", "d', True),
        ("f", '{"city": "Oslo', True),
        ("f", '{"city": ', False),
        ("f", "", False),
        ("f", '{"city": "Lima", "d', False),
        ("g", '{"city": "Oslo", "d', False),
        ("f", None, False),
    ],
)
def test_only_a_cut_repetition_of_an_earlier_call_is_dropped(name: str, arguments: Any, is_dropped: bool) -> None:
    whole = asks("f", city="Oslo", day=1)
    reply = read({"tool_calls": [whole, asks_raw(name, arguments, "2")]}, "length")
    reply.drop_cut_repetition()
    assert (len(reply.calls), reply.has_cut_call) == ((1, False) if is_dropped else (2, True))


def test_a_call_that_was_not_cut_or_is_alone_is_not_dropped() -> None:
    for calls, reason in (([asks_raw("f", '{"a": ')], "length"), ([asks("f", a=1), asks("f", "2", a=1)], "length")):
        reply = read({"tool_calls": calls}, reason)
        reply.drop_cut_repetition()
        assert len(reply.calls) == len(calls)


@pytest.mark.parametrize(
    "entry",
    [{}, [], "f", 3, {"function": None}, {"function": "f"}, {"function": {"name": None}}, {"function": {"name": []}}],
)
def test_an_entry_that_is_not_a_call_becomes_a_call_without_a_name(entry: Any) -> None:
    (call,) = read({"tool_calls": [entry]}).calls
    assert (call["function"]["name"], call["type"]) == ("", "function")


@pytest.mark.parametrize(
    "completion",
    [
        {},
        {"choices": None},
        {"choices": []},
        {"choices": [None]},
        {"choices": [[]]},
        {"choices": {}},
        {"choices": [{"message": [{}]}]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"tool_calls": {}}}]},
        {"choices": [{"message": {"tool_calls": "f"}}]},
    ],
)
def test_a_reply_without_content_has_no_text(completion: Any) -> None:
    reply = read_reply(completion)
    assert (reply.text, reply.calls, reply.announces_calls) == ("", [], False)


def test_usage_that_is_not_a_count_is_ignored() -> None:
    assert read({"content": "x"}, usage={"prompt_tokens": 3, "total_tokens": "many"}).usage == {"prompt_tokens": 3}
    unusable: tuple[Any, ...] = (None, [], "12", {}, {"prompt_tokens": None})
    for usage in unusable:
        assert read({"content": "x"}, usage=usage).usage is None


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ({"reasoning_content": "Hm.", "content": "x"}, {"reasoning_content": "Hm."}),
        ({"reasoning": "Hm.", "content": "x"}, {"reasoning": "Hm."}),
        ({"reasoning": "Hm.", "reasoning_content": "Hm.", "content": "x"}, {"reasoning_content": "Hm."}),
        ({"reasoning": "Hm.", "reasoning_content": "", "content": "x"}, {"reasoning": "Hm."}),
        ({"content": "<think>Hm.</think>x"}, {"reasoning_content": "Hm."}),
        ({"content": "x"}, {}),
    ],
)
def test_reasoning_is_sent_back_in_the_field_in_which_it_came(message: Any, fields: dict[str, str]) -> None:
    assert read(message).reasoning_fields == fields


def test_the_signature_of_a_call_is_kept() -> None:
    signature = {"google": {"thought_signature": "abc"}}
    (call,) = read({"tool_calls": [{**asks("f"), "extra_content": signature}]}).calls
    assert call["extra_content"] == signature
