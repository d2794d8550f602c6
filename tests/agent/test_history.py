"""The conversation of a run: valid at every moment, and trimmed in whole groups of messages."""

from __future__ import annotations

import decimal
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge import Agent, LLMClient, LLMValidationError
from lmbridge.agent.continued_messages import check_pairs
from lmbridge.agent.history import History, valid_arguments
from lmbridge.client.token_count import size_of
from lmbridge.testing import ScriptedServer, answer
from tests.agent.support import asks, asks_raw, begin_turn, check_valid, tool_texts
from tests.support import assert_linear


def turn(history: History, *call_ids: str, text: str = "result") -> None:
    opened = begin_turn(history, "", [asks("f", call_id) for call_id in call_ids])
    for call_id in call_ids:
        opened.begin([call_id])
        opened.answer(call_id, text)
    history.end_turn()


def test_an_open_turn_has_placeholders_for_missing_results() -> None:
    history = History("Go.")
    opened = begin_turn(history, "So:", [asks("f", "1"), asks("f", "2"), asks("f", "3")])
    opened.begin(["1", "2"])
    opened.answer("2", "two")
    for ended, texts in (
        (False, ["still running", "two", "still running"]),
        (True, ["may still be", "two", "Not called"]),
    ):
        messages = history.snapshot(ended=ended)
        check_valid(messages)
        for text, expected in zip(tool_texts(messages), texts, strict=True):
            assert expected in text
    assert history.to_send() == [{"role": "user", "content": "Go."}]
    history.end_turn()
    check_valid(history.to_send())


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("get_weather", "get_weather"),
        ("Get-Weather_2", "get-weather_2"),
        ("functions.get_weather", "functions_get_weather"),
        ("get weather", "get_weather"),
        ("$READFILE", "_readfile"),
        ("assistant<|channel|>commentary", "assistant_channel_commentary"),
        ('add{"a": 1}', "add_a_1_"),
        ("caf\u00e9", "caf_"),
        ("\u017f\u212a", "unknown"),
        ("n" * 10_000, "n" * 64),
        ("\u00e9" * 10_000, "unknown"),
        ("...", "unknown"),
        ("-", "unknown"),
        ("a\n", "a_"),
        ("", "unknown"),
    ],
)
def test_a_name_that_servers_refuse_is_not_sent(name: str, sent: str) -> None:
    history = History("Go.")
    turn = begin_turn(history, "", [asks_raw(name, "{}", "x")])
    turn.answer("x", "there is no such tool")
    history.end_turn()
    (assistant, result) = history.to_send()[1:]
    assert assistant["tool_calls"][0]["function"]["name"] == sent
    assert re.fullmatch("[a-z0-9_-]{1,64}", sent)
    assert assistant["tool_calls"][0]["id"] == result["tool_call_id"]


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        ({"a": 1}, '{"a":1}'),
        ('"{\\"a\\": 1}"', '{"a": 1}'),
        (' {"a" : 1} ', ' {"a" : 1} '),
        (None, "{}"),
        (3, "{}"),
        (["a"], "{}"),
    ],
)
def test_arguments_are_sent_back_as_the_object_that_they_stand_for(arguments: Any, sent: str) -> None:
    assert valid_arguments(arguments) == sent


def test_a_conversation_with_a_name_that_servers_refuse_can_be_continued() -> None:
    signed = {**asks("Sub.Tract", "1"), "extra_content": {"google": {"thought_signature": "abc"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "", "tool_calls": [signed]},
        {"role": "tool", "tool_call_id": "1", "content": "no such tool"},
    ]
    (call,) = History("Go.", messages=messages).to_send()[1]["tool_calls"]
    assert call == {**signed, "function": {"name": "sub_tract", "arguments": "{}"}}


def test_the_signature_of_a_call_is_sent_back() -> None:
    history = History("Go.")
    begin_turn(history, "", [{**asks("f"), "extra_content": {"google": {"thought_signature": "abc"}}, "index": 0}])
    (call,) = history.snapshot(ended=True)[1]["tool_calls"]
    assert call == {**asks("f"), "extra_content": {"google": {"thought_signature": "abc"}}}


@pytest.mark.parametrize("arguments", ['{"a": 1', "", "null", "[1]", "3", '"x"', "\ud800", "[" * 100_000])
def test_malformed_arguments_are_replaced_by_an_empty_object(arguments: str) -> None:
    history = History("Go.")
    begin_turn(history, "", [asks_raw("f", arguments), asks_raw("", "{}", "2")])
    message = history.snapshot(ended=True)[1]
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert message["tool_calls"][1]["function"]["name"] == "unknown"


@given(st.dictionaries(st.text(), st.integers() | st.text()))
def test_arguments_that_are_an_object_are_unchanged(arguments: dict[str, Any]) -> None:
    text = json.dumps(arguments)
    assert valid_arguments(text) == text


def test_there_is_one_leading_system_message() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": None},
        {"role": "developer", "content": ["Be ", {"type": "text", "text": "brief."}]},
    ]
    kept = History("Go.", messages=messages).to_send()
    assert kept[0] == {"role": "system", "content": "Be kind.\n\nBe brief."}
    check_valid(kept)
    replaced = History("Go.", messages=messages, system_prompt="Be exact.").to_send()
    assert replaced[0] == {"role": "system", "content": "Be exact."}
    assert kept[1:] == replaced[1:]
    assert kept[2] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("before", "task", "joined"),
    [
        ("One.", "Two.", "One.\n\nTwo."),
        ("One.", [{"type": "text", "text": "Two."}], [{"type": "text", "text": each} for each in ("One.", "Two.")]),
        ([{"type": "text", "text": "One."}], "Two.", [{"type": "text", "text": each} for each in ("One.", "Two.")]),
    ],
)
def test_there_are_never_two_user_messages_in_a_row(before: Any, task: Any, joined: Any) -> None:
    history = History(task, messages=[{"role": "user", "content": before}])
    assert history.to_send() == history.snapshot(ended=True) == [{"role": "user", "content": joined}]


def test_arguments_that_are_an_object_are_sent_as_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ]
    sent = History("Go.", messages=messages).to_send()
    assert sent[1]["tool_calls"][0]["function"]["arguments"] == '{"a":1}'
    check_valid(sent)


ASSISTANT = {"role": "assistant", "content": "", "tool_calls": [asks("f", "1")]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "x"}


@pytest.mark.parametrize(
    "messages",
    [
        [ASSISTANT],
        [RESULT],
        [ASSISTANT, RESULT, RESULT],
        [ASSISTANT, {"role": "user", "content": "x"}, RESULT],
        [{**ASSISTANT, "tool_calls": [asks_raw("f", "{", "1")]}, RESULT],
        [{**ASSISTANT, "tool_calls": [asks_raw("f", "[]", "1")]}, RESULT],
        [{**ASSISTANT, "tool_calls": [asks_raw("", "{}", "1")]}, RESULT],
        [{**ASSISTANT, "tool_calls": ["f"]}, RESULT],
        [{"role": "user", "content": object()}],
        ["x"],
        "x",
    ],
)
def test_messages_that_no_server_accepts_are_refused(messages: Any) -> None:
    with pytest.raises(LLMValidationError) as caught:
        History("Go.", messages=messages)
    assert caught.value.hint


def trim(history: History, excess: int) -> bool:
    """Leaves out the oldest groups, at least so many bytes if there are enough, and returns whether there were any."""
    before, after = history.count_oldest(history.size - excess)
    history.leave_out(before, after)
    return bool(before or after)


def test_trimming_leaves_out_the_oldest_and_keeps_the_task_and_the_last_turn() -> None:
    before = [
        message
        for number in range(3)
        for message in ({"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"})
    ]
    history = History("Go.", system_prompt="Be kind.", messages=before)
    for number in range(3):
        turn(history, f"{number}a", f"{number}b", text=f"r{number}")
    whole = history.snapshot(ended=True)
    sizes = [history.size]
    while trim(history, 1):
        check_valid(history.to_send())
        assert history.size == sum(map(size_of, history.to_send())) < sizes[-1]
        sizes.append(history.size)
    left = history.to_send()
    assert [message["role"] for message in left] == ["system", "user", "assistant", "tool", "tool"]
    assert (left[1]["content"], tool_texts(left)) == ("Go.", ["r2", "r2"])
    assert len(sizes) == 6
    assert history.snapshot(ended=True) == whole, "nothing is lost to the user"


def test_an_image_counts_as_a_fixed_size() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    assert size_of({"role": "user", "content": [{"type": "text", "text": "What?"}, image]}) < 5_000


def test_numeric_ids_and_endless_names_are_made_acceptable() -> None:
    history = History("Go.")
    turn = begin_turn(history, "", [{"id": 7, "function": {"name": "n" * 10_000, "arguments": "{}"}}])
    turn.answer("7", "done")
    history.end_turn()
    messages = history.snapshot(ended=True)
    check_valid(messages)
    assert tool_texts(messages) == ["done"]
    assert messages[1]["tool_calls"][0] == {
        "id": "7",
        "type": "function",
        "function": {"name": "n" * 64, "arguments": "{}"},
    }


@pytest.mark.parametrize(
    ("prompt", "before", "expected"),
    [
        (None, None, "Note."),
        ("Be brief.", None, "Be brief.\n\nNote."),
        (None, [{"role": "system", "content": "Old."}], "Old.\n\nNote."),
    ],
)
def test_a_note_becomes_part_of_the_leading_system_message(prompt: str | None, before: Any, expected: str) -> None:
    history = History("Go.", system_prompt=prompt, messages=before)
    history.add_system_note("Note.")
    messages = history.snapshot(ended=True)
    check_valid(messages)
    assert (
        messages == history.to_send() == [{"role": "system", "content": expected}, {"role": "user", "content": "Go."}]
    )
    assert history.size == sum(map(size_of, messages))


def test_an_empty_note_changes_nothing() -> None:
    history = History("Go.", system_prompt="Be brief.")
    size = history.size
    history.add_system_note("")
    assert history.to_send()[0] == {"role": "system", "content": "Be brief."}
    assert history.size == size


@settings(deadline=None)
@given(st.lists(st.sampled_from(["answer", "turn", "begin", "end", "trim", "trim all", "tell"]), max_size=12))
def test_the_messages_to_send_are_the_whole_conversation_except_for_trimmed_ones(steps: list[str]) -> None:
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    history = History("Go.", system_prompt="Be brief.", messages=before)
    for number, step in enumerate(steps):
        if step == "answer":
            history.add_answer(f"answer {number}")
        elif step == "turn":
            turn(history, f"call {number}")
        elif step == "begin":
            history.end_turn()
            begin_turn(history, "", [asks("f", f"call {number}")])
        elif step == "end":
            history.end_turn()
        elif step == "tell":
            history.add_system_note(f"Note {number}.")
        else:
            trim(history, 1 if step == "trim" else history.size)
        sent = history.to_send()
        groups = (history._head, *history._groups_before_task, [history._task], *history._groups_after_task)
        assert sent == [message for group in groups for message in group]
        assert history.size == sum(map(size_of, sent))
        check_valid(sent)
        # The list belongs to the caller, which may change it.
        sent.clear()


@pytest.mark.slow
def test_the_time_for_turns_grows_with_their_number() -> None:
    def take(turns: int) -> None:
        history = History("Go.")
        for number in range(turns):
            turn(history, f"call {number}")
            trim(history, 0)
        history.snapshot(ended=True)

    assert_linear(take, 500)


class Text(str):
    """Like `numpy.str_`."""

    __slots__ = ()


async def test_an_instance_of_a_subclass_of_str_is_its_text_everywhere_in_a_run(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.default = answer("Fine.")
    before: list[dict[str, Any]] = [
        {"role": Text("user"), "content": Text("Hi.")},
        {"role": "assistant", "content": [{"type": Text("text")}]},
    ]
    agent = Agent(client, model=Text("other"), system_prompt=Text("Be brief."), stop=[Text("x")])
    result = await agent.run(Text("Go."), messages=before)
    (body,) = [request.json for request in scripted_server.requests if request.method == "POST"]
    assert (body["model"], body["stop"]) == ("other", ["x"])
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": [{"type": "text"}]},
        {"role": "user", "content": "Go."},
    ]
    assert result.messages == [*body["messages"], {"role": "assistant", "content": "Fine."}]


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"task": [{"type": "text", "text": decimal.Decimal(1)}]}, r"task\[0\]\.text"),
        ({"task": [{"type": "image_url", "image_url": {"url": b"data"}}]}, r"task\[0\]\.image_url\.url"),
        ({"task": [{"type": "text", "text": "half \ud83d"}]}, r"task\[0\]\.text"),
        ({"task": "half \ud83d"}, "task"),
        ({"task": "Go.", "messages": [{"role": "user", "content": "x", "name": b"x"}]}, r"messages\[0\]\.name"),
        (
            {"task": "Go.", "messages": [{"role": "user", "content": [{"x": math.nan}]}]},
            r"messages\[0\]\.content\[0\]\.x",
        ),
        ({"task": "Go.", "system_prompt": "half \ud83d"}, "system_prompt"),
    ],
)
def test_a_value_that_json_does_not_have_is_refused_with_its_path(arguments: dict[str, Any], path: str) -> None:
    with pytest.raises(LLMValidationError, match=f"^{path} (is|cannot be sent as JSON: it has) "):
        History(**arguments)


async def test_a_run_refuses_a_task_that_json_does_not_have(scripted_server: ScriptedServer, client: LLMClient) -> None:
    with pytest.raises(LLMValidationError, match=r"task\[0\]\.text is of type Decimal, which cannot be sent as JSON"):
        await Agent(client).run([{"type": "text", "text": decimal.Decimal(1)}])
    assert scripted_server.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_a_conversation_with_very_many_calls_is_checked_in_linear_time(reverse: bool) -> None:
    def conversation(count: int) -> list[dict[str, Any]]:
        ids = [f"call_{number}" for number in range(count)]
        function = {"name": "add", "arguments": "{}"}
        calls = [{"id": each, "type": "function", "function": function} for each in ids]
        results = [{"role": "tool", "tool_call_id": each, "content": ""} for each in (ids[::-1] if reverse else ids)]
        return [{"role": "assistant", "content": "", "tool_calls": calls}, *results]

    assert_linear(lambda count: check_pairs(conversation(count)), 2_000)


@pytest.mark.parametrize(
    ("ids", "results", "message"),
    [
        (["a", "a"], ["a", "a"], None),
        (["a", "a"], ["a"], "no result for the call 'a'"),
        (["a"], ["a", "a"], "a result for the call 'a', but no such call"),
        ([1], ["1"], "a result for the call '1', but no such call"),
        (["a"], [["a"]], r"a result for the call \['a'\], but no such call"),
        ([], [None], "a result for the call None, but no such call"),
    ],
)
def test_each_result_answers_one_call(ids: list[Any], results: list[Any], message: str | None) -> None:
    calls = [{"id": each, "function": {"name": "add", "arguments": "{}"}} for each in ids]
    messages = [
        {"role": "assistant", "tool_calls": calls},
        *({"role": "tool", "tool_call_id": each} for each in results),
    ]
    if message is None:
        check_pairs(messages)
        return
    with pytest.raises(LLMValidationError, match=message):
        check_pairs(messages)
