"""Replies that are neither an answer nor a call: how they are recognized, and what the model is told."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, LLMResponseError, ModelNudged, RunFinished
from lmbridge.agent.history import History
from lmbridge.agent.model_reply import ModelReply
from lmbridge.agent.nudges import find_flaw, is_promise
from lmbridge.agent.toolset import Toolset
from lmbridge.testing import Behaviour, ScriptedServer, answer
from tests.agent.support import add, asks, asks_raw, calls, check_valid, generations, read_reply, sent

CALL = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
UNREADABLE = "<function=add>{a: 1, b: "


def reply(
    text: str = "", reasoning: str = "", *, reason: Any = "stop", may_call: bool = True, **message: Any
) -> ModelReply:
    choice = {"message": {"content": text, "reasoning_content": reasoning, **message}, "finish_reason": reason}
    read = read_reply({"choices": [choice]})
    read.may_call = may_call
    return read


@pytest.fixture
async def toolset() -> Toolset:
    return await Toolset.collect([add])


# What is wrong with a reply


@pytest.mark.parametrize(
    ("given", "flaw"),
    [
        (reply(), "empty"),
        (reply(" \n"), "empty"),
        (reply(may_call=False), "empty"),
        (reply(reason=None), "empty"),
        (reply(reason="length"), None),
        (reply(reasoning="Hm."), "only_reasoning"),
        (reply("<think>Hm.</think>"), "only_reasoning"),
        (reply("<think>Hm."), "only_reasoning"),
        (reply(reasoning="Hm.", reason="length"), "cut_reasoning"),
        (reply("<think>Hm.", reason="length"), "cut_reasoning"),
        (reply("It is 3."), None),
        (reply("It is", reason="length"), None),
        (reply("It is 3.", reason="tool_calls"), "missing_call"),
        (reply(reason="function_call"), "missing_call"),
        (reply("I will call add now."), "promise"),
        (reply("I will call add now.", reason="length"), None),
        (reply("I will call add now.", may_call=False), None),
        (reply(UNREADABLE), "unreadable_call"),
        (reply('A call looks like this:\n\n<function=add>{"a": 1, "b": 2}</function>'), "promise"),
        (reply(UNREADABLE, may_call=False), None),
        (reply(UNREADABLE, reason="length"), "cut_call"),
        (reply(reasoning=f"I add them. {UNREADABLE}"), "unreadable_call"),
        (reply(tool_calls=[asks("add", a=1, b=2)]), None),
        (reply(tool_calls=[asks("add", a=1, b=2)], reason="length"), None),
        (reply(tool_calls=[asks_raw("add", '{"a": 1')], reason="length"), "cut_call"),
        (reply(tool_calls=[asks_raw("add", '{"a": 1')]), None),
    ],
)
def test_a_reply_that_is_neither_an_answer_nor_a_call_has_a_flaw(
    given: ModelReply, flaw: str | None, toolset: Toolset
) -> None:
    assert find_flaw(given, toolset) == flaw


PROMISES = [
    "I will now call the add tool.",
    "I'll check the weather for you.",
    "I\u2019ll look that up",
    "Let me check that for you:",
    "Okay. Let me do the next step and look that up:",
    "Sure! Let me search the database...",
    "To find out, I am going to read the file first.",
    "I need to use the add function to solve this.",
    "First, I'm going to fetch the list of users.",
    "The sum is not known yet. Let's first calculate it.",
    "Calling add...",
    "Checking the weather in Paris\u2026",
    "One moment, please.",
    "Okay.\n\nI will go ahead and query the database now.",
    "I'll start by listing the files.",
]


@pytest.mark.parametrize("text", PROMISES)
def test_a_promise_is_recognized(text: str) -> None:
    assert is_promise(text, ["add"])


ANSWERS = [
    "It is 3.",
    "Let me know if you need anything else.",
    "I have checked the weather: it is sunny.",
    "I'll be happy to help with that.",
    "I will call you Bob from now on.\n\nNice to meet you, Bob.",
    "Let me explain: a tool is a function that a model can call.",
    "Do you want me to look it up? I can do that.",
    "If you want, I will check the weather in other cities.",
    "Would you like me to search again? Then I will run the query once more if you agree.",
    "I called add, and the sum is 3.",
    "The function add returns the sum of its arguments.",
    "Once you give me the file, I'll read it.",
    "You should check the log, and then run the command again.",
    "Let me check. I looked it up: the sum is 3.",
    "First I will call add.\n\nDone: the sum is 3.",
    "The steps: 1. fetch the list. 2. sort it.",
    "I can't look that up, because I have no tool for it.",
    "Running the tests takes two minutes.",
    "Should I search the web?",
    "I'm sorry, I could not find any result.",
]


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_no_promise(text: str) -> None:
    assert not is_promise(text, ["add"])


def test_only_the_end_of_a_long_answer_is_examined() -> None:
    assert not is_promise("I will call add " * 100_000 + ". The sum is 3.", ["add"])


# What a run does

FATAL = ("empty", "only_reasoning", "missing_call")
"""The flaws with which a run ends in an error if they remain."""
NUDGES: list[tuple[str, Behaviour, str]] = [
    ("empty", answer(""), "Your reply was empty"),
    ("only_reasoning", answer("", reasoning="Hm."), "only reasoning"),
    ("cut_reasoning", answer("", reasoning="Hm.", finish_reason="length"), "limit of 8192 tokens"),
    ("promise", answer("I will call add now."), "have not called a tool"),
    ("missing_call", answer("Yes.", finish_reason="tool_calls"), "announced a tool call"),
    ("unreadable_call", answer(UNREADABLE), '{"name":"add","arguments":{"a":1,"b":1}}'),
    ("cut_call", calls(asks_raw("add", '{"a": 1'), finish_reason="length"), "cut off at 8192 tokens"),
]


@pytest.mark.parametrize(("kind", "flawed", "words"), NUDGES, ids=[kind for kind, _, _ in NUDGES])
@pytest.mark.parametrize("calls_before", [0, 1])
async def test_a_nudge_is_sent_once_and_forgotten_when_it_has_worked(
    scripted_server: ScriptedServer, client: LLMClient, kind: str, flawed: Behaviour, words: str, calls_before: int
) -> None:
    call = calls(asks("add", a=1, b=2))
    scripted_server.script(*[call] * calls_before, flawed, call, answer("It is 3."))
    events = [event async for event in Agent(client, tools=[add]).stream("1 + 2?")]
    last = events[-1]
    assert isinstance(last, RunFinished)
    result = last.result
    assert (result.text, result.stop_reason, result.rounds) == ("It is 3.", "stop", calls_before + 2)

    before, during, after = (sent(scripted_server, calls_before + place)["messages"] for place in range(3))
    assert during[: len(before)] == before
    bad_reply, nudge = during[len(before) :]
    assert (bad_reply["role"], nudge["role"]) == ("assistant", "user")
    assert bad_reply["content"]
    assert words in nudge["content"]
    assert after[: len(before)] == before
    assert [message["role"] for message in after[len(before) :]] == ["assistant", "tool"]
    check_valid(result.messages)
    assert result.messages[:-1] == after

    (event,) = [event for event in events if isinstance(event, ModelNudged)]
    assert (event.nudge.kind, event.nudge.message) == (kind, nudge["content"])
    assert result.log[calls_before].nudges == (event.nudge,)
    assert [len(each.nudges) for each in result.log] == [*[0] * calls_before, 1, 0]


@pytest.mark.parametrize(("kind", "flawed", "_words"), NUDGES, ids=[kind for kind, _, _ in NUDGES])
async def test_each_kind_is_sent_once_a_round(
    scripted_server: ScriptedServer, client: LLMClient, kind: str, flawed: Behaviour, _words: str
) -> None:
    scripted_server.default = flawed
    agent = Agent(client, tools=[add])
    if kind in FATAL:
        with pytest.raises(LLMResponseError, match="twice") as caught:
            await agent.run("1 + 2?")
        assert caught.value.partial.messages == [{"role": "user", "content": "1 + 2?"}]
    else:
        result = await agent.run("1 + 2?")
        assert result.stop_reason == ("length" if kind.startswith("cut") else "stop")
        assert [nudge.kind for nudge in result.log[0].nudges] == [kind]
        assert [message["role"] for message in result.messages] == ["user", "assistant"]
        # A cut call says so by the stop reason; the others look like answers.
        assert len(result.warnings) == (kind in ("promise", "unreadable_call"))
    assert len(generations(scripted_server)) == 2


async def test_different_kinds_share_the_limit_of_a_round(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer(""), answer("I will call add now."), answer(UNREADABLE), answer("Not asked for."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, len(generations(scripted_server))) == (UNREADABLE, 3)
    assert [nudge.kind for nudge in result.log[0].nudges] == ["empty", "promise"]
    # The request after the second nudge still has the first one.
    assert [message["role"] for message in sent(scripted_server)["messages"]] == [
        "user", "assistant", "user", "assistant", "user",
    ]  # fmt: skip


async def test_a_run_has_three_times_as_many_nudges_as_a_round(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    flawed = calls(asks("add", a=1, b=2)), answer("I will call add now.")
    scripted_server.script(*flawed * 3, *flawed)
    result = await Agent(client, tools=[add], max_nudges=1, repetition_limit=None).run("1 + 2?")
    assert (result.text, sum(len(each.nudges) for each in result.log)) == ("I will call add now.", 3)


@pytest.mark.parametrize(("kind", "flawed", "_words"), NUDGES, ids=[kind for kind, _, _ in NUDGES])
async def test_without_nudges_the_model_is_not_asked_again(
    scripted_server: ScriptedServer, client: LLMClient, kind: str, flawed: Behaviour, _words: str
) -> None:
    scripted_server.default = flawed
    agent = Agent(client, tools=[add], max_nudges=0)
    if kind in FATAL:
        with pytest.raises(LLMResponseError):
            await agent.run("1 + 2?")
    else:
        await agent.run("1 + 2?")
    assert len(generations(scripted_server)) == 1


# Asking for an answer without tools

RESULT = calls(asks("add", a=1, b=2))
NEXT_CALL = '{"name": "add", "arguments": {"a": 3, "b": 2}}'


@pytest.mark.parametrize(
    ("kind", "flawed"),
    [
        ("promise", answer("I will call add now.")),
        ("unreadable_call", answer(UNREADABLE)),
        ("cut_call", answer(f"{NEXT_CALL}\n{NEXT_CALL}\n{NEXT_CALL[:20]}", finish_reason="length")),
    ],
)
async def test_a_model_with_results_that_goes_on_to_call_is_asked_to_answer_without_tools(
    scripted_server: ScriptedServer, client: LLMClient, kind: str, flawed: Behaviour
) -> None:
    scripted_server.script(RESULT, flawed, flawed, answer("It is 3."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, result.stop_reason, result.rounds) == ("It is 3.", "stop", 2)
    assert [(nudge.kind, nudge.without_tools) for nudge in result.log[1].nudges] == [(kind, False), (kind, True)]
    requests = [request.json for request in generations(scripted_server)]
    assert ["tools" in request for request in requests] == [True, True, True, False]
    # The flawed replies and the first nudge are not in the last prompt.
    assert requests[3]["messages"][:-2] == requests[1]["messages"]
    assert requests[3]["messages"][-2:] == [
        {"role": "assistant", "content": "I have called the tools."},
        {"role": "user", "content": "Now answer from the results above, without tools: 1 + 2?"},
    ]
    check_valid(requests[3]["messages"])
    check_valid(result.messages)


@pytest.mark.parametrize(
    "flawed",
    [
        answer(f"{NEXT_CALL}\n{NEXT_CALL[:20]}", finish_reason="length"),
        calls(asks_raw("add", '{"a": 1'), finish_reason="length"),
    ],
)
async def test_a_model_whose_calls_are_too_long_is_not_asked_to_answer_without_them(
    scripted_server: ScriptedServer, client: LLMClient, flawed: Behaviour
) -> None:
    scripted_server.script(RESULT, flawed, flawed)
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert result.stop_reason == "length"
    assert [(nudge.kind, nudge.without_tools) for nudge in result.log[1].nudges] == [("cut_call", False)]


@pytest.mark.parametrize("flawed", [answer(""), answer("", reasoning="Hm.")])
async def test_a_model_with_results_that_adds_nothing_is_asked_again_once(
    scripted_server: ScriptedServer, client: LLMClient, flawed: Behaviour
) -> None:
    scripted_server.script(RESULT, flawed, flawed)
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, result.stop_reason) == ("", "stop")
    assert [nudge.without_tools for nudge in result.log[1].nudges] == [False]


async def test_a_long_task_is_not_repeated(scripted_server: ScriptedServer, client: LLMClient) -> None:
    flawed = answer("I will call add now.")
    scripted_server.script(RESULT, flawed, flawed, answer("It is 3."))
    await Agent(client, tools=[add]).run("1 + 2?" + " Think twice." * 50)
    question = sent(scripted_server)["messages"][-1]["content"]
    assert question.startswith("Now give the best answer")
    assert "Think" not in question


async def test_without_results_the_model_is_never_asked_to_make_up_an_answer(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("add", a="one")), answer(UNREADABLE), answer(UNREADABLE))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert result.text == UNREADABLE
    assert all("tools" in request.json for request in generations(scripted_server))


@pytest.mark.parametrize(("reason", "kind"), [("stop", "unreadable_call"), ("length", "cut_call")])
async def test_a_reply_that_begins_with_a_known_call_is_followed_by_a_request_for_the_answer(
    scripted_server: ScriptedServer, client: LLMClient, reason: str, kind: str
) -> None:
    flawed = answer(f'{CALL}\n{{"name": "response", "arguments": [[3,]]}}\n{{', finish_reason=reason)
    scripted_server.script(RESULT, flawed, answer("It is 3."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, result.stop_reason) == ("It is 3.", "stop")
    assert [(nudge.kind, nudge.without_tools) for nudge in result.log[1].nudges] == [(kind, True)]


@pytest.mark.parametrize("options", [{"repetition_limit": None}, {"deduplicate_calls": False}])
@pytest.mark.parametrize(("reason", "kind"), [("stop", "unreadable_call"), ("length", "cut_call")])
async def test_a_known_call_may_be_written_again_if_repetitions_are_allowed(
    scripted_server: ScriptedServer, client: LLMClient, reason: str, kind: str, options: dict[str, Any]
) -> None:
    flawed = answer(f'{CALL}\n{{"name": "response", "arguments": [[3,]]}}\n{{', finish_reason=reason)
    scripted_server.script(RESULT, flawed, answer("It is 3."))
    result = await Agent(client, tools=[add], **options).run("1 + 2?")
    assert [(nudge.kind, nudge.without_tools) for nudge in result.log[1].nudges] == [(kind, False)]


async def test_a_call_that_has_failed_may_be_written_again(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(
        calls(asks("fail", a=1)),
        answer('{"name": "fail", "arguments": {"a": 1}}\n{"name": "response", "arguments": [[3,]]}'),
        answer("It is broken."),
    )

    def fail(a: int) -> str:
        """Fails."""
        raise OSError(f"{a} is busy")

    result = await Agent(client, tools=[fail]).run("Go.")
    assert [(nudge.kind, nudge.without_tools) for nudge in result.log[1].nudges] == [("unreadable_call", False)]
    assert "tools" in sent(scripted_server)


async def test_tools_are_offered_again_after_a_reply_without_them(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(RESULT, answer(UNREADABLE), answer(UNREADABLE), RESULT, answer("It is 3."))
    await Agent(client, tools=[add]).run("1 + 2?")
    assert ["tools" in request.json for request in generations(scripted_server)] == [True, True, True, False, True]


async def test_a_call_that_the_server_recognizes_may_be_repeated_up_to_the_limit(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(*[RESULT] * 5)
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.stop_reason, len(result.tool_calls)) == ("repetition", 5)
    assert not any(each.nudges for each in result.log)


async def test_a_run_whose_model_repeats_its_call_even_without_tools_ends_as_a_repetition(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer(CALL), answer(CALL), answer(CALL))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, result.stop_reason, len(result.tool_calls)) == (CALL, "repetition", 1)
    scripted_server.script(answer(CALL), answer(CALL), answer(CALL), answer("It is 3."))
    result = await Agent(client, tools=[add], on_limit="answer").run("1 + 2?")
    assert (result.text, result.stop_reason) == ("It is 3.", "repetition")


async def test_a_tool_whose_results_differ_may_be_called_again_and_again(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    count = iter(range(10))

    def poll() -> int:
        """Returns how many jobs are done."""
        return next(count)

    scripted_server.script(*[calls(asks("poll"))] * 6, answer("They are done."))
    result = await Agent(client, tools=[poll]).run("Wait.")
    assert (len(result.tool_calls), result.text) == (6, "They are done.")


async def test_a_call_that_was_cut_off_while_it_was_repeated_does_not_stop_the_others(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    reply = calls(asks("add", a=1, b=2), asks_raw("add", '{"a": 1, "b', "call_2"), finish_reason="length")
    scripted_server.script(reply, answer("It is 3."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, len(result.tool_calls)) == ("It is 3.", 1)
    check_valid(result.messages)


# Models that write their calls as text

WRITTEN = answer(CALL)


async def test_a_model_that_writes_the_call_that_it_has_just_made_is_asked_to_answer_without_tools(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(WRITTEN, answer(f"{CALL}\n{CALL}"), answer("It is 3."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, result.stop_reason, result.rounds, len(result.tool_calls)) == ("It is 3.", "stop", 2, 1)
    (nudge,) = result.log[1].nudges
    assert (nudge.kind, nudge.without_tools, nudge.reply) == ("repeated_call", True, f"{CALL}\n{CALL}")
    assert ["tools" in request.json for request in generations(scripted_server)] == [True, True, False]
    check_valid(sent(scripted_server)["messages"])
    check_valid(result.messages)


@pytest.mark.parametrize(
    ("second", "options"),
    [
        (RESULT, {}),
        (answer(NEXT_CALL), {}),
        (answer(f"{CALL}\n{NEXT_CALL}"), {}),
        (WRITTEN, {"repetition_limit": None}),
        (WRITTEN, {"deduplicate_calls": False}),
        (WRITTEN, {"max_nudges": 0}),
    ],
    ids=["recognized", "another", "with another", "repetitions allowed", "no deduplication", "no nudges"],
)
async def test_other_calls_after_a_written_one_are_made(
    scripted_server: ScriptedServer, client: LLMClient, second: Behaviour, options: dict[str, Any]
) -> None:
    scripted_server.script(WRITTEN, second, answer("It is 3."))
    result = await Agent(client, tools=[add], **options).run("1 + 2?")
    assert (result.text, result.rounds) == ("It is 3.", 3)
    assert not any(each.nudges for each in result.log)


@pytest.mark.parametrize("cut", [0, 1, 20, len(CALL) - 1])
async def test_a_written_call_that_was_repeated_until_the_reply_was_cut_is_made_once(
    scripted_server: ScriptedServer, client: LLMClient, cut: int
) -> None:
    written = f"{CALL}\n{CALL}\n{CALL[:cut]}"
    scripted_server.script(answer(written, finish_reason="length"), answer("It is 3."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, len(result.tool_calls)) == ("It is 3.", 1)
    assert not any(each.nudges for each in result.log)

    # Once the model has a result, it has lost its way, and is asked for its answer.
    scripted_server.script(WRITTEN, answer(f"{written}{CALL[cut:]}\n{{", finish_reason="length"), answer("It is 3."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, len(result.tool_calls)) == ("It is 3.", 1)
    assert [nudge.without_tools for each in result.log for nudge in each.nudges] == [True]


async def test_a_reply_full_of_calls_that_begins_with_a_known_one_is_followed_by_a_request_for_the_answer(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    written = f"{CALL}\n{NEXT_CALL}\n"
    scripted_server.script(WRITTEN, answer(written, finish_reason="length"), answer("It is 3."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, len(result.tool_calls)) == ("It is 3.", 1)
    assert [nudge.kind for each in result.log for nudge in each.nudges] == ["repeated_call"]


async def test_a_call_may_be_written_again_after_a_different_one(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(WRITTEN, answer(NEXT_CALL), WRITTEN, answer("It is 3."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (len(result.tool_calls), result.text) == (3, "It is 3.")


async def test_a_written_call_that_has_failed_may_be_made_again(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    def draw() -> str:
        """Draws a ticket."""
        scripted_server.script(answer("It is 7."))
        raise OSError("it is busy")

    call = answer('{"name": "draw", "arguments": {}}')
    scripted_server.script(call, call)
    result = await Agent(client, tools=[draw]).run("Go.")
    assert (len(result.tool_calls), result.text) == (2, "It is 7.")


async def test_a_model_that_writes_its_calls_is_asked_whether_its_first_answer_needs_one(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    agent = Agent(client, tools=[add])
    scripted_server.script(answer("It is 4."), WRITTEN, answer("It is 3."))
    # Nothing is known about the model yet, so its answer counts.
    assert (await agent.run("1 + 2?")).text == "It is 4."
    assert (await agent.run("1 + 2?")).text == "It is 3."

    scripted_server.script(answer("It is 4."), WRITTEN, answer("It is 3."))
    result = await agent.run("1 + 2?")
    assert (result.text, result.rounds, len(result.tool_calls)) == ("It is 3.", 2, 1)
    assert [nudge.kind for nudge in result.log[0].nudges] == ["no_call"]
    assert [message["role"] for message in result.messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("second", [answer("I cannot call a tool."), answer("I will call add now."), answer("")])
async def test_the_first_answer_counts_if_the_model_has_no_call_to_make(
    scripted_server: ScriptedServer, client: LLMClient, second: Behaviour
) -> None:
    agent = Agent(client, tools=[add])
    scripted_server.script(WRITTEN, answer("It is 3."))
    await agent.run("1 + 2?")
    scripted_server.default = second
    scripted_server.script(answer("Hello."))
    result = await agent.run("Hi.")
    assert (result.text, result.stop_reason, result.warnings) == ("Hello.", "stop", ())
    assert result.messages == [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    assert result.log[0].text == "Hello."


async def test_an_answer_after_a_call_is_not_doubted(scripted_server: ScriptedServer, client: LLMClient) -> None:
    agent = Agent(client, tools=[add])
    scripted_server.script(WRITTEN, answer("It is 3."), answer("You are welcome."))
    first = await agent.run("1 + 2?")
    second = await agent.run("Thanks.", messages=first.messages)
    assert second.text == "You are welcome."
    assert not any(each.nudges for run in (first, second) for each in run.log)


async def test_a_model_whose_calls_the_server_recognizes_is_not_doubted(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    agent = Agent(client, tools=[add])
    scripted_server.script(RESULT, RESULT, answer("It is 3."), answer("Hello."))
    assert (await agent.run("1 + 2?")).rounds == 3
    assert (await agent.run("Hi.")).log[0].nudges == ()


async def test_a_cut_call_is_told_how_many_tokens_it_had(scripted_server: ScriptedServer, client: LLMClient) -> None:
    usage = {"prompt_tokens": 50, "completion_tokens": 128, "total_tokens": 178}
    scripted_server.script(calls(asks_raw("add", '{"a": 1'), finish_reason="length", usage=usage), answer("It is 3."))
    await Agent(client, tools=[add]).run("1 + 2?")
    assert "cut off at 128 tokens" in sent(scripted_server)["messages"][-1]["content"]


async def test_a_run_without_tokens_left_is_not_nudged(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("I will call add now."), answer("Not asked for."))
    result = await Agent(client, tools=[add], max_total_tokens=1).run("1 + 2?")
    assert (result.text, len(generations(scripted_server))) == ("I will call add now.", 1)


async def test_an_empty_answer_after_a_tool_is_asked_for_once_more(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), answer(""), answer("It is 3."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, result.stop_reason) == ("It is 3.", "stop")


async def test_a_run_without_tools_is_not_told_to_call_one(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer(""), answer("Hello."))
    await Agent(client).run("Hi.")
    assert sent(scripted_server)["messages"][-1]["content"] == "Your reply was empty. Now give your answer."


async def test_no_form_of_a_call_is_shown_if_calls_in_the_text_are_not_read(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer(UNREADABLE), answer("Done."))
    await Agent(client, tools=[add], read_text_calls="never").run("1 + 2?")
    nudge = sent(scripted_server)["messages"][-1]["content"]
    assert "Calls in your text are never read" in nudge
    assert "<tool_call>" not in nudge


async def test_the_form_of_a_call_is_that_of_the_tool_in_the_reply(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    def paint(colour: str, tags: list[str], *, dry: bool = False) -> str:
        """Paints."""
        return f"{colour} {tags} {dry}"

    scripted_server.script(answer("[TOOL_CALLS]paint{colour: red"), answer("Done."))
    await Agent(client, tools=[paint, add]).run("Paint.")
    form = '{"name":"paint","arguments":{"colour":"...","tags":[],"dry":true}}'
    assert sent(scripted_server)["messages"][-1]["content"].endswith(f"<tool_call>\n{form}\n</tool_call>")


async def test_an_unreadable_call_is_reported_even_if_the_nudge_has_worked(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer(UNREADABLE), calls(asks("add", a=1, b=2)), answer("It is 3."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    (warning,) = result.warnings
    assert re.search(r"could not be read \(<function=\)", warning)


async def test_a_cancelled_run_has_no_nudge_in_its_messages(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer(""), answer("never", gate=asyncio.Event()))
    async with Agent(client, tools=[add]).stream("1 + 2?") as events:
        async for event in events:
            if isinstance(event, ModelNudged):
                break
    assert events.handle.messages == [{"role": "user", "content": "1 + 2?"}]


async def test_a_nudge_counts_towards_the_size_of_the_prompt() -> None:
    history = History("Hi.")
    size = history.size
    history.add_nudge("(The reply was empty.)", "Again.")
    assert history.size > size
    history.drop_nudges()
    assert (history.size, len(history.to_send())) == (size, 1)
