"""FakeChatClient: an agent whose model says what the test has scripted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lmbridge import Agent, LLMConnectionError, LLMStreamError, LLMValidationError, ToolCall, collect
from lmbridge.testing import FakeChatClient, FakeReply
from tests.support import MESSAGES


def weather(city: str) -> str:
    """Returns the weather."""
    return f"It rains in {city}."


CALL = ToolCall("1", "weather", {"city": "Oslo"})


async def test_an_agent_makes_the_scripted_calls_and_returns_the_scripted_answer() -> None:
    client = FakeChatClient([CALL, "Take an umbrella."])
    result = await Agent(client, tools=[weather]).run("What is the weather in Oslo?")
    assert result.text == "Take an umbrella."
    assert [record.text for record in result.log[0].tool_calls] == ["It rains in Oslo."]
    assert [request.tools for request in client.requests] == [["weather"], ["weather"]]
    assert client.requests[1].messages[-1]["content"] == "It rains in Oslo."
    assert client.requests[0].model == "fake-model"


async def test_several_calls_are_made_in_one_turn() -> None:
    client = FakeChatClient([[CALL, ToolCall("2", "weather", {"city": "Bergen"})], "Rain everywhere."])
    result = await Agent(client, tools=[weather]).run("?")
    assert [record.text for record in result.log[0].tool_calls] == ["It rains in Oslo.", "It rains in Bergen."]


async def test_a_reply_can_have_reasoning_a_finish_reason_and_usage() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    reply = FakeReply(text="Half an answ", reasoning="Hm.", finish_reason="length", usage=usage)
    result = await Agent(FakeChatClient([reply])).run("?")
    assert (result.text, result.reasoning, result.stop_reason) == ("Half an answ", "Hm.", "length")
    assert result.usage["total_tokens"] == 10


async def test_a_turn_can_be_a_message_as_a_dict() -> None:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]}
    result = await Agent(FakeChatClient([message, {"content": "Wet."}]), tools=[weather]).run("?")
    assert (result.tool_calls[0].name, result.text) == ("weather", "Wet.")


async def test_a_function_gets_the_messages_and_decides() -> None:
    async def decide(messages: list[dict[str, Any]]) -> str | ToolCall:
        await asyncio.sleep(0)
        return f"I read: {messages[-1]['content']}" if messages[-1]["role"] == "tool" else CALL

    assert (await Agent(FakeChatClient(decide), tools=[weather]).run("?")).text == "I read: It rains in Oslo."
    mixed = FakeChatClient([lambda messages: CALL, lambda messages: str(len(messages))])
    assert (await Agent(mixed, tools=[weather]).run("?")).text == "3"


async def test_an_exception_is_raised_in_place_of_a_reply() -> None:
    with pytest.raises(LLMConnectionError, match="it is down") as caught:
        await Agent(FakeChatClient([CALL, LLMConnectionError("it is down")]), tools=[weather]).run("?")
    assert caught.value.partial.rounds == 2


async def test_a_reply_can_break_off() -> None:
    reply = FakeReply(text="Once upon", error=LLMStreamError("the connection broke"))
    with pytest.raises(LLMStreamError) as caught:
        await Agent(FakeChatClient([reply])).run("?")
    assert caught.value.partial.text == "Once upon"


async def test_a_request_after_the_last_turn_fails_the_test() -> None:
    agent = Agent(FakeChatClient([CALL]), tools=[weather])
    with pytest.raises(AssertionError, match=r"asked for turn 2, but has only 1; .*It rains in Oslo"):
        await agent.run("?")


async def test_plain_and_streamed_replies_are_the_same() -> None:
    client = FakeChatClient([FakeReply(text="Two words", reasoning="Hm.", tool_calls=[CALL])] * 2)
    plain = await client.chat_completion(MESSAGES)
    stream = await client.chat_completion(MESSAGES, stream=True, stream_options={"include_usage": True})
    streamed: Any = await collect(stream)
    message = plain["choices"][0]["message"]
    assert {key: streamed["choices"][0]["message"][key] for key in message} == message
    assert streamed["usage"] == plain["usage"]


@pytest.mark.parametrize("turns", ["Hello", {"content": "Hello"}, 3])
def test_turns_that_are_not_a_list_are_refused(turns: Any) -> None:
    with pytest.raises(LLMValidationError, match="a turn is a text"):
        FakeChatClient(turns)


@pytest.mark.parametrize("turn", [3, {"name": "weather"}, ["weather"], []])
async def test_a_turn_of_an_unknown_kind_is_refused(turn: Any) -> None:
    with pytest.raises(LLMValidationError, match="turn of a FakeChatClient"):
        await FakeChatClient([turn]).chat_completion(MESSAGES)
