"""How a run makes room in a context that is full: shortened results, summaries, and messages that are left out."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmbridge import (
    Agent,
    CompactionStep,
    ContextCompacted,
    LLMClient,
    LLMValidationError,
    RunFinished,
    TaskCancelledError,
)
from lmbridge.agent.compaction import Compactor
from lmbridge.agent.continued_messages import Message
from lmbridge.agent.history import History
from lmbridge.agent.settings import CompactionMode
from lmbridge.agent.tokens import ContextBudget
from lmbridge.client.token_count import size_of
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, reply, stall
from tests.agent.support import asks, begin_turn, calls, check_valid, collect_events, generations, sent, tool_texts

SUMMARY = "Page 0 has the code 1000."


def page(number: int, characters: int = 3_000) -> str:
    """Reads a page."""
    return f"page {number} has the code {1000 + number}. ".ljust(characters, "x") + f" end of page {number}"


def short_page(number: int) -> str:
    """Reads a short page."""
    return page(number, 1_000)


def know_context(server: ScriptedServer, tokens: int) -> None:
    """Makes a server report the length of its context."""
    models = {"data": [{"id": "test-model", "owned_by": "vllm", "max_model_len": tokens}]}
    server.on_path("/v1/models", reply(200, models))


def is_summary(request: dict[str, Any]) -> bool:
    return request.get("tool_choice") == "none"


def used_by(exchange: Exchange) -> dict[str, int]:
    """Returns the usage of a request: a token for three bytes of its messages, and one for the answer."""
    tokens = sum(map(size_of, exchange.request.json["messages"])) // 3
    return {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1}


def reads_pages(tool: str, count: int, summary: Behaviour | None = None) -> Behaviour:
    """Returns a model that reads so many pages one after the other, and writes a summary when it is asked for one."""
    calls_made = iter(range(count))

    async def behave(exchange: Exchange) -> None:
        if is_summary(exchange.request.json):
            await (summary or answer(SUMMARY))(exchange)
        elif (number := next(calls_made, None)) is not None:
            await calls(asks(tool, f"call_{number}", number=number), usage=used_by(exchange))(exchange)
        else:
            await answer("All read.")(exchange)

    return behave


async def run_long(
    server: ScriptedServer,
    client: LLMClient,
    *,
    tool: Callable[..., str] = page,
    count: int = 12,
    context: int = 8_000,
    summary: Behaviour | None = None,
    **options: Any,
) -> list[Any]:
    """Lets a run read more than fits into its context, and returns its events."""
    know_context(server, context)
    server.default = reads_pages(tool.__name__, count, summary)
    return await collect_events(Agent(client, tools=[tool], max_rounds=100, **options), "Read all pages.")


def steps_of(events: list[Any]) -> list[CompactionStep]:
    return [event.step for event in events if isinstance(event, ContextCompacted)]


async def test_old_results_are_shortened_first_and_the_newest_ones_stay_whole(
    scripted_server: ScriptedServer, client: LLMClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lmbridge.agent"):
        events = await run_long(scripted_server, client, count=10)
    for step in steps_of(events):
        assert (step.kind, step.summary) == ("shorten", "")
        assert step.tokens_after < step.tokens_before
    assert "messages were shortened" in caplog.text
    messages = sent(scripted_server)["messages"]
    texts = tool_texts(messages)
    assert len(texts) == 10, "no call is left out"
    assert (texts[0][:28], texts[0][-13:]) == (page(0)[:28], "end of page 0")
    assert "characters omitted" in texts[0]
    assert texts[-2:] == [page(8), page(9)]
    check_valid(messages)


async def test_the_messages_of_the_result_are_never_compacted(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    events = await run_long(scripted_server, client, count=30)
    result = events[-1].result
    assert {step.kind for step in steps_of(events)} == {"shorten", "summarize"}
    assert tool_texts(result.messages) == [page(number) for number in range(30)]
    assert result.messages[0] == {"role": "user", "content": "Read all pages."}
    assert not any(SUMMARY in str(message["content"]) for message in result.messages)
    check_valid(result.messages)


async def test_a_summary_replaces_the_oldest_turns_when_shortening_is_not_enough(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    events = await run_long(scripted_server, client, tool=short_page, count=25)
    requests = [request.json for request in generations(scripted_server)]
    place = next(number for number, request in enumerate(requests) if is_summary(request))
    before, summary, after = requests[place - 1], requests[place], requests[place + 1]
    # The request for the summary begins like the one before, so that the server has it in its cache.
    *repeated, full, question = summary["messages"]
    assert repeated == before["messages"][: len(repeated)]
    assert summary["tools"] == before["tools"]
    assert (full["role"], question["role"]) == ("assistant", "user")
    assert "Write notes" in question["content"]
    check_valid(summary["messages"])
    task = after["messages"][0]["content"]
    assert task.startswith("Read all pages.\n\n[To save room, ")
    assert 'short_page({"number": 0})' in task
    assert task.endswith(SUMMARY)
    assert tool_texts(after["messages"])[-1] == short_page(len(tool_texts(before["messages"])))
    check_valid(after["messages"])
    (step, *_) = steps_of(events)
    assert (step.kind, step.summary) == ("summarize", SUMMARY)
    result = events[-1].result
    logged = [step for each in result.log for step in each.compactions]
    assert logged == steps_of(events)
    assert result.rounds == 26, "a summary is not a round"


async def test_extra_body_changes_neither_the_length_nor_the_form_of_a_summary(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    fields = {"tool_choice": "auto", "max_tokens": 5, "response_format": {"type": "json_object"}, "top_k": 20}
    await run_long(scripted_server, client, tool=short_page, count=25, extra_body=fields)
    requests = [request.json for request in generations(scripted_server)]
    summaries = [each for each in requests if "Write notes" in str(each["messages"][-1]["content"])]
    assert summaries
    for each in requests:
        assert each["top_k"] == 20
        if each in summaries:
            assert (each["tool_choice"], "response_format" in each) == ("none", False)
            assert each["max_tokens"] > 5
        else:
            assert {name: each[name] for name in fields} == fields


async def test_the_tokens_of_a_summary_are_counted(scripted_server: ScriptedServer, client: LLMClient) -> None:
    used = {"prompt_tokens": 0, "completion_tokens": 7, "total_tokens": 7}
    events = await run_long(
        scripted_server, client, tool=short_page, count=25, summary=answer(SUMMARY, usage=used), max_total_tokens=10**6
    )
    requests = [request.json for request in generations(scripted_server)]
    result = events[-1].result
    others = len(requests) - sum(map(is_summary, requests))
    assert result.usage["completion_tokens"] >= 7 + others


async def test_room_is_made_rarely_and_between_that_prompts_only_grow(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    await run_long(scripted_server, client, count=40, context=16_000)
    prompts = [request.json["messages"] for request in generations(scripted_server) if not is_summary(request.json)]
    pairs = list(itertools.pairwise(prompts))
    breaks = sum(second[: len(first)] != first for first, second in pairs)
    assert len(pairs) == 40
    assert 1 <= breaks <= 8


@pytest.mark.parametrize(
    ("summary", "reason"),
    [
        (answer(""), "the model wrote none"),
        (answer("", reasoning="Hm."), "the model wrote none"),
        (calls(asks("short_page", number=1)), "called a tool"),
        (answer('<tool_call>{"name": "short_page", "arguments": {"number": 1}}</tool_call>'), "called a tool"),
        (reply(500, {"error": {"message": "no template for that"}}), "no template for that"),
    ],
)
async def test_without_a_usable_summary_the_turns_are_left_out_and_the_model_is_not_asked_again(
    scripted_server: ScriptedServer,
    client: LLMClient,
    caplog: pytest.LogCaptureFixture,
    summary: Behaviour,
    reason: str,
) -> None:
    events = await run_long(
        scripted_server, client.with_options(max_retries=0), tool=short_page, count=40, summary=summary
    )
    assert isinstance(events[-1], RunFinished)
    assert {step.kind for step in steps_of(events)} == {"drop"}
    assert len(steps_of(events)) > 1
    assert sum(is_summary(request.json) for request in generations(scripted_server)) == 1
    assert [record.levelname for record in caplog.records if "without a summary" in record.message] == ["WARNING"]
    assert reason in caplog.text
    task = sent(scripted_server)["messages"][0]["content"]
    assert "calls and their results were removed: " in task
    assert "notes" not in task


async def test_a_result_that_the_model_asked_for_again_is_not_shortened_again(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    know_context(scripted_server, 12_000)
    order = iter([*range(11), 0, *range(11, 20)])

    async def behave(exchange: Exchange) -> None:
        number = next(order, None)
        behaviour = answer("Done.") if number is None else calls(asks("page", number=number), usage=used_by(exchange))
        await behaviour(exchange)

    scripted_server.default = behave
    await Agent(client, tools=[page], compaction="shorten").run("Read all pages.")
    texts = tool_texts(sent(scripted_server)["messages"])
    first, second = (text for text in texts if text.startswith("page 0 "))
    assert "characters omitted" in first
    assert second == page(0)
    assert "characters omitted" in texts[texts.index(second) + 1]


async def test_a_call_may_be_repeated_once_more_after_each_compaction(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    know_context(scripted_server, 4_000)
    order = iter([0, 1, 2, 3] * 5)

    async def behave(exchange: Exchange) -> None:
        number = next(order, None)
        behaviour = answer("Done.") if number is None else calls(asks("page", number=number), usage=used_by(exchange))
        await behaviour(exchange)

    scripted_server.default = behave
    agent = Agent(client, tools=[page], compaction="drop", max_rounds=50, repetition_limit=3)
    result = await agent.run("Read all pages.")
    assert (result.stop_reason, result.rounds) == ("stop", 21)


@pytest.mark.parametrize("mode", ["shorten", "drop"])
async def test_the_other_modes_never_ask_for_a_summary(
    scripted_server: ScriptedServer, client: LLMClient, mode: str
) -> None:
    events = await run_long(scripted_server, client, count=40, compaction=mode)
    kinds = [step.kind for step in steps_of(events)]
    assert set(kinds) == ({"drop"} if mode == "drop" else {"shorten", "drop"})
    assert not any(is_summary(request.json) for request in generations(scripted_server))
    messages = sent(scripted_server)["messages"]
    assert (messages[0]["content"] == "Read all pages.") == (mode == "drop")
    assert any("omitted" in text for text in tool_texts(messages)) == (mode == "shorten")


async def test_a_small_context_has_no_room_for_notes(scripted_server: ScriptedServer, client: LLMClient) -> None:
    events = await run_long(scripted_server, client, tool=short_page, count=20, context=2_000)
    assert {step.kind for step in steps_of(events)} == {"drop"}
    assert sent(scripted_server)["messages"][0]["content"] == "Read all pages."


async def test_a_result_that_is_larger_than_the_context_is_shortened(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    def read() -> str:
        """Reads everything."""
        return "first " + "word " * 3_900 + "last"

    know_context(scripted_server, 2_000)
    scripted_server.script(calls(asks("read")), answer("Done."))
    events = await collect_events(Agent(client, tools=[read]))
    (text,) = tool_texts(sent(scripted_server)["messages"])
    assert (text[:6], text[-4:]) == ("first ", "last")
    assert "characters omitted" in text
    assert 1_500 < len(text) < 6_000
    assert [step.kind for step in steps_of(events)] == ["shorten"]


async def test_several_results_that_are_too_large_together_are_all_shortened(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    know_context(scripted_server, 4_000)
    scripted_server.script(calls(*(asks("page", f"call_{n}", number=n) for n in range(6))), answer("Done."))
    await Agent(client, tools=[page]).run("Read all pages.")
    texts = tool_texts(sent(scripted_server)["messages"])
    assert all("characters omitted" in text for text in texts)
    assert [text[:6] for text in texts] == [f"page {number}" for number in range(6)]
    assert sum(map(len, texts)) < 3 * 3_000


async def test_a_second_summary_replaces_the_first_one(scripted_server: ScriptedServer, client: LLMClient) -> None:
    count = iter(range(100))

    async def summarize(exchange: Exchange) -> None:
        number = next(count)
        if number:
            assert f"notes {number - 1}" in exchange.request.json["messages"][0]["content"]
        await answer(f"notes {number}")(exchange)

    events = await run_long(scripted_server, client, tool=short_page, count=60, summary=summarize)
    summaries = [step.summary for step in steps_of(events) if step.kind == "summarize"]
    assert len(summaries) > 1
    task = sent(scripted_server)["messages"][0]["content"]
    assert task.endswith(summaries[-1])
    assert "notes 0" not in task


async def test_a_run_that_is_cancelled_during_a_summary_stops_the_server_and_stays_valid(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    know_context(scripted_server, 8_000)
    started = asyncio.Event()

    async def hang(exchange: Exchange) -> None:
        started.set()
        await stall(["half of the notes"])(exchange)

    scripted_server.default = reads_pages("short_page", 40, hang)
    handle = Agent(client, tools=[short_page], max_rounds=100).start("Read all pages.")
    await started.wait()
    handle.cancel()
    with pytest.raises(TaskCancelledError):
        await handle.result()
    await scripted_server.wait_until(lambda: generations(scripted_server)[-1].aborted)
    check_valid(handle.messages)
    assert handle.partial.text == ""
    assert not any("half of the notes" in str(message) for message in handle.messages)


async def test_a_run_that_is_paused_during_a_summary_is_held_before_the_next_generation(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    know_context(scripted_server, 8_000)

    async def pause(exchange: Exchange) -> None:
        handle.pause()
        await answer(SUMMARY)(exchange)

    scripted_server.default = reads_pages("short_page", 25, pause)
    handle = Agent(client, tools=[short_page], max_rounds=100).start("Read all pages.")
    async for event in handle.events():
        if isinstance(event, ContextCompacted):
            break
    for _ in range(20):
        await asyncio.sleep(0)
    assert is_summary(sent(scripted_server))
    handle.resume()
    assert (await handle.result()).text == "All read."


async def test_the_option_is_checked(client: LLMClient) -> None:
    options: dict[str, Any] = {"compaction": "yes"}
    with pytest.raises(LLMValidationError, match="compaction"):
        Agent(client, **options)


# Without a server


def add_turn(history: History, name: str, results: list[int]) -> None:
    turn = begin_turn(history, "", [asks("read", f"{name} {number}", n=number) for number in range(len(results))])
    for number, length in enumerate(results):
        turn.answer(f"{name} {number}", "y" * length)
    history.end_turn()


def test_results_of_an_earlier_conversation_are_shortened_although_its_calls_have_one_id() -> None:
    exchange: list[Any] = [{"role": "user", "content": "Read."}]
    for number in range(3):
        call = asks("read", "the only id", n=number)
        exchange.append({"role": "assistant", "content": "", "tool_calls": [call]})
        exchange.append({"role": "tool", "tool_call_id": "the only id", "content": "y" * 3_000})
    history = History("Go.", messages=[*exchange, {"role": "assistant", "content": "Done."}])
    assert history.shorten_results(0, longer_than=1_200, kept=600) == 3


def test_results_that_cannot_be_shortened_leave_their_part_to_the_others() -> None:
    history = History("Go.")
    add_turn(history, "turn", [*[640] * 50, 8_000])
    goal = history.size - 400
    assert history.shorten_last_results(goal, kept=600) == 1
    assert history.size <= goal
    *short, long = tool_texts(history.to_send())
    assert set(map(len, short)) == {640}
    assert 7_500 < len(long) < 8_000


@pytest.mark.parametrize("mode", get_args(CompactionMode))
@example(before=0, turns=[[0, 602, 7965]], context=4001, summary="")
@given(
    before=st.integers(0, 4),
    turns=st.lists(st.lists(st.integers(0, 8_000), min_size=1, max_size=3), min_size=1, max_size=12),
    context=st.integers(300, 12_000),
    summary=st.sampled_from(["", "Some notes.", "long " * 2_000]),
)
def test_whatever_is_compacted_the_conversation_is_valid_and_the_task_and_the_last_turn_stay(
    mode: CompactionMode, before: int, turns: list[list[int]], context: int, summary: str
) -> None:
    given_messages = [
        {"role": role, "content": f"{role} {n} " + "z" * 900} for n in range(before) for role in ("user", "assistant")
    ]
    history = History("Go.", system_prompt="Be brief.", messages=given_messages)
    budget = ContextBudget(history, tools_size=100, context_length=context, max_tokens="auto")
    steps: list[CompactionStep] = []

    async def summarize(messages: list[Message], max_tokens: int) -> str:
        check_valid(messages)
        assert budget.tokens_of(100 + sum(map(size_of, messages))) + max_tokens <= context
        return summary

    async def report(step: CompactionStep) -> None:
        steps.append(step)

    compactor = Compactor(history, budget, mode=mode, summarize=summarize, report=report)

    async def run() -> None:
        for number, results in enumerate(turns):
            add_turn(history, f"turn {number}", results)
            whole, size = history.snapshot(ended=True), history.size
            await compactor.fit()
            sent = history.to_send()
            check_valid(sent)
            assert history.size == sum(map(size_of, sent))
            assert history.snapshot(ended=True) == whole
            assert sent[0] == {"role": "system", "content": "Be brief."}
            tasks = [each["content"] for each in sent if each["role"] == "user" and each["content"].startswith("Go.")]
            assert len(tasks) == 1
            assert sent[-1]["role"] == "tool"
            assert sent[-1]["tool_call_id"] == f"turn {number} {len(results) - 1}"
            assert history.size <= size or steps
            if mode != "drop" and context > 4_000 and budget.excess() > 0:
                # What is left is short already.
                assert all(len(text) <= 1_260 for text in tool_texts(sent))

    asyncio.run(run())
