"""Calls with small mistakes in their names or arguments, which are put right and recorded as repaired."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, ToolCall, ToolCallFinished, ToolCallStarted
from lmbridge.agent.unknown_tools import find_meant_name
from lmbridge.testing import ScriptedServer, answer
from tests.agent.support import add, asks, asks_raw, calls, check_valid, collect_events, sent, tool_texts

ALMOST = "{'a': 1, 'b': 2,}"


# Names


@pytest.mark.parametrize(
    "asked",
    [
        "Get_Weather",
        "GET_WEATHER",
        "getWeather",
        "GetWeather",
        "get-weather",
        "get weather",
        "get.weather",
        " get_weather\n",
        "`get_weather`",
        "get_weather()",
        "functions.get_weather",
        "functions.getWeather",
        "functions.get_weather:0",
        "default_api.get_weather",
        "get_weather<|channel|>commentary",
        "get_weather<|channel|>json",
        "get_weathr",
        "get_weatther",
        "get_wether",
        "gte_weather",
        "get_waether",
        "get_weathers",
        "get_weathet",
    ],
)
def test_a_name_that_can_mean_only_one_tool_is_found(asked: str) -> None:
    assert find_meant_name(asked, ["set_weather", "get_weather", "add"]) == "get_weather"


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("weather", ["get_weather"]),
        ("set_weather", ["get_weather"]),
        ("let_weather", ["get_weather", "set_weather"]),
        ("read_2", ["read_1"]),
        ("read_file1", ["read_file"]),
        ("getweather", ["get_weather", "getWeather"]),
        ("sum", ["sub"]),
        ("sad", ["add"]),
        ("play", ["pay"]),
        ("lock", ["block"]),
        ("get_wather_now", ["get_weather"]),
        ("", ["add"]),
        ("functions.", ["add"]),
        ("<|channel|>", ["add"]),
        ("_", ["add", "_"]),
        ("add", []),
        # A prefix is only removed where a name begins.
        ("weather_tool.delete_all", ["weather_delete_all"]),
        ("my_api.search", ["my_search"]),
    ],
)
def test_any_other_name_is_not_guessed(asked: str, names: list[str]) -> None:
    assert find_meant_name(asked, names) is None


def test_a_tool_whose_name_has_a_prefix_of_its_own_is_found() -> None:
    assert find_meant_name("Functions.Add", ["functions.add", "add"]) == "functions.add"
    assert find_meant_name("addd", ["add"]) == find_meant_name("ad", ["add"]) == "add"


# Runs


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("add", ALMOST),
        ("add", '{"a": 1, "b": 2'),
        ("add", '{"a": 1, "b": 2}}'),
        ("add", '{"a": 1, /* one */ "b": 2}'),
        ("add", '```json\n{"a": 1, "b": 2}\n```'),
        ("add", "{'a': 1, 'b': 2}{'a': 1, 'b': 2}"),
        ("add", json.dumps(json.dumps(json.dumps({"a": 1, "b": 2})))),
        ("add", json.dumps(ALMOST)),
        ("Add", '{"a": 1, "b": 2}'),
        ("functions.add", ALMOST),
        ("add<|channel|>commentary", '{"a": 1, "b": 2}'),
    ],
)
async def test_a_call_with_a_small_mistake_is_repaired(
    scripted_server: ScriptedServer, client: LLMClient, caplog: pytest.LogCaptureFixture, name: str, arguments: str
) -> None:
    approved: list[ToolCall] = []

    def approve(call: ToolCall) -> bool:
        approved.append(call)
        return True

    scripted_server.script(calls(asks_raw(name, arguments)), answer("It is 3."))
    with caplog.at_level(logging.INFO, "lmbridge.agent"):
        result = await Agent(client, tools=[add], approve=approve).run("1 + 2?")
    assert (result.text, tool_texts(result.messages)) == ("It is 3.", ["3"])
    (record,) = result.log[0].tool_calls
    assert record.repaired
    assert result.tool_calls[0].repaired
    assert [(call.name, call.arguments, call.repaired) for call in approved] == [("add", {"a": 1, "b": 2}, True)]
    assert "was repaired" in caplog.text
    function = sent(scripted_server)["messages"][1]["tool_calls"][0]["function"]
    assert function["name"] == "add"
    assert json.loads(function["arguments"]) == {"a": 1, "b": 2}
    check_valid(result.messages)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("add", ALMOST, "not valid JSON"),
        ("Add", '{"a": 1, "b": 2}', "there is no tool 'Add'"),
        ("add", json.dumps(ALMOST), "they have to be a JSON object"),
    ],
)
async def test_nothing_is_repaired_if_that_is_not_wanted(
    scripted_server: ScriptedServer, client: LLMClient, name: str, arguments: str, words: str
) -> None:
    scripted_server.script(calls(asks_raw(name, arguments)), answer("Sorry."))
    result = await Agent(client, tools=[add], repair_calls=False).run("1 + 2?")
    assert words in tool_texts(result.messages)[0]
    assert not result.log[0].tool_calls[0].repaired


@pytest.mark.parametrize(
    "arguments", ["{'a': 1}", "{'a': 1, 'b': 'x'}", "{'a': 1, 'b': 2, 'b': 3}", '{"a": 1, "b": "2', "{'a': 1} {'a': 2}"]
)
async def test_a_repair_that_gives_no_valid_arguments_is_not_used(
    scripted_server: ScriptedServer, client: LLMClient, arguments: str
) -> None:
    scripted_server.script(calls(asks_raw("add", arguments)), answer("Sorry."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert "not valid JSON" in tool_texts(result.messages)[0]
    assert not result.log[0].tool_calls[0].repaired
    assert result.messages[1]["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize(
    ("options", "usage"),
    [
        ({}, {"prompt_tokens": 5, "completion_tokens": 8192, "total_tokens": 8197}),
        ({"max_tokens": 20}, {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25}),
        ({"stop": "}"}, None),
        ({}, {"prompt_tokens": 5}),
    ],
)
async def test_a_call_that_may_have_been_cut_off_is_never_completed(
    scripted_server: ScriptedServer, client: LLMClient, options: dict[str, Any], usage: Any
) -> None:
    """Some servers give the finish reason of a whole call to one that was cut off."""
    scripted_server.script(calls(asks_raw("add", '{"a": 1, "b": 2'), usage=usage), answer("Sorry."))
    result = await Agent(client, tools=[add], **options).run("1 + 2?")
    assert "not valid JSON" in tool_texts(result.messages)[0]


async def test_events_say_that_a_call_was_repaired(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(calls(asks_raw("add", ALMOST, "x"), asks("add", "y", a=2, b=3)), answer("ok"))
    events = await collect_events(Agent(client, tools=[add]))
    started = {event.call.id: event.call.repaired for event in events if isinstance(event, ToolCallStarted)}
    finished = {event.call.id: event.repaired for event in events if isinstance(event, ToolCallFinished)}
    assert started == finished == {"x": True, "y": False}


async def test_a_refused_call_was_repaired_too(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(calls(asks_raw("add", ALMOST)), answer("Sorry."))
    result = await Agent(client, tools=[add], approve=lambda _: False).run("1 + 2?")
    (record,) = result.log[0].tool_calls
    assert (record.repaired, record.is_error) == (True, True)


async def test_a_repaired_call_is_identical_to_the_same_call(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks_raw("ADD", ALMOST, "x"), asks("add", "y", a=1, b=2)), answer("ok"))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert [(each.repaired, each.is_duplicate) for each in result.log[0].tool_calls] == [(True, False), (True, True)]
