"""The calls of one reply: identical ones, ids that occur twice, and very many of them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import attrs
import pytest

from lmbridge import (
    Agent,
    LLMClient,
    LLMError,
    LLMValidationError,
    TaskCancelledError,
    Tool,
    ToolCall,
    ToolCallFinished,
    ToolCallStarted,
    ToolRecord,
)
from lmbridge.agent.channel import Channel
from lmbridge.agent.history import History
from lmbridge.agent.model_reply import ModelReply
from lmbridge.agent.pause import PauseGate
from lmbridge.agent.run_record import RunRecord
from lmbridge.agent.schema_check_limit import STEPS_AT_ONCE, spend_steps
from lmbridge.agent.settings import Settings
from lmbridge.agent.toolset import Toolset
from lmbridge.agent.turn_runner import TurnRunner
from lmbridge.testing import ScriptedServer, answer, sse
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
from tests.support import Steps, assert_linear, cancel_at_each_step, piece


class Die:
    """A tool that counts its calls."""

    def __init__(self) -> None:
        self.thrown = 0

    async def throw(self, sides: int = 6) -> str:
        """Throws a die."""
        self.thrown += 1
        return f"throw {self.thrown} of {sides}"


def numbered(count: int, name: str = "throw", **arguments: Any) -> list[dict[str, Any]]:
    """Returns identical calls with different ids."""
    return [asks(name, f"call_{number}", **arguments) for number in range(count)]


# Identical calls of one reply


async def test_identical_calls_of_a_reply_are_made_once_and_answered_each(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    die = Die()
    scripted_server.script(calls(*numbered(9)), answer("ok"))
    result = await Agent(client, tools=[die.throw]).run("Go.")
    assert (result.stop_reason, result.text, die.thrown) == ("stop", "ok", 1)
    assert tool_texts(result.messages) == ["throw 1 of 6"] * 9
    assert [call.id for call in result.tool_calls] == [f"call_{number}" for number in range(9)]
    records = result.log[0].tool_calls
    assert [record.call.id for record in records] == [f"call_{number}" for number in range(9)]
    assert [record.is_duplicate for record in records] == [False] + [True] * 8
    assert [record.raw for record in records] == ["throw 1 of 6"] * 9
    check_valid(sent(scripted_server)["messages"])


@pytest.mark.parametrize(
    "other",
    [
        asks_raw("throw", '{ "sides": 20 }', "2"),
        asks_raw("throw", '{"sides": "20"}', "2"),
        asks_raw("throw", '"{\\"sides\\": 20}"', "2"),
    ],
)
async def test_calls_are_identical_by_what_they_mean(
    scripted_server: ScriptedServer, client: LLMClient, other: dict[str, Any]
) -> None:
    die = Die()
    scripted_server.script(calls(asks("throw", "1", sides=20), other), answer("ok"))
    result = await Agent(client, tools=[die.throw]).run("Go.")
    assert (die.thrown, tool_texts(result.messages)) == (1, ["throw 1 of 20"] * 2)


async def test_calls_that_differ_in_an_argument_or_in_the_reply_are_different(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    die = Die()
    scripted_server.script(calls(asks("throw", "1"), asks("throw", "2", sides=20)), calls(asks("throw")), answer("ok"))
    result = await Agent(client, tools=[die.throw]).run("Go.")
    assert tool_texts(result.messages) == ["throw 1 of 6", "throw 2 of 20", "throw 3 of 6"]


async def test_identical_calls_can_all_be_made(scripted_server: ScriptedServer, client: LLMClient) -> None:
    die = Die()
    scripted_server.script(calls(*numbered(9)), answer("ok"))
    result = await Agent(client, tools=[die.throw], deduplicate_calls=False).run("Go.")
    assert (result.stop_reason, die.thrown) == ("stop", 9)
    assert sorted(tool_texts(result.messages)) == sorted(f"throw {number} of 6" for number in range(1, 10))
    assert not any(record.is_duplicate for record in result.log[0].tool_calls)


async def test_nine_identical_calls_with_the_same_result_do_not_end_the_run(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    for deduplicate in (True, False):
        scripted_server.script(calls(*numbered(9, "add", a=1, b=2)), answer("3"))
        result = await Agent(client, tools=[add], deduplicate_calls=deduplicate).run("Go.")
        assert (result.stop_reason, result.rounds) == ("stop", 2)
        assert tool_texts(result.messages) == ["3"] * 9, "a first reply gets no warning"


async def test_nine_identical_calls_in_each_of_five_replies_do_end_the_run(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.default = calls(*numbered(9, "add", a=1, b=2))
    result = await Agent(client, tools=[add]).run("Go.")
    assert (result.stop_reason, result.rounds) == ("repetition", 5)
    warned = ["[This call was made" in text for text in tool_texts(result.messages)]
    assert warned == [False] * 18 + [True] * 27
    check_valid(result.messages)


async def test_a_failing_call_is_made_once_too(scripted_server: ScriptedServer, client: LLMClient) -> None:
    tried = 0

    async def fail() -> None:
        """Fails."""
        nonlocal tried
        tried += 1
        raise OSError("disk full")

    scripted_server.script(calls(*numbered(3, "fail")), answer("ok"))
    result = await Agent(client, tools=[fail]).run("Go.")
    assert tried == 1
    assert all("disk full" in text for text in tool_texts(result.messages))
    assert [record.is_error for record in result.log[0].tool_calls] == [True] * 3


async def test_approval_of_identical_calls_is_requested_once(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    asked: list[str] = []

    def approve(call: ToolCall) -> bool:
        asked.append(call.id)
        return call.arguments == {"sides": 20}

    die = Die()
    scripted_server.script(calls(*numbered(3), asks("throw", "x", sides=20)), answer("ok"))
    result = await Agent(client, tools=[die.throw], approve=approve).run("Go.")
    assert asked == ["call_0", "x"]
    refused, made = tool_texts(result.messages)[:3], tool_texts(result.messages)[3]
    assert all(text.startswith("Refused") for text in refused)
    assert (made, die.thrown) == ("throw 1 of 20", 1)


async def test_each_duplicate_has_its_event(scripted_server: ScriptedServer, client: LLMClient) -> None:
    die = Die()
    scripted_server.script(calls(*numbered(3)), answer("ok"))
    events = await collect_events(Agent(client, tools=[die.throw]))
    assert [event.call.id for event in events if isinstance(event, ToolCallStarted)] == ["call_0"]
    finished = [event for event in events if isinstance(event, ToolCallFinished)]
    assert [(event.call.id, event.is_duplicate) for event in finished] == [
        ("call_0", False),
        ("call_1", True),
        ("call_2", True),
    ]


async def test_duplicates_of_a_call_that_was_interrupted_may_have_had_its_effect(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    gate = Gate()
    scripted_server.script(calls(*numbered(3, "wait")))
    handle = Agent(client, tools=[gate.wait]).start("Go.")
    await gate.begun.wait()
    await handle.aclose()
    assert gate.cancelled == 1
    assert [text[:35] for text in tool_texts(handle.messages)] == ["No result: the run ended while the "] * 3
    check_valid(handle.messages)


# Guards count replies


async def test_a_reply_full_of_bad_calls_is_one_mistake(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(calls(*(asks_raw("add", "{", f"call_{n}") for n in range(20))), answer("3"))
    result = await Agent(client, tools=[add], max_bad_calls=2).run("1 + 2?")
    assert (result.stop_reason, result.rounds) == ("stop", 2)
    assert all("not valid JSON" in text for text in tool_texts(result.messages))


async def test_a_reply_with_one_good_call_is_not_a_bad_one(scripted_server: ScriptedServer, client: LLMClient) -> None:
    bad, good = asks_raw("add", "{", "bad"), asks("add", "good", a=1, b=2)
    for mixed in ([bad, good], [good, bad]):
        scripted_server.script(calls(bad), calls(*mixed), calls(bad), answer("3"))
        assert (await Agent(client, tools=[add], max_bad_calls=2).run("1 + 2?")).stop_reason == "stop"


async def test_building_after_each_edit_may_give_the_same_result(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    async def edit(line: int) -> str:
        """Edits a line."""
        return "edited"

    async def build() -> str:
        """Builds the program."""
        return "1 error"

    agent = Agent(client, tools=[edit, build], repetition_limit=None)
    steps = [calls(asks("edit", "e", line=number), asks("build", "b")) for number in range(12)]
    scripted_server.script(*steps, answer("It builds."))
    result = await agent.run("Make it build.")
    assert (result.stop_reason, result.text) == ("stop", "It builds.")
    assert set(tool_texts(result.messages)) == {"edited", "1 error"}
    scripted_server.default = calls(asks("build"))
    limited = await Agent(client, tools=[build], repetition_limit=3).run("Make it build.")
    assert (limited.stop_reason, limited.rounds) == ("repetition", 3)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_limit": 1},
        {"repetition_limit": 0},
        {"repetition_limit": True},
        {"repetition_limit": "5"},
        {"deduplicate_calls": None},
        {"deduplicate_calls": 1},
    ],
)
def test_an_invalid_option_of_calls_is_refused(client: LLMClient, options: dict[str, Any]) -> None:
    with pytest.raises(LLMValidationError, match=next(iter(options))):
        Agent(client, **options)


# Ids


def streamed(*tool_calls: dict[str, Any]) -> Any:
    """Returns a stream with one chunk for each call, exactly as given."""
    chunks = []
    for call in tool_calls:
        chunk = piece(None)
        chunk["choices"][0]["delta"] = {"tool_calls": [call]}
        chunks.append(chunk)
    return sse(*chunks, piece(finish_reason="tool_calls"), done=True)


@pytest.mark.parametrize("indices", [(0, 1), (0, 0), (None, None)])
@pytest.mark.parametrize(
    ("second", "results"),
    [(asks("add", "x", a=3, b=4), ["3", "7"]), (asks("subtract", "x", a=1, b=2), ["3", "-1"])],
)
async def test_two_calls_under_one_id_are_made_and_answered(
    scripted_server: ScriptedServer, client: LLMClient, indices: tuple[Any, Any], second: Any, results: list[str]
) -> None:
    def subtract(a: int, b: int) -> int:
        """Subtracts."""
        return a - b

    listed = [asks("add", "x", a=1, b=2), second]
    numbered_calls = [
        call if index is None else {**call, "index": index} for call, index in zip(listed, indices, strict=True)
    ]
    scripted_server.script(streamed(*numbered_calls), answer("ok"))
    result = await Agent(client, tools=[add, subtract]).run("Go.")
    assert (result.text, tool_texts(result.messages)) == ("ok", results)
    first_id, second_id = (call.id for call in result.tool_calls)
    assert first_id == "x" != second_id
    assert [call["id"] for call in result.messages[1]["tool_calls"]] == [first_id, second_id]
    check_valid(sent(scripted_server)["messages"])


async def test_calls_without_ids_get_ids_of_their_own(scripted_server: ScriptedServer, client: LLMClient) -> None:
    listed = [{**asks("add", a=number, b=0), "id": call_id} for number, call_id in enumerate(["", None, 7])]
    del listed[1]["id"]
    scripted_server.script(streamed(*listed), answer("ok"))
    result = await Agent(client, tools=[add]).run("Go.")
    ids = [call.id for call in result.tool_calls]
    assert len(set(ids)) == 3
    assert all(ids)
    assert tool_texts(result.messages) == ["0", "1", "2"]
    assert [call["id"] for call in result.messages[1]["tool_calls"]] == ids
    check_valid(sent(scripted_server)["messages"])


async def test_an_id_may_come_back_in_another_reply(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(*(calls(asks("add", "call_0", a=n, b=0)) for n in range(3)), answer("ok"))
    result = await Agent(client, tools=[add]).run("Go.")
    assert [call.id for call in result.tool_calls] == ["call_0"] * 3
    assert tool_texts(result.messages) == ["0", "1", "2"]


# Very many calls


async def many_calls(count: int) -> tuple[TurnRunner, ModelReply, RunRecord]:
    """Returns what makes a number of calls of one reply, with every third one twice and every fourth one unusable."""

    async def double(number: int) -> int:
        """Doubles a number."""
        return 2 * number

    listed = [
        asks_raw("double", "{" if number % 4 == 3 else f'{{"number": {number - number % 3 // 2}}}', "same")
        for number in range(count)
    ]
    message = {"content": "", "tool_calls": listed}
    record = RunRecord(History("Go."))
    runner = TurnRunner(
        "run",
        settings=Settings(),
        toolset=await Toolset.collect([double]),
        record=record,
        channel=Channel(is_muted=True),
        is_stopping=lambda: False,
        clock=lambda: 0.0,
        gate=PauseGate(),
    )
    completion = {"choices": [{"message": message, "finish_reason": "tool_calls"}]}
    return runner, await ModelReply.from_completion(completion), record


async def answer_calls(count: int) -> RunRecord:
    """Makes a number of calls of one reply."""
    runner, reply, record = await many_calls(count)
    await runner.run(reply)
    assert runner.stop_reason is None
    return record


async def test_thousands_of_calls_with_one_id_are_all_answered() -> None:
    record = await answer_calls(1_000)
    messages = record.history.to_send()
    check_valid(messages)
    assert len({call.id for call in record.calls}) == 1_000
    for number, text in enumerate(tool_texts(messages)):
        if number % 4 == 3:
            assert "not valid JSON" in text
        else:
            assert text == str(2 * (number - number % 3 // 2))


async def test_a_turn_that_is_cancelled_between_two_slices_leaves_a_valid_history() -> None:
    lengths = set()
    runner, reply, record = await many_calls(250)

    def check_history(_: object = None) -> None:
        check_valid(record.history.snapshot(ended=False))
        messages = record.history.snapshot(ended=True)
        check_valid(messages)
        lengths.add(len(messages))

    async def run() -> None:
        nonlocal runner, record
        runner, _, record = await many_calls(250)
        await Steps(runner.run(reply), check_history)

    async def after_cancellation() -> None:
        check_history()

    await cancel_at_each_step(run, after_cancellation, at_least=9)
    assert lengths == {1, 252}, "either none of the calls are there, or all of them with their results"


async def test_a_run_that_is_cancelled_while_its_result_is_made_has_the_whole_conversation(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(*numbered(250, "nothing")), answer("Done."))
    handle = Agent(client, tools=[add]).start("Go.")
    while handle.messages[-1]["content"] != "Done.":
        await asyncio.sleep(0)
    assert handle.cancel()
    with pytest.raises(TaskCancelledError) as caught:
        await handle.result()
    result = caught.value.partial
    assert (result.stop_reason, len(result.messages), result.text) == ("cancelled", 253, "Done.")
    check_valid(result.messages)


def test_the_time_for_calls_grows_with_their_number() -> None:
    assert_linear(lambda count: asyncio.run(answer_calls(count)), 100)


# Decisions of `approve`


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_reason_of_approve_is_told_to_the_model(
    scripted_server: ScriptedServer, client: LLMClient, is_async: bool
) -> None:
    async def decide(_call: ToolCall) -> str:
        return "use the other folder"

    approve = decide if is_async else (lambda _call: "use the other folder")
    scripted_server.script(calls(asks("add", a=1, b=2)), answer("Then not."))
    result = await Agent(client, tools=[add], approve=approve).run("1 + 2?")
    assert tool_texts(result.messages) == ["Refused: use the other folder"]
    assert result.log[0].tool_calls[0].is_error


@pytest.mark.parametrize("decision", [False, None, "", "  ", 0])
async def test_a_refusal_without_a_reason_says_what_to_do(
    scripted_server: ScriptedServer, client: LLMClient, decision: Any
) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), answer("Then not."))
    result = await Agent(client, tools=[add], approve=lambda _call: decision).run("1 + 2?")
    assert tool_texts(result.messages)[0].startswith("Refused: this call is not allowed.")


@pytest.mark.parametrize("decision", [(False, "no"), 1, 0.0, [], {"approved": False}], ids=repr)
async def test_a_value_that_is_not_a_decision_does_not_approve_a_call(
    scripted_server: ScriptedServer, client: LLMClient, decision: Any
) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), answer("never"))
    with pytest.raises(LLMError, match=r"approve returned .*, which is not a decision; approve must") as caught:
        await Agent(client, tools=[add], approve=lambda _call: decision).run("1 + 2?")
    assert "Not called" in tool_texts(caught.value.partial.messages)[0]


async def test_an_edited_call_that_takes_long_to_check_is_read_in_a_thread(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    threads: list[bool] = []

    def convert(values: Any) -> dict[str, Any]:
        if values["n"] == 2:
            threads.append(threading.current_thread() is not threading.main_thread())
            spend_steps(STEPS_AT_ONCE + 1)
        return dict(values)

    tool = Tool("double", "Doubles.", {"properties": {"n": {"type": "integer"}}}, lambda n: 2 * n, _convert=convert)
    scripted_server.script(calls(asks("double", n=1)), answer("4"))
    agent = Agent(client, tools=[tool], approve=lambda call: attrs.evolve(call, arguments={"n": 2}))
    assert (await agent.run("2 * 2?")).log[0].tool_calls[0].raw == 4
    assert threads == [False, True]


async def test_an_edited_call_is_made_in_place_of_the_requested_one(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    def edit(call: ToolCall) -> ToolCall:
        return attrs.evolve(call, arguments={"a": 10, "b": "20"})

    scripted_server.script(calls(asks("add", a=1, b=2)), answer("30"))
    result = await Agent(client, tools=[add], approve=edit).run("1 + 2?")
    (record,) = result.log[0].tool_calls
    assert record.raw == 30
    assert record.call.arguments == {"a": 1, "b": 2}
    assert record.edited is not None
    assert (record.edited.name, record.edited.arguments) == ("add", {"a": 10, "b": 20})
    assert tool_texts(result.messages) == ['[The user changed this call: add({"a":10,"b":20}) was made.]\n30']
    check_valid(result.messages)


async def test_the_events_of_an_edited_call_name_the_call_that_is_made(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    def edit(call: ToolCall) -> ToolCall:
        return attrs.evolve(call, arguments={"a": 10, "b": 20})

    scripted_server.script(calls(asks("add", a=1, b=2)), answer("30"))
    events = await collect_events(Agent(client, tools=[add], approve=edit), "1 + 2?")
    (started,) = (each for each in events if isinstance(each, ToolCallStarted))
    (finished,) = (each for each in events if isinstance(each, ToolCallFinished))
    assert started.call == finished.edited
    assert started.call.arguments == {"a": 10, "b": 20}
    assert (finished.call.id, finished.call.arguments) == (started.call.id, {"a": 1, "b": 2})


async def test_the_event_of_a_finished_call_has_all_fields_of_its_record(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), answer("3"))
    events = await collect_events(Agent(client, tools=[add]), "1 + 2?")
    (finished,) = (each for each in events if isinstance(each, ToolCallFinished))
    for field in attrs.fields(ToolRecord):
        assert getattr(finished, field.name) == getattr(finished.record, field.name)


async def test_an_edited_call_may_be_of_another_tool(scripted_server: ScriptedServer, client: LLMClient) -> None:
    def sub(a: int, b: int) -> int:
        """Subtracts."""
        return a - b

    scripted_server.script(calls(asks("add", a=1, b=2)), answer("-1"))
    agent = Agent(client, tools=[add, sub], approve=lambda call: attrs.evolve(call, name="sub", tool=None))
    result = await agent.run("1 + 2?")
    assert result.log[0].tool_calls[0].raw == -1


async def test_the_same_call_from_approve_is_an_approval(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), answer("3"))
    result = await Agent(client, tools=[add], approve=lambda call: call).run("1 + 2?")
    assert tool_texts(result.messages) == ["3"]
    assert result.log[0].tool_calls[0].edited is None


@pytest.mark.parametrize("change", [{"name": "nothing"}, {"arguments": {"a": 1}}, {"arguments": {"a": "x", "b": 2}}])
async def test_an_edited_call_that_cannot_be_made_ends_the_run(
    scripted_server: ScriptedServer, client: LLMClient, change: dict[str, Any]
) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), answer("never"))
    with pytest.raises(LLMError, match=r"approve returned a call of '.*' that cannot be made") as caught:
        await Agent(client, tools=[add], approve=lambda call: attrs.evolve(call, **change)).run("1 + 2?")
    check_valid(caught.value.partial.messages)


async def test_other_tasks_run_between_the_calls_of_a_run_without_a_listener(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(*numbered(3_000, "nothing")), answer("ok"))
    turns, started = 0, asyncio.Event()

    async def count() -> None:
        nonlocal turns
        started.set()
        while True:
            turns += 1
            await asyncio.sleep(0)

    run = asyncio.create_task(Agent(client, tools=[add]).run("Go."))
    await scripted_server.wait_until(lambda: len(generations(scripted_server)) == 1)
    counter = asyncio.create_task(count())
    await started.wait()
    await scripted_server.wait_until(lambda: len(generations(scripted_server)) == 2, timeout=50)
    counter.cancel()
    await run
    assert turns >= 60
