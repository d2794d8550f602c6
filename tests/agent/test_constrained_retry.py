"""The reply after an invalid call: when it is constrained to the schema of the tool, and how it is read."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

import msgspec
import pytest

from lmbridge import Agent, LLMClient, LLMResponseError, LLMValidationError, TextDelta, ToolCallFinished
from lmbridge.testing import Behaviour, ScriptedServer, answer, reply
from tests.agent.support import add, asks, asks_raw, calls, check_valid, collect_events, generations, sent, tool_texts


def forecast(city: str, unit: Literal["C", "F"] = "C") -> str:
    """Forecasts the weather."""
    return f"It will be warm in {city} ({unit})."


WRONG = calls(asks("forecast", town="Oslo"))
RIGHT = answer('{"city": "Oslo", "unit": "F"}')
TEXT = "It will be warm in Oslo (F)."


def formats(server: ScriptedServer) -> list[str | None]:
    """Returns for each request the name of the schema to which its reply is constrained."""
    found = [request.json.get("response_format") for request in generations(server)]
    return [None if each is None else each["json_schema"]["name"] for each in found]


@pytest.mark.parametrize(
    "wrong", [asks("forecast", town="Oslo"), asks("forecast", city="Oslo", unit="K"), asks_raw("forecast", '{"city"')]
)
async def test_the_reply_after_an_invalid_call_is_constrained_and_becomes_a_call(
    scripted_server: ScriptedServer, client: LLMClient, wrong: dict[str, Any]
) -> None:
    scripted_server.script(calls(wrong), RIGHT, answer("Warm."))
    result = await Agent(client, tools=[add, forecast]).run("What will the weather be in Oslo?")
    first, second, third = (sent(scripted_server, number) for number in range(3))
    assert formats(scripted_server) == [None, "forecast", None]
    schema = second["response_format"]["json_schema"]["schema"]
    assert schema == {"additionalProperties": False, **first["tools"][1]["function"]["parameters"]}
    # The beginning of the prompt stays the same, so that it stays in the server's cache.
    assert second["tools"] == first["tools"] == third["tools"]
    assert [record.constrained for entry in result.log for record in entry.tool_calls] == [False, True]
    assert tool_texts(result.messages)[1] == TEXT
    assert result.messages[3]["content"] == ""
    check_valid(result.messages)


async def test_the_json_of_a_constrained_reply_is_an_event_of_a_call_and_no_text(
    scripted_server: ScriptedServer, client: LLMClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lmbridge.agent")
    scripted_server.script(WRONG, RIGHT, answer("Warm."))
    events = await collect_events(Agent(client, tools=[forecast], read_text_calls="never"))
    assert "".join(each.text for each in events if isinstance(each, TextDelta)) == "Warm."
    assert [each.constrained for each in events if isinstance(each, ToolCallFinished)] == [False, True]
    assert "the retry of an invalid call of 'forecast' was constrained" in caplog.text


@pytest.mark.parametrize(
    "constrained",
    [
        answer('```json\n{"city": "Oslo", "unit": "F"}\n```'),
        answer("", reasoning='{"city": "Oslo", "unit": "F"}'),
        calls(asks("forecast", city="Oslo", unit="F")),
    ],
    ids=["fenced", "as reasoning", "as a call"],
)
async def test_the_arguments_are_found_wherever_a_server_puts_them(
    scripted_server: ScriptedServer, client: LLMClient, constrained: Behaviour
) -> None:
    scripted_server.script(WRONG, constrained, answer("Warm."))
    result = await Agent(client, tools=[forecast]).run("Go.")
    assert tool_texts(result.messages)[1] == TEXT
    assert result.log[1].tool_calls[0].constrained


@pytest.mark.parametrize(
    "first",
    [
        calls(asks("forecasts_of_oslo", city="Oslo")),
        calls(asks("forecast", "1", town="Oslo"), asks("forecast", "2", city="Oslo")),
        calls(asks("forecast", "1", town="Oslo"), asks("add", "2", x=1)),
        calls(asks("forecast", city="Oslo")),
    ],
    ids=["unknown tool", "one of two is valid", "two tools", "valid"],
)
async def test_a_reply_is_free_unless_all_calls_before_it_were_invalid_ones_of_one_tool(
    scripted_server: ScriptedServer, client: LLMClient, first: Behaviour
) -> None:
    scripted_server.script(first, answer("Warm."))
    await Agent(client, tools=[add, forecast]).run("Go.")
    assert formats(scripted_server) == [None, None]


async def test_a_constrained_call_that_is_invalid_as_well_is_followed_by_a_free_reply(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    # The server knows nothing of the enum, as with keywords that are not sent.
    scripted_server.script(WRONG, answer('{"city": "Oslo", "unit": "K"}'), WRONG, RIGHT, answer("Warm."))
    result = await Agent(client, tools=[forecast]).run("Go.")
    assert formats(scripted_server) == [None, "forecast", None, "forecast", None]
    assert "invalid enum value 'K'" in tool_texts(result.messages)[1]
    check_valid(result.messages)


async def test_a_server_that_refuses_the_constraint_is_not_asked_for_it_again(
    scripted_server: ScriptedServer, client: LLMClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lmbridge.agent")
    refusal = reply(400, {"error": {"message": "response_format is not supported"}})
    agent = Agent(client, tools=[forecast])
    right = calls(asks("forecast", city="Oslo", unit="F"))
    scripted_server.script(WRONG, refusal, right, answer("Warm."), WRONG, right, answer("Warm."))
    result = await agent.run("Go.")
    assert tool_texts(result.messages)[1] == TEXT
    assert not result.log[1].tool_calls[0].constrained
    await agent.run("Go.")
    assert formats(scripted_server) == [None, "forecast", None, None, None, None, None]
    assert caplog.text.count("refuses to constrain the retry") == 1


async def test_an_error_that_has_another_reason_is_raised_and_nothing_is_learned_from_it(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    broken = reply(400, {"error": {"message": "out of order"}})
    agent = Agent(client.with_options(max_retries=0), tools=[forecast])
    scripted_server.script(WRONG, broken, broken, WRONG, RIGHT, answer("Warm."))
    with pytest.raises(LLMResponseError, match="out of order"):
        await agent.run("Go.")
    await agent.run("Go.")
    assert formats(scripted_server) == [None, "forecast", None, None, "forecast", None]


async def test_a_server_that_ignores_the_constraint_gives_an_ordinary_answer(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(WRONG, answer("I cannot know that."))
    events = await collect_events(Agent(client, tools=[forecast]))
    assert "".join(each.text for each in events if isinstance(each, TextDelta)) == "I cannot know that."
    assert events[-1].result.text == "I cannot know that."


async def test_json_that_is_not_of_the_schema_is_an_answer(scripted_server: ScriptedServer, client: LLMClient) -> None:
    class Weather(msgspec.Struct):
        warm: bool

    scripted_server.script(WRONG, answer('{"warm": true}'))
    result = await Agent(client, tools=[forecast]).run("Go.", output_type=Weather)
    assert result.output == Weather(warm=True)


@pytest.mark.parametrize(
    "unusable",
    [answer('{"city": "Ooooo', finish_reason="length"), answer("")],
    ids=["cut off", "empty"],
)
async def test_a_constrained_reply_that_is_unusable_is_asked_for_again_without_the_constraint(
    scripted_server: ScriptedServer, client: LLMClient, unusable: Behaviour
) -> None:
    scripted_server.script(WRONG, unusable, calls(asks("forecast", city="Oslo", unit="F")), answer("Warm."))
    events = await collect_events(Agent(client, tools=[forecast]))
    assert formats(scripted_server) == [None, "forecast", None, None]
    assert sent(scripted_server, 1)["messages"] == sent(scripted_server, 2)["messages"]
    assert "".join(each.text for each in events if isinstance(each, TextDelta)) == "Warm."


async def test_a_response_format_of_the_user_stays(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(WRONG, answer("{}"))
    await Agent(client, tools=[forecast], extra_body={"response_format": {"type": "text"}}).run("Go.")
    assert sent(scripted_server)["response_format"] == {"type": "text"}


async def test_a_run_that_forbids_calls_is_never_constrained_to_one(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(WRONG, answer("Warm."))
    await Agent(client, tools=[forecast], tool_choice="none").run("Go.")
    assert formats(scripted_server) == [None, None]


async def test_retries_are_free_if_the_user_wants_that(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(WRONG, answer('{"city": "Oslo"}'))
    result = await Agent(client, tools=[forecast], constrain_retries=False).run("Go.")
    assert formats(scripted_server) == [None, None]
    assert result.text == '{"city": "Oslo"}'


async def test_a_run_that_is_cancelled_during_a_constrained_reply_has_a_valid_history(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    gate = asyncio.Event()
    scripted_server.script(WRONG, answer('{"city": "Oslo"}', gate=gate))
    handle = Agent(client, tools=[forecast]).start("Go.")
    await scripted_server.wait_until(lambda: len(generations(scripted_server)) == 2)
    await handle.aclose()
    check_valid(handle.messages)
    assert len(tool_texts(handle.messages)) == 1


@pytest.mark.parametrize("value", ["auto", None, 1])
def test_the_option_has_to_be_a_bool(client: LLMClient, value: Any) -> None:
    with pytest.raises(LLMValidationError, match="constrain_retries"):
        Agent(client, constrain_retries=value)
