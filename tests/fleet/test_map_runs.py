"""Fleets in one process: outcomes, retries, checkpoints, and leaving early."""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lmbridge import (
    Agent,
    Journal,
    LLMClient,
    LLMResponseError,
    LLMValidationError,
    MaxRoundsExceededError,
    RunResult,
    TaskCancelledError,
)
from lmbridge.fleet import FleetProgress, Outcome, ProgressBar, map_runs
from lmbridge.testing import Exchange, ScriptedServer, answer, reply, stall
from tests.agent.support import add, asks, calls, generations, tool_texts

TASKS = [f"Task {number}." for number in range(12)]


def task_of(exchange: Exchange) -> str:
    return next(str(each["content"]) for each in exchange.request.json["messages"] if each["role"] == "user")


async def echo(exchange: Exchange) -> None:
    """Answers with the task."""
    await answer(f"Did {task_of(exchange)}")(exchange)


async def collect(*args: Any, **options: Any) -> list[Outcome]:
    return [outcome async for outcome in map_runs(*args, **options)]


async def test_every_task_has_an_outcome_with_its_result(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = echo
    outcomes = await collect(TASKS, lambda: Agent(client), max_in_flight=4)
    assert sorted(outcome.index for outcome in outcomes) == list(range(12))
    for outcome in outcomes:
        assert outcome.result is not None
        assert (outcome.task, outcome.result.text) == (TASKS[outcome.index], f"Did {TASKS[outcome.index]}")
        assert (outcome.error, outcome.attempts) == (None, 1)
    assert scripted_server.max_in_flight <= 4


async def test_outcomes_come_as_they_finish(scripted_server: ScriptedServer, client: LLMClient) -> None:
    gate = asyncio.Event()

    async def hold_the_first(exchange: Exchange) -> None:
        await (answer("x", gate=gate) if task_of(exchange) == TASKS[0] else echo)(exchange)

    scripted_server.default = hold_the_first
    seen = []
    async for outcome in map_runs(TASKS, lambda: Agent(client), max_in_flight=3):
        seen.append(outcome.index)
        if len(seen) == 11:
            gate.set()
    assert seen[-1] == 0


async def test_a_task_that_keeps_failing_is_reported_and_does_not_stop_the_others(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    async def fail_for_two(exchange: Exchange) -> None:
        await (reply(400, {"error": "no"}) if task_of(exchange) == TASKS[2] else echo)(exchange)

    scripted_server.default = fail_for_two
    progress: list[FleetProgress] = []
    outcomes = await collect(TASKS, lambda: Agent(client), max_in_flight=4, retries=1, on_progress=progress.append)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    ((index, error, result, attempts),) = [(each.index, each.error, each.result, each.attempts) for each in failed]
    assert (index, result, attempts) == (2, None, 2)
    assert isinstance(error, LLMResponseError)
    assert len(outcomes) == 12
    assert progress[-1] == FleetProgress(total=12, done=11, failed=1, in_flight=0)
    assert [each.done + each.failed for each in progress] == list(range(1, 13))


async def test_a_task_that_fails_once_is_tried_again(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = echo
    scripted_server.script(*[reply(400, {"error": "no"})] * 2)
    (outcome,) = await collect(["Go."], lambda: Agent(client), retries=2)
    assert outcome.result is not None
    assert outcome.attempts == 3


@pytest.mark.parametrize("has_checkpoint", [False, True])
async def test_errors_that_would_only_be_repeated_are_not_tried_again(
    has_checkpoint: bool, scripted_server: ScriptedServer, client: LLMClient, tmp_path: Path
) -> None:
    scripted_server.default = calls(asks("unknown"))
    checkpoint = tmp_path / "fleet.db" if has_checkpoint else None
    agent = Agent(client, max_rounds=1, tools=[add])
    outcomes = await collect(["", "Go."], lambda: agent, retries=5, max_in_flight=1, checkpoint=checkpoint)
    kinds = {outcome.index: type(outcome.error) for outcome in outcomes}
    assert kinds == {0: LLMValidationError, 1: MaxRoundsExceededError}
    assert {outcome.attempts for outcome in outcomes} == {1}


async def test_tasks_are_read_as_they_are_needed(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = echo
    read = []

    def endless() -> Iterator[str]:
        for number in range(10**9):
            read.append(number)
            yield f"Task {number}."

    async with aclosing(map_runs(endless(), lambda: Agent(client), max_in_flight=2)) as outcomes:
        async for outcome in outcomes:
            if outcome.index >= 5:
                break
    assert len(read) < 20


async def test_leaving_early_cancels_the_runs_and_stops_the_server(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(answer("Done."))
    scripted_server.default = stall()
    closed = []

    @asynccontextmanager
    async def make_agent() -> AsyncIterator[Agent]:
        yield Agent(client)
        closed.append(scripted_server.in_flight)

    async with aclosing(map_runs(TASKS, make_agent, max_in_flight=5)) as outcomes:
        async for _ in outcomes:
            await scripted_server.wait_until(lambda: scripted_server.in_flight == 5)
            break
    assert len(closed) == 1
    await scripted_server.wait_until(lambda: not scripted_server.in_flight)
    assert len(scripted_server.aborts) == 5
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("lmbridge-")]


async def test_a_cancelled_program_cancels_the_runs(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = stall()
    program = asyncio.create_task(collect(TASKS, lambda: Agent(client), max_in_flight=3))
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 3)
    program.cancel()
    with pytest.raises(asyncio.CancelledError):
        await program
    await scripted_server.wait_until(lambda: not scripted_server.in_flight)
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("lmbridge-")]


async def test_a_slow_program_slows_the_runs_down(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = echo
    outcomes = map_runs(TASKS, lambda: Agent(client), max_in_flight=2)
    await anext(outcomes)
    for _ in range(500):
        await asyncio.sleep(0)
    # One outcome was read, two wait in the queue, and two runs wait for room there.
    assert len(generations(scripted_server)) <= 5
    await outcomes.aclose()


async def test_a_checkpoint_makes_a_second_call_skip_what_is_finished_and_let_the_rest_go_on(
    scripted_server: ScriptedServer, client: LLMClient, tmp_path: Path
) -> None:
    made: Counter[str] = Counter()

    async def act(name: str) -> str:
        """Acts."""
        made[name] += 1
        return f"{name} is done"

    async def behave(exchange: Exchange) -> None:
        name = task_of(exchange)
        results = tool_texts(exchange.request.json["messages"])
        if not results:
            await calls(asks("act", name=name))(exchange)
        elif is_broken and name in TASKS[6:]:
            await reply(400, {"error": "no"})(exchange)
        else:
            await answer(results[0])(exchange)

    scripted_server.default, is_broken, checkpoint = behave, True, tmp_path / "fleet.db"
    options: dict[str, Any] = {"max_in_flight": 3, "retries": 0, "checkpoint": checkpoint}
    first = await collect(TASKS, lambda: Agent(client, tools=[act]), **options)
    assert sum(outcome.error is not None for outcome in first) == 6
    is_broken = False
    before = len(generations(scripted_server))
    second = await collect([*TASKS, TASKS[0]], lambda: Agent(client, tools=[act]), **options)
    texts = {outcome.index: outcome.result.text for outcome in second if outcome.result is not None}
    assert texts == {number: f"{task} is done" for number, task in enumerate([*TASKS, TASKS[0]])}
    # Six runs went on with their last round, and the task that was added, which is equal to another one, was done.
    assert len(generations(scripted_server)) - before == 6 + 2
    assert made == Counter([*TASKS, TASKS[0]])
    assert len(await Journal(checkpoint).runs()) == 13


async def test_a_retry_goes_on_from_the_checkpoint(
    scripted_server: ScriptedServer, client: LLMClient, tmp_path: Path
) -> None:
    made = []

    def act() -> str:
        """Acts."""
        made.append(1)
        return "done"

    scripted_server.script(calls(asks("act")), reply(400, {"error": "no"}), answer("Done."))
    (outcome,) = await collect(["Go."], lambda: Agent(client, tools=[act]), checkpoint=tmp_path / "fleet.db")
    assert outcome.result is not None
    assert (outcome.result.text, outcome.attempts, made) == ("Done.", 2, [1])


async def test_the_factory_may_be_async_and_is_called_once(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.default = echo
    made = []

    async def make_agent() -> Agent:
        made.append(1)
        return Agent(client)

    assert len(await collect(TASKS, make_agent)) == 12
    assert made == [1]


class Failing:
    """An agent of another kind, whose runs raise anything."""

    async def run(self, task: Any, **options: Any) -> RunResult:
        raise ZeroDivisionError(task)


async def test_any_object_with_a_method_run_can_be_the_agent() -> None:
    outcomes = await collect(["a", "b"], Failing, retries=0)
    assert {(str(outcome.error), type(outcome.error)) for outcome in outcomes} == {
        ("a", ZeroDivisionError),
        ("b", ZeroDivisionError),
    }


class CancelledAtFirst:
    """An agent whose first run is cancelled by something else than the fleet."""

    def __init__(self) -> None:
        self.runs = 0

    async def run(self, task: Any, **options: Any) -> RunResult:
        self.runs += 1
        if self.runs == 1:
            raise asyncio.CancelledError
        raise ZeroDivisionError(task)


async def test_a_run_that_something_else_cancels_is_one_that_has_failed() -> None:
    outcomes = await collect(["a", "b"], CancelledAtFirst, retries=0, max_in_flight=1)
    assert [(outcome.task, type(outcome.error)) for outcome in outcomes] == [
        ("a", TaskCancelledError),
        ("b", ZeroDivisionError),
    ]


async def test_a_factory_or_tasks_that_fail_raise_their_error(client: LLMClient) -> None:
    def fail() -> Agent:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await collect(TASKS, fail)
    with pytest.raises(LLMValidationError, match="agent_factory"):
        await collect(TASKS, lambda: 7)
    with pytest.raises(ZeroDivisionError):
        await collect((1 / 0 for _ in range(3)), lambda: Agent(client))
    assert await collect([], lambda: Agent(client)) == []


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"tasks": "Go."}, "tasks must be"),
        ({"agent_factory": 7}, "agent_factory must be"),
        ({"backend": "threads"}, "backend must be"),
        ({"max_in_flight": 0}, "max_in_flight must be"),
        ({"retries": -1}, "retries must be"),
        ({"on_progress": 7}, "on_progress must be"),
        ({"checkpoint": 7}, "path must be"),
    ],
)
def test_wrong_arguments_are_errors_at_once(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(LLMValidationError, match=text):
        map_runs(**{"tasks": ["Go."], "agent_factory": Failing, **wrong})


def test_a_progress_bar_draws_only_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = FleetProgress(total=4, done=2, failed=1, in_flight=1)
    bar = ProgressBar()
    bar(progress)
    bar.stop()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    bar = ProgressBar("night")
    bar(progress)
    bar.stop()
    drawn = capsys.readouterr().err
    assert "night" in drawn
    assert "3/4" in drawn
    assert "1 failed" in drawn


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lmbridge.fleet.ray_backend", raising=False)
    with pytest.raises(ImportError, match=re.escape("pip install 'lmbridge[ray]'")):
        map_runs(["Go."], Failing, backend="ray")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'lmbridge[cli]'")):
        ProgressBar()
