"""The typed output of a run: `agent.run(task, output_type=T)`, with and without tools."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal, assert_type

import pytest
from pydantic import BaseModel, Field

from lmbridge import (
    Agent,
    LLMClient,
    LLMValidationError,
    MaxRoundsExceededError,
    RunFinished,
    RunIncompleteError,
    TextDelta,
    Tool,
)
from lmbridge.agent.tools import as_tool
from lmbridge.agent.typed_output import OutputReader
from lmbridge.client.structured import InvalidAnswerError
from lmbridge.testing import ScriptedServer, answer
from tests.agent.support import add, asks, calls, check_valid, generations, sent


class Sum(BaseModel):
    total: int = Field(ge=0)


@dataclasses.dataclass
class Point:
    x: int


async def test_a_run_without_tools_asks_for_its_output_at_once(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer('{"total": 3}'))
    result = await Agent(client).run("What is 1 plus 2?", output_type=Sum)
    assert result.output == Sum(total=3)
    assert result.text == '{"total": 3}'
    assert result.stop_reason == "stop"
    schema = sent(scripted_server)["response_format"]["json_schema"]
    assert (schema["name"], schema["schema"]["required"]) == ("Sum", ["total"])


async def test_the_model_uses_its_tools_and_is_then_asked_for_the_output(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), answer("It is three."), answer('{"total": 3}'))
    result = await Agent(client, tools=[add], output_type=Sum).run("What is 1 plus 2?")
    assert result.output == Sum(total=3)
    assert result.rounds == 3
    for number in (0, 1):
        assert sent(scripted_server, number)["tools"]
        assert "response_format" not in sent(scripted_server, number)
    request = sent(scripted_server)
    assert "tools" not in request
    assert request["response_format"]["type"] == "json_schema"
    before, question = request["messages"][-2:]
    assert before == {"role": "assistant", "content": "It is three."}
    assert question["role"] == "user"
    assert question["content"].startswith(
        "Give your answer as JSON, and nothing else. It has to follow this JSON schema: {"
    )
    # What is sent only grows at its end.
    assert request["messages"][:-2] == sent(scripted_server, 1)["messages"]
    check_valid(result.messages)


@pytest.mark.parametrize(
    ("output_type", "text", "output"),
    [
        (Sum, '{"total": 3}', Sum(total=3)),
        (Point, '```json\n{"x": 1}\n```', Point(1)),
        (Point, 'It is {"x": 1}, as you can see.', Point(1)),
        (int, "3", 3),
        (list[Point], '{"answer": [{"x": 1}]}', [Point(1)]),
        (Literal["yes", "no"], '"yes"', "yes"),
        (Sum | Point, '{"x": 1}', Point(1)),
    ],
)
async def test_an_answer_that_is_the_output_already_is_not_asked_for_again(
    scripted_server: ScriptedServer, client: LLMClient, output_type: Any, text: str, output: Any
) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), answer(text))
    result = await Agent(client, tools=[add]).run("What is 1 plus 2?", output_type=output_type)
    assert result.output == output
    assert type(result.output) is type(output)


async def test_an_output_that_the_server_took_for_reasoning_is_read(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer("", reasoning='{"x": 1}'))
    assert (await Agent(client).run("Hi", output_type=Point)).output == Point(1)
    scripted_server.script(answer("", reasoning="Hm."), answer("Hello."))
    assert (await Agent(client).run("Hi")).text == "Hello."


async def test_the_type_of_a_run_replaces_that_of_the_agent(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer('{"x": 1}'), answer('{"total": 1}'))
    agent = Agent(client, output_type=Sum)
    assert (await agent.run("Hi", output_type=Point)).output == Point(1)
    assert (await agent.run("Hi")).output == Sum(total=1)


async def test_type_checkers_know_the_type_of_the_output(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer('{"total": 1}'), answer("[]"), answer("Hi"))
    agent = Agent(client)
    assert_type((await agent.run("Hi", output_type=Sum)).output, Sum)
    assert_type((await agent.run("Hi", output_type=list[Sum], max_rounds=2)).output, list[Sum])
    assert_type((await agent.run("Hi")).output, Any)


async def test_a_run_without_a_type_has_no_output(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer('{"total": 1}'))
    result = await Agent(client).run("Hi")
    assert result.output is None
    assert "response_format" not in sent(scripted_server)


async def test_a_wrong_output_is_sent_back_with_the_mistake(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer('{"total": -1}'), answer('{"total": "x"}'), answer('{"total": 1}'))
    result = await Agent(client).run("Hi", output_type=Sum)
    assert result.output == Sum(total=1)
    first, second = (sent(scripted_server, number)["messages"][-1]["content"] for number in (1, 2))
    assert first.startswith("That is not a valid Sum: $.total: input should be greater than or equal to 0. Give your")
    assert "JSON schema" in first
    assert "valid integer" in second
    assert "JSON schema" not in second
    check_valid(result.messages)


async def test_the_run_fails_if_no_output_is_valid(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = answer('{"total": -1}')
    with pytest.raises(LLMValidationError, match=r"the run's output is not a valid Sum: \$\.total: input") as caught:
        await Agent(client).run("Hi", output_type=Sum)
    error = caught.value
    assert len(generations(scripted_server)) == 4
    assert error.body == '{"total": -1}'
    assert error.context["path"] == "$.total"
    assert error.partial.output is None
    assert error.partial.stop_reason == "error"
    check_valid(error.partial.messages)


async def test_a_tool_may_still_be_called_when_the_output_is_asked_for(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(
        answer("I am not sure."), calls(asks("add", a=1, b=2)), answer("Three."), answer('{"total": 3}')
    )
    result = await Agent(client, tools=[add]).run("What is 1 plus 2?", output_type=Sum)
    assert result.output == Sum(total=3)
    assert ["tools" in sent(scripted_server, number) for number in range(4)] == [True, False, True, False]


@pytest.mark.parametrize(
    ("options", "error_type"),
    [({"max_rounds": 1}, MaxRoundsExceededError), ({"max_total_tokens": 1}, RunIncompleteError)],
)
async def test_asking_for_the_output_counts_for_the_budgets_of_the_run(
    scripted_server: ScriptedServer, client: LLMClient, options: dict[str, Any], error_type: type[RunIncompleteError]
) -> None:
    scripted_server.default = answer("Three.")
    with pytest.raises(error_type) as caught:
        await Agent(client, **options).run("Hi", output_type=Sum)
    assert caught.value.result.output is None
    assert caught.value.result.text == "Three."
    assert len(generations(scripted_server)) == 1


async def test_an_output_that_was_cut_off_is_not_one(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = answer('{"total": 3', finish_reason="length")
    with pytest.raises(RunIncompleteError, match="ended without its output: its last reply was cut off"):
        await Agent(client).run("Hi", output_type=Sum)
    assert len(generations(scripted_server)) == 1


async def test_a_stream_ends_with_the_output(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("Three."), answer('{"total": 3}'))
    async with Agent(client, tools=[add]).stream("What is 1 plus 2?", output_type=Sum) as stream:
        events = [event async for event in stream]
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == 'Three.{"total": 3}'
    assert isinstance(events[-1], RunFinished)
    assert events[-1].result.output == Sum(total=3)


async def test_a_handle_has_the_output_in_its_result(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer('{"total": 3}'))
    handle = Agent(client).start("What is 1 plus 2?", output_type=Sum)
    assert (await handle.result()).output == Sum(total=3)


async def test_a_type_that_cannot_be_used_is_refused_before_anything_is_sent(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    with pytest.raises(LLMValidationError, match="cannot parse an answer as ScriptedServer"):
        Agent(client, output_type=ScriptedServer)
    with pytest.raises(LLMValidationError, match="cannot parse an answer as ScriptedServer"):
        await Agent(client).run("Hi", output_type=ScriptedServer)
    assert not scripted_server.requests


def test_the_schema_is_shown_to_the_model_as_it_is_sent() -> None:
    reader = OutputReader(list[Point], has_tools=True)
    assert reader.response_format is None
    with pytest.raises(InvalidAnswerError, match="not valid JSON") as caught:
        reader.read("a point")
    request = reader.next_request(caught.value)
    assert request is not None
    assert reader.response_format is not None
    assert json.loads(request.partition("schema: ")[2]) == reader.response_format["json_schema"]["schema"]


async def test_a_call_written_as_text_is_not_made_when_the_output_is_requested(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    scripted_server.script(answer("It is three."), answer(text), answer("3"))
    result = await Agent(client, tools=[add], output_type=int).run("What is 1 plus 2?")
    assert (result.output, result.tool_calls) == (3, ())
    assert "tools" not in sent(scripted_server, 1)


class GrowingProvider:
    """A provider that has a tool only after the first request."""

    def __init__(self, server: ScriptedServer, tools: Sequence[Tool] = ()) -> None:
        self._server = server
        self._tools = tools

    async def list_tools(self) -> Sequence[Tool]:
        return self._tools

    async def new_tools(self) -> Sequence[Tool]:
        return [as_tool(add)] if generations(self._server) else []


@pytest.mark.parametrize("has_tools", [False, True])
async def test_tools_that_are_revealed_later_are_offered(
    scripted_server: ScriptedServer, client: LLMClient, has_tools: bool
) -> None:
    other = Tool("other", "Other.", {"type": "object"}, lambda: 1)
    provider = GrowingProvider(scripted_server, [other] if has_tools else ())
    scripted_server.script(
        answer("I do not know."), calls(asks("add", a=1, b=2)), answer("It is three."), answer('{"total": 3}')
    )
    result = await Agent(client, tools=[provider], output_type=Sum).run("What is 1 plus 2?")
    assert result.output == Sum(total=3)
    assert ("response_format" in sent(scripted_server, 0)) is not has_tools
    assert [each["function"]["name"] for each in sent(scripted_server, 1)["tools"]][-1] == "add"
    assert "response_format" not in sent(scripted_server, 1)
    assert sent(scripted_server)["response_format"]
    check_valid(result.messages)
