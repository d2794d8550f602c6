"""The client and the model of a `DynamicAutonomousAgent`, and what happens if runs name different models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from lmbridge import DynamicAutonomousAgent, LLMClient, LLMClientPool, ModelChangedDuringExecutionError
from lmbridge.config import Limits
from lmbridge.testing import ScriptedServer, answer, reply
from tests.agent.support import generations, sent
from tests.mcp.conftest import MakeAgent
from tests.mcp.dynamic_support import ONLY_ECHO, echo_the_task
from tests.mcp.support import scripted, wait_for_notes


async def test_a_pool_lends_a_client_for_each_generation(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    scripted_server.default = echo_the_task
    async with LLMClientPool(2, api_base=scripted_server.api_base, model="test-model") as pool:
        agent = make_agent({"a": ONLY_ECHO}, client=pool)
        tasks = [f"task {number}" for number in range(10)]
        assert await asyncio.gather(*(agent.autonomous_with_mcp("a", task) for task in tasks)) == tasks
        assert pool.stats().in_use == 0


async def test_the_default_client_is_configured_from_the_environment_with_automatic_limits(
    scripted_server: ScriptedServer, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMBRIDGE_API_BASE", scripted_server.api_base)
    monkeypatch.setenv("DEFAULT_MODEL", "qwen3-4b")
    scripted_server.on_path("/v1/models", reply(200, {"data": [{"id": "qwen3-4b", "owned_by": "llamacpp"}]}))
    props = {"total_slots": 3, "build_info": "b1", "default_generation_settings": {"n_ctx": 4096}}
    scripted_server.on_path("/props", reply(200, props))
    agent = DynamicAutonomousAgent(config_path=config({"a": scripted({})}))
    assert agent.model == "qwen3-4b"
    assert await agent.autonomous_with_mcp("a", "Go.") == "Hello from the scripted server."
    assert agent._default_client
    assert agent._default_client._server.transport.nodes[0].limits == Limits(max_concurrency=3)
    await agent.close()
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)


async def test_the_callers_client_stays_open(
    scripted_server: ScriptedServer, client: LLMClient, config: Callable[..., Path]
) -> None:
    async with DynamicAutonomousAgent(client, config_path=config({"a": scripted({})})) as agent:
        await agent.autonomous_with_mcp("a", "Go.")
    assert scripted_server.open_connections == 1


async def test_switch_model_changes_the_default_model(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    agent = make_agent({"a": {}})
    await agent.switch_model("other")
    await agent.autonomous_with_mcp("a", "Go.")
    assert agent.model == sent(scripted_server)["model"] == "other"
    assert "other" in repr(agent)


async def test_a_second_model_is_refused_while_the_first_run_continues(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    gate = asyncio.Event()
    scripted_server.default = answer("done", gate=gate)
    agent = make_agent({"filesystem": {}}, switch_policy="reject")
    slow = agent.autonomous_with_mcp("filesystem", "Analyze large codebase", model="mistralai/magistral-small-2509")
    first = asyncio.create_task(slow)
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    with pytest.raises(ModelChangedDuringExecutionError) as caught:
        await agent.autonomous_with_mcp("filesystem", "Quick task", model="qwen/qwen3-coder-30b")
    assert (caught.value.old_model, caught.value.new_model) == (
        "mistralai/magistral-small-2509",
        "qwen/qwen3-coder-30b",
    )
    gate.set()
    assert await first == "done"


async def test_a_second_model_is_refused_while_the_servers_of_the_first_run_start(
    make_agent: MakeAgent, notes: Path
) -> None:
    agent = make_agent({"slow": {"hang": True, "starts": True, "notes": str(notes)}, "a": {}}, switch_policy="reject")
    first = asyncio.create_task(agent.autonomous_with_mcp("slow", "Go.", model="one"))
    await wait_for_notes(notes)
    for stream in (False, True):
        with pytest.raises(ModelChangedDuringExecutionError):
            await agent.autonomous_with_mcp("a", "Go.", model="other", stream=stream)
    assert list(agent._hub.status()) == ["slow"]
    first.cancel()
    await asyncio.wait([first])


async def test_concurrent_runs_with_the_same_model_succeed(make_agent: MakeAgent) -> None:
    agent = make_agent({"filesystem": {}}, switch_policy="reject")
    tasks = [agent.autonomous_with_mcp("filesystem", f"Task {n}", model="qwen/qwen3-coder-30b") for n in (1, 2)]
    assert await asyncio.gather(*tasks) == ["Hello from the scripted server."] * 2


async def test_a_hundred_runs_on_two_models_share_one_server_process(
    scripted_server: ScriptedServer, make_agent: MakeAgent, notes: Path
) -> None:
    scripted_server.default = echo_the_task
    agent = make_agent({"filesystem": {**ONLY_ECHO, "starts": True, "notes": str(notes)}})
    models = ["qwen/qwen3-coder-30b", "mistralai/magistral-small-2509"]
    runs = (agent.autonomous_with_mcp("filesystem", f"Task {n}", model=models[n % 2]) for n in range(100))
    assert await asyncio.gather(*runs) == [f"Task {n}" for n in range(100)]
    assert len(generations(scripted_server)) == 200
    assert await wait_for_notes(notes) == ["started"]
