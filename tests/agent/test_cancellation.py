"""Cancelling a run in every way and at each of its awaits: server and tools stop, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmbridge import Agent, Limits, LLMClient, LLMClientPool, LLMError, TaskCancelledError, ToolContext
from lmbridge.agent.runs import RunHandle
from lmbridge.testing import ScriptedServer, answer, reply
from tests.agent.support import Gate, add, asks, calls, check_valid, our_tasks
from tests.support import Steps, in_flight


class Probe:
    """Counts the awaits of the tasks of runs, and calls a function at the n-th.

    Args:
        monkeypatch: To reach the coroutine of the run.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.at = 0
        self.act: Callable[[], object] = lambda: None
        main = RunHandle._main
        probe = self

        async def probed(handle: RunHandle) -> Any:
            return await Steps(main(handle), probe.step)

        monkeypatch.setattr(RunHandle, "_main", probed)

    def step(self, count: int) -> None:
        self.count = count
        if count == self.at:
            asyncio.get_running_loop().call_soon(self.act)


def check_cancelled(error: TaskCancelledError) -> None:
    check_valid(error.partial.messages)
    assert error.partial.stop_reason == "cancelled"


WAYS = ["handle", "caller", "timeout", "sibling", "stream", "reader", "task"]


async def stopped(agent: Agent, way: str, probe: Probe) -> tuple[bool, RunHandle]:
    """Runs the agent and stops it at the probe's await; returns whether it was stopped, and the handle."""
    if way in ("stream", "reader"):
        return await stopped_stream(agent, way, probe)
    handle = agent.start("Go.")
    if way == "handle":
        probe.act = handle.cancel
        try:
            await handle.result()
        except TaskCancelledError as error:
            check_cancelled(error)
            return True, handle
    elif way == "task":
        probe.act = handle._task._task.cancel
        try:
            await handle.result()
        except TaskCancelledError:
            return True, handle
    elif way == "caller":
        caller = asyncio.create_task(handle.result())
        probe.act = caller.cancel
        await asyncio.wait([caller])
        if caller.cancelled():
            return True, handle
        caller.result()
    elif way == "timeout":
        clock = asyncio.timeout(None)
        probe.act = lambda: clock.reschedule(0)
        try:
            async with clock:
                await handle.result()
        except TimeoutError:
            return True, handle
    else:
        assert way == "sibling"
        stop = asyncio.Event()
        probe.act = stop.set

        async def fail() -> None:
            await stop.wait()
            raise OSError("the sibling failed")

        try:
            async with asyncio.TaskGroup() as group:
                failing = group.create_task(fail())
                await handle.result()
                failing.cancel()
        except* OSError:
            pass
        return handle._task.was_cancelled, handle
    return False, handle


async def stopped_stream(agent: Agent, way: str, probe: Probe) -> tuple[bool, RunHandle]:
    stream = agent.stream("Go.")
    task = asyncio.current_task()
    assert task is not None
    if way == "stream":

        async def leave() -> None:
            await stream.aclose()

        leaving: list[asyncio.Task[None]] = []
        probe.act = lambda: leaving.append(asyncio.create_task(leave()))
        try:
            async for _ in stream:
                pass
        except TaskCancelledError as error:
            check_cancelled(error)
            await leaving[0]
            return True, stream.handle
        for each in leaving:
            await each
        return False, stream.handle

    async def read() -> None:
        async with stream:
            async for _ in stream:
                pass

    reader = asyncio.create_task(read())
    probe.act = reader.cancel
    await asyncio.wait([reader])
    if reader.cancelled():
        return True, stream.handle
    reader.result()
    return False, stream.handle


@pytest.mark.parametrize("way", WAYS)
async def test_a_cancel_at_any_wait_of_a_run_leaves_nothing_behind(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    probe = Probe(monkeypatch)
    running = 0

    async def work(number: int) -> int:
        """Works for a few turns of the loop."""
        nonlocal running
        running += 1
        try:
            for _ in range(3):
                await asyncio.sleep(0)
        finally:
            try:
                # The clean-up takes a turn of the loop, and may be cancelled too.
                await asyncio.sleep(0)
            finally:
                running -= 1
        return number

    two = calls(asks("work", number=1), asks("work", "call_2", number=2), text="one two")
    at, stops = 0, 0
    async with LLMClient(scripted_server.api_base, "test-model", limits=Limits(max_concurrency=1)) as client:
        agent = Agent(client, tools=[work])
        # Looked up beforehand, so that every run has the same awaits.
        await agent._source.context_length("test-model")
        while True:
            at += 1
            probe.count, probe.at = 0, at
            scripted_server._script.clear()
            scripted_server.script(two, answer("three four"))
            was_stopped, handle = await stopped(agent, way, probe)
            assert handle.done
            assert running == 0
            assert our_tasks() == []
            assert agent._admission.is_idle
            assert in_flight(client) == 0
            check_valid(handle.messages)
            stops += was_stopped
            if probe.count < at:
                assert not was_stopped
                break
            # The connection of a stream that was left is closed, so the server has stopped.
            await scripted_server.wait_until(lambda: scripted_server.in_flight == 0)
            scripted_server._script.clear()
            scripted_server.script(answer("fine"))
            probe.at = 0
            assert (await agent.run("Still there?")).text == "fine"
    assert at > 8, f"the run had only {at - 1} waits"
    assert stops >= at - 3, f"only {stops} of {at - 1} runs were stopped"
    await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


async def test_a_cancel_at_any_wait_gives_the_pools_client_back(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe(monkeypatch)
    at = 0
    async with LLMClientPool(1, api_base=scripted_server.api_base, model="test-model") as pool:
        while True:
            at += 1
            probe.count, probe.at = 0, at
            scripted_server._script.clear()
            scripted_server.script(calls(asks("add", a=1, b=2)), answer("3"))
            # A new agent, so that its request for the context length is cancelled too.
            agent = Agent(pool, tools=[add])
            was_stopped, _ = await stopped(agent, "handle", probe)
            assert pool.stats().in_use == 0
            if probe.count < at:
                break
            assert was_stopped
    assert at > 6


async def test_the_server_stops_generating(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("one two", gate=asyncio.Event()))
    handle = Agent(client).start("Go.")
    async for event in handle.events():
        if type(event).__name__ == "TextDelta":
            break
    handle.cancel()
    with pytest.raises(TaskCancelledError) as caught:
        await handle.result()
    assert caught.value.partial.text == "one"
    assert caught.value.partial.messages == [{"role": "user", "content": "Go."}]
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_every_parallel_tool_is_cancelled_and_awaited(scripted_server: ScriptedServer, client: LLMClient) -> None:
    gate = Gate()
    scripted_server.script(calls(*(asks("wait", f"call_{n}", name=str(n)) for n in range(6))))
    handle = Agent(client, tools=[gate.wait], max_parallel_tools=3).start("Go.")
    await gate.begun.wait()
    while gate.running < 3:
        await asyncio.sleep(0)
    check_valid(handle.messages)
    assert "still running" in handle.messages[2]["content"]
    handle.cancel()
    with pytest.raises(TaskCancelledError) as caught:
        await handle.result()
    assert (gate.cancelled, gate.running) == (3, 0)
    texts = [message["content"] for message in caught.value.partial.messages if message["role"] == "tool"]
    assert ["may still be running" in text for text in texts] == [True] * 3 + [False] * 3
    assert texts[5] == "Not called: the run ended first."


async def test_a_cancellation_of_the_caller_stays_a_cancelled_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer("one two", gate=asyncio.Event()))
    caller = asyncio.create_task(Agent(client).run("Go."))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    caller.cancel("enough")
    with pytest.raises(asyncio.CancelledError) as caught:
        await caller
    assert type(caught.value) is asyncio.CancelledError
    assert our_tasks() == []


async def test_a_second_cancel_of_the_caller_does_not_interrupt_the_clean_up(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    cleaning, finish, cleaned = asyncio.Event(), asyncio.Event(), False

    async def stubborn() -> None:
        """Needs time for its clean-up."""
        nonlocal cleaned
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            try:
                await finish.wait()
            except asyncio.CancelledError:
                await finish.wait()
            cleaned = True

    scripted_server.script(calls(asks("stubborn")))
    handle = Agent(client, tools=[stubborn]).start("Go.")
    caller = asyncio.create_task(handle.result())
    await scripted_server.wait_until(lambda: scripted_server.requests and scripted_server.in_flight == 0)
    while not any("stubborn" in repr(task) for task in asyncio.all_tasks()):
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    caller.cancel()
    await cleaning.wait()
    caller.cancel()
    asyncio.get_running_loop().call_soon(finish.set)
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert cleaned
    assert handle.done


async def test_other_tasks_that_await_the_run_get_a_task_cancelled_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer("one two", gate=asyncio.Event()))
    handle = Agent(client).start("Go.")
    first, second = (asyncio.create_task(handle.result()) for _ in range(2))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    first.cancel()
    with pytest.raises(TaskCancelledError):
        await second
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_callback_that_swallows_the_cancellation_does_not_keep_the_run_alive(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    asked = asyncio.Event()

    async def approve(call: Any) -> bool:
        asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return True
        return True

    scripted_server.script(calls(asks("add", a=1, b=2)), answer("3"))
    handle = Agent(client, tools=[add], approve=approve).start("Go.")
    await asked.wait()
    handle.cancel()
    with pytest.raises(TaskCancelledError):
        await handle.result()


async def test_a_run_that_is_cancelled_before_it_began_has_a_partial_result(client: LLMClient) -> None:
    handle = Agent(client).start("Go.")
    assert handle.cancel()
    with pytest.raises(TaskCancelledError, match="agent run") as caught:
        await handle.result()
    assert (caught.value.partial.rounds, caught.value.partial.stop_reason) == (0, "cancelled")
    assert handle.messages == [{"role": "user", "content": "Go."}]
    assert not handle.cancel()


async def test_a_tool_that_cancels_its_own_run_ends_it(scripted_server: ScriptedServer, client: LLMClient) -> None:
    handles: list[RunHandle] = []

    async def give_up() -> str:
        """Gives up."""
        handles[0].cancel()
        await asyncio.sleep(0)
        return "never"

    scripted_server.script(calls(asks("give_up")))
    handles.append(Agent(client, tools=[give_up]).start("Go."))
    with pytest.raises(TaskCancelledError):
        await handles[0].result()


@pytest.mark.parametrize("wait", ["result", "aclose"])
async def test_a_tool_that_waits_for_its_own_run_does_not_hang(
    scripted_server: ScriptedServer, client: LLMClient, wait: str, caplog: pytest.LogCaptureFixture
) -> None:
    streams: list[Any] = []

    async def deadlock() -> str:
        """Waits for itself."""
        await (streams[0].handle.result() if wait == "result" else streams[0].aclose())
        await asyncio.sleep(0)
        return "never"

    scripted_server.script(calls(asks("deadlock")), answer("Aha."))
    streams.append(Agent(client, tools=[deadlock]).stream("Go."))
    if wait == "result":
        events = [event async for event in streams[0]]
        assert "cannot wait for itself" in events[-1].result.messages[2]["content"]
    else:
        with pytest.raises(TaskCancelledError):
            async for _ in streams[0]:
                pass
    assert caplog.messages == [], "no tool goes on after its cancel"


async def test_a_second_cancel_ends_a_clean_up_that_hangs(scripted_server: ScriptedServer, client: LLMClient) -> None:
    asked, cleaning = asyncio.Event(), asyncio.Event()

    async def approve(call: Any) -> bool:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await asyncio.Event().wait()
        return True

    scripted_server.script(calls(asks("add", a=1, b=2)))
    caller = asyncio.create_task(Agent(client, tools=[add], approve=approve).run("Go."))
    await asked.wait()
    caller.cancel()
    await cleaning.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert our_tasks() == []


async def test_a_thread_can_see_the_cancellation_and_is_not_awaited(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    begun, has_seen_cancel = threading.Event(), threading.Event()

    def busy(context: ToolContext) -> None:
        """Is busy until its result is no longer awaited."""
        begun.set()
        while not context.cancelled():
            pass
        has_seen_cancel.set()

    scripted_server.script(calls(asks("busy")))
    handle = Agent(client, tools=[busy]).start("Go.")
    await asyncio.to_thread(begun.wait, 10)
    handle.cancel()
    with pytest.raises(TaskCancelledError):
        await handle.result()
    assert await asyncio.to_thread(has_seen_cancel.wait, 10)


async def test_a_nested_run_is_cancelled_with_the_tool_that_awaits_it(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("delegate")), answer("one two", gate=asyncio.Event()))

    async def delegate() -> str:
        """Delegates to another run."""
        return (await agent.run("Do it.", tools=())).text

    agent = Agent(client, tools=[delegate])
    handle = agent.start("Go.")
    await scripted_server.wait_until(lambda: len(our_tasks()) == 2 and scripted_server.in_flight)
    handle.cancel()
    with pytest.raises(TaskCancelledError):
        await handle.result()
    assert our_tasks() == []
    await scripted_server.wait_until(lambda: scripted_server.aborts)


def test_ctrl_c_ends_the_run_and_its_tools(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(CTRL_C)
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert out == b"tool cancelled\nplain cancel\n"
    assert error.rstrip().endswith(b"KeyboardInterrupt")
    assert b"never" not in error


CTRL_C = """
import asyncio
from lmbridge import Agent, LLMClient
from lmbridge.testing import ScriptedServer, answer

async def wait() -> None:
    "Waits."
    print("waiting", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        print("tool cancelled", flush=True)

async def main() -> None:
    async with ScriptedServer() as server, LLMClient(server.api_base) as client:
        call = {"id": "1", "type": "function", "function": {"name": "wait", "arguments": "{}"}}
        server.script(answer("", tool_calls=[call]))
        try:
            await Agent(client, tools=[wait]).run("Go.")
        except asyncio.CancelledError as error:
            assert type(error) is asyncio.CancelledError
            print("plain cancel", flush=True)
            raise

asyncio.run(main())
"""


async def test_the_error_of_a_run_that_is_never_awaited_is_logged_by_asyncio(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    seen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context))
    scripted_server.script(reply(400, {"error": "no"}))
    handle = Agent(client).start("Go.")
    await asyncio.wait([handle._task._task])
    del handle
    await asyncio.sleep(0)
    gc.collect()
    assert [context["message"] for context in seen] == ["Task exception was never retrieved"]


async def test_a_cancelled_error_from_a_callback_does_not_count_as_a_cancellation_of_the_run(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    async def approve(_: object) -> bool:
        raise asyncio.CancelledError

    scripted_server.script(calls(asks("add", a=1, b=2)))
    with pytest.raises(LLMError, match="not cancelled, but something that it waited for") as caught:
        await Agent(client, tools=[add], approve=approve).run("Go.")
    assert not isinstance(caught.value, TaskCancelledError)
    assert caught.value.partial.stop_reason == "error"
    check_valid(caught.value.partial.messages)
