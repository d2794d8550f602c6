"""What runs share, and what is left of them: leases, cancels, the file that changes, and the end of the agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmbridge import (
    DynamicAutonomousAgent,
    LLMClient,
    RoundStarted,
    RunFinished,
    TaskCancelledError,
    ToolCallFinished,
    ToolCallStarted,
)
from lmbridge.mcp.servers.guardian import is_gone
from lmbridge.testing import ScriptedServer, answer
from tests.agent.support import asks, calls, check_valid, our_tasks, tool_texts
from tests.agent.test_cancellation import Probe
from tests.mcp.conftest import MakeAgent
from tests.mcp.support import gone, noted, scripted
from tests.mcp.test_dynamic import echoes, tools_sent
from tests.mcp.test_hub import rewrite
from tests.support import cancel_at_each_step, in_flight, turns


def users(agent: DynamicAutonomousAgent) -> int:
    """Runs and calls that hold the agent's servers."""
    return sum(server._users for server in agent._hub._servers.values())


def pid_of(agent: DynamicAutonomousAgent, name: str = "a") -> int:
    pid = agent._hub.status()[name].pid
    assert pid
    return pid


def slow(notes: Path, **told: Any) -> dict[str, Any]:
    """A server that never answers, and notes when it is started."""
    return {"hang": True, "starts": True, "notes": str(notes), **told}


# Leases


async def test_a_run_holds_its_servers_until_its_end(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    agent = make_agent({"a": {}})
    gate = asyncio.Event()
    scripted_server.script(answer("one", gate=gate), answer("two"))
    first = asyncio.create_task(agent.autonomous_with_mcp("a", "Go."))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    assert users(agent) == 1
    await agent.autonomous_with_mcp("a", "Go.")
    assert users(agent) == 1
    gate.set()
    await first
    assert users(agent) == 0


async def test_a_changed_file_closes_an_old_server_only_after_the_runs_that_use_it(
    scripted_server: ScriptedServer, make_agent: MakeAgent, tmp_path: Path
) -> None:
    agent = make_agent({"a": {}})
    gate = asyncio.Event()
    scripted_server.script(
        calls(asks("echo", text="on"), gate=gate), answer("other done"), calls(asks("count", "2")), answer("done")
    )
    first = asyncio.create_task(agent.autonomous_with_mcp("a", "Go.", full=True))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    old = pid_of(agent)
    rewrite(tmp_path / "mcp.json", {"a": {"tools": ["parts"]}, "b": {}})
    assert await agent.list_available_mcps() == ["a", "b"]
    assert await agent.autonomous_with_mcp("a", "Go.") == "other done"
    assert tools_sent(scripted_server) == ["parts"]
    assert pid_of(agent) != old
    assert not await asyncio.to_thread(is_gone, old)
    gate.set()
    assert tool_texts((await first).messages) == ["on", "count"]
    await gone(old)


async def test_the_next_run_uses_what_the_file_says_by_then(
    scripted_server: ScriptedServer, make_agent: MakeAgent, tmp_path: Path
) -> None:
    agent = make_agent({"a": {"tools": ["echo"]}, "goes": {}})
    await agent.autonomous_discover_and_execute("Go.")
    rewrite(tmp_path / "mcp.json", {"a": {"tools": ["echo"]}, "comes": {"tools": ["count"]}})
    pid = pid_of(agent)
    await agent.autonomous_discover_and_execute("Go.")
    assert tools_sent(scripted_server) == ["echo", "count"]
    assert pid_of(agent) == pid


# Cancels


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_is_cancelled_at_any_moment_leaves_nothing_behind(
    scripted_server: ScriptedServer, make_agent: MakeAgent, client: LLMClient, stream: bool
) -> None:
    scripted_server.default = echoes
    agents: list[DynamicAutonomousAgent] = []

    async def run() -> None:
        agents.append(make_agent({"a": {"tools": ["echo"]}}))  # a new one, which starts its server
        if not stream:
            assert await agents[-1].autonomous_with_mcp("a", "Go.") == "Go."
            return
        events = await agents[-1].autonomous_with_mcp("a", "Go.", stream=True)
        async with events:
            assert isinstance([event async for event in events][-1], RunFinished)

    async def check() -> None:
        agent = agents[-1]
        assert our_tasks() == []
        assert users(agent) == 0
        assert in_flight(client) == 0
        await agent.close()
        check_idle(agent)

    await cancel_at_each_step(run, check, at_least=5 if stream else 1)


def check_idle(agent: DynamicAutonomousAgent) -> None:
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("lmbridge-mcp")] == []
    assert agent._agent._admission.is_idle


@pytest.mark.parametrize("stream", [False, True])
async def test_a_run_that_is_cancelled_at_any_of_its_waits_gives_its_servers_back(
    scripted_server: ScriptedServer,
    make_agent: MakeAgent,
    client: LLMClient,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    scripted_server.default = echoes
    probe = Probe(monkeypatch)
    at = stops = 0
    while True:
        at += 1
        probe.count, probe.at = 0, at
        agent = make_agent({"a": {"tools": ["echo"]}})

        async def run(agent: DynamicAutonomousAgent = agent) -> None:
            if stream:
                async with await agent.autonomous_with_mcp("a", "Go.", stream=True) as events:
                    async for _ in events:
                        pass
            else:
                await agent.autonomous_with_mcp("a", "Go.")

        caller = asyncio.create_task(run())
        probe.act = caller.cancel
        await asyncio.wait([caller])
        stops += caller.cancelled()
        assert users(agent) == 0
        assert our_tasks() == []
        assert in_flight(client) == 0
        await agent.close()
        check_idle(agent)
        if probe.count < at:
            assert not caller.cancelled()
            caller.result()
            break
    assert at > 10, f"the run had only {at - 1} waits"
    assert stops >= at - 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancel_while_servers_start_ends_them(make_agent: MakeAgent, notes: Path, stream: bool) -> None:
    agent = make_agent({"slow": slow(notes)})
    caller = asyncio.create_task(agent.autonomous_with_mcp("slow", "Go.", stream=stream))
    await noted(notes)
    caller.cancel("enough")
    with pytest.raises(asyncio.CancelledError) as caught:
        await caller
    assert type(caught.value) is asyncio.CancelledError
    assert our_tasks() == []
    assert users(agent) == 0
    assert agent._hub.status()["slow"].state == "idle"


async def test_a_cancel_while_the_servers_of_one_run_start_does_not_disturb_another(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    agent = make_agent({"a": {}})
    first, second = (asyncio.create_task(agent.autonomous_with_mcp("a", "Go.")) for _ in range(2))
    while not users(agent):
        await asyncio.sleep(0)
    first.cancel()
    assert await second == "Hello from the scripted server."
    assert first.cancelled()


async def test_events_that_are_left_early_cancel_the_run(
    scripted_server: ScriptedServer, make_agent: MakeAgent, notes: Path
) -> None:
    agent = make_agent({"a": {"notes": str(notes)}})
    scripted_server.script(calls(asks("sleep")))
    async with await agent.autonomous_with_mcp("a", "Go.", stream=True) as events:
        async for event in events:
            if isinstance(event, ToolCallStarted):
                await turns(20)  # the call is on its way
                break
    assert events.handle.stop_reason == "cancelled"
    assert users(agent) == 0
    assert (await noted(notes))[0].startswith("cancelled ")
    check_valid(events.handle.messages)


async def test_events_that_are_dropped_cancel_the_run_with_a_warning(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    agent = make_agent({"a": {}})
    scripted_server.script(answer("one two", gate=asyncio.Event()))
    events = await agent.autonomous_with_mcp("a", "Go.", stream=True)
    assert isinstance(await anext(events), RoundStarted)
    with pytest.warns(ResourceWarning, match="was dropped before its end"):
        del events
    while our_tasks():
        await asyncio.sleep(0)
    assert users(agent) == 0


# The end


@pytest.fixture
def own(
    scripted_server: ScriptedServer, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> DynamicAutonomousAgent:
    """An agent with a client of its own."""
    monkeypatch.setenv("LMBRIDGE_API_BASE", scripted_server.api_base)
    return DynamicAutonomousAgent(config_path=config({"a": scripted({})}))


async def test_close_cancels_the_runs_in_flight_and_all_processes_are_gone(
    scripted_server: ScriptedServer, own: DynamicAutonomousAgent
) -> None:
    scripted_server.script(calls(asks("echo", text="x")), answer("one two", gate=asyncio.Event()))
    stream = await own.autonomous_with_mcp("a", "Go.", stream=True)
    async for event in stream:
        if isinstance(event, ToolCallFinished):
            break
    scripted_server.default = answer("three four", gate=asyncio.Event())
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
    plain = asyncio.create_task(own.autonomous_with_mcp("a", "Go."))
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 2)
    pid = pid_of(own)
    await own.close()
    assert await asyncio.to_thread(is_gone, pid)
    assert our_tasks() == []
    for ended in (anext(stream), plain):
        with pytest.raises(TaskCancelledError, match="the run was cancelled because its agent was closed") as caught:
            await ended
        assert caught.value.partial.stop_reason == "cancelled"
        check_valid(caught.value.partial.messages)
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)


async def test_close_waits_for_tools_that_clean_up(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    at_work, cleaning, finish = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        """Works."""
        at_work.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await finish.wait()

    agent = make_agent({"a": {}}, tools=[work])
    scripted_server.script(calls(asks("work")))
    run = asyncio.create_task(agent.autonomous_with_mcp("a", "Go."))
    await at_work.wait()
    closing = asyncio.create_task(agent.close())
    await cleaning.wait()
    (server,) = (task for task in asyncio.all_tasks() if task.get_name() == "lmbridge-mcp-a")
    await turns(20)
    assert not closing.done()
    assert not server.done(), "a run has its servers to its end"
    finish.set()
    await closing
    assert server.done()
    with pytest.raises(TaskCancelledError):
        await run


async def test_close_ends_servers_that_are_starting(make_agent: MakeAgent, notes: Path) -> None:
    agent = make_agent({"slow": slow(notes, grandchild=True)})
    waiting = asyncio.create_task(agent.autonomous_with_mcp("slow", "Go.", stream=True))
    grandchild = next(line for line in await noted(notes, 2) if line.startswith("grandchild"))
    await agent.close()
    with pytest.raises(TaskCancelledError, match="its agent was closed"):
        await waiting
    await gone(int(grandchild.split()[1]))
    check_idle(agent)


async def test_close_again_does_nothing_and_a_later_run_opens_it_again(
    scripted_server: ScriptedServer, own: DynamicAutonomousAgent
) -> None:
    await own.close()
    for _ in range(2):
        assert await own.autonomous_with_mcp("a", "Go.") == "Hello from the scripted server."
        pid = pid_of(own)
        await own.close()
        await own.close()
        assert await asyncio.to_thread(is_gone, pid)
        assert await own.list_available_mcps() == ["a"]
    await own.close()


async def test_whoever_closes_at_the_same_time_waits_for_the_same_end(
    scripted_server: ScriptedServer, own: DynamicAutonomousAgent
) -> None:
    scripted_server.default = answer("one two", gate=asyncio.Event())
    run = asyncio.create_task(own.autonomous_with_mcp("a", "Go."))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    pid = pid_of(own)

    async def close() -> bool:
        await own.close()
        return run.done() and is_gone(pid) and not our_tasks()

    assert await asyncio.gather(*(close() for _ in range(3))) == [True] * 3


async def test_close_goes_on_if_who_waits_for_it_is_cancelled(
    scripted_server: ScriptedServer, own: DynamicAutonomousAgent
) -> None:
    await own.autonomous_with_mcp("a", "Go.")
    pid = pid_of(own)
    closing = asyncio.create_task(own.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled()
    await own.close()
    assert await asyncio.to_thread(is_gone, pid)
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)


async def test_a_run_that_was_about_to_begin_when_its_agent_was_closed_does_not(
    scripted_server: ScriptedServer, own: DynamicAutonomousAgent
) -> None:
    run = asyncio.create_task(own.autonomous_with_mcp("a", "Go."))
    await asyncio.sleep(0)  # it looks at the file
    await own.close()
    with pytest.raises(TaskCancelledError, match="its agent was closed"):
        await run
    assert own._hub.status() == {}
    assert scripted_server.requests == []


async def test_a_tool_may_close_the_agent_of_its_own_run(
    scripted_server: ScriptedServer, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMBRIDGE_API_BASE", scripted_server.api_base)

    async def shut_down() -> str:
        """Ends everything."""
        await agent.close()
        return "never told"

    agent = DynamicAutonomousAgent(config_path=config({"a": scripted({})}), tools=[shut_down])
    scripted_server.script(calls(asks("shut_down")))
    run = asyncio.create_task(agent.autonomous_with_mcp("a", "Go."))
    while not agent._hub.status() or not agent._hub.status()["a"].pid:
        await asyncio.sleep(0)
    pid = pid_of(agent)
    with pytest.raises(TaskCancelledError, match="its agent was closed") as caught:
        await run
    assert tool_texts(caught.value.partial.messages)[0].startswith("No result: the run ended")
    await agent.close()  # waits for the end of the first
    assert await asyncio.to_thread(is_gone, pid)
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)


async def test_leaving_the_block_closes_it(scripted_server: ScriptedServer, own: DynamicAutonomousAgent) -> None:
    async with own as agent:
        assert agent is own
        await agent.autonomous_with_mcp("a", "Go.")
        pid = pid_of(agent)
    assert await asyncio.to_thread(is_gone, pid)
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)


async def test_one_that_was_never_used_is_closed_without_a_trace(own: DynamicAutonomousAgent) -> None:
    before = asyncio.all_tasks()
    await own.close()
    assert asyncio.all_tasks() == before


def test_it_begins_anew_in_the_next_event_loop(config: Callable[..., Path]) -> None:
    agent = DynamicAutonomousAgent(config_path=config({"a": scripted({})}))

    async def run() -> str:
        async with ScriptedServer() as server, agent:
            assert agent._own_client
            agent._own_client.api_base = server.api_base
            return await agent.autonomous_with_mcp("a", "Go.")

    assert [asyncio.run(run()) for _ in range(2)] == ["Hello from the scripted server."] * 2
