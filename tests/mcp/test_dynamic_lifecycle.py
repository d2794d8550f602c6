"""The servers of an agent over time: sharing by runs, changes of the configuration file, cancellation, and closing."""

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
from tests.mcp.dynamic_support import echo_the_task, sent_tool_names
from tests.mcp.support import rewrite, scripted, wait_for_notes, wait_until_gone
from tests.support import cancel_at_each_step, in_flight, turns


def count_server_users(agent: DynamicAutonomousAgent) -> int:
    """Returns how many runs and calls hold servers of the agent."""
    return sum(server._use_count for server in agent._hub._servers.values())


def pid_of(agent: DynamicAutonomousAgent, name: str = "a") -> int:
    pid = agent._hub.status()[name].pid
    assert pid
    return pid


def hanging_server(notes: Path, **options: Any) -> dict[str, Any]:
    """Returns the options of a server that never answers, and that notes when it is started."""
    return {"hang": True, "starts": True, "notes": str(notes), **options}


# Sharing


async def test_a_run_holds_its_servers_until_its_end(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    agent = make_agent({"a": {}})
    gate = asyncio.Event()
    scripted_server.script(answer("one", gate=gate), answer("two"))
    first = asyncio.create_task(agent.autonomous_with_mcp("a", "Go."))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    assert count_server_users(agent) == 1
    await agent.autonomous_with_mcp("a", "Go.")
    assert count_server_users(agent) == 1
    gate.set()
    await first
    assert count_server_users(agent) == 0


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
    assert sent_tool_names(scripted_server) == ["parts"]
    assert pid_of(agent) != old
    assert not await asyncio.to_thread(is_gone, old)
    gate.set()
    assert tool_texts((await first).messages) == ["on", "count"]
    await wait_until_gone(old)


async def test_a_run_uses_the_configuration_file_as_it_is_when_the_run_starts(
    scripted_server: ScriptedServer, make_agent: MakeAgent, tmp_path: Path
) -> None:
    agent = make_agent({"a": {"tools": ["echo"]}, "goes": {}})
    await agent.autonomous_discover_and_execute("Go.")
    rewrite(tmp_path / "mcp.json", {"a": {"tools": ["echo"]}, "comes": {"tools": ["count"]}})
    pid = pid_of(agent)
    await agent.autonomous_discover_and_execute("Go.")
    assert sent_tool_names(scripted_server) == ["echo", "count"]
    assert pid_of(agent) == pid


# Cancellation


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_the_caller_at_any_step_leaves_nothing_behind(
    scripted_server: ScriptedServer, make_agent: MakeAgent, client: LLMClient, stream: bool
) -> None:
    scripted_server.default = echo_the_task
    agents: list[DynamicAutonomousAgent] = []

    async def run() -> None:
        # Each attempt has a new agent, which has to start its server.
        agents.append(make_agent({"a": {"tools": ["echo"]}}))
        if not stream:
            assert await agents[-1].autonomous_with_mcp("a", "Go.") == "Go."
            return
        events = await agents[-1].autonomous_with_mcp("a", "Go.", stream=True)
        async with events:
            assert isinstance([event async for event in events][-1], RunFinished)

    async def check() -> None:
        agent = agents[-1]
        assert our_tasks() == []
        assert count_server_users(agent) == 0
        assert in_flight(client) == 0
        await agent.close()
        check_idle(agent)

    await cancel_at_each_step(run, check, at_least=5 if stream else 1)


def check_idle(agent: DynamicAutonomousAgent) -> None:
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("lmbridge-mcp")] == []
    assert agent._agent._admission.is_idle


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_a_run_at_any_await_releases_its_servers(
    scripted_server: ScriptedServer,
    make_agent: MakeAgent,
    client: LLMClient,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    scripted_server.default = echo_the_task
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
        assert count_server_users(agent) == 0
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
async def test_a_cancelled_run_stops_servers_that_are_starting(
    make_agent: MakeAgent, notes: Path, stream: bool
) -> None:
    agent = make_agent({"slow": hanging_server(notes)})
    caller = asyncio.create_task(agent.autonomous_with_mcp("slow", "Go.", stream=stream))
    await wait_for_notes(notes)
    caller.cancel("enough")
    with pytest.raises(asyncio.CancelledError) as caught:
        await caller
    assert type(caught.value) is asyncio.CancelledError
    assert our_tasks() == []
    assert count_server_users(agent) == 0
    assert agent._hub.status()["slow"].state == "idle"


async def test_a_run_cancelled_during_the_start_of_a_server_does_not_disturb_another_run(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    agent = make_agent({"a": {}})
    first, second = (asyncio.create_task(agent.autonomous_with_mcp("a", "Go.")) for _ in range(2))
    while not count_server_users(agent):
        await asyncio.sleep(0)
    first.cancel()
    assert await second == "Hello from the scripted server."
    assert first.cancelled()


async def test_leaving_the_event_stream_early_cancels_the_run(
    scripted_server: ScriptedServer, make_agent: MakeAgent, notes: Path
) -> None:
    agent = make_agent({"a": {"notes": str(notes)}})
    scripted_server.script(calls(asks("sleep")))
    async with await agent.autonomous_with_mcp("a", "Go.", stream=True) as events:
        async for event in events:
            if isinstance(event, ToolCallStarted):
                # By then the call has been sent to the server.
                await turns(20)
                break
    assert events.handle.stop_reason == "cancelled"
    assert count_server_users(agent) == 0
    assert (await wait_for_notes(notes))[0].startswith("cancelled ")
    check_valid(events.handle.messages)


async def test_dropping_the_event_stream_cancels_the_run_with_a_warning(
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
    assert count_server_users(agent) == 0


# Closing


@pytest.fixture
def agent_with_default_client(
    scripted_server: ScriptedServer, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> DynamicAutonomousAgent:
    """An agent that has created its client and closes it."""
    monkeypatch.setenv("LMBRIDGE_API_BASE", scripted_server.api_base)
    return DynamicAutonomousAgent(config_path=config({"a": scripted({})}))


async def test_close_cancels_the_runs_in_flight_and_all_processes_are_gone(
    scripted_server: ScriptedServer, agent_with_default_client: DynamicAutonomousAgent
) -> None:
    scripted_server.script(calls(asks("echo", text="x")), answer("one two", gate=asyncio.Event()))
    stream = await agent_with_default_client.autonomous_with_mcp("a", "Go.", stream=True)
    async for event in stream:
        if isinstance(event, ToolCallFinished):
            break
    scripted_server.default = answer("three four", gate=asyncio.Event())
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
    plain = asyncio.create_task(agent_with_default_client.autonomous_with_mcp("a", "Go."))
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 2)
    pid = pid_of(agent_with_default_client)
    await agent_with_default_client.close()
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
    assert not server.done(), "the server has to stay until the run has ended"
    finish.set()
    await closing
    assert server.done()
    with pytest.raises(TaskCancelledError):
        await run


async def test_close_ends_servers_that_are_starting(make_agent: MakeAgent, notes: Path) -> None:
    agent = make_agent({"slow": hanging_server(notes, grandchild=True)})
    waiting = asyncio.create_task(agent.autonomous_with_mcp("slow", "Go.", stream=True))
    grandchild = next(line for line in await wait_for_notes(notes, 2) if line.startswith("grandchild"))
    await agent.close()
    with pytest.raises(TaskCancelledError, match="its agent was closed"):
        await waiting
    await wait_until_gone(int(grandchild.split()[1]))
    check_idle(agent)


async def test_close_is_idempotent_and_a_later_run_opens_the_agent_again(
    scripted_server: ScriptedServer, agent_with_default_client: DynamicAutonomousAgent
) -> None:
    await agent_with_default_client.close()
    for _ in range(2):
        assert await agent_with_default_client.autonomous_with_mcp("a", "Go.") == "Hello from the scripted server."
        pid = pid_of(agent_with_default_client)
        await agent_with_default_client.close()
        await agent_with_default_client.close()
        assert await asyncio.to_thread(is_gone, pid)
        assert await agent_with_default_client.list_available_mcps() == ["a"]
    await agent_with_default_client.close()


async def test_concurrent_calls_of_close_wait_for_the_same_end(
    scripted_server: ScriptedServer, agent_with_default_client: DynamicAutonomousAgent
) -> None:
    scripted_server.default = answer("one two", gate=asyncio.Event())
    run = asyncio.create_task(agent_with_default_client.autonomous_with_mcp("a", "Go."))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    pid = pid_of(agent_with_default_client)

    async def close() -> bool:
        await agent_with_default_client.close()
        return run.done() and is_gone(pid) and not our_tasks()

    assert await asyncio.gather(*(close() for _ in range(3))) == [True] * 3


async def test_close_continues_if_its_caller_is_cancelled(
    scripted_server: ScriptedServer, agent_with_default_client: DynamicAutonomousAgent
) -> None:
    await agent_with_default_client.autonomous_with_mcp("a", "Go.")
    pid = pid_of(agent_with_default_client)
    closing = asyncio.create_task(agent_with_default_client.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled()
    await agent_with_default_client.close()
    assert await asyncio.to_thread(is_gone, pid)
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)


async def test_a_run_does_not_start_if_the_agent_is_closed_meanwhile(
    scripted_server: ScriptedServer, agent_with_default_client: DynamicAutonomousAgent
) -> None:
    run = asyncio.create_task(agent_with_default_client.autonomous_with_mcp("a", "Go."))
    # The run is reading the configuration file when the agent is closed.
    await asyncio.sleep(0)
    await agent_with_default_client.close()
    with pytest.raises(TaskCancelledError, match="its agent was closed"):
        await run
    assert agent_with_default_client._hub.status() == {}
    assert scripted_server.requests == []


async def test_a_tool_may_close_the_agent_of_its_own_run(
    scripted_server: ScriptedServer, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMBRIDGE_API_BASE", scripted_server.api_base)

    async def shut_down() -> str:
        """Closes the agent."""
        await agent.close()
        return "never returned"

    agent = DynamicAutonomousAgent(config_path=config({"a": scripted({})}), tools=[shut_down])
    scripted_server.script(calls(asks("shut_down")))
    run = asyncio.create_task(agent.autonomous_with_mcp("a", "Go."))
    while not agent._hub.status() or not agent._hub.status()["a"].pid:
        await asyncio.sleep(0)
    pid = pid_of(agent)
    with pytest.raises(TaskCancelledError, match="its agent was closed") as caught:
        await run
    assert tool_texts(caught.value.partial.messages)[0].startswith("No result: the run ended")
    # This waits for the first close, which the tool has started.
    await agent.close()
    assert await asyncio.to_thread(is_gone, pid)
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)


async def test_leaving_the_block_closes_the_agent(
    scripted_server: ScriptedServer, agent_with_default_client: DynamicAutonomousAgent
) -> None:
    async with agent_with_default_client as agent:
        assert agent is agent_with_default_client
        await agent.autonomous_with_mcp("a", "Go.")
        pid = pid_of(agent)
    assert await asyncio.to_thread(is_gone, pid)
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)


async def test_closing_an_unused_agent_starts_no_task(agent_with_default_client: DynamicAutonomousAgent) -> None:
    before = asyncio.all_tasks()
    await agent_with_default_client.close()
    assert asyncio.all_tasks() == before


def test_a_closed_agent_can_be_used_in_the_next_event_loop(config: Callable[..., Path]) -> None:
    agent = DynamicAutonomousAgent(config_path=config({"a": scripted({})}))

    async def run() -> str:
        async with ScriptedServer() as server, agent:
            assert agent._default_client
            agent._default_client.api_base = server.api_base
            return await agent.autonomous_with_mcp("a", "Go.")

    assert [asyncio.run(run()) for _ in range(2)] == ["Hello from the scripted server."] * 2
