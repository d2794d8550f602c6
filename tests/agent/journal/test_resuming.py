"""Runs that go on from a journal after an interruption."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from lmbridge import (
    Agent,
    Journal,
    JournalEntry,
    JournalError,
    LLMClient,
    LLMResponseError,
    LLMValidationError,
    MaxRoundsExceededError,
    ModelChangedDuringExecutionError,
    Tool,
    ToolCall,
    image_part,
)
from lmbridge import Gate as DecisionGate
from lmbridge.agent.journal import database
from lmbridge.agent.journal_interface import UNCERTAIN_RESULT
from lmbridge.observe import ObservedEvent, RunBegun, RunEnded
from lmbridge.testing import Exchange, ScriptedServer, answer, reply, stall
from tests.agent.journal.support import Counted, hold_writes, interrupt, interrupt_after
from tests.agent.support import Gate, add, asks, calls, check_valid, generations, sent, tool_texts
from tests.agent.test_compaction import SUMMARY, is_summary, know_context, reads_pages, short_page

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


async def test_a_finished_call_is_never_made_again(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    tool = Counted()
    agent = Agent(client, tools=[tool.act], system_prompt="Be exact.")
    first = calls(asks("act", "one", name="a"), asks("act", "two", name="b"), text="Two.", usage=USAGE)
    await interrupt_after(scripted_server, agent, journal, first)
    scripted_server.script(answer("Both are done.", usage=USAGE))
    result = await Agent.resume(journal, client=client, tools=[tool.act])
    assert (result.text, result.rounds, result.stop_reason) == ("Both are done.", 2, "stop")
    assert sorted(tool.calls) == ["a", "b"]
    assert result.usage == {"prompt_tokens": 14, "completion_tokens": 6, "total_tokens": 20}
    assert [message["role"] for message in result.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert tool_texts(result.messages) == ["a is done", "b is done"]
    check_valid(result.messages)
    # What is sent is what had been sent, byte for byte, so that the server can use its prompt cache.
    assert sent(scripted_server, -1)["messages"] == sent(scripted_server, -2)["messages"]
    first_round, _ = result.log
    assert [(record.call.name, record.text) for record in first_round.tool_calls] == [
        ("act", "a is done"),
        ("act", "b is done"),
    ]


async def test_a_call_that_had_started_may_have_happened(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    gate = Gate()
    scripted_server.script(calls(asks("wait")), answer("I see."))
    handle = Agent(client, tools=[gate.wait]).start("Go.", journal=journal)
    await gate.begun.wait()
    await interrupt(handle)
    gate.begun.clear()
    # If the call were made again, it would end.
    gate.open.set()
    result = await Agent.resume(journal, client=client, tools=[gate.wait])
    assert tool_texts(result.messages) == [UNCERTAIN_RESULT]
    assert "may have happened" in UNCERTAIN_RESULT
    assert not gate.begun.is_set()
    assert result.log[0].tool_calls[0].is_error


async def test_an_uncertain_call_stays_uncertain_when_the_run_is_interrupted_again(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    gate = Gate()
    scripted_server.script(calls(asks("wait")))
    handle = Agent(client, tools=[gate.wait]).start("Go.", journal=journal)
    await gate.begun.wait()
    await interrupt(handle)
    gate.open.set()
    scripted_server.script(reply(400, {"error": "no"}), answer("I see."))
    with pytest.raises(LLMResponseError):
        await Agent.resume(journal, client=client, tools=[gate.wait])
    tool = Tool.from_function(gate.wait, idempotent=True)
    result = await Agent.resume(journal, client=client, tools=[tool])
    assert tool_texts(result.messages) == [UNCERTAIN_RESULT]


@pytest.mark.parametrize("mark", [{"idempotent": True}, {"annotations": {"idempotentHint": True}}])
async def test_a_call_of_an_idempotent_tool_is_made_again(
    mark: dict[str, Any], scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    gate = Gate()
    tool = Tool("wait", "", {"type": "object"}, gate.wait, **mark)
    scripted_server.script(calls(asks("wait")), answer("I see."))
    handle = Agent(client, tools=[tool]).start("Go.", journal=journal)
    await gate.begun.wait()
    await interrupt(handle)
    gate.open.set()
    result = await Agent.resume(journal, client=client, tools=[tool])
    assert tool_texts(result.messages) == ["done"]


async def test_a_planned_call_is_made_as_it_was_decided(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    tool, gate, asked = Counted(), Gate(), []

    def approve(call: ToolCall) -> bool | str | ToolCall:
        asked.append(call.id)
        edited = attrs.evolve(call, arguments={"name": "edited"})
        decisions: dict[str, bool | str | ToolCall] = {"held": True, "no": "not today", "other": edited, "yes": True}
        return decisions[call.id]

    requested = [
        asks("wait", "held"),
        *(asks("act", each, name=each) for each in ("no", "other", "yes")),
        asks("unknown", "bad"),
    ]
    scripted_server.script(calls(*requested), answer("I see."))
    tools = [tool.act, gate.wait]
    agent = Agent(client, tools=tools, approve=approve, max_parallel_tools=1)
    handle = agent.start("Go.", journal=journal)
    await gate.begun.wait()
    await interrupt(handle)
    assert (tool.calls, asked) == ([], ["held", "no", "other", "yes"])
    with pytest.raises(JournalError, match="its calls have to be approved") as caught:
        await Agent.resume(journal, client=client, tools=tools)
    assert caught.value.problem == "mismatch"
    result = await Agent.resume(journal, client=client, tools=tools, approve=approve)
    assert (tool.calls, asked) == (["edited", "yes"], ["held", "no", "other", "yes"])
    uncertain, refused, edited, made, unknown = tool_texts(result.messages)
    assert (uncertain, refused, made) == (UNCERTAIN_RESULT, "Refused: not today", "yes is done")
    assert edited == '[The user changed this call: act({"name":"edited"}) was made.]\nedited is done'
    assert "there is no tool 'unknown'" in unknown


async def test_a_run_that_began_with_a_gate_needs_one_again(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    tool, question = Counted(), "Is this call free of harm?"
    gate = DecisionGate(question, threshold=0.5)
    passes = {"type": "noul", "noul": 0.9}
    scripted_server.on_path("/v1/systemone", reply(200, {"model": "m", "answers": {"gate": passes}}))
    agent = Agent(client, tools=[tool.act], gate=gate)
    await interrupt_after(scripted_server, agent, journal, calls(asks("act", "a", name="a")))
    with pytest.raises(JournalError, match=r"its calls have to be approved.*gate=") as caught:
        await Agent.resume(journal, client=client, tools=[tool.act])
    assert caught.value.problem == "mismatch"
    scripted_server.script(calls(asks("act", "b", name="b")), answer("Both are done."))
    result = await Agent.resume(journal, client=client, tools=[tool.act], gate=gate)
    assert (result.text, tool.calls) == ("Both are done.", ["a", "b"])
    decided = [each.json["state"]["arguments"] for each in scripted_server.requests if each.path == "/v1/systemone"]
    assert decided == [{"name": "a"}, {"name": "b"}]


async def test_a_gate_of_a_resumed_run_is_asked_before_its_approve(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    tool, asked = Counted(), []

    def approve(call: ToolCall) -> bool:
        asked.append(call.id)
        return True

    agent = Agent(client, tools=[tool.act], approve=approve)
    await interrupt_after(scripted_server, agent, journal, calls(asks("act", "a", name="a")))
    refuses = {"type": "noul", "noul": 0.1}
    scripted_server.on_path("/v1/systemone", reply(200, {"model": "m", "answers": {"gate": refuses}}))
    scripted_server.script(calls(asks("act", "b", name="b")), answer("I may not."))
    await Agent.resume(journal, client=client, tools=[tool.act], approve=approve, gate="Is this call free of harm?")
    assert (tool.calls, asked) == (["a"], ["a"])


async def test_a_resumed_run_has_observers(scripted_server: ScriptedServer, client: LLMClient, journal: Path) -> None:
    events: list[ObservedEvent] = []
    tool = Counted()
    observer: Any = SimpleNamespace(on_event=events.append)
    await interrupt_after(scripted_server, Agent(client, tools=[tool.act]), journal, calls(asks("act", name="a")))
    scripted_server.script(answer("Done."))
    await Agent.resume(journal, client=client, tools=[tool.act], observers=[observer])
    assert [type(each) for each in (events[0], events[-1])] == [RunBegun, RunEnded]


async def test_a_call_that_was_edited_and_made_keeps_its_record(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    tool = Counted()

    def approve(call: ToolCall) -> ToolCall:
        return attrs.evolve(call, arguments={"name": "edited"})

    agent = Agent(client, tools=[tool.act], approve=approve)
    await interrupt_after(scripted_server, agent, journal, calls(asks("act", name="a")))
    scripted_server.script(answer("I see."))
    result = await Agent.resume(journal, client=client, tools=[tool.act], approve=approve)
    (record,) = result.log[0].tool_calls
    assert record.edited is not None
    assert (record.edited.arguments, record.call.arguments) == ({"name": "edited"}, {"name": "a"})
    assert tool.calls == ["edited"]


async def test_a_finished_run_gives_its_result_without_a_request(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2), reasoning="Add."), answer("It is 3.", reasoning="Clear."))
    result = await Agent(client, tools=[add]).run("1 + 2?", journal=journal)
    again = await Agent.resume(journal, client=client)
    assert len(generations(scripted_server)) == 2
    assert attrs.evolve(again, log=result.log, tool_calls=result.tool_calls) == result
    assert [call.arguments for call in again.tool_calls] == [{"a": 1, "b": 2}]
    handle = Agent(client).start("1 + 2?", journal=JournalEntry(journal, run_id=(await Journal(journal).runs())[0].id))
    assert (await handle.result()).text == handle.partial.text == "It is 3."
    assert handle.messages == result.messages
    copied = handle.messages
    copied.pop()
    copied[1]["tool_calls"][0]["function"]["name"] = "sub"
    assert handle.messages == handle.partial.messages == result.messages


async def test_a_run_that_used_up_its_rounds_is_finished(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    scripted_server.default = calls(asks("add", a=1, b=2))
    with pytest.raises(MaxRoundsExceededError) as first:
        await Agent(client, tools=[add], max_rounds=2).run("1 + 2?", journal=journal)
    with pytest.raises(MaxRoundsExceededError) as second:
        await Agent.resume(journal, client=client, tools=[add])
    assert len(generations(scripted_server)) == 2
    assert second.value.result.messages == first.value.result.messages


async def test_limits_go_on_where_they_were(scripted_server: ScriptedServer, client: LLMClient, journal: Path) -> None:
    agent = Agent(client, tools=[add], max_rounds=3, max_total_tokens=25, repetition_limit=4)
    rounds = [calls(asks("add", a=1, b=2), usage=USAGE)] * 2
    await interrupt_after(scripted_server, agent, journal, *rounds)
    scripted_server.script(calls(asks("add", a=1, b=2), usage=USAGE))
    result = await Agent.resume(journal, client=client, tools=[add])
    # 30 tokens are more than 25, although this program has used 10 only; and this is the third identical call.
    assert (result.stop_reason, result.usage["total_tokens"]) == ("budget", 30)
    assert "This call was made 3 times" in tool_texts(result.messages)[-1]


async def test_the_time_before_the_interruption_counts(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("lmbridge.agent.journal.recorder.time", SimpleNamespace(monotonic=lambda: now[0]))

    def think() -> str:
        """Takes an hour."""
        now[0] += 3600
        return "thought"

    agent = Agent(client, tools=[think], max_seconds=3000)
    await interrupt_after(scripted_server, agent, journal, calls(asks("think")))
    scripted_server.script(stall())
    result = await Agent.resume(journal, client=client, tools=[think])
    assert (result.stop_reason, result.rounds) == ("budget", 0)
    again = await Agent.resume(journal, client=client, tools=[think])
    assert again.stop_reason == "budget"


async def test_the_log_has_the_seconds_of_rounds_before_the_interruption(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("lmbridge.agent.journal.recorder.time", SimpleNamespace(monotonic=lambda: now[0]))

    def think() -> str:
        """Takes an hour."""
        now[0] += 3600
        return "thought"

    agent = Agent(client, tools=[think], repetition_limit=None)
    await interrupt_after(scripted_server, agent, journal, *[calls(asks("think"))] * 2)
    now[0] += 1_000_000
    scripted_server.script(answer("Done."))
    result = await Agent.resume(journal, client=client, tools=[think])
    assert [each.seconds for each in result.log] == [3600, 3600, 0]


async def test_nudges_are_repeated_and_not_sent_again(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    tool = Counted()
    agent = Agent(client, tools=[tool.act])
    replies = [answer("Let me check."), calls(asks("act", name="a")), answer("")]
    await interrupt_after(scripted_server, agent, journal, *replies)
    scripted_server.script(answer("Done."))
    result = await Agent.resume(journal, client=client, tools=[tool.act])
    assert [[nudge.kind for nudge in each.nudges] for each in result.log] == [["promise"], ["empty"]]
    assert sent(scripted_server, -1)["messages"] == sent(scripted_server, -2)["messages"]
    assert tool.calls == ["a"]


async def test_a_reply_that_made_the_run_fail_is_asked_for_again_and_its_tokens_count(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    scripted_server.script(*[answer("", usage=USAGE)] * 2)
    with pytest.raises(LLMResponseError, match="empty answer"):
        await Agent(client, max_nudges=1).run("Go.", journal=journal)
    assert (await Journal(journal).runs())[0].state == "failed"
    scripted_server.script(answer("Done.", usage=USAGE))
    result = await Agent.resume(journal, client=client)
    assert (result.text, result.rounds, result.usage["total_tokens"]) == ("Done.", 1, 30)
    assert result.messages[1:] == [{"role": "assistant", "content": "Done."}]


async def test_a_summary_of_the_conversation_is_not_asked_for_again(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    know_context(scripted_server, 8_000)
    reads, has_summary = reads_pages("short_page", 40), asyncio.Event()

    async def read_until_summarized(exchange: Exchange) -> None:
        if SUMMARY in str(exchange.request.json["messages"]):
            has_summary.set()
            await stall()(exchange)
        else:
            await reads(exchange)

    scripted_server.default = read_until_summarized
    handle = Agent(client, tools=[short_page], max_rounds=100).start("Read all pages.", journal=journal)
    await has_summary.wait()
    await interrupt(handle)
    scripted_server.default = answer("All read.")
    result = await Agent.resume(journal, client=client, tools=[short_page])
    assert sent(scripted_server, -1)["messages"] == sent(scripted_server, -2)["messages"]
    assert sum(is_summary(request.json) for request in generations(scripted_server)) == 1
    # One token for each call, six for the summary, two for the answer; one generation was interrupted.
    assert result.usage["completion_tokens"] == len(generations(scripted_server)) - 3 + 6 + 2


async def test_the_output_of_a_run_is_read_again(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    @attrs.frozen
    class Sum:
        value: int

    agent = Agent(client, tools=[add], output_type=Sum)
    await interrupt_after(scripted_server, agent, journal, calls(asks("add", a=1, b=2)), answer("It is 3."))
    for wrong in (None, int):
        with pytest.raises(JournalError, match="output type"):
            await Agent.resume(journal, client=client, tools=[add], output_type=wrong)
    scripted_server.script(answer('{"value": 3}'))
    for _ in range(2):
        result = await Agent.resume(journal, client=client, tools=[add], output_type=Sum)
        assert result.output == Sum(3)
    assert len(generations(scripted_server)) == 4


@pytest.mark.parametrize("is_finished", [False, True])
async def test_a_repeated_run_needs_the_output_type_that_it_began_with(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path, is_finished: bool
) -> None:
    @attrs.frozen
    class Sum:
        value: int

    agent, entry = Agent(client), JournalEntry(journal, run_id="sum")
    if is_finished:
        scripted_server.script(answer('{"value": 3}'))
        await agent.run("Go.", journal=entry, output_type=Sum)
    else:
        await interrupt_after(scripted_server, agent, entry, output_type=Sum)
    for wrong in (None, int):
        handle = agent.start("Go.", journal=entry, output_type=wrong)
        with pytest.raises(JournalError, match="output type") as caught:
            await handle.result()
        assert (caught.value.problem, handle.stop_reason) == ("mismatch", "error")
    scripted_server.script(answer('{"value": 3}'))
    assert (await agent.run("Go.", journal=entry, output_type=Sum)).output == Sum(3)


async def test_an_output_that_its_type_no_longer_accepts_is_an_error_of_the_journal(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    limit = 5

    @dataclass
    class Sum:
        value: int

        def __post_init__(self) -> None:
            if self.value > limit:
                raise ValueError("too large")

    agent, entry = Agent(client, output_type=Sum), JournalEntry(journal, run_id="sum")
    scripted_server.script(answer('{"value": 3}'))
    await agent.run("Go.", journal=entry)
    limit = 2
    handle = agent.start("Go.", journal=entry)
    with pytest.raises(JournalError, match=r"does not accept its output.*too large") as caught:
        await handle.result()
    assert (caught.value.problem, handle.stop_reason) == ("mismatch", "error")


async def test_images_of_results_stay_where_the_server_takes_them(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    image = image_part(b"\x89PNG\r\n\x1a\n" + bytes(20))

    def look() -> Any:
        """Looks."""
        return ["Here it is.", image]

    refusal = reply(400, {"error": "messages: role 'user' cannot have images here"})
    agent = Agent(client, tools=[look])
    await interrupt_after(scripted_server, agent, journal, calls(asks("look")), refusal, calls(asks("look", "2")))
    async with LLMClient(scripted_server.api_base, "test-model") as other:
        scripted_server.script(answer("Seen."))
        result = await Agent.resume(journal, client=other, tools=[look])
    assert sent(scripted_server, -1)["messages"] == sent(scripted_server, -2)["messages"]
    assert image in result.messages[2]["content"]
    assert result.log[0].tool_calls[0].images == (image,)


async def test_a_run_goes_on_with_its_model(scripted_server: ScriptedServer, client: LLMClient, journal: Path) -> None:
    agent = Agent(client, tools=[add])
    await interrupt_after(scripted_server, agent, journal, calls(asks("add", a=1, b=2)))
    scripted_server.script(answer("It is 3."))
    async with LLMClient(scripted_server.api_base, "another-model") as other:
        await Agent.resume(journal, client=other, tools=[add])
    assert sent(scripted_server)["model"] == "test-model"


async def test_a_run_whose_model_was_swapped_meanwhile_raises(scripted_server: ScriptedServer, journal: Path) -> None:
    async with LLMClient(scripted_server.api_base) as client:
        agent = Agent(client, tools=[add])
        await interrupt_after(scripted_server, agent, journal, calls(asks("add", a=1, b=2), model="first"))
        scripted_server.script(answer("It is 3.", model="second"))
        with pytest.raises(ModelChangedDuringExecutionError):
            await Agent.resume(journal, client=client, tools=[add])
    async with LLMClient(scripted_server.api_base, "second") as client:
        with pytest.raises(JournalError, match="began with model None, and would be resumed with 'second'") as caught:
            await Agent.resume(journal, client=client, tools=[add])
    assert caught.value.problem == "mismatch"


async def test_a_run_needs_the_tools_that_it_began_with(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    await interrupt_after(scripted_server, Agent(client, tools=[add]), journal, calls(asks("add", a=1, b=2)))
    with pytest.raises(JournalError, match="lacks tools that it began with: add") as caught:
        await Agent.resume(journal, client=client)
    assert (caught.value.problem, caught.value.path) == ("mismatch", str(journal))


async def test_a_run_has_its_options_and_its_conversation(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    before = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    agent = Agent(client, tools=[add], temperature=0.5, max_tokens=77)
    parts = [{"type": "text", "text": "1 + 2?"}]
    options: dict[str, Any] = {"messages": before, "seed": 4, "extra_body": {"top_k": 5}}
    await interrupt_after(
        scripted_server,
        agent,
        journal,
        calls(asks("add", a=1, b=2)),
        task=parts,
        **options,
    )
    scripted_server.script(answer("It is 3."))
    await Agent.resume(journal, client=client, tools=[add])
    assert sent(scripted_server, -1) == sent(scripted_server, -2)
    assert (sent(scripted_server)["temperature"], sent(scripted_server)["seed"], sent(scripted_server)["top_k"]) == (
        0.5,
        4,
        5,
    )


async def test_only_one_program_lets_a_run_go_on(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    scripted_server.script(stall())
    handle = Agent(client).start("Go.", journal=journal)
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    with pytest.raises(JournalError, match="is in progress") as caught:
        await Agent.resume(journal, client=client)
    assert caught.value.problem == "in_use"
    await interrupt(handle)
    scripted_server.script(answer("Done."))
    assert (await Agent.resume(journal, client=client)).text == "Done."


async def test_one_of_several_runs_has_to_be_named(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    agent = Agent(client)
    for task in ("Read the first report.", "Read the second report."):
        await interrupt_after(scripted_server, agent, journal, task=task)
    with pytest.raises(JournalError, match=r"2 runs that can be resumed.*unfinished: Read the first report") as caught:
        await Agent.resume(journal, client=client)
    assert caught.value.problem == "run"
    first, second = await Journal(journal).runs()
    scripted_server.script(answer("Done."))
    assert (await Agent.resume(journal, client=client, run_id=second.id)).text == "Done."
    # Only one is left.
    scripted_server.script(answer("Done, too."))
    assert (await Agent.resume(journal, client=client)).text == "Done, too."
    with pytest.raises(JournalError, match="all 2 runs of the journal are finished"):
        await Agent.resume(journal, client=client)
    assert (await Agent.resume(journal, client=client, run_id=first.id)).text == "Done, too."
    with pytest.raises(JournalError, match="has no run 'x'"):
        await Agent.resume(journal, client=client, run_id="x")


async def test_a_run_with_a_chosen_id_goes_on_when_it_is_begun_again(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    tool, entry = Counted(), JournalEntry(journal, run_id="order-7")
    agent = Agent(client, tools=[tool.act])
    await interrupt_after(scripted_server, agent, entry, calls(asks("act", name="a")))
    scripted_server.script(answer("Done."))
    assert [(await agent.run("Go.", journal=entry)).text for _ in range(2)] == ["Done."] * 2
    assert tool.calls == ["a"]
    with pytest.raises(JournalError, match="begun with another task"):
        await agent.run("Stop.", journal=entry)
    with pytest.raises(LLMValidationError, match="run_id"):
        JournalEntry(journal, run_id=" ")


async def test_events_of_a_run_with_a_journal_are_those_of_a_run_without(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    scripted_server.script(*[calls(asks("add", a=1, b=2)), answer("It is 3.")] * 2)
    agent = Agent(client, tools=[add])
    kinds = []
    for options in ({}, {"journal": journal}):
        async with agent.stream("1 + 2?", **options) as events:  # type: ignore[call-overload]  # options of one kind
            kinds.append([type(event) async for event in events])
    assert kinds[0] == kinds[1]


# Writing


async def test_a_step_is_written_although_the_run_is_cancelled_meanwhile(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, may_write = Counted(), threading.Event()

    async def act(name: str) -> str:
        """Acts, and makes the step after it wait."""
        begun.append(hold_writes(monkeypatch, may_write.wait))
        return await tool.act(name)

    begun: list[asyncio.Event] = []
    scripted_server.script(calls(asks("act", name="a")))
    handle = Agent(client, tools=[act]).start("Go.", journal=journal)
    while not begun:
        await asyncio.sleep(0)
    await begun[0].wait()
    handle.cancel()
    may_write.set()
    await interrupt(handle)
    scripted_server.script(answer("Done."))
    result = await Agent.resume(journal, client=client, tools=[act])
    assert tool_texts(result.messages) == ["a is done"]


async def test_a_full_disk_ends_the_run_and_cancels_its_tools(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()

    def fill() -> str:
        """Leaves no room on the disk."""
        monkeypatch.setattr(database.Database, "add_steps", _add_steps_to_full_disk)
        return "x" * 10_000

    scripted_server.script(calls(asks("wait", "1"), asks("fill", "2")))
    tools: list[Callable[..., Any]] = [gate.wait, fill]
    with pytest.raises(JournalError, match="database or disk is full") as caught:
        await Agent(client, tools=tools).run("Go.", journal=journal)
    error = caught.value
    assert (error.problem, error.path, gate.cancelled) == ("full", str(journal), 1)
    assert error.partial.stop_reason == "error"
    check_valid(error.partial.messages)
    monkeypatch.undo()
    scripted_server.script(answer("I see."))
    result = await Agent.resume(journal, client=client, tools=tools)
    assert tool_texts(result.messages) == [UNCERTAIN_RESULT] * 2


def _add_steps_to_full_disk(self: database.Database, *args: Any) -> None:
    self._execute("PRAGMA max_page_count = 1")
    for number in range(100):
        self._execute("INSERT INTO steps VALUES ('filler', ?, 'x', 0, ?)", number, "x" * 4000)


async def test_a_journal_that_cannot_be_used_is_an_error_before_anything_is_sent(
    scripted_server: ScriptedServer, client: LLMClient, tmp_path: Path
) -> None:
    with pytest.raises(JournalError) as caught:
        await Agent(client).run("Go.", journal=tmp_path / "missing" / "runs.db")
    assert caught.value.problem == "unwritable"
    assert caught.value.partial.stop_reason == "error"
    with pytest.raises(LLMValidationError, match="path must be the path of a file"):
        await Agent(client).run("Go.", journal=7)  # type: ignore[call-overload]  # the point of this test
    assert not scripted_server.requests


async def test_many_runs_share_a_journal(scripted_server: ScriptedServer, client: LLMClient, journal: Path) -> None:
    scripted_server.default = answer("Done.")
    agent = Agent(client)
    results = await asyncio.gather(*(agent.run(f"Task {number}.", journal=journal) for number in range(20)))
    assert {result.text for result in results} == {"Done."}
    runs = await Journal(journal).runs()
    assert {run.state for run in runs} == {"finished"}
    assert len({run.id for run in runs}) == 20


async def test_tools_that_a_search_has_found_are_offered_again(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    numbered = {"type": "object", "properties": {"number": {"type": "integer"}}}
    paints = [Tool(f"paint_{number}", "Paints. " * 40, numbered, print) for number in range(8)]
    tools = [*paints, Tool("forecast", f"Forecasts the weather. {'Really. ' * 40}", numbered, lambda: "warm")]
    agent = Agent(client, tools=tools, max_definition_tokens=500)
    await interrupt_after(scripted_server, agent, journal, calls(asks("find_tools", query="weather")))
    scripted_server.script(calls(asks("forecast", "two")), answer("Warm."))
    result = await Agent.resume(journal, client=client, tools=tools)
    assert tool_texts(result.messages)[1] == "warm"
    before, after = sent(scripted_server, 1), sent(scripted_server, 2)
    assert after["tools"][-1]["function"]["name"] == "forecast"
    assert (before["tools"], before["messages"]) == (after["tools"], after["messages"])


async def test_a_constrained_reply_that_was_unusable_is_one_after_an_interruption_as_well(
    scripted_server: ScriptedServer, client: LLMClient, journal: Path
) -> None:
    agent = Agent(client, tools=[add])
    wrong, cut = calls(asks("add", x=1)), answer('{"a": 11111', finish_reason="length")
    right = calls(asks("add", a=1, b=2))
    await interrupt_after(scripted_server, agent, journal, wrong, cut, right)
    scripted_server.script(answer("It is 3."))
    result = await Agent.resume(journal, client=client, tools=[add])
    assert (result.text, tool_texts(result.messages)[1]) == ("It is 3.", "3")
    assert [record.constrained for entry in result.log for record in entry.tool_calls] == [False, False]
    check_valid(result.messages)
