"""Handles and event streams: what listening to a run, and leaving it, does to the run."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from lmbridge import (
    Agent,
    LLMClient,
    LLMResponseError,
    RoundStarted,
    RunFinished,
    RunResult,
    TaskCancelledError,
    TextDelta,
    Tool,
    ToolCallStarted,
    ToolError,
)
from lmbridge.agent.channel import CAPACITY, Channel
from lmbridge.agent.loop import RunLoop
from lmbridge.testing import ScriptedServer, answer, reply
from tests.agent.support import Gate, add, asks, calls, check_valid, our_tasks, tool_texts
from tests.support import assert_linear, in_flight, living, piece


async def test_a_handle_shows_the_run_while_it_is_in_progress(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    gate = Gate()
    scripted_server.script(calls(asks("wait"), text="Let me wait."), answer("done"))
    handle = Agent(client, tools=[gate.wait]).start("Wait.")
    assert not handle.done
    await gate.begun.wait()
    partial = handle.partial
    assert (partial.stop_reason, partial.rounds, partial.text) == ("running", 1, "Let me wait.")
    assert partial.usage["total_tokens"] > 0
    for messages in (handle.messages, partial.messages):
        check_valid(messages)
        assert tool_texts(messages) == ["No result: the tool is still running."]
    handle.messages.clear()
    gate.open.set()
    result = await handle.result()
    assert result is await handle.result()
    assert handle.done
    assert handle.stop_reason == "stop"
    assert handle.messages == result.messages == handle.partial.messages


async def test_changes_to_the_messages_of_a_handle_do_not_affect_the_run(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    gate = Gate()
    scripted_server.script(calls(asks("wait")), answer("done"))
    before = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]
    handle = Agent(client, tools=[gate.wait]).start("Wait.", messages=before)
    await gate.begun.wait()
    before[0]["content"] = "changed"
    handle.messages[0]["content"] = "changed"
    handle.messages[3]["tool_calls"].clear()
    gate.open.set()
    result = await handle.result()
    assert result.messages[0]["content"] == "One."
    check_valid(result.messages)


async def test_a_run_goes_on_without_a_reference_to_it_or_to_its_agent() -> None:
    waiting: list[weakref.ref[asyncio.Future[str]]] = []
    received: list[str] = []

    class Double:
        """A client that waits for ever, without sockets and timers, which would keep the run alive too."""

        model = None

        async def chat_completion(self, messages: Any, **options: Any) -> AsyncGenerator[dict[str, Any]]:
            future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            waiting.append(weakref.ref(future))
            received.append(await future)
            return self.chunks()

        async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
            yield piece("done", finish_reason="stop")

    agent = Agent(Double())
    agent._source._context_lengths[None] = None, math.inf  # its timer too
    agent.start("Go.")
    del agent
    while not waiting:
        await asyncio.sleep(0)
    gc.collect()
    future = waiting[0]()
    assert future is not None
    future.set_result("found")
    while our_tasks():
        await asyncio.sleep(0)
    assert received == ["found"]


async def test_what_a_run_leaves_behind_does_not_wait_for_the_garbage_collector(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), answer("3"))
    others = living(RunLoop)
    gc.disable()
    try:
        handle = Agent(client, tools=[add]).start("Add.")
        assert (await handle.result()).text == "3"
        ended = weakref.ref(handle)
        del handle
        while our_tasks():
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert ended() is None
        assert [each for each in gc.get_objects() if type(each) is RunLoop and each not in others] == []
    finally:
        gc.enable()


async def test_a_stream_whose_channel_was_closed_has_no_more_events(client: LLMClient) -> None:
    stream = Agent(client).stream("Go.")
    assert isinstance(await anext(stream), RoundStarted)
    await stream.handle.result()
    await stream.aclose()
    with pytest.raises(TaskCancelledError, match="closed before its end"):
        await anext(stream)


async def test_events_without_a_listener_are_dropped(scripted_server: ScriptedServer, client: LLMClient) -> None:
    gate = Gate()
    scripted_server.script(calls(asks("wait")), answer("done"))
    handle = Agent(client, tools=[gate.wait]).start("Wait.")
    await gate.begun.wait()
    events = handle.events()
    gate.open.set()
    names = [type(event).__name__ async for event in events]
    assert names == ["ToolCallFinished", "RoundFinished", "RoundStarted", "TextDelta", "RoundFinished", "RunFinished"]


async def test_a_run_can_have_several_listeners(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("one two three"))
    handle = Agent(client).start("Go.")

    async def read() -> list[Any]:
        return [event async for event in handle.events()]

    first, second = await asyncio.gather(read(), read())
    assert first == second
    assert isinstance(first[-1], RunFinished)
    assert first[-1].result is await handle.result()


@pytest.mark.parametrize("how", ["break", "aclose", "cancel"])
async def test_leaving_the_events_of_a_handle_detaches(
    scripted_server: ScriptedServer, client: LLMClient, how: str
) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("one two three", gate=gate))
    handle = Agent(client).start("Go.")

    async def listen() -> None:
        async for event in handle.events():
            if isinstance(event, TextDelta) and how == "break":
                return

    if how == "aclose":
        async with handle.events() as events:
            assert isinstance(await anext(events), RoundStarted)
        with pytest.raises(TaskCancelledError, match="closed before its end") as caught:
            await anext(events)
        assert caught.value.partial.stop_reason == "running"
    else:
        listener = asyncio.create_task(listen())
        await scripted_server.wait_until(lambda: scripted_server.in_flight)
        if how == "cancel":
            listener.cancel()
        await asyncio.wait([listener])
    gc.collect()
    await asyncio.sleep(0)
    assert not handle._channel.has_listener
    assert not handle.done
    gate.set()
    assert (await handle.result()).text == "one two three"


@pytest.mark.parametrize("how", ["break", "aclose", "error"])
async def test_leaving_the_stream_of_a_run_cancels_it(
    scripted_server: ScriptedServer, client: LLMClient, how: str
) -> None:
    scripted_server.script(answer("one two three", gate=asyncio.Event()))
    stream = Agent(client).stream("Go.")
    if how == "aclose":
        while not isinstance(await anext(stream), TextDelta):
            pass
        await stream.aclose()
        await stream.aclose()
    else:
        with pytest.raises(KeyError) if how == "error" else pytest.raises(StopAsyncIteration):
            async with stream:
                async for event in stream:
                    if isinstance(event, TextDelta):
                        raise KeyError if how == "error" else StopAsyncIteration
    handle = stream.handle
    assert handle.done
    assert our_tasks() == []
    assert in_flight(client) == 0
    assert handle.partial.text == "one"
    assert handle.messages == [{"role": "user", "content": "Go."}]
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    with pytest.raises(TaskCancelledError):
        await anext(stream)


async def test_a_reader_that_is_cancelled_while_it_leaves_still_waits_for_the_end_of_the_run(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    cleaning, finish = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        """Needs time for its clean-up."""
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await finish.wait()

    scripted_server.script(calls(asks("work")))
    stream = Agent(client, tools=[work]).stream("Go.")
    while not isinstance(await anext(stream), ToolCallStarted):
        pass
    leaving = asyncio.create_task(stream.aclose())
    await cleaning.wait()
    leaving.cancel()
    await asyncio.sleep(0)
    assert not leaving.done()
    finish.set()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert stream.handle.done


async def test_a_stream_that_is_dropped_warns_and_cancels_its_run(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer("one two three", gate=asyncio.Event()))
    stream = Agent(client).stream("Go.")
    handle = stream.handle
    with pytest.warns(ResourceWarning, match="dropped before its end"):  # noqa: PT031 - dropped at the break
        async for event in stream:
            if isinstance(event, TextDelta):
                del stream
                break
    with pytest.raises(TaskCancelledError, match="dropped"):
        await handle.result()
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_a_stream_that_was_read_to_its_end_is_dropped_silently(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    agent = Agent(client)
    async for event in agent.stream("Go."):
        if isinstance(event, RunFinished):
            break
    stream = agent.stream("Go.")
    events = [event async for event in stream]
    assert isinstance(events[-1], RunFinished)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await stream.aclose()
    del stream
    gc.collect()


async def test_a_slow_listener_slows_the_run(scripted_server: ScriptedServer, client: LLMClient) -> None:
    words = CAPACITY * 3
    scripted_server.script(answer("", chunks=[f"{number} " for number in range(words)]))
    stream = Agent(client).stream("Count.")
    while len(stream._events._waiting) < CAPACITY:
        await asyncio.sleep(0)
    await scripted_server.wait_until(lambda: not scripted_server.in_flight)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(stream._events._waiting) == CAPACITY
    assert not stream.handle.done
    text = "".join([event.text async for event in stream if isinstance(event, TextDelta)])
    assert text == "".join(f"{number} " for number in range(words))


async def test_there_is_always_room_for_the_last_event(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("", chunks=["x"] * (CAPACITY - 2)))
    stream = Agent(client).stream("Go.")  # RoundStarted, the text, RoundFinished
    result = await stream.handle.result()
    assert isinstance(result, RunResult)
    assert isinstance([event async for event in stream][-1], RunFinished)


async def test_an_error_is_raised_after_the_events_before_it(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), reply(400, {"error": "no"}))
    stream = Agent(client, tools=[add]).stream("Go.")
    seen: list[str] = []
    while "RoundFinished" not in seen or seen[-1] != "RoundStarted":
        seen.append(type(await anext(stream)).__name__)
    with pytest.raises(LLMResponseError):
        await anext(stream)
    with pytest.raises(LLMResponseError) as caught:
        await anext(stream)
    assert seen[-2:] == ["RoundFinished", "RoundStarted"]
    assert caught.value.partial.rounds == 2


async def test_a_stream_is_an_async_generator(scripted_server: ScriptedServer, client: LLMClient) -> None:
    stream = Agent(client).stream("Go.")
    assert isinstance(await stream.asend(None), RoundStarted)
    with pytest.raises(TypeError):
        await stream.asend(1)  # type: ignore[arg-type]  # the subject of the test
    with pytest.raises(KeyError):
        await stream.athrow(KeyError("x"))
    assert stream.handle.done
    assert "RunStream of <RunHandle" in repr(stream)


async def test_a_full_channel_releases_the_run_when_its_listener_leaves() -> None:
    channel: Channel[int] = Channel()
    subscription = channel.subscribe()
    for number in range(CAPACITY):
        await channel.put(number)
    putting = asyncio.create_task(channel.put(CAPACITY))
    await asyncio.sleep(0)
    assert not putting.done()
    subscription.leave()
    await putting
    assert not channel.has_listener
    channel.close(discard=False)
    assert await channel.subscribe().get() is None


async def test_a_listener_after_the_end_gets_the_outcome(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("Hello."), reply(400, {"error": "no"}))
    agent = Agent(client)
    handle = agent.start("Hi.")
    result = await handle.result()
    assert [event async for event in handle.events()] == [RunFinished(result)]
    failed = agent.start("Hi.")
    with pytest.raises(LLMResponseError):
        await failed.result()
    with pytest.raises(LLMResponseError):
        await anext(failed.events())


async def test_the_error_of_a_provider_has_the_run_so_far(client: LLMClient) -> None:
    class Provider:
        async def list_tools(self) -> list[Tool]:
            raise OSError("gone")

    with pytest.raises(ToolError, match="raised OSError: gone") as caught:
        await Agent(client, tools=[Provider()]).run("Hi.")
    assert caught.value.partial.stop_reason == "error"


async def test_begun_returns_when_a_run_ends_without_having_begun(client: LLMClient) -> None:
    handle = Agent(client).start("Go.")
    handle.cancel()
    await handle.wait_begun()
    assert handle.done


class Chunks:
    """A client that streams the same piece many times, and then an answer."""

    model = "chunks"

    def __init__(self, count: int, delta: dict[str, Any]) -> None:
        self._count = count
        self._delta = delta

    async def chat_completion(self, messages: Any, **params: Any) -> AsyncGenerator[dict[str, Any]]:
        return self._chunks()

    async def _chunks(self) -> AsyncGenerator[dict[str, Any]]:
        for _ in range(self._count):
            yield {"choices": [{"index": 0, "delta": self._delta, "finish_reason": None}]}
        yield piece("done", finish_reason="stop")


@pytest.mark.parametrize("delta", [{"content": " "}, {"reasoning_content": "\n"}, {"content": "x"}])
def test_the_time_for_events_grows_with_their_number(delta: dict[str, str]) -> None:
    async def run(count: int) -> None:
        events = [event async for event in Agent(Chunks(count, delta)).stream("Go.")]
        assert isinstance(events[-1], RunFinished)
        assert events[-1].result.text.endswith("done")

    assert_linear(lambda count: asyncio.run(run(count)), 300)
