"""The parts of the Ray backend that need no cluster."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from lmbridge import Agent, LLMClient, LLMError, MaxRoundsExceededError, MCPConnectionError, RunResult, ToolCall
from lmbridge.fleet import Outcome
from lmbridge.testing import ScriptedServer, answer
from tests.agent.support import asks, calls

pytest.importorskip("ray", reason="needs lmbridge[ray]")

import ray
from ray import cloudpickle

from lmbridge.fleet.ray_backend import RayBackend, _portable


class FakeCluster:
    """Stands in for the functions of Ray, and counts what is started and ended.

    Args:
        patch: Replaces the functions.
        fails_at: The number of the actor that cannot be created, or None.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, fails_at: int | None = None) -> None:
        self.begun, self.may_start = threading.Event(), threading.Event()
        self.may_start.set()
        self.created: list[object] = []
        self.killed: list[object] = []
        self.is_connected = False
        self._fails_at = fails_at
        patch.setattr(ray, "is_initialized", lambda: self.is_connected)
        patch.setattr(ray, "init", self._init)
        patch.setattr(ray, "shutdown", self._shutdown)
        patch.setattr(ray, "cluster_resources", lambda: {"CPU": 2})
        patch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0" * 56))
        patch.setattr(ray, "remote", lambda _class: SimpleNamespace(options=self._options))
        patch.setattr(ray, "kill", lambda actor, **_options: self.killed.append(actor))

    def _init(self, **_options: Any) -> None:
        self.begun.set()
        self.may_start.wait(60)
        self.is_connected = True

    def _shutdown(self) -> None:
        self.is_connected = False

    def _options(self, **_options: Any) -> SimpleNamespace:
        return SimpleNamespace(remote=self._create)

    def _create(self, *_arguments: Any) -> object:
        if len(self.created) == self._fails_at:
            raise RuntimeError("no room for another actor")
        self.created.append(object())
        return self.created[-1]


def no_agent() -> Agent:
    raise AssertionError("the factory is only called in the actors")


@pytest.fixture
def make_backend(tmp_path: Path) -> Callable[[], RayBackend]:
    checkpoint = str(tmp_path / "fleet.db")
    return lambda: RayBackend(no_agent, slots=2, retries=0, checkpoint=checkpoint)


async def test_a_backend_whose_opening_is_cancelled_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, make_backend: Callable[[], RayBackend]
) -> None:
    cluster = FakeCluster(monkeypatch)
    cluster.may_start.clear()
    opening = asyncio.ensure_future(make_backend().__aenter__())
    await asyncio.to_thread(cluster.begun.wait, 60)
    opening.cancel()
    await asyncio.sleep(0)
    cluster.may_start.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert len(cluster.created) == 3
    assert sorted(map(id, cluster.killed)) == sorted(map(id, cluster.created))
    assert not cluster.is_connected


@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize("was_connected", [False, True])
async def test_a_backend_that_cannot_be_opened_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, make_backend: Callable[[], RayBackend], fails_at: int, was_connected: bool
) -> None:
    cluster = FakeCluster(monkeypatch, fails_at=fails_at)
    cluster.is_connected = was_connected
    with pytest.raises(RuntimeError, match="no room"):
        await make_backend().__aenter__()
    assert len(cluster.created) == fails_at
    assert sorted(map(id, cluster.killed)) == sorted(map(id, cluster.created))
    assert cluster.is_connected is was_connected, "a connection of the program stays"


# What is sent from one process to another


def unpicklable_tool(number: int) -> object:
    """Returns something that cannot be pickled."""
    return SimpleNamespace(number=number, lock=threading.Lock())


@attrs.define
class Locked:
    """An output that cannot be pickled."""

    number: int
    lock: Any = attrs.field(init=False, factory=threading.Lock)


def through_pickle(outcome: Outcome) -> Outcome:
    """Sends an outcome from one process to another, in effect."""
    pickler: Any = cloudpickle
    sent: Outcome = pickler.loads(pickler.dumps(_portable(outcome)))
    return sent


async def run_edited(server: ScriptedServer, **options: Any) -> RunResult:
    def approve(call: ToolCall) -> ToolCall:
        return attrs.evolve(call, arguments={"number": 2})

    lock = threading.Lock()

    def locked_tool(number: int) -> object:
        """Returns something that cannot be pickled, and cannot be pickled itself."""
        with lock:
            return unpicklable_tool(number)

    server.script(calls(asks("locked_tool", number=1)), answer('{"number": 3}'))
    async with LLMClient(server.api_base, "test-model") as client:
        return await Agent(client, tools=[locked_tool], approve=approve, **options).run("Go.")


async def test_a_result_keeps_the_calls_that_were_made_in_place_of_others(scripted_server: ScriptedServer) -> None:
    outcome = through_pickle(Outcome(index=0, task="Go.", result=await run_edited(scripted_server)))
    assert outcome.result is not None
    (record,) = outcome.result.log[0].tool_calls
    assert record.edited is not None
    assert (record.call.arguments, record.edited.arguments) == ({"number": 1}, {"number": 2})
    assert (record.call.tool, record.edited.tool, record.raw) == (None, None, None)


async def test_the_result_in_an_error_keeps_its_calls(scripted_server: ScriptedServer) -> None:
    with pytest.raises(MaxRoundsExceededError) as caught:
        await run_edited(scripted_server, max_rounds=1)
    error = through_pickle(Outcome(index=0, task="Go.", error=caught.value)).error
    assert isinstance(error, MaxRoundsExceededError)
    for result in (error.result, error.partial):
        assert result.log[0].tool_calls[0].edited.arguments == {"number": 2}


async def test_an_output_that_cannot_be_pickled_is_a_named_error(scripted_server: ScriptedServer) -> None:
    result = await run_edited(scripted_server, output_type=Locked)
    outcome = through_pickle(Outcome(index=7, task="Go.", result=result, attempts=2))
    assert (outcome.index, outcome.result, outcome.attempts) == (7, None, 2)
    assert isinstance(outcome.error, LLMError)
    assert "the output of the run, of type Locked, cannot be sent" in str(outcome.error)
    assert "output_type" in str(outcome.error)
    assert (outcome.error.partial.text, outcome.error.partial.output) == ('{"number": 3}', None)


async def test_an_error_of_a_server_that_cannot_be_pickled_becomes_its_text(scripted_server: ScriptedServer) -> None:
    class ForeignError(Exception):
        def __init__(self) -> None:
            super().__init__("no such server")
            self.lock = threading.Lock()

    known = MCPConnectionError("it does not start", server="a")
    result = attrs.evolve(await run_edited(scripted_server), errors={"a": known, "b": ForeignError()})
    outcome = through_pickle(Outcome(index=0, task="Go.", result=result))
    assert outcome.result is not None
    assert isinstance(outcome.result.errors["a"], MCPConnectionError)
    assert isinstance(outcome.result.errors["b"], LLMError)
    assert "ForeignError: no such server" in str(outcome.result.errors["b"])
