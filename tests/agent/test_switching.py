"""Runs with different models: the decisions of the switchboard alone, and agents whose models are switched."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge import (
    Agent,
    LLMClient,
    LLMClientPool,
    LLMValidationError,
    ModelChangedDuringExecutionError,
    RunHandle,
    RunResult,
    TextDelta,
)
from lmbridge.agent.switching import Effects, RunAdmission, RunPermit, Switchboard, SwitchPolicy
from lmbridge.testing import Exchange, ScriptedServer, answer
from tests.agent.support import Gate, add, asks, calls, our_tasks, sent
from tests.support import cancel_at_each_step, in_flight

POLICIES: list[SwitchPolicy] = ["isolate", "reject", "cancel", "drain"]


def run(model: str | None = None, parent: RunPermit | None = None) -> RunPermit:
    return RunPermit(requested_model=model, parent=parent)


def switch(model: str, parent: RunPermit | None = None) -> RunPermit:
    return RunPermit(requested_model=model, is_switch=True, parent=parent)


def cancelled_runs(effects: Effects) -> list[RunPermit]:
    return [permit for permit, _ in effects.cancelled]


# The switchboard


@pytest.mark.parametrize("policy", POLICIES)
def test_runs_with_the_same_model_run_side_by_side(policy: SwitchPolicy) -> None:
    board = Switchboard(policy, "a")
    for permit in (run(), run("a"), run()):
        effects = board.arrive(permit)
        assert effects.admitted == [permit]
        assert effects.cancelled == []
        assert permit.model == "a"


def test_isolate_runs_another_model_beside_the_first() -> None:
    board = Switchboard("isolate", "a")
    first, second = run(), run("b")
    board.arrive(first)
    effects = board.arrive(second)
    assert (effects.admitted, effects.cancelled, second.model, first.model) == ([second], [], "b", "a")


def test_isolate_switch_cancels_only_runs_that_took_the_default() -> None:
    board = Switchboard("isolate", "a")
    default, explicit, change = run(), run("a"), switch("b")
    board.arrive(default)
    board.arrive(explicit)
    effects = board.arrive(change)
    assert cancelled_runs(effects) == [default]
    assert effects.admitted == []
    assert board.default == "a"
    later = run()
    assert board.arrive(later).admitted == [], "it waits for the new model"
    assert board.arrive(other := run("c")).admitted == [other], "it names its own"
    assert board.leave(default).admitted == [change, later]
    assert (board.default, later.model) == ("b", "b")


def test_reject_refuses_another_model() -> None:
    board = Switchboard("reject", "a")
    board.arrive(first := run())
    with pytest.raises(ModelChangedDuringExecutionError) as caught:
        board.arrive(run("b"))
    assert (caught.value.old_model, caught.value.new_model) == ("a", "b")
    with pytest.raises(ModelChangedDuringExecutionError):
        board.arrive(switch("b"))
    assert board.arrive(same := switch("a")).admitted == [same]
    board.leave(first)
    assert board.arrive(second := run("b")).admitted == [second]


def test_cancel_cancels_the_others_and_runs_when_they_have_ended() -> None:
    board = Switchboard("cancel", "a")
    first, second, third = run(), run("a"), run("b")
    board.arrive(first)
    board.arrive(second)
    effects = board.arrive(third)
    assert cancelled_runs(effects) == [first, second]
    assert [(error.old_model, error.new_model) for _, error in effects.cancelled] == [("a", "b")] * 2
    assert board.leave(first) == Effects(), "nobody is cancelled twice"
    assert board.leave(second).admitted == [third]
    effects = board.arrive(change := switch("c"))
    assert cancelled_runs(effects) == [third]
    assert board.leave(third).admitted == [change]
    assert board.default == "c"


def test_drain_waits_and_later_runs_wait_behind_it() -> None:
    board = Switchboard("drain", "a")
    first, waiting, behind = run(), run("b"), run("a")
    board.arrive(first)
    assert board.arrive(waiting) == Effects()
    assert board.arrive(behind) == Effects()
    assert board.leave(first).admitted == [waiting]
    assert board.leave(waiting).admitted == [behind]


def test_drain_switch_waits_and_later_runs_take_the_new_model() -> None:
    board = Switchboard("drain", "a")
    board.arrive(first := run())
    change, behind = switch("b"), run()
    assert board.arrive(change) == board.arrive(behind) == Effects()
    assert board.leave(first).admitted == [change, behind]
    assert behind.model == "b"


@pytest.mark.parametrize("policy", POLICIES)
def test_leaving_the_queue_changes_nothing(policy: SwitchPolicy) -> None:
    board = Switchboard(policy, "a")
    board.arrive(first := run())
    if policy != "reject":
        board.arrive(change := switch("b"))
        board.leave(change)
    assert board.default == "a"
    if policy in ("reject", "drain"):
        second = run("a")
        assert board.arrive(second).admitted == [second]
        board.leave(second)
    board.leave(first)
    assert board.is_idle


def test_a_nested_run_with_the_same_model_passes_a_waiting_drain() -> None:
    board = Switchboard("drain", "a")
    board.arrive(first := run())
    board.arrive(waiting := run("b"))
    nested = run("a", parent=first)
    assert board.arrive(nested).admitted == [nested]
    deeper = run("a", parent=nested)
    assert board.arrive(deeper).admitted == [deeper]
    for permit in (deeper, nested):
        assert board.leave(permit).admitted == []
    assert board.leave(first).admitted == [waiting]


@pytest.mark.parametrize("policy", ["reject", "cancel", "drain"])
def test_a_nested_run_with_another_model_is_refused_at_once(policy: SwitchPolicy) -> None:
    board = Switchboard(policy, "a")
    board.arrive(first := run())
    for nested in (run("b", parent=first), switch("b", parent=first)):
        with pytest.raises(ModelChangedDuringExecutionError) as caught:
            board.arrive(nested)
        assert (caught.value.old_model, caught.value.new_model) == ("a", "b")
    assert first.cancelled_by is None


def test_a_nested_run_under_isolate_simply_runs() -> None:
    board = Switchboard("isolate", "a")
    board.arrive(first := run())
    assert board.arrive(nested := run("b", parent=first)).admitted == [nested]
    with pytest.raises(ModelChangedDuringExecutionError):
        board.arrive(switch("b", parent=first))
    explicit = run("a")
    board.arrive(explicit)
    board.leave(first)
    assert board.arrive(change := switch("c", parent=explicit)).admitted == [change]


def test_a_nested_run_of_a_run_that_is_being_cancelled_gets_the_same_error() -> None:
    policies: list[SwitchPolicy] = ["isolate", "cancel"]
    for policy in policies:
        board = Switchboard(policy, "a")
        board.arrive(first := run())
        board.arrive(switch("b"))
        with pytest.raises(ModelChangedDuringExecutionError) as caught:
            board.arrive(run(parent=first))
        assert (caught.value.old_model, caught.value.new_model) == ("a", "b")


steps = st.lists(
    st.tuples(
        st.sampled_from(["run", "switch", "nested", "leave"]), st.sampled_from([None, "a", "b", "c"]), st.integers(0)
    ),
    max_size=40,
)


@given(st.sampled_from(POLICIES), steps)
def test_no_run_waits_for_ever_and_models_never_mix(policy: SwitchPolicy, script: Any) -> None:
    board = Switchboard(policy, "a")
    running: list[RunPermit] = []
    waiting: list[RunPermit] = []

    def apply(effects: Effects) -> None:
        for permit in effects.admitted:
            if permit in waiting:
                waiting.remove(permit)
            if not permit.is_switch:
                running.append(permit)
        if policy in ("reject", "drain"):
            assert len({permit.model for permit in running}) <= 1
            assert effects.cancelled == []
        if policy == "cancel":
            assert len({permit.model for permit in running}) <= 1

    def leave(permit: RunPermit) -> None:
        running.remove(permit)
        apply(board.leave(permit))

    for what, model, pick in script:
        if what == "leave":
            if running:
                leave(running[pick % len(running)])
            continue
        parent = running[pick % len(running)] if what == "nested" and running else None
        permit = switch(model or "a", parent) if what == "switch" else run(model, parent)
        waiting.append(permit)
        try:
            apply(board.arrive(permit))
        except ModelChangedDuringExecutionError:
            waiting.remove(permit)
            continue
        if parent is not None and permit in waiting:
            assert policy == "isolate", "a run must not wait for its ancestor"
            assert all(ancestor.cancelled_by is None for ancestor in permit.ancestors() if ancestor in running)
    while running:
        leave(running[0])
    assert waiting == []
    assert board.is_idle


async def test_a_cancelled_waiter_anywhere_in_the_queue_frees_its_place() -> None:
    admission = RunAdmission("drain", "a")

    async def scenario() -> None:
        first, second = run(), run("b")
        await admission.enter(first)
        asyncio.get_running_loop().call_soon(admission.leave, first)
        try:
            await admission.enter(second)
        finally:
            admission.leave(second)

    async def after() -> None:
        await asyncio.sleep(0)
        assert admission.is_idle

    await cancel_at_each_step(scenario, after, at_least=1)


# Agents


async def begun(agent: Agent, gate: Gate, model: str | None = None) -> RunHandle:
    """Starts a run, and waits until its tool is running."""
    gate.begun.clear()
    handle = agent.start("Wait.", model=model)
    await gate.begun.wait()
    return handle


@pytest.fixture
def gate(scripted_server: ScriptedServer) -> Gate:
    """Returns a tool that holds each run until it is opened. The server makes every run call it once."""

    async def behave(exchange: Exchange) -> None:
        fields = exchange.request.json
        called = fields["messages"][-1]["role"] == "tool"
        if called or "tools" not in fields:
            await answer(f"answer of {exchange.model}")(exchange)
        else:
            await calls(asks("wait"), text="Wait:")(exchange)

    scripted_server.default = behave
    return Gate()


async def test_isolate_gives_each_run_its_own_model(client: LLMClient, gate: Gate) -> None:
    agent = Agent(client, tools=[gate.wait])
    first, second = await begun(agent, gate), await begun(agent, gate, "other")
    gate.open.set()
    assert (await first.result()).text == "answer of test-model"
    assert (await second.result()).text == "answer of other"


async def test_a_second_model_raises_under_reject(client: LLMClient, gate: Gate) -> None:
    agent = Agent(client, tools=[gate.wait], switch_policy="reject")
    first = await begun(agent, gate, "mistralai/magistral-small-2509")
    with pytest.raises(ModelChangedDuringExecutionError) as caught:
        await agent.run("Quick task", model="qwen/qwen3-coder-30b")
    assert caught.value.old_model == "mistralai/magistral-small-2509"
    assert caught.value.new_model == "qwen/qwen3-coder-30b"
    assert caught.value.partial.rounds == 0
    same = asyncio.create_task(agent.run("Task 2", model="mistralai/magistral-small-2509"))
    gate.open.set()
    texts = [result.text for result in (await first.result(), await same)]
    assert texts == ["answer of mistralai/magistral-small-2509"] * 2
    assert (await agent.run("Now.", model="qwen/qwen3-coder-30b")).text == "answer of qwen/qwen3-coder-30b"


async def test_a_hundred_runs_on_two_models_succeed_under_isolate(scripted_server: ScriptedServer) -> None:
    models = ["qwen/qwen3-coder-30b", "mistralai/magistral-small-2509"]

    async def behave(exchange: Exchange) -> None:
        last = exchange.request.json["messages"][-1]
        done = last["role"] == "tool"
        await (answer(f"{exchange.model} {last['content']}") if done else calls(asks("add", a=1, b=2)))(exchange)

    scripted_server.default = behave
    async with LLMClientPool(10, api_base=scripted_server.api_base) as pool:
        agent = Agent(pool, tools=[add])
        results = await asyncio.gather(
            *(agent.run(f"Task {n}", model=models[n % 2]) for n in range(100)), return_exceptions=True
        )
        assert pool.stats().in_use == 0
    assert [result for result in results if not isinstance(result, RunResult)] == []
    assert [result.text for result in results if isinstance(result, RunResult)] == [
        f"{models[n % 2]} 3" for n in range(100)
    ]
    assert scripted_server.max_in_flight <= 10


async def test_cancel_cancels_the_run_in_flight_with_its_partial_result(client: LLMClient, gate: Gate) -> None:
    agent = Agent(client, tools=[gate.wait], switch_policy="cancel")
    first = await begun(agent, gate)
    result = await agent.run("Quick.", model="other", tools=())
    assert result.text == "answer of other"
    assert first.done
    assert gate.cancelled == 1
    with pytest.raises(ModelChangedDuringExecutionError) as caught:
        await first.result()
    assert (caught.value.old_model, caught.value.new_model) == ("test-model", "other")
    assert caught.value.partial.text == "Wait:"
    assert caught.value.partial.stop_reason == "cancelled"


async def test_a_generation_that_is_cancelled_yields_no_more_text(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer("one two", gate=asyncio.Event()), answer("three"))
    agent = Agent(client, switch_policy="cancel")
    stream = agent.stream("Tell.")
    while not any(isinstance(event, TextDelta) for event in stream._events._waiting):
        await asyncio.sleep(0)
    assert (await agent.run("Quick.", model="other")).text == "three"
    with pytest.raises(ModelChangedDuringExecutionError) as caught:
        await anext(stream)
    assert caught.value.partial.text == "one"
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_drain_waits_for_the_end_of_the_others(client: LLMClient, gate: Gate) -> None:
    agent = Agent(client, tools=[gate.wait], switch_policy="drain")
    first = await begun(agent, gate)
    second = agent.start("Quick.", model="other", tools=())
    third = agent.start("Quick.", tools=())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not second.done
    assert not third.done
    gate.open.set()
    for handle, model in ((first, "test-model"), (second, "other"), (third, "test-model")):
        assert (await handle.result()).text == f"answer of {model}"


async def test_switch_model_under_isolate_cancels_the_runs_that_took_the_default(client: LLMClient, gate: Gate) -> None:
    agent = Agent(client, tools=[gate.wait])
    default, explicit = await begun(agent, gate), await begun(agent, gate, "test-model")
    await agent.switch_model("other")
    assert agent.model == "other"
    assert default.done
    assert not explicit.done
    with pytest.raises(ModelChangedDuringExecutionError):
        await default.result()
    gate.open.set()
    assert (await explicit.result()).text == "answer of test-model"
    assert (await agent.run("Go.", tools=())).text == "answer of other"


async def test_switch_model_under_reject_raises_while_runs_are_in_flight(client: LLMClient, gate: Gate) -> None:
    agent = Agent(client, tools=[gate.wait], switch_policy="reject")
    handle = await begun(agent, gate)
    with pytest.raises(ModelChangedDuringExecutionError):
        await agent.switch_model("other")
    gate.open.set()
    await handle.result()
    await agent.switch_model("other")
    assert agent.model == "other"


@pytest.mark.parametrize("policy", ["cancel", "drain"])
async def test_switch_model_waits_for_the_end_of_the_others(
    client: LLMClient, gate: Gate, policy: SwitchPolicy
) -> None:
    agent = Agent(client, tools=[gate.wait], switch_policy=policy)
    handle = await begun(agent, gate, "special")
    switching = asyncio.create_task(agent.switch_model("other"))
    await asyncio.sleep(0)
    assert agent.model == "test-model"
    if policy == "drain":
        gate.open.set()
        assert (await handle.result()).text == "answer of special"
    await switching
    assert handle.done
    assert agent.model == "other"


async def test_a_cancelled_switch_changes_nothing(client: LLMClient, gate: Gate) -> None:
    agent = Agent(client, tools=[gate.wait], switch_policy="drain")
    handle = await begun(agent, gate)
    switching = asyncio.create_task(agent.switch_model("other"))
    await asyncio.sleep(0)
    switching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await switching
    beside = agent.start("Go.", tools=())
    assert (await beside.result()).text == "answer of test-model"
    gate.open.set()
    assert (await handle.result()).model == agent.model == "test-model"


async def test_a_switch_that_is_cancelled_as_the_last_run_ends_has_changed_the_model() -> None:
    admission = RunAdmission("drain", "a")
    last = run()
    await admission.enter(last)
    switch = asyncio.ensure_future(admission.enter(RunPermit(requested_model="b", is_switch=True)))
    await asyncio.sleep(0)
    admission.leave(last)
    switch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await switch
    assert (admission.default, admission.is_idle) == ("b", True)


async def test_a_waiting_run_that_is_cancelled_frees_its_place(client: LLMClient, gate: Gate) -> None:
    agent = Agent(client, tools=[gate.wait], switch_policy="drain")
    first = await begun(agent, gate)
    second = agent.start("Go.", model="other", tools=())
    third = agent.start("Go.", tools=())
    await asyncio.sleep(0)
    second.cancel()
    assert (await third.result()).text == "answer of test-model"
    gate.open.set()
    await first.result()


@pytest.mark.parametrize("policy", ["reject", "cancel", "drain"])
async def test_a_run_of_a_tool_with_another_model_is_refused_at_once(
    scripted_server: ScriptedServer, client: LLMClient, policy: SwitchPolicy
) -> None:
    errors: list[ModelChangedDuringExecutionError] = []

    async def delegate() -> str:
        """Delegates to another model."""
        for ask in (agent.run("Do it.", model="other", tools=()), agent.switch_model("other")):
            try:
                await ask
            except ModelChangedDuringExecutionError as error:
                errors.append(error)
        return (await agent.run("Do it.", tools=())).text

    agent = Agent(client, tools=[delegate], switch_policy=policy)
    scripted_server.script(calls(asks("delegate")), answer("nested"), answer("done"))
    result = await agent.run("Go.")
    assert [result.text, result.messages[2]["content"]] == ["done", "nested"]
    assert [(error.old_model, error.new_model) for error in errors] == [("test-model", "other")] * 2


async def test_a_run_without_a_model_leaves_the_choice_to_the_server(scripted_server: ScriptedServer) -> None:
    async with LLMClient(scripted_server.api_base) as client:
        result = await Agent(client).run("Hi.")
    assert "model" not in sent(scripted_server)
    assert result.model == "test-model"


async def test_switch_model_needs_a_name(client: LLMClient) -> None:
    agent = Agent(client)
    for name in ("", None):
        with pytest.raises(LLMValidationError):
            await agent.switch_model(name)  # type: ignore[arg-type]  # the subject of the test
    assert our_tasks() == []
