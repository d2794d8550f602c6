"""The answer that a run gives when it has used up its rounds or its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, LLMValidationError, MaxRoundsExceededError, RunIncompleteError
from lmbridge.testing import Behaviour, ScriptedServer, answer
from tests.agent.support import add, asks, calls, check_valid, generations, sent

CALL = calls(asks("add", a=1, b=2))


@dataclass
class Sum:
    total: int


@pytest.mark.parametrize(("options", "stop"), [({"max_rounds": 1}, "max_rounds"), ({"max_total_tokens": 1}, "budget")])
async def test_a_run_at_its_limit_gives_its_best_answer(
    scripted_server: ScriptedServer, client: LLMClient, options: dict[str, Any], stop: str
) -> None:
    scripted_server.script(CALL, answer("Probably 3."))
    result = await Agent(client, tools=[add], on_limit="answer", tool_choice="auto", **options).run("1 + 2?")
    assert (result.text, result.stop_reason, result.rounds) == ("Probably 3.", stop, 2)
    assert result.has_answer
    last = sent(scripted_server)
    assert "tools" not in last
    assert "tool_choice" not in last
    assert last["messages"][-1]["content"] == "Now answer from the results above, without tools: 1 + 2?"
    check_valid(last["messages"])
    check_valid(result.messages)
    assert result.messages[-1] == {"role": "assistant", "content": "Probably 3."}
    assert [message["role"] for message in result.messages].count("user") == 1
    assert len(result.log) == 2


async def test_by_default_a_run_without_an_answer_raises(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = CALL
    with pytest.raises(MaxRoundsExceededError):
        await Agent(client, tools=[add], max_rounds=2).run("1 + 2?")
    assert len(generations(scripted_server)) == 2


@pytest.mark.parametrize("last", [answer(""), answer("", reasoning="Hm."), CALL])
async def test_a_run_whose_last_words_are_none_ends_like_any_other(
    scripted_server: ScriptedServer, client: LLMClient, last: Behaviour
) -> None:
    scripted_server.script(CALL, last)
    with pytest.raises(MaxRoundsExceededError) as caught:
        await Agent(client, tools=[add], max_rounds=1, on_limit="answer").run("1 + 2?")
    check_valid(caught.value.result.messages)
    assert caught.value.result.messages[-1]["role"] == "tool"
    assert not caught.value.result.has_answer


async def test_last_words_that_are_a_call_have_a_warning(scripted_server: ScriptedServer, client: LLMClient) -> None:
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1'
    scripted_server.script(CALL, answer(text))
    result = await Agent(client, tools=[add], max_rounds=1, on_limit="answer").run("1 + 2?")
    assert (result.text, result.stop_reason) == (text, "max_rounds")
    assert "the answer ends in a tool call that could not be read" in result.warnings[0]


async def test_last_words_that_were_cut_off_have_a_warning(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(CALL, answer("It is", finish_reason="length"))
    result = await Agent(client, tools=[add], max_rounds=1, on_limit="answer").run("1 + 2?")
    assert (result.text, result.warnings) == ("It is", ("the last answer of the run was cut off at max_tokens",))


async def test_the_last_words_are_the_typed_output(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(CALL, answer('{"total": 3}'))
    agent = Agent(client, tools=[add], max_rounds=1, on_limit="answer", output_type=Sum)
    result = await agent.run("1 + 2?")
    assert (result.output, result.stop_reason) == (Sum(3), "max_rounds")
    assert "response_format" in sent(scripted_server)


@pytest.mark.parametrize("options", [{"max_rounds": 1}, {"max_total_tokens": 1}])
async def test_last_words_that_are_not_the_output_are_an_error(
    scripted_server: ScriptedServer, client: LLMClient, options: dict[str, Any]
) -> None:
    scripted_server.script(CALL, answer("Three."))
    agent = Agent(client, tools=[add], on_limit="answer", output_type=Sum, **options)
    with pytest.raises(RunIncompleteError) as caught:
        await agent.run("1 + 2?")
    assert caught.value.result.text == "Three."


async def test_an_answer_within_the_limits_is_not_asked_for_again(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(CALL, answer("It is 3."))
    result = await Agent(client, tools=[add], max_rounds=2, on_limit="answer").run("1 + 2?")
    assert (result.text, result.stop_reason, len(generations(scripted_server))) == ("It is 3.", "stop", 2)


def test_on_limit_is_one_of_two_words(client: LLMClient) -> None:
    options: dict[str, Any] = {"on_limit": "continue"}
    with pytest.raises(LLMValidationError, match="on_limit"):
        Agent(client, **options)
