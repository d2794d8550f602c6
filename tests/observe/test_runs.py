"""What the observers of an agent are told: each event once, on each way on which a run can end."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, LLMConnectionError, MaxRoundsExceededError, ToolCall
from lmbridge.observe import (
    ObservedEvent,
    RequestQueued,
    RoundEnded,
    RunBegun,
    RunEnded,
    ToolCallBegun,
    ToolCallEnded,
)
from lmbridge.testing import FakeChatClient, ScriptedServer, answer
from tests.observe.test_requests import Recorder, recorder
from tests.support import turns

__all__ = ["recorder"]

CALL = ToolCall("1", "add", {"a": 1, "b": 2})
ROUND = ["RoundBegun", "RoundEnded"]
ROUND_WITH_CALL = ["RoundBegun", "ToolCallBegun", "ToolCallEnded", "RoundEnded"]


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def agent_of(turns: Any, recorder: Recorder, **options: Any) -> Agent:
    return Agent(FakeChatClient(turns), observers=[recorder], **options)


async def test_a_run_with_a_call(recorder: Recorder) -> None:
    result = await agent_of([CALL, "It is 3."], recorder, tools=[add]).run("1 + 2?")
    assert recorder.names == ["RunBegun", *ROUND_WITH_CALL, *ROUND, "RunEnded"]
    begun, end = recorder.events[0], recorder.last
    assert isinstance(begun, RunBegun)
    assert (begun.task, begun.parent_run_id, begun.model) == ("1 + 2?", None, None)
    assert {event.run_id for event in recorder.events} == {begun.run_id}
    (call,), (called,) = recorder.of(ToolCallBegun), recorder.of(ToolCallEnded)
    assert (call.name, call.arguments, called.outcome, called.text) == ("add", {"a": 1, "b": 2}, "result", "3")
    assert recorder.of(RoundEnded)[1].text == "It is 3."
    assert (end.stop_reason, end.error, end.rounds, end.model) == ("stop", None, 2, "fake-model")
    assert end.completion_tokens == result.usage["completion_tokens"]


async def test_the_times_of_a_result_are_in_order(recorder: Recorder) -> None:
    result = await agent_of([CALL, "It is 3."], recorder, tools=[add]).run("1 + 2?")
    first, second = result.log
    call = first.tool_calls[0]
    assert 0 <= first.started <= first.started + first.reply_seconds <= call.started
    assert call.started + call.seconds <= first.started + first.seconds <= second.started


async def test_a_call_that_fails_and_one_that_cannot_be_made(recorder: Recorder) -> None:
    def fail() -> None:
        raise ValueError("no")

    calls = [ToolCall("1", "fail", {}), ToolCall("2", "unknown", {})]
    await agent_of([calls, "Sorry."], recorder, tools=[fail]).run("?")
    assert [event.outcome for event in recorder.of(ToolCallEnded)] == ["error"]
    assert recorder.names == ["RunBegun", *ROUND_WITH_CALL, *ROUND, "RunEnded"]


async def test_an_error_ends_the_round_as_well(recorder: Recorder) -> None:
    with pytest.raises(LLMConnectionError):
        await agent_of([LLMConnectionError("down")], recorder).run("?")
    assert recorder.names == ["RunBegun", *ROUND, "RunEnded"]
    assert (recorder.of(RoundEnded)[0].is_complete, recorder.last.stop_reason) == (False, "error")
    assert recorder.last.error == "LLMConnectionError"


async def test_a_run_that_uses_up_its_rounds(recorder: Recorder) -> None:
    with pytest.raises(MaxRoundsExceededError):
        await agent_of(lambda _: CALL, recorder, tools=[add], max_rounds=2).run("?")
    assert recorder.names == ["RunBegun", *ROUND_WITH_CALL * 2, "RunEnded"]
    assert (recorder.last.stop_reason, recorder.last.error) == ("max_rounds", "MaxRoundsExceededError")


@pytest.mark.parametrize("by_caller", [True, False])
async def test_a_cancelled_run_ends_its_calls_and_its_round(recorder: Recorder, by_caller: bool) -> None:
    begun = asyncio.Event()

    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    handle = agent_of([ToolCall("1", "wait", {})], recorder, tools=[wait]).start("?")
    caller = asyncio.ensure_future(handle.result())
    await begun.wait()
    assert caller.cancel() if by_caller else handle.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    await handle.aclose()
    assert recorder.names == ["RunBegun", *ROUND_WITH_CALL, "RunEnded"]
    assert recorder.of(ToolCallEnded)[0].outcome == "cancelled"
    assert recorder.last.stop_reason == "cancelled"


async def test_a_run_that_is_cancelled_before_its_first_step_has_no_events(recorder: Recorder) -> None:
    handle = agent_of(["Hello"], recorder).start("?")
    handle.cancel()
    await handle.aclose()
    assert recorder.names == []


class EndSignal:
    """Wakes up a test at the end of a run."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    def on_event(self, event: ObservedEvent) -> None:
        if isinstance(event, RunEnded):
            self.ended.set()


async def test_a_run_whose_handle_is_dropped_goes_on_and_ends_once(recorder: Recorder) -> None:
    begun, gate, signal = asyncio.Event(), asyncio.Event(), EndSignal()

    async def wait() -> str:
        begun.set()
        await gate.wait()
        return "done"

    client = FakeChatClient([ToolCall("1", "wait", {}), "Hello"])
    handles = [Agent(client, tools=[wait], observers=[recorder, signal]).start("?")]
    await begun.wait()
    handles.clear()
    gc.collect()
    assert recorder.of(RunEnded) == []
    gate.set()
    await signal.ended.wait()
    await turns()
    assert recorder.names == ["RunBegun", *ROUND_WITH_CALL, *ROUND, "RunEnded"]
    assert (recorder.last.stop_reason, recorder.last.error) == ("stop", None)


async def test_a_run_whose_stream_is_dropped_is_cancelled_and_ends_once(recorder: Recorder) -> None:
    begun, signal = asyncio.Event(), EndSignal()

    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    client = FakeChatClient([ToolCall("1", "wait", {})])
    streams = [Agent(client, tools=[wait], observers=[recorder, signal]).stream("?")]
    await anext(streams[0])
    await begun.wait()
    with pytest.warns(ResourceWarning, match="was dropped before its end"):
        streams.clear()
    await signal.ended.wait()
    await turns()
    assert recorder.names == ["RunBegun", *ROUND_WITH_CALL, "RunEnded"]
    assert recorder.of(ToolCallEnded)[0].outcome == "cancelled"
    assert recorder.last.stop_reason == "cancelled"


async def test_requests_and_inner_runs_name_their_run(scripted_server: ScriptedServer, recorder: Recorder) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "delegate", "arguments": "{}"}}
    scripted_server.script(answer("", tool_calls=[call]), answer("Inner."), answer("Outer."))
    async with LLMClient(scripted_server.api_base, "m", observers=[recorder]) as client:
        inner = Agent(client, observers=[recorder])

        async def delegate() -> str:
            """Asks another agent."""
            return (await inner.run("Help.")).text

        await Agent(client, tools=[delegate], observers=[recorder]).run("?")
    outer_run, inner_run = recorder.of(RunBegun)
    assert (outer_run.parent_run_id, inner_run.parent_run_id) == (None, outer_run.run_id)
    chats = [event.run_id for event in recorder.of(RequestQueued) if event.operation == "chat completion"]
    assert chats == [outer_run.run_id, inner_run.run_id, outer_run.run_id]
    assert [event.run_id for event in recorder.of(RunEnded)] == [inner_run.run_id, outer_run.run_id]


async def test_a_run_with_a_journal_has_its_events_and_its_options(recorder: Recorder, tmp_path: Path) -> None:
    result = await agent_of(["Hello"], recorder).run("?", journal=tmp_path / "runs.db")
    assert result.text == "Hello"
    assert recorder.names == ["RunBegun", *ROUND, "RunEnded"]


@pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
async def test_an_observer_that_raises_does_not_break_a_run(
    caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    class Broken:
        def on_event(self, event: ObservedEvent) -> None:
            raise error

    assert (await Agent(FakeChatClient(["Hello"]), observers=[Broken()]).run("?", max_rounds=3)).text == "Hello"
    assert len(caplog.records) == 1
