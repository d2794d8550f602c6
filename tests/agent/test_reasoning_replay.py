"""Reasoning that is sent back to the server, because the user or the server wants it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, LLMError, LLMResponseError, LLMValidationError
from lmbridge.agent.history import History
from lmbridge.agent.reasoning_replay import demanded_field
from lmbridge.client.token_count import size_of
from lmbridge.testing import Exchange, ScriptedServer, answer, reply, sse
from tests.agent.support import add, asks, begin_turn, calls, check_valid, generations, sent, tool_texts
from tests.support import piece

DEMANDS = [
    # DeepSeek.
    "The `reasoning_content` in the thinking mode must be passed back to the API.",
    "Missing `reasoning_content` field in the assistant message at message index 2. For more information, please see",
    # Kimi.
    "thinking is enabled but reasoning_content is missing in assistant tool call message at index 7",
    # Proxies and others.
    "messages[2].reasoning_content is required when thinking is enabled",
    "assistant messages with tool_calls must include reasoning_content",
    "Upstream request failed: [invalid_request_error] The reasoning_content in the thinking mode must be passed back",
    "思考模式下必须回传 reasoning_content",
]
REFUSALS = [
    "'messages.2' : the following must be satisfied[('messages.2' : property 'reasoning_content' is unsupported)]",
    "messages.1.reasoning_content: Extra inputs are not permitted; all required fields are there",
    "reasoning_content must not be sent in messages",
    "reasoning_effort is required",
    "the model's reasoning took too long",
    "messages must be a list",
]


def error_of(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", **fields}}


@pytest.mark.parametrize("text", DEMANDS)
def test_a_demand_is_recognized(text: str) -> None:
    body = json.dumps(error_of(text), ensure_ascii=False)
    assert demanded_field(LLMResponseError("refused", status=400, body=body)) == "reasoning_content"
    assert demanded_field(LLMError(text)) == "reasoning_content"


@pytest.mark.parametrize("text", REFUSALS)
def test_another_error_is_not_a_demand(text: str) -> None:
    assert demanded_field(LLMResponseError("refused", status=400, body=json.dumps(error_of(text)))) is None


def test_the_field_of_other_servers_is_recognized() -> None:
    assert demanded_field(LLMError("assistant messages must contain 'reasoning' with tool calls")) == "reasoning"


def demanding(text: str, *, field: str = "reasoning_content", status: int = 400, **fields: Any) -> Any:
    """Returns a server that refuses messages with calls but without reasoning, and that calls a tool twice."""

    async def behave(exchange: Exchange) -> None:
        messages = exchange.request.json["messages"]
        if any(message["role"] == "assistant" and field not in message for message in messages):
            await reply(status, error_of(text, **fields))(exchange)
        else:
            number = len(tool_texts(messages))
            done = answer("done", reasoning="I am done.")
            behaviour = done if number == 2 else calls(asks("add", a=number, b=0), reasoning=f"Thought {number}.")
            await behaviour(exchange)

    return behave


@pytest.mark.parametrize("text", DEMANDS)
async def test_reasoning_is_sent_back_once_the_server_demands_it(
    scripted_server: ScriptedServer, client: LLMClient, text: str
) -> None:
    scripted_server.default = demanding(text)
    result = await Agent(client, tools=[add]).run("Go.")
    assert result.text == "done"
    assert len(generations(scripted_server)) == 4
    assert "reasoning_content" not in json.dumps(sent(scripted_server, 1))
    messages = sent(scripted_server)["messages"]
    assert [m["reasoning_content"] for m in messages if m["role"] == "assistant"] == ["Thought 0.", "Thought 1."]
    assert messages == result.messages[:-1]
    assert result.messages[-1]["reasoning_content"] == "I am done."
    check_valid(result.messages)


async def test_the_demand_may_be_in_another_field_of_the_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.default = demanding("Param Incorrect", param=DEMANDS[0], code="400")
    assert (await Agent(client, tools=[add]).run("Go.")).text == "done"


async def test_the_demand_is_remembered_for_the_model(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = demanding(DEMANDS[0])
    agent = Agent(client, tools=[add])
    await agent.run("Go.")
    before = len(generations(scripted_server))
    assert (await agent.run("Go.")).text == "done"
    assert len(generations(scripted_server)) == before + 3


async def test_a_conversation_without_reasoning_is_continued_with_empty_reasoning(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.default = demanding(DEMANDS[0])
    before: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "", "tool_calls": [asks("add", "x", a=1, b=2)]},
        {"role": "tool", "tool_call_id": "x", "content": "3"},
        {"role": "assistant", "content": "3", "reasoning_content": "Kept."},
    ]
    assert (await Agent(client, tools=[add]).run("Go.", messages=before)).text == "done"
    reasoning = [m["reasoning_content"] for m in sent(scripted_server)["messages"] if m["role"] == "assistant"]
    assert reasoning == ["", "Kept.", "Thought 1."]


async def test_a_demand_that_cannot_be_met_is_raised(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2), reasoning="Hm."))
    scripted_server.default = reply(400, error_of(DEMANDS[0]))
    with pytest.raises(LLMResponseError, match="must be passed back") as caught:
        await Agent(client, tools=[add]).run("Go.")
    assert len(generations(scripted_server)) == 3
    assert tool_texts(caught.value.partial.messages) == ["3"]


async def test_a_demand_before_any_reply_is_raised(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = reply(400, error_of(DEMANDS[0]))
    with pytest.raises(LLMResponseError, match="must be passed back"):
        await Agent(client, tools=[add]).run("Go.")
    assert len(generations(scripted_server)) == 1


async def test_a_demand_in_the_stream_is_met_too(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2), reasoning="Hm."), sse(error_of(DEMANDS[2])), answer("ok"))
    assert (await Agent(client, tools=[add]).run("Go.")).text == "ok"
    assert sent(scripted_server)["messages"][1]["reasoning_content"] == "Hm."


async def test_reasoning_is_not_sent_back_if_the_user_forbids_it(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.default = demanding(DEMANDS[0])
    with pytest.raises(LLMResponseError, match="must be passed back"):
        await Agent(client, tools=[add], send_reasoning=False).run("Go.")


async def test_reasoning_is_sent_back_from_the_start_if_the_user_asks_for_it(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    chunk = piece(None)
    chunk["choices"][0]["delta"] = {"reasoning": "Second.", "tool_calls": [{"index": 0, **asks("add", a=1, b=2)}]}
    scripted_server.script(
        calls(asks("add", a=1, b=2), reasoning="First."),
        sse(chunk, piece(finish_reason="tool_calls"), done=True),
        calls(asks("add", a=2, b=2), text="<think>Third.</think>So:"),
        calls(asks("add", a=3, b=2)),
        answer("ok"),
    )
    result = await Agent(client, tools=[add], send_reasoning=True).run("Go.")
    assistants = [message for message in sent(scripted_server)["messages"] if message["role"] == "assistant"]
    fields = [{key: each[key] for key in each if key.startswith("reasoning")} for each in assistants]
    assert fields == [
        {"reasoning_content": "First."},
        {"reasoning": "Second."},
        {"reasoning_content": "Third."},
        {},
    ]
    assert assistants[2]["content"] == "So:"
    assert result.text == "ok"


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_an_invalid_option_is_refused(client: LLMClient, value: Any) -> None:
    with pytest.raises(LLMValidationError, match="send_reasoning"):
        Agent(client, send_reasoning=value)


def test_reasoning_belongs_to_the_messages_that_are_trimmed() -> None:
    history = History("Go.", messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    for number in range(3):
        turn = begin_turn(history, "", [asks("f", str(number))], reasoning={"reasoning_content": f"r{number}" * 50})
        turn.answer(str(number), "x")
        history.end_turn()
    history.leave_out(1, 0)
    assert history.send_reasoning("reasoning_content")
    assert history.size == sum(map(size_of, history.to_send()))
    assert not history.send_reasoning("reasoning_content"), "nothing changes a second time"
    assert [message.get("reasoning_content") for message in history.to_send()[1::2]] == [
        f"r{number}" * 50 for number in range(3)
    ]
    assert len(history.snapshot(ended=True)) == 9
    while history.count_oldest(0) != (0, 0):
        history.leave_out(*history.count_oldest(history.size - 1))
        assert history.size == sum(map(size_of, history.to_send()))
        check_valid(history.to_send())
