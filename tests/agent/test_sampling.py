"""The parameters of the API that an agent and its runs pass on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, LLMValidationError
from lmbridge.testing import MockRequest, MockTransport
from tests.support import piece

SAMPLING: dict[str, Any] = {
    "temperature": 0,
    "top_p": 0.9,
    "seed": 7,
    "stop": ["END"],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "extra_body": {"top_k": 20, "max_tokens": 5},
}


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def chats(transport: MockTransport) -> list[dict[str, Any]]:
    """Returns the bodies of the chat completions, without the questions about the server."""
    return [request.json for request in transport.requests if request.method == "POST"]


def answer(request: MockRequest) -> Any:
    if request.method == "GET":
        return {}
    return [piece("Hello", finish_reason="stop")]


async def test_an_agent_passes_its_sampling_options_on() -> None:
    transport = MockTransport(answer)
    await Agent(LLMClient(transport=transport), tools=[add], **SAMPLING).run("Hello")
    sent = chats(transport)[0]
    assert {name: sent[name] for name in SAMPLING if name != "extra_body"} == {
        name: value for name, value in SAMPLING.items() if name != "extra_body"
    }
    assert (sent["top_k"], sent["max_tokens"]) == (20, 5)
    assert "extra_body" not in sent


async def test_nothing_is_sent_by_default_and_no_choice_of_tools_without_tools() -> None:
    transport = MockTransport(answer)
    client = LLMClient(transport=transport)
    await Agent(client).run("Hello")
    of_calls: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": True}
    await Agent(client, **of_calls).run("Hello")
    await Agent(client, extra_body=of_calls).run("Hello")
    for sent in chats(transport):
        assert set(sent) == {"messages", "stream", "stream_options", "max_tokens"}


@pytest.mark.parametrize("method", ["run", "stream", "start"])
async def test_a_run_overrides_the_options_of_its_agent(method: str) -> None:
    transport = MockTransport(answer)
    agent = Agent(LLMClient(transport=transport), temperature=1, seed=3)
    started = getattr(agent, method)("Hello", temperature=0, top_p=0.5, seed=None)
    if method == "stream":
        async for _ in started:
            pass
    else:
        await (started if method == "run" else started.result())
    sent = chats(transport)[0]
    assert (sent["temperature"], sent["top_p"], sent["seed"]) == (0, 0.5, 3)


@pytest.mark.parametrize("options", [{"tool_choice": "none"}, {"extra_body": {"tool_choice": "none"}}])
async def test_calls_that_the_options_forbid_are_not_made(options: dict[str, Any]) -> None:
    made: list[int] = []

    def note(number: int) -> str:
        """Notes a number."""
        made.append(number)
        return "noted"

    requested = [
        {"index": n, "id": f"c{n}", "function": {"name": "note", "arguments": f'{{"number": {n}}}'}} for n in (0, 1)
    ]

    def handler(request: MockRequest) -> Any:
        if request.method == "GET" or request.json["messages"][-1]["role"] == "tool":
            return answer(request)
        return [{"choices": [{"index": 0, "delta": {"tool_calls": requested}, "finish_reason": "tool_calls"}]}]

    transport = MockTransport(handler)
    result = await Agent(LLMClient(transport=transport), tools=[note]).run("Hello", **options)
    assert made == []
    assert result.stop_reason == "stop"
    assert [record.is_error for record in result.log[0].tool_calls] == [True, True]
    texts = [each["content"] for each in result.messages if each["role"] == "tool"]
    assert len(texts) == 2
    assert all("Not called: this run does not allow calls of tools (tool_choice is 'none')" in text for text in texts)


async def test_a_model_that_goes_on_with_forbidden_calls_ends_the_run() -> None:
    requested = {"index": 0, "id": "c", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}

    def handler(request: MockRequest) -> Any:
        if request.method == "GET":
            return answer(request)
        return [{"choices": [{"index": 0, "delta": {"tool_calls": [requested]}, "finish_reason": "tool_calls"}]}]

    agent = Agent(LLMClient(transport=MockTransport(handler)), tools=[add], tool_choice="none", max_bad_calls=2)
    assert (await agent.run("Hello")).stop_reason == "bad_calls"


@pytest.mark.parametrize("options", [{"parallel_tool_calls": False}, {"extra_body": {"parallel_tool_calls": False}}])
async def test_calls_that_must_not_be_parallel_are_made_one_after_the_other(options: dict[str, Any]) -> None:
    running, most = 0, 0

    async def work(number: int) -> int:
        """Works."""
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return number

    requested = [
        {"index": n, "id": f"c{n}", "function": {"name": "work", "arguments": f'{{"number": {n}}}'}} for n in range(4)
    ]

    def handler(request: MockRequest) -> Any:
        if request.method == "GET" or request.json["messages"][-1]["role"] == "tool":
            return answer(request)
        return [{"choices": [{"index": 0, "delta": {"tool_calls": requested}, "finish_reason": "tool_calls"}]}]

    client = LLMClient(transport=MockTransport(handler))
    await Agent(client, tools=[work], **options).run("Hello")
    assert most == 1
    await Agent(client, tools=[work]).run("Hello")
    assert most == 4


NAMED_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"tool_choice": "required"}, "required"),
        ({"extra_body": {"tool_choice": "required"}}, "required"),
        ({"extra_body": {"tool_choice": NAMED_TOOL}}, NAMED_TOOL),
        ({"tool_choice": "auto", "extra_body": {"tool_choice": "required"}}, "required"),
    ],
)
async def test_a_forced_tool_choice_holds_for_the_first_round(options: dict[str, Any], first: Any) -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}

    def handler(request: MockRequest) -> Any:
        if request.method == "GET" or request.json["messages"][-1]["role"] == "tool":
            return answer(request)
        return [{"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}]}]

    transport = MockTransport(handler)
    await Agent(LLMClient(transport=transport), tools=[add], **options).run("Add 1 and 2.")
    assert [sent.get("tool_choice") for sent in chats(transport)] == [first, None]


@pytest.mark.parametrize("options", [{"stop": "END"}, {"extra_body": {"stop": "END"}}])
async def test_a_call_that_a_stop_text_may_have_cut_is_not_completed(options: dict[str, Any]) -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "add", "arguments": '{"a": 1, "b": 2'}}

    def handler(request: MockRequest) -> Any:
        if request.method == "GET" or request.json["messages"][-1]["role"] == "tool":
            return answer(request)
        usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
        choices = [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}]
        return [{"choices": choices, "usage": usage}]

    client = LLMClient(transport=MockTransport(handler))
    for given, is_error in (({}, False), (options, True)):
        (record,) = (await Agent(client, tools=[add], **given).run("Add 1 and 2.")).log[0].tool_calls
        assert record.is_error is is_error


async def test_a_limit_in_extra_body_is_the_one_that_replies_are_judged_by() -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "add", "arguments": '{"a": 1, "b": 2'}}

    def handler(request: MockRequest) -> Any:
        if request.method == "GET" or request.json["messages"][-1]["role"] == "tool":
            return answer(request)
        usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
        choices = [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}]
        return [{"choices": choices, "usage": usage}]

    client = LLMClient(transport=MockTransport(handler))
    # A reply that has as many tokens as it may have was probably cut. -1 means no limit to llama.cpp.
    for limit, is_error in ((10, False), (9, True), (-1, True)):
        result = await Agent(client, tools=[add], extra_body={"max_tokens": limit}).run("Add 1 and 2.")
        assert result.log[0].tool_calls[0].is_error is is_error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number of at least 0, not 'hot'"),
        ({"temperature": float("inf")}, "temperature must be a number of at least 0, not inf"),
        ({"top_p": -1}, "top_p must be a number from 0 to 1, not -1"),
        ({"top_p": 5}, "top_p must be a number from 0 to 1, not 5"),
        ({"seed": 1.5}, "seed must be an integer, not 1.5"),
        ({"stop": [1]}, "stop must be a string or a list of strings"),
        ({"tool_choice": 1}, "tool_choice must be 'none', 'auto', 'required' or a dict that names a tool"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls must be True or False"),
        ({"extra_body": [1]}, "extra_body must be a dict of JSON fields"),
        ({"extra_body": {"messages": []}}, "extra_body has messages, which the run sets itself"),
    ],
)
async def test_an_invalid_option_is_refused_by_the_agent_and_by_the_run(options: dict[str, Any], message: str) -> None:
    client = LLMClient(transport=MockTransport(answer))
    with pytest.raises(LLMValidationError) as of_the_agent:
        Agent(client, **options)
    with pytest.raises(LLMValidationError) as of_the_run:
        await Agent(client).run("Hello", **options)
    assert str(of_the_agent.value).startswith(message)
    assert str(of_the_run.value) == str(of_the_agent.value)


async def test_an_unknown_option_of_a_run_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="temperatur"):
        # The name is misspelt on purpose.
        await Agent(LLMClient(transport=MockTransport(answer))).run("Hello", temperatur=1)  # type: ignore[call-overload]
