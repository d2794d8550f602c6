"""The rounds of a run, against a scripted server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal

import pytest

from lmbridge import (
    Agent,
    ContextLengthExceededError,
    LLMClient,
    LLMClientPool,
    LLMError,
    LLMResponseError,
    LLMTimeoutError,
    LLMValidationError,
    MaxRoundsExceededError,
    ModelChangedDuringExecutionError,
    Timeouts,
    Tool,
    ToolCall,
    image_part,
)
from lmbridge.agent.switching import RunPermit
from lmbridge.observe import TimelineObserver
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, reply, sse, stall
from tests.agent.support import (
    Gate,
    add,
    asks,
    asks_raw,
    calls,
    check_valid,
    collect_events,
    generations,
    sent,
    tool_texts,
)
from tests.support import in_flight, piece


async def test_a_plain_answer_is_the_result(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("Hello there."))
    result = await Agent(client).run("Hi.")
    assert (result.text, result.stop_reason, result.rounds, result.model) == ("Hello there.", "stop", 1, "test-model")
    assert result.messages == [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello there."},
    ]
    assert result.usage == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert result.tool_calls == ()
    assert result.errors == {}


async def test_a_tool_is_called_and_its_result_goes_back(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2), text="Let me see."), answer("It is 3."))
    result = await Agent(client, tools=[add], system_prompt="Be exact.").run("What is 1 plus 2?")
    assert result.text == "It is 3."
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("add", {"a": 1, "b": 2})]
    assert sent(scripted_server)["messages"] == result.messages[:-1]
    assert [message["role"] for message in result.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert result.messages[2]["content"] == "Let me see."
    assert result.messages[3] == {"role": "tool", "tool_call_id": "call_1", "content": "3"}
    assert result.usage == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
    check_valid(result.messages)


async def test_the_log_has_every_round(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2), reasoning="Add them."), answer("3"))
    first, second = (await Agent(client, tools=[add]).run("1 + 2?")).log
    assert (first.number, first.reasoning, first.finish_reason) == (1, "Add them.", "tool_calls")
    ((record),) = first.tool_calls
    assert (record.call.name, record.text, record.raw, record.is_error) == ("add", "3", 3, False)
    assert (second.number, second.text, second.model, second.tool_calls) == (2, "3", "test-model", ())
    assert second.usage == {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


async def test_every_generation_is_streamed_and_bounded(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), answer("3"))
    await Agent(client, tools=[add]).run("1 + 2?")
    for number in range(2):
        request = sent(scripted_server, number)
        assert request["stream"] is True
        assert request["stream_options"] == {"include_usage": True}
        assert request["max_tokens"] == 8192
        assert [tool["function"]["name"] for tool in request["tools"]] == ["add"]


async def test_a_request_without_tools_has_no_tools_field(scripted_server: ScriptedServer, client: LLMClient) -> None:
    await Agent(client, tools=[add], max_tokens=50).run("Hi.", tools=())
    assert "tools" not in sent(scripted_server)
    assert sent(scripted_server)["max_tokens"] == 50


async def test_calls_are_made_whatever_the_finish_reason_is(scripted_server: ScriptedServer, client: LLMClient) -> None:
    for reason in ("stop", "length", "tool_calls", "function_call"):
        scripted_server.script(calls(asks("add", a=1, b=2), finish_reason=reason), answer("3"))
        assert (await Agent(client, tools=[add]).run("1 + 2?")).text == "3"


async def test_a_client_is_leased_for_a_generation_and_not_for_a_tool(scripted_server: ScriptedServer) -> None:
    gate = Gate()
    scripted_server.script(calls(asks("wait")), answer("done"))
    async with LLMClientPool(1, api_base=scripted_server.api_base, model="test-model") as pool:
        handle = Agent(pool, tools=[gate.wait]).start("Wait.")
        await gate.begun.wait()
        assert pool.stats().in_use == 0
        gate.open.set()
        assert (await handle.result()).text == "done"
        assert pool.stats().in_use == 0


async def test_a_hundred_runs_share_a_pool_of_ten(scripted_server: ScriptedServer) -> None:
    scripted_server.models = ["qwen/qwen3-coder-30b", "mistralai/magistral-small-2509"]

    async def behave(exchange: Exchange) -> None:
        messages = exchange.request.json["messages"]
        if messages[-1]["role"] == "tool":
            await answer(f"{exchange.model}: {messages[-1]['content']}")(exchange)
        else:
            number = int(messages[-1]["content"])
            await calls(asks("add", a=number, b=1000))(exchange)

    scripted_server.default = behave
    async with LLMClientPool(10, api_base=scripted_server.api_base) as pool:
        agent = Agent(pool, tools=[add])
        models = [scripted_server.models[number % 2] for number in range(100)]
        results = await asyncio.gather(*(agent.run(str(n), model=model) for n, model in enumerate(models)))
    assert [result.text for result in results] == [f"{model}: {1000 + n}" for n, model in enumerate(models)]
    assert scripted_server.max_in_flight <= 10


# Calls that go wrong


@pytest.mark.parametrize(
    ("call", "told_to_the_model"),
    [
        (asks_raw("add", '{"a": 1, "b":'), "not valid JSON"),
        (asks_raw("add", "[1, 2]"), "JSON object"),
        (asks("add", a="x", b=2), "a"),
        (asks("subtract", a=1, b=2), "there are: add"),
        (asks_raw("", "{}"), "names no tool"),
    ],
)
async def test_a_bad_call_is_reported_to_the_model_and_the_history_stays_valid(
    scripted_server: ScriptedServer, client: LLMClient, call: dict[str, Any], told_to_the_model: str
) -> None:
    scripted_server.script(calls(call), calls(asks("add", "call_2", a=1, b=2)), answer("3"))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert result.text == "3"
    assert told_to_the_model in tool_texts(result.messages)[0]
    assert tool_texts(result.messages)[1] == "3"
    for number in range(3):
        check_valid(sent(scripted_server, number)["messages"])
    check_valid(result.messages)


async def test_bad_calls_in_a_row_end_the_run(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = calls(asks_raw("add", "{"))
    result = await Agent(client, tools=[add], max_bad_calls=3).run("1 + 2?")
    assert (result.stop_reason, result.rounds) == ("bad_calls", 3)
    check_valid(result.messages)


async def test_a_good_call_resets_the_count_of_bad_ones(scripted_server: ScriptedServer, client: LLMClient) -> None:
    bad, good = asks_raw("add", "{"), asks("add", "call_2", a=1, b=2)
    scripted_server.script(calls(bad), calls(good), calls(bad), answer("3"))
    assert (await Agent(client, tools=[add], max_bad_calls=2).run("1 + 2?")).stop_reason == "stop"


@pytest.mark.parametrize("cut", range(len('{"a": 1, "b": 2}')))
async def test_a_call_that_was_cut_off_is_never_made(
    scripted_server: ScriptedServer, client: LLMClient, cut: int
) -> None:
    made: list[int] = []

    def note(a: int = 0, b: int = 0) -> None:
        """Notes its arguments."""
        made.append(a + b)

    whole = asks("note", "call_1", a=5, b=5)
    reply = calls(whole, asks_raw("note", '{"a": 1, "b": 2}'[:cut], "call_2"), text="So:", finish_reason="length")
    scripted_server.script(reply, reply)
    result = await Agent(client, tools=[note]).run("Note.")
    assert len(generations(scripted_server)) == 2
    assert (result.stop_reason, result.text, result.tool_calls, made) == ("length", "So:", (), [])
    check_valid(result.messages)


async def test_an_answer_that_was_cut_off_has_the_stop_reason_length(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer("Once upon", finish_reason="length"))
    result = await Agent(client).run("Tell a story.")
    assert (result.stop_reason, result.text) == ("length", "Once upon")


async def test_the_error_of_a_tool_goes_to_the_model_and_does_not_stop_other_tools(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    async def fail() -> None:
        """Raises an error."""
        raise OSError("disk full")

    scripted_server.script(calls(asks("fail"), asks("add", "call_2", a=1, b=2)), answer("ok"))
    result = await Agent(client, tools=[fail, add]).run("Go.")
    failed, added = tool_texts(result.messages)
    assert "disk full" in failed
    assert added == "3"
    assert [record.is_error for record in result.log[0].tool_calls] == [True, False]


async def test_results_are_in_the_order_of_the_calls(scripted_server: ScriptedServer, client: LLMClient) -> None:
    second_done = asyncio.Event()

    async def first() -> str:
        """Waits for the second tool."""
        await second_done.wait()
        return "first"

    async def second() -> str:
        """Releases the first tool."""
        second_done.set()
        return "second"

    scripted_server.script(calls(asks("first"), asks("second", "call_2")), answer("ok"))
    result = await Agent(client, tools=[first, second]).run("Go.")
    assert tool_texts(result.messages) == ["first", "second"]


@pytest.mark.parametrize("asked", [2, 3, 4, 9])
async def test_max_parallel_tools_limits_the_tools_that_run_together(
    scripted_server: ScriptedServer, client: LLMClient, asked: int
) -> None:
    running, most = 0, 0

    async def work(number: int) -> int:
        """Returns its number after a while."""
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(10):
            await asyncio.sleep(0)
        running -= 1
        return number

    scripted_server.script(calls(*(asks("work", f"call_{n}", number=n) for n in range(asked))), answer("ok"))
    result = await Agent(client, tools=[work], max_parallel_tools=3).run("Go.")
    assert most == min(asked, 3)
    assert tool_texts(result.messages) == [str(number) for number in range(asked)]


async def test_a_call_written_as_text_is_made(scripted_server: ScriptedServer, client: LLMClient) -> None:
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    scripted_server.script(answer(text), answer("3"))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, result.log[0].text) == ("3", "")
    assert result.messages[1]["content"] == ""
    assert tool_texts(result.messages) == ["3"]


@pytest.mark.parametrize("options", [{"tool_choice": "none"}, {"extra_body": {"tool_choice": "none"}}])
@pytest.mark.parametrize("before", ["", "As told, I write and do not call:\n"])
async def test_a_call_written_as_text_is_not_made_if_calls_are_forbidden(
    scripted_server: ScriptedServer, client: LLMClient, options: dict[str, Any], before: str
) -> None:
    text = f'{before}<tool_call>{{"name": "add", "arguments": {{"a": 1, "b": 2}}}}</tool_call>'
    scripted_server.script(answer(text))
    result = await Agent(client, tools=[add], **options).run("Write a call.")
    assert (result.text, result.tool_calls, len(result.warnings)) == (text, (), 1)


async def test_a_call_quoted_in_an_answer_is_not_made(scripted_server: ScriptedServer, client: LLMClient) -> None:
    text = 'Write <tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call> for that.'
    scripted_server.script(answer(text))
    result = await Agent(client, tools=[add]).run("How?")
    assert (result.text, result.tool_calls) == (text, ())


async def test_reasoning_is_separated_and_not_sent_back(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(
        calls(asks("add", a=1, b=2), text="<think>Hm.</think>Let me add."),
        answer("<think>Done.</think>3"),
    )
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, result.reasoning) == ("3", "Done.")
    assert "think" not in json.dumps(sent(scripted_server)["messages"])


async def test_half_a_surrogate_pair_in_a_reply_does_not_end_the_run(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    chunk = '{"model": "test-model", "choices": [{"index": 0, "delta": %s, "finish_reason": null}]}'
    text = chunk % '{"content": "half \\ud83d"}'
    call = (
        chunk % '{"tool_calls": [{"index": 0, "id": "x\\ud83d", "function": {"name": "f\\ud83d", "arguments": "{}"}}]}'
    )
    scripted_server.script(
        sse(f"data: {text}\n\n", f"data: {call}\n\n", piece(finish_reason="tool_calls"), done=True), answer("Fine.")
    )
    result = await Agent(client, tools=[add]).run("Go.")
    assert (result.text, result.messages[1]["content"], result.tool_calls[0].id) == ("Fine.", "half ?", "x?")
    check_valid(result.messages)


async def test_a_character_that_arrived_in_two_halves_is_joined(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    chunk = 'data: {"model": "test-model", "choices": [{"index": 0, "delta": {"content": "%s"}, "finish_reason": %s}]}'
    chunks = (chunk % (r"\ud83d", "null"), chunk % (r"\ude00", '"stop"'))
    scripted_server.script(sse(*(f"{each}\n\n" for each in chunks), done=True))
    assert (await Agent(client).run("Go.")).text == "\N{GRINNING FACE}"


async def test_a_run_that_ends_in_the_middle_of_a_character_has_a_valid_history(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    chunk = (
        r'{"model": "test-model", "choices": [{"index": 0, "delta": {"content": "so \ud83d"}, "finish_reason": null}]}'
    )
    scripted_server.script(stall([f"data: {chunk}\n\n"]))
    result = await Agent(client, max_seconds=0.3).run("Go.")
    assert (result.stop_reason, result.messages[-1]["content"]) == ("budget", "so ?")


# Guards and budgets


async def test_a_repeated_call_with_the_same_result_ends_the_run(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.default = calls(asks("add", a=1, b=2))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.stop_reason, result.rounds) == ("repetition", 5)
    warned = ["[This call was made" in text for text in tool_texts(result.messages)]
    assert warned == [False, False, True, True, True]
    check_valid(result.messages)


async def test_a_run_that_ends_by_repetition_may_answer_at_its_limit(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(*[calls(asks("add", a=1, b=2))] * 5, answer("It is 3."))
    result = await Agent(client, tools=[add], on_limit="answer", max_nudges=0).run("1 + 2?")
    assert (result.text, result.stop_reason, result.rounds) == ("It is 3.", "repetition", 6)
    last = sent(scripted_server)
    assert "tools" not in last
    assert last["messages"][-1]["content"] == "Now answer from the results above, without tools: 1 + 2?"
    check_valid(last["messages"])
    check_valid(result.messages)


async def test_a_poll_whose_result_changes_goes_on(scripted_server: ScriptedServer, client: LLMClient) -> None:
    polls = iter(range(100))

    async def poll() -> int:
        """Returns a different number each time."""
        return next(polls)

    scripted_server.script(*[calls(asks("poll"))] * 9, answer("ready"))
    assert (await Agent(client, tools=[poll]).run("Wait.")).text == "ready"


async def test_too_many_rounds_raise_with_the_result(scripted_server: ScriptedServer, client: LLMClient) -> None:
    numbers = iter(range(100))

    async def behave(exchange: Exchange) -> None:
        await calls(asks("add", a=next(numbers), b=0))(exchange)

    scripted_server.default = behave
    with pytest.raises(MaxRoundsExceededError, match="within 2 rounds") as caught:
        await Agent(client, tools=[add], max_rounds=9).run("Go.", max_rounds=2)
    result = caught.value.result
    assert (result.rounds, result.stop_reason, len(result.log)) == (2, "max_rounds", 2)
    assert caught.value.partial is result
    assert tool_texts(result.messages) == ["0", "1"]
    check_valid(result.messages)


async def test_a_token_budget_ends_the_run_between_rounds(scripted_server: ScriptedServer, client: LLMClient) -> None:
    usage = {"prompt_tokens": 60, "completion_tokens": 1, "total_tokens": 61}
    scripted_server.default = calls(asks("add", a=1, b=2), usage=usage)
    result = await Agent(client, tools=[add], max_total_tokens=100).run("Go.")
    assert (result.stop_reason, result.rounds, result.usage["total_tokens"]) == ("budget", 2, 122)
    check_valid(result.messages)


async def test_a_token_budget_uses_an_estimate_where_the_server_reports_no_usage(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    chunk = piece(None)
    chunk["choices"][0]["delta"] = {"tool_calls": [{"index": 0, **asks("add", a=1, b=2)}]}
    scripted_server.default = sse(chunk, piece(finish_reason="tool_calls"), done=True)
    result = await Agent(client, tools=[add], max_total_tokens=100).run("word " * 100)
    assert (result.stop_reason, result.rounds) == ("budget", 1)
    assert result.usage["total_tokens"] == 0
    assert result.log[0].usage is None


async def test_max_seconds_cancels_a_running_tool(scripted_server: ScriptedServer, client: LLMClient) -> None:
    gate = Gate()
    scripted_server.script(calls(asks("wait")))
    result = await Agent(client, tools=[gate.wait], max_seconds=0.3).run("Wait.")
    assert (result.stop_reason, gate.cancelled, gate.running) == ("budget", 1, 0)
    assert "may still be running" in tool_texts(result.messages)[0]
    check_valid(result.messages)


async def test_max_seconds_keeps_the_text_of_a_running_generation(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer("Once upon a time", chunks=["Once ", "upon"], gate=asyncio.Event()))
    result = await Agent(client, max_seconds=0.3).run("Tell a story.")
    assert (result.stop_reason, result.text) == ("budget", "Once ")
    assert result.messages[-1] == {"role": "assistant", "content": "Once "}
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    assert in_flight(client) == 0


async def test_max_seconds_counts_while_a_run_waits_for_others(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    agent = Agent(client, max_seconds=0.1, switch_policy="drain")
    other = RunPermit(requested_model="other")
    await agent._admission.enter(other)
    result = await agent.run("Wait.")
    assert (result.rounds, result.stop_reason) == (0, "budget")
    agent._admission.leave(other)
    assert agent._admission.is_idle
    assert generations(scripted_server) == []


async def test_a_timeout_of_the_client_is_an_error_and_not_a_budget(scripted_server: ScriptedServer) -> None:
    scripted_server.script(answer("x", gate=asyncio.Event()))
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(idle=0.1)) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await Agent(client, max_seconds=30).run("Go.")
    assert caught.value.phase == "idle"
    assert caught.value.partial.text == "x"
    assert caught.value.partial.stop_reason == "error"


# Empty answers


async def test_an_empty_first_answer_is_requested_once_more(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer(" "), answer("Hello."))
    result = await Agent(client).run("Hi.")
    assert (result.text, result.rounds, len(generations(scripted_server))) == ("Hello.", 1, 2)
    assert result.usage["total_tokens"] == 4
    assert len(result.messages) == 2


async def test_two_empty_first_answers_are_an_error(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = answer("", reasoning="Hm.")
    with pytest.raises(LLMResponseError, match="twice returned an empty answer") as caught:
        await Agent(client, tools=[add]).run("Hi.")
    assert len(generations(scripted_server)) == 2
    assert caught.value.partial.reasoning == "Hm."
    assert caught.value.partial.messages == [{"role": "user", "content": "Hi."}]


async def test_an_empty_answer_after_a_tool_ends_the_run(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), answer(""), answer(""), answer(""))
    result = await Agent(client, tools=[add]).run("Add them, and say nothing.")
    assert (result.text, result.stop_reason, result.rounds) == ("", "stop", 2)
    check_valid(result.messages)


# Finish reasons that contradict the reply


@pytest.mark.parametrize("reason", ["tool_calls", "function_call"])
@pytest.mark.parametrize("text", ["Let me look.", ""])
async def test_a_call_that_was_announced_and_is_missing_is_asked_for_once_more(
    scripted_server: ScriptedServer, client: LLMClient, reason: str, text: str
) -> None:
    scripted_server.script(answer(text, finish_reason=reason), calls(asks("add", a=1, b=2)), answer("3"))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, result.stop_reason, result.rounds) == ("3", "stop", 2)
    check_valid(result.messages)


@pytest.mark.parametrize("rounds_before", [0, 1])
async def test_a_call_that_is_announced_and_missing_twice_is_an_error(
    scripted_server: ScriptedServer, client: LLMClient, rounds_before: int
) -> None:
    scripted_server.script(*[calls(asks("add", a=1, b=2))] * rounds_before)
    scripted_server.default = answer("Let me look.", finish_reason="tool_calls")
    with pytest.raises(
        LLMResponseError, match=r"twice returned a reply .*'tool_calls', but without a tool call"
    ) as caught:
        await Agent(client, tools=[add]).run("1 + 2?")
    assert "tool parser" in str(caught.value.hint)
    assert len(generations(scripted_server)) == rounds_before + 2
    assert caught.value.partial.text == "Let me look."
    check_valid(caught.value.partial.messages)


async def test_the_answer_after_such_a_reply_is_an_answer(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("Let me look.", finish_reason="tool_calls"), answer("It is 3."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, result.stop_reason, result.rounds) == ("It is 3.", "stop", 1)


async def test_a_call_in_the_text_is_the_one_that_was_announced(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    scripted_server.script(answer(text, finish_reason="tool_calls"), answer("3"))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, tool_texts(result.messages)) == ("3", ["3"])


async def test_a_legacy_function_call_is_made_and_answered(scripted_server: ScriptedServer, client: LLMClient) -> None:
    deltas = [{"function_call": {"name": "add", "arguments": ""}}, {"function_call": {"arguments": '{"a": 1, "b": 2}'}}]
    chunks = [piece(None) for _ in deltas]
    for chunk, delta in zip(chunks, deltas, strict=True):
        chunk["choices"][0]["delta"] = delta
    scripted_server.script(sse(*chunks, piece(finish_reason="function_call"), done=True), answer("3"))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, tool_texts(result.messages)) == ("3", ["3"])
    check_valid(sent(scripted_server)["messages"])


@pytest.mark.parametrize("reason", [None, "stop", "tool_calls"])
async def test_calls_in_a_whole_message_of_a_client_are_made(reason: str | None) -> None:
    class WholeMessages:
        model = "whole"

        async def chat_completion(self, messages: Any, **params: Any) -> Any:
            async def chunks() -> AsyncGenerator[dict[str, Any]]:
                if messages[-1]["role"] == "tool":
                    yield piece(messages[-1]["content"], finish_reason="stop")
                    return
                message = {"role": "assistant", "content": "", "tool_calls": [asks("add", a=1, b=2)]}
                yield {"choices": [{"index": 0, "message": message, "finish_reason": reason}]}

            return chunks()

    assert (await Agent(WholeMessages(), tools=[add]).run("1 + 2?")).text == "3"


@pytest.mark.parametrize("reason", [None, "stop", "tool_calls"])
async def test_calls_in_a_whole_message_within_a_stream_are_made(
    scripted_server: ScriptedServer, client: LLMClient, reason: str | None
) -> None:
    whole = piece(None, finish_reason=reason)
    del whole["choices"][0]["delta"]
    whole["choices"][0]["message"] = {"role": "assistant", "content": "", "tool_calls": [asks("add", a=1, b=2)]}
    scripted_server.script(sse(whole, done=True), answer("3"))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, tool_texts(result.messages)) == ("3", ["3"])


async def test_calls_without_a_finish_reason_are_made(scripted_server: ScriptedServer, client: LLMClient) -> None:
    chunk = piece(None)
    chunk["choices"][0]["delta"] = {"tool_calls": [{"index": 0, **asks("add", a=1, b=2)}]}
    scripted_server.script(sse(chunk, done=True), answer("3"))
    assert (await Agent(client, tools=[add]).run("1 + 2?")).text == "3"


@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_calls_of_a_reply_that_was_aborted_are_not_made(
    scripted_server: ScriptedServer, client: LLMClient, reason: str
) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2), finish_reason=reason))
    with pytest.raises(LLMError) as caught:
        await Agent(client, tools=[add]).run("1 + 2?")
    assert caught.value.partial.tool_calls == ()


# What is sent back


async def test_a_call_is_sent_back_under_the_name_that_was_offered(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    tool = Tool("Add Numbers", "Adds.", {"type": "object", "properties": {"a": {"type": "integer"}}}, lambda a: a)
    scripted_server.script(
        calls(asks("Add Numbers", "1", a=1), asks("add_numbers", "2", a=2), asks("Add Numbers", "3", a="x")),
        answer("ok"),
    )
    result = await Agent(client, tools=[tool]).run("Go.")
    body = sent(scripted_server)
    assert body["tools"][0]["function"]["name"] == "add_numbers"
    assert [call["function"]["name"] for call in body["messages"][1]["tool_calls"]] == ["add_numbers"] * 3
    assert [text[:3] for text in tool_texts(body["messages"])] == ["1", "2", "the"]
    assert [call.name for call in result.tool_calls] == ["Add Numbers"] * 3


@pytest.mark.parametrize(
    "name", ["functions.subtract", "SubTract", "sub tract", "subtract<|channel|>", "\u00e9", "x" * 500]
)
async def test_a_name_that_was_made_up_cannot_break_the_conversation(
    scripted_server: ScriptedServer, client: LLMClient, name: str
) -> None:
    async def strict(exchange: Exchange) -> None:
        for message in exchange.request.json["messages"]:
            for call in message.get("tool_calls", ()):
                if not re.fullmatch("[a-z0-9_-]{1,64}", call["function"]["name"]):
                    return await reply(400, {"error": {"message": "string does not match pattern"}})(exchange)
        behaviour = answer("Sorry.") if len(exchange.request.json["messages"]) > 1 else calls(asks(name, a=1))
        return await behaviour(exchange)

    scripted_server.default = strict
    result = await Agent(client, tools=[add]).run("Go.")
    assert result.text == "Sorry."
    assert "there is no tool" in tool_texts(result.messages)[0]
    assert result.tool_calls[0].name == name
    check_valid(result.messages)


# Errors


async def test_a_name_at_the_end_of_a_reply_that_is_not_that_of_the_run_is_an_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    # Within a reply, each of the names fits the one before it. The run reads the last chunks without looking at each.
    pieces = [piece("a", model="m"), piece("b", model="m"), piece("c", model="m@q8", finish_reason="stop")]
    scripted_server.script(calls(asks("add", a=1, b=2), model="m@q4"), sse(*pieces, done=True))
    with pytest.raises(ModelChangedDuringExecutionError) as caught:
        await Agent(client, tools=[add]).run("1 + 2?")
    assert (caught.value.old_model, caught.value.new_model) == ("m@q4", "m@q8")


async def test_an_error_holds_the_run_so_far(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), reply(400, {"error": {"message": "no grammar for you"}}))
    with pytest.raises(LLMResponseError, match="no grammar") as caught:
        await Agent(client, tools=[add]).run("1 + 2?")
    partial = caught.value.partial
    assert (partial.rounds, partial.stop_reason, len(partial.log)) == (2, "error", 1)
    assert tool_texts(partial.messages) == ["3"]
    scripted_server.script(answer("It is 3."))
    resumed = await Agent(client, tools=[add]).run("Go on.", messages=partial.messages)
    assert resumed.text == "It is 3."


async def test_a_model_that_changes_between_rounds_is_an_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2), model="a"), answer("of another mind", model="b"))
    with pytest.raises(ModelChangedDuringExecutionError) as caught:
        await Agent(client, tools=[add]).run("1 + 2?")
    assert (caught.value.old_model, caught.value.new_model) == ("a", "b")
    assert caught.value.partial.text == ""
    assert in_flight(client) == 0


async def test_a_model_that_changes_inside_a_reply_is_an_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sse(piece("Hel", model="a"), piece("lo", model="b"), done=True))
    with pytest.raises(ModelChangedDuringExecutionError) as caught:
        await Agent(client).run("Hi.")
    assert caught.value.partial.text == "Hel"


class ForeignClient:
    """A client whose streams are generators and not those of lmbridge."""

    def __init__(self, client: LLMClient) -> None:
        self._client = client
        self.model = client.model

    async def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None, stream: Literal[True], **params: Any
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        chunks = await self._client.chat_completion(messages, model=model, stream=stream, **params)

        async def generate() -> AsyncGenerator[Mapping[str, Any], None]:
            async with chunks:
                async for chunk in chunks:
                    yield chunk

        return generate()


LOADING = {"id": "loading-1", "object": "proxy.status", "model": "llama-swap"}
LOADING_FRAMES = [
    {**LOADING, "choices": []},
    piece("", **LOADING),
    {**LOADING, "choices": [{"index": 0, "delta": {"role": "assistant"}}]},
    {**LOADING, "choices": [{"index": 0, "delta": {"reasoning_content": "Loading model..."}}]},
]


@pytest.mark.parametrize("frame", LOADING_FRAMES)
@pytest.mark.parametrize("is_foreign", [False, True])
async def test_a_proxy_may_announce_a_load_under_its_own_name_in_any_round(
    scripted_server: ScriptedServer, client: LLMClient, frame: dict[str, Any], is_foreign: bool
) -> None:
    def swapped(*events: dict[str, Any]) -> Behaviour:
        return sse(frame, frame, *(event | {"id": "chatcmpl-1", "model": "file.gguf"} for event in events), done=True)

    asked = [piece(choices=[{"index": 0, "delta": {"tool_calls": [{"index": 0, **asks("add", a=1, b=2)}]}}])]
    answered = [piece("It is "), piece("3.", finish_reason="stop")]
    scripted_server.script(swapped(*asked, piece(finish_reason="tool_calls")), swapped(*answered))
    result = await Agent(ForeignClient(client) if is_foreign else client, tools=[add]).run("1 + 2?")
    assert (result.text, result.model) == ("It is 3.", "test-model")
    assert [each.model for each in result.log] == ["file.gguf", "file.gguf"]


async def test_the_model_may_change_if_model_mismatch_is_ignore(scripted_server: ScriptedServer) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2), model="a"), answer("3", model="b"))
    async with LLMClient(scripted_server.api_base, "test-model", model_mismatch="ignore") as client:
        assert (await Agent(client, tools=[add]).run("1 + 2?")).text == "3"
        scripted_server.script(sse(piece("Hel", model="a"), piece("lo", model="b"), done=True))
        assert (await Agent(client).run("Hi.")).text == "Hello"


async def test_a_model_that_changes_inside_a_reply_of_another_client_is_an_error(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script(sse(piece("Hel", model="a"), piece("lo", model="b"), done=True))
    # This client of lmbridge would not notice the change, so it is the run that does.
    async with LLMClient(scripted_server.api_base, "test-model", model_mismatch="ignore") as client:
        with pytest.raises(ModelChangedDuringExecutionError) as caught:
            await Agent(ForeignClient(client)).run("Hi.")
    assert (caught.value.old_model, caught.value.new_model) == ("a", "b")


async def test_another_instance_of_the_model_is_the_same_model(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(
        calls(asks("add", a=1, b=2), model="test-model:2"), answer("3", model="test-model"), answer("x")
    )
    assert (await Agent(client, tools=[add]).run("1 + 2?")).text == "3"


# Approval


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_refused_call_is_not_made_and_the_model_gets_a_refusal(
    scripted_server: ScriptedServer, client: LLMClient, is_async: bool
) -> None:
    asked: list[ToolCall] = []

    def approve(call: ToolCall) -> bool:
        asked.append(call)
        return call.arguments != {"a": 1, "b": 2}

    async def approve_later(call: ToolCall) -> bool:
        await asyncio.sleep(0)
        return approve(call)

    scripted_server.script(calls(asks("add", a=1, b=2), asks("add", "call_2", a=2, b=3)), answer("ok"))
    result = await Agent(client, tools=[add], approve=approve_later if is_async else approve).run("Go.")
    refused, made = tool_texts(result.messages)
    assert refused.startswith("Refused")
    assert made == "5"
    assert [call.id for call in asked] == ["call_1", "call_2"]
    assert asked[0].tool is not None


async def test_an_exception_of_approve_ends_the_run(scripted_server: ScriptedServer, client: LLMClient) -> None:
    def approve(call: ToolCall) -> bool:
        raise KeyError("no user")

    scripted_server.script(calls(asks("add", a=1, b=2)))
    with pytest.raises(LLMError, match="approve raised KeyError") as caught:
        await Agent(client, tools=[add], approve=approve).run("Go.")
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.hint is not None
    assert "the call was not made; to refuse a call, return" in caught.value.hint
    assert tool_texts(caught.value.partial.messages) == ["Not called: the run ended first."]
    check_valid(caught.value.partial.messages)


# Context


async def test_max_tokens_is_what_is_left_of_the_context(scripted_server: ScriptedServer, client: LLMClient) -> None:
    models = {"data": [{"id": "test-model", "owned_by": "vllm", "max_model_len": 4096}]}
    scripted_server.on_path("/v1/models", reply(200, models))
    await Agent(client).run("Hi.")
    assert 3900 < sent(scripted_server)["max_tokens"] < 4096 - 64


async def test_the_context_length_is_requested_once(scripted_server: ScriptedServer, client: LLMClient) -> None:
    agent = Agent(client)
    await asyncio.gather(*(agent.run("Hi.") for _ in range(20)))
    await agent.run("Hi.")
    assert len([request for request in scripted_server.requests if request.path == "/v1/models"]) == 1


def overflow(prompt: int, context: int) -> Any:
    error = {"type": "exceed_context_size_error", "message": "too long", "n_prompt_tokens": prompt, "n_ctx": context}
    return reply(400, {"error": {"code": 400, **error}})


async def test_an_overflow_trims_the_oldest_turns_and_sends_the_request_again(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    def read(page: int) -> str:
        """Reads a page."""
        return f"page {page}: " + "word " * 200

    turns = [calls(asks("read", f"call_{page}", page=page)) for page in range(6)]
    scripted_server.script(*turns, overflow(2000, 1600), answer("All read."))
    result = await Agent(client, tools=[read]).run("Read all pages.")
    assert result.text == "All read."
    messages = sent(scripted_server)["messages"]
    check_valid(messages)
    assert messages[0] == {"role": "user", "content": "Read all pages."}
    assert 1 <= len(tool_texts(messages)) < 6
    assert tool_texts(messages)[-1].startswith("page 5")
    assert len(tool_texts(result.messages)) == 6, "what was not sent is not lost"


async def test_an_overflow_that_cannot_be_trimmed_is_raised(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(overflow(5000, 1600))
    with pytest.raises(ContextLengthExceededError) as caught:
        await Agent(client, max_tokens=100).run("word " * 5000)
    assert caught.value.partial.rounds == 1
    assert len(generations(scripted_server)) == 1


async def test_an_overflow_by_the_answer_alone_lowers_max_tokens(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(overflow(10, 4096), answer("Hello."))
    assert (await Agent(client).run("Hi.")).text == "Hello."
    assert sent(scripted_server)["max_tokens"] == 4096 - 10 - 64


async def test_history_is_trimmed_beforehand_if_the_context_length_is_known(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    models = {"data": [{"id": "test-model", "owned_by": "vllm", "max_model_len": 1000}]}
    scripted_server.on_path("/v1/models", reply(200, models))
    before = [
        message
        for number in range(10)
        for message in (
            {"role": "user", "content": f"{number} " + "word " * 100},
            {"role": "assistant", "content": "Yes."},
        )
    ]
    result = await Agent(client, system_prompt="Be kind.").run("And now?", messages=before)
    messages = sent(scripted_server)["messages"]
    assert [messages[0]["role"], messages[1]["role"], messages[-1]["content"]] == ["system", "user", "And now?"]
    assert 3 < len(messages) < 12
    assert sent(scripted_server)["max_tokens"] >= 250, "a quarter of the context is for the answer"
    assert len(result.messages) == 23


async def test_a_prompt_that_cannot_be_trimmed_is_sent_anyway(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    models = {"data": [{"id": "test-model", "owned_by": "vllm", "max_model_len": 1000}]}
    scripted_server.on_path("/v1/models", reply(200, models))
    assert (await Agent(client).run("word " * 2000)).stop_reason == "stop"
    assert sent(scripted_server)["max_tokens"] == 16


@pytest.mark.parametrize("context", [None, 100_000])
async def test_an_overflow_without_numbers_trims_a_quarter(
    scripted_server: ScriptedServer, client: LLMClient, context: int | None
) -> None:
    entry = {"id": "test-model", "owned_by": "vllm"} | ({} if context is None else {"max_model_len": context})
    scripted_server.on_path("/v1/models", reply(200, {"data": [entry]}))
    scripted_server.script(reply(400, {"error": {"type": "exceed_context_size_error", "message": "too long"}}))
    before = [
        message
        for number in range(20)
        for message in (
            {"role": "user", "content": f"{number} " + "word " * 100},
            {"role": "assistant", "content": "Yes."},
        )
    ]
    await Agent(client).run("And now?", messages=before)
    first, second = (len(sent(scripted_server, number)["messages"]) for number in range(2))
    assert first == 41
    assert 10 < second < 35


# Going on


async def test_a_run_continues_the_conversation_of_another(scripted_server: ScriptedServer, client: LLMClient) -> None:
    agent = Agent(client, tools=[add], system_prompt="Be exact.")
    scripted_server.script(calls(asks("add", a=1, b=2)), answer("3"), answer("4"))
    first = await agent.run("1 + 2?")
    second = await agent.run("And one more?", messages=first.messages)
    assert sent(scripted_server)["messages"] == [*first.messages, {"role": "user", "content": "And one more?"}]
    assert second.messages[:-2] == first.messages
    assert second.tool_calls == ()


async def test_an_image_is_sent(scripted_server: ScriptedServer, client: LLMClient) -> None:
    image = image_part("data:image/png;base64,iVBORw0KGgo=")
    parts = [{"type": "text", "text": "What is this?"}, image]
    await Agent(client).run(parts)
    assert sent(scripted_server)["messages"][0]["content"] == parts


async def test_parts_of_a_task_that_have_no_text_are_sent(scripted_server: ScriptedServer, client: LLMClient) -> None:
    parts: list[dict[str, Any]] = [{"type": "text", "text": None}, {"type": "text", "text": "Hello."}]
    await Agent(client, observers=[TimelineObserver()]).run(parts)
    assert sent(scripted_server)["messages"][0]["content"] == parts


async def test_a_provider_is_asked_at_each_run(scripted_server: ScriptedServer, client: LLMClient) -> None:
    class Provider:
        asked = 0

        async def list_tools(self) -> list[Tool]:
            self.asked += 1
            return [Tool.from_function(add)]

    provider = Provider()
    agent = Agent(client, tools=[provider])
    for _ in range(2):
        scripted_server.script(calls(asks("add", a=1, b=2)), answer("3"))
        assert (await agent.run("1 + 2?")).text == "3"
    assert provider.asked == 2


async def test_any_object_with_chat_completion_can_be_a_client() -> None:
    class Double:
        model = "double"
        closed = 0

        async def chat_completion(self, messages: Any, *, model: str | None, stream: Any, **params: Any) -> Any:
            async def chunks() -> AsyncGenerator[dict[str, Any]]:
                try:
                    yield piece("Hel", model=model)
                    yield piece("lo", model=model, finish_reason="stop")
                finally:
                    self.closed += 1

            return chunks()

    double = Double()
    result = await Agent(double).run("Hi.")
    assert (result.text, result.model, double.closed) == ("Hello", "double", 1)


# Arguments


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_rounds": 0}, "max_rounds"),
        ({"max_rounds": True}, "max_rounds"),
        ({"max_tokens": "all"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"max_seconds": float("nan")}, "max_seconds"),
        ({"max_total_tokens": -1}, "max_total_tokens"),
        ({"switch_policy": "maybe"}, "switch_policy"),
        ({"system_prompt": " "}, "system_prompt"),
        ({"tool_timeout": -1}, "tool_timeout"),
        ({"max_parallel_tools": 0}, "max_parallel_tools"),
        ({"approve": "yes"}, "approve"),
        ({"model": ""}, "model"),
        ({"tools": "add"}, "tools"),
        ({"tools": [add, add]}, "two tools 'add'"),
        ({"tools": [3]}, "3"),
    ],
)
def test_an_invalid_option_is_refused(client: LLMClient, options: dict[str, Any], named: str) -> None:
    with pytest.raises(LLMValidationError, match=named) as caught:
        Agent(client, **options)
    assert caught.value.hint


@pytest.mark.parametrize("client", [None, "http://localhost", LLMClient])
def test_an_object_that_is_not_a_client_is_refused(client: Any) -> None:
    with pytest.raises(LLMValidationError, match="client must be"):
        Agent(client)


@pytest.mark.parametrize(
    "arguments",
    [
        {"task": ""},
        {"task": None},
        {"task": []},
        {"task": ["text"]},
        {"task": "half \ud83d"},
        {"task": [{"type": "text", "text": object()}]},
        {"task": "x", "max_rounds": 0},
        {"task": "x", "max_tokens": "some"},
        {"task": "x", "model": " "},
        {"task": "x", "tools": [add, add]},
        {"task": "x", "messages": "hello"},
        {"task": "x", "messages": [{"content": "no role"}]},
    ],
)
async def test_an_invalid_argument_is_refused_before_anything_is_sent(
    scripted_server: ScriptedServer, client: LLMClient, arguments: dict[str, Any]
) -> None:
    agent = Agent(client)
    for start in (agent.stream, agent.start):
        with pytest.raises(LLMValidationError):
            start(**arguments)
    with pytest.raises(LLMValidationError):
        await agent.run(**arguments)
    assert scripted_server.requests == []


async def test_the_events_cover_the_whole_run(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(
        calls(asks("add", a=1, b=2), asks_raw("add", "{", "call_2"), reasoning="Hm."), answer("It is 3.")
    )
    events = await collect_events(Agent(client, tools=[add]))
    assert [type(event).__name__ for event in events] == [
        "RoundStarted",
        "ReasoningDelta",
        "ToolCallStarted",
        "ToolCallFinished",  # the one that cannot be made
        "ToolCallFinished",
        "RoundFinished",
        "RoundStarted",
        *["TextDelta"] * 3,
        "RoundFinished",
        "RunFinished",
    ]
    assert [event.call.id for event in events[2:5]] == ["call_1", "call_2", "call_1"]
    assert [(event.text, event.is_error) for event in events[3:5]][1] == ("3", False)
    assert "".join(event.text for event in events[7:10]) == "It is 3."
    assert events[-1].result.text == "It is 3."


@pytest.mark.parametrize("reason", ["abort", "error", "content_filter"])
async def test_an_answer_that_the_server_broke_off_is_an_error(
    scripted_server: ScriptedServer, client: LLMClient, reason: str
) -> None:
    scripted_server.script(answer("Half of", finish_reason=reason))
    with pytest.raises(LLMResponseError, match=f"finish reason '{reason}'") as caught:
        await Agent(client).run("Go.")
    assert caught.value.partial.text == "Half of"
