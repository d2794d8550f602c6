"""The order in which the requests of several runs are admitted, seen from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pytest

from lmbridge import Agent, Limits, LLMClient, LLMValidationError
from lmbridge._scheduled_run import ScheduledRun
from lmbridge.testing import ScriptedServer, answer, reply, retry_without_waiting
from lmbridge.transport.begun_runs import BegunRuns
from lmbridge.transport.slot_use import SlotUse
from tests.agent.support import asks, calls, generations


def task_of(body: Mapping[str, Any]) -> str:
    """Returns the task of the run to which a request belongs."""
    return next(str(message["content"]) for message in body["messages"] if message["role"] == "user")


def tasks_in_order(server: ScriptedServer) -> list[str]:
    return [task_of(request.json) for request in generations(server)]


async def behave(exchange: Any) -> None:
    """Asks for a tool in the first two rounds of a run, and then answers."""
    rounds = sum(message["role"] == "tool" for message in exchange.request.json["messages"])
    await (calls(asks("step", number=rounds)) if rounds < 2 else answer("Done."))(exchange)


def step(number: int) -> str:
    """Takes a step."""
    return f"step {number}"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the place of a run for longer than any tool takes, although the scripted server answers at once."""

    def set_patience(runs: BegunRuns, run: ScheduledRun, _: float) -> None:
        runs._patience[run] = 60

    monkeypatch.setattr(BegunRuns, "set_patience", set_patience)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(("order", "finished_first"), [("run", ["0", "1", "2", "3"]), ("request", None)])
async def test_runs_finish_one_after_the_other(
    scripted_server: ScriptedServer, order: Literal["run", "request"], finished_first: list[str] | None
) -> None:
    scripted_server.default = behave
    finished: list[str] = []

    async def run(agent: Agent, task: str) -> None:
        await agent.run(task)
        finished.append(task)

    limits = Limits(max_concurrency=1, order=order)
    async with LLMClient(scripted_server.api_base, limits=limits) as client:
        agent = Agent(client, tools=[step])
        await asyncio.gather(*(run(agent, str(number)) for number in range(4)))
    if order == "run":
        assert finished == finished_first
        assert tasks_in_order(scripted_server) == [task for task in "0123" for _ in range(3)]
    else:
        assert tasks_in_order(scripted_server)[:4] == ["0", "1", "2", "3"]


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every server count as one that is known to forget the conversations that have lost their slot."""
    monkeypatch.setattr(SlotUse, "is_worth_keeping", True)


@pytest.mark.usefixtures("patient", "forgetful")
async def test_a_run_begins_as_soon_as_the_run_whose_slot_it_would_take_is_being_answered(
    scripted_server: ScriptedServer,
) -> None:
    ends, tool_ends, reply_ends = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def wait() -> str:
        """Waits."""
        await tool_ends.wait()
        return "ready"

    async def reply(exchange: Any) -> None:
        task = task_of(exchange.request.json)
        if task == "ending":
            await ends.wait()
        elif task == "calling" and exchange.request.json["messages"][-1]["role"] != "tool":
            await calls(asks("wait"))(exchange)
            return
        elif task == "calling":
            await exchange.chunk({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "It "}}]})
            await reply_ends.wait()
        await answer("Done.")(exchange)

    scripted_server.default = reply
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=2)) as client:
        agent = Agent(client, tools=[wait])
        ending, calling = agent.start("ending"), agent.start("calling")
        await scripted_server.wait_until(lambda: len(generations(scripted_server)) == 2)
        while client.stats().in_flight > 1:
            await asyncio.sleep(0)
        ends.set()
        await ending.result()
        new = agent.start("new")
        while not client.stats().queued:
            await asyncio.sleep(0)
        tool_ends.set()
        await scripted_server.wait_until(lambda: len(generations(scripted_server)) == 4)
        assert tasks_in_order(scripted_server)[2:] == ["calling", "new"]
        reply_ends.set()
        await asyncio.gather(calling.result(), new.result())


@pytest.fixture
def without_waits() -> Iterator[None]:
    with retry_without_waiting():
        yield


@pytest.mark.usefixtures("patient", "without_waits")
@pytest.mark.parametrize(
    ("cached_tokens", "failures", "next_task"),
    # A further attempt finds in the cache what the first one has left there.
    [(90, 0, "second"), (10, 0, "calling"), (None, 0, "calling"), (90, 1, "calling")],
)
async def test_slots_are_kept_unless_a_reply_shows_that_the_server_remembers_what_has_lost_its_slot(
    scripted_server: ScriptedServer, cached_tokens: int | None, failures: int, next_task: str
) -> None:
    ends = asyncio.Event()
    left = failures
    gates = {(task, number): asyncio.Event() for task in ("calling", "first", "second") for number in range(2)}

    async def wait(task: str, number: int) -> str:
        """Waits."""
        await gates[task, number].wait()
        return f"ready {number}"

    async def behave_as_task(exchange: Any) -> None:
        task = task_of(exchange.request.json)
        rounds = sum(message["role"] == "tool" for message in exchange.request.json["messages"])
        nonlocal left
        if (task, rounds) == ("calling", 1) and left:
            left -= 1
            await reply(503, {"error": {"message": "busy"}})(exchange)
            return
        if task == "ending":
            await ends.wait()
        if task == "ending" or rounds == 2:
            await answer("Done.")(exchange)
            return
        details = {} if cached_tokens is None else {"prompt_tokens_details": {"cached_tokens": cached_tokens}}
        usage = {"prompt_tokens": 100 + rounds, "completion_tokens": 1, **details}
        await calls(asks("wait", task=task, number=rounds), usage=usage)(exchange)

    async def wait_for_tools(generated: int, in_flight: int) -> None:
        await scripted_server.wait_until(lambda: len(generations(scripted_server)) == generated)
        while client.stats().in_flight > in_flight:
            await asyncio.sleep(0)

    scripted_server.default = behave_as_task
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=2)) as client:
        agent = Agent(client, tools=[wait])
        runs = [agent.start("ending"), agent.start("calling")]
        await wait_for_tools(generated=2, in_flight=1)
        ends.set()
        await runs[0].result()
        # Nothing is known about the server, so this run may take the slot of the one whose tool is running.
        runs.append(agent.start("first"))
        await wait_for_tools(generated=3, in_flight=0)
        # The next reply to that run shows what the server remembers.
        gates["calling", 0].set()
        await wait_for_tools(generated=4 + failures, in_flight=0)
        runs.append(agent.start("second"))
        if next_task != "second":
            while not client.stats().queued:
                await asyncio.sleep(0)
            gates["calling", 1].set()
        await scripted_server.wait_until(lambda: len(generations(scripted_server)) >= 5 + failures)
        assert tasks_in_order(scripted_server)[4 + failures] == next_task
        for gate in gates.values():
            gate.set()
        await asyncio.gather(*(run.result() for run in runs))


@pytest.mark.usefixtures("patient")
async def test_a_run_that_a_tool_starts_has_the_place_of_the_run_that_called_the_tool(
    scripted_server: ScriptedServer,
) -> None:
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:
        helper = Agent(client)

        async def ask_helper() -> str:
            """Asks a helper."""
            return (await helper.run("helper")).text

        async def reply(exchange: Any) -> None:
            has_result = exchange.request.json["messages"][-1]["role"] == "tool"
            is_first = task_of(exchange.request.json) == "first"
            await (calls(asks("ask_helper")) if is_first and not has_result else answer("Done."))(exchange)

        scripted_server.default = reply
        agent = Agent(client, tools=[ask_helper])
        await asyncio.gather(agent.run("first"), agent.run("second"))
    assert tasks_in_order(scripted_server) == ["first", "helper", "first", "second"]


async def test_the_runs_of_an_urgent_agent_go_before_those_of_a_patient_one(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("Done.")
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:
        patient, urgent = Agent(client, priority="batch"), Agent(client, priority="interactive")
        gate = asyncio.Event()
        scripted_server.script(answer("First.", gate=gate))
        first = patient.start("first")
        await scripted_server.wait_until(lambda: len(generations(scripted_server)) == 1)
        runs = [patient.start("batch"), urgent.start("interactive"), Agent(client).start("normal")]
        while client.stats().queued < 3:
            await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*(run.result() for run in [first, *runs]))
    assert tasks_in_order(scripted_server) == ["first", "interactive", "normal", "batch"]
    assert "priority" not in generations(scripted_server)[0].json


@pytest.mark.parametrize("priority", ["urgent", 1.5, True, None])
async def test_a_priority_that_is_not_valid_is_refused(priority: Any) -> None:
    with pytest.raises(LLMValidationError, match="priority"):
        LLMClient(priority=priority)
    if priority is not None:
        with pytest.raises(LLMValidationError, match="priority"):
            Agent(LLMClient(), priority=priority)


async def test_the_priority_of_a_client_and_of_a_call(scripted_server: ScriptedServer) -> None:
    """A call, `with_options` and the client decide in this order, and the server does not see the priority."""
    scripted_server.default = answer("Done.")
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1), priority="batch") as client:
        gate = asyncio.Event()
        scripted_server.script(answer("First.", gate=gate))

        def ask(client: LLMClient, text: str, **options: Any) -> asyncio.Task[Any]:
            return asyncio.create_task(client.chat_completion([{"role": "user", "content": text}], **options))

        first = ask(client, "first")
        await scripted_server.wait_until(lambda: len(generations(scripted_server)) == 1)
        tasks = [
            ask(client, "batch"),
            ask(client.with_options(priority="normal"), "normal"),
            ask(client, "call", priority=3, stream=False),
        ]
        while client.stats().queued < 3:
            await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *tasks)
    assert tasks_in_order(scripted_server) == ["first", "call", "normal", "batch"]
    assert all("priority" not in request.json for request in generations(scripted_server))
