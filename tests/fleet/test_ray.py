"""Fleets on a local Ray, with real processes, one of which is killed."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import attrs
import pytest

from lmbridge import Agent, LLMError, LLMResponseError, LocalServer
from lmbridge.fleet import Outcome, map_runs
from lmbridge.gateway import Gateway
from lmbridge.testing import Exchange, ScriptedServer, answer, reply, stall
from tests.agent.support import generations
from tests.real.support import until_idle

pytest.importorskip("ray", reason="needs lmbridge[ray]")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RUNS = 200


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray with two processors, which no other process of this machine can use."""
    import ray  # noqa: PLC0415 - an extra

    with pytest.MonkeyPatch.context() as patch:
        # Ray gives its processes the lowest priority, so that they would wait for all others on a busy machine.
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_raylet_start_wait_time_s", "120")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        yield
        ray.shutdown()


def agent_factory(api_base: str, pids: Path | None = None, **options: Any) -> Any:
    """Returns a factory that Ray sends to its processes by value, so that they need not import this module."""

    def make_agent() -> Any:
        import os  # noqa: PLC0415 - runs in another process
        from collections.abc import AsyncIterator  # noqa: PLC0415 - as above
        from contextlib import asynccontextmanager  # noqa: PLC0415 - as above

        from lmbridge import Agent, LLMClient  # noqa: PLC0415 - as above

        @asynccontextmanager
        async def opened() -> AsyncIterator[Agent]:
            if pids is not None:
                (pids / str(os.getpid())).touch()
            async with LLMClient(api_base) as client:
                yield Agent(client, **options)

        return opened()

    return make_agent


@pytest.mark.usefixtures("cluster")
async def test_errors_and_results_come_back_as_they_were(scripted_server: ScriptedServer) -> None:
    async def fail_for_one(exchange: Exchange) -> None:
        task = exchange.request.json["messages"][-1]["content"]
        await (reply(400, {"error": "no"}) if task == "1" else answer(f"Did {task}."))(exchange)

    scripted_server.default = fail_for_one
    factory = agent_factory(scripted_server.api_base)
    outcomes = [each async for each in map_runs(["0", "1", "2"], factory, backend="ray", retries=1)]
    outcomes.sort(key=lambda outcome: outcome.index)
    assert [outcome.result and outcome.result.text for outcome in outcomes] == ["Did 0.", None, "Did 2."]
    assert isinstance(outcomes[1].error, LLMResponseError)
    assert (outcomes[1].attempts, outcomes[1].error.status) == (2, 400)


@pytest.mark.usefixtures("cluster")
async def test_an_output_that_cannot_be_sent_to_the_program_is_a_named_error(scripted_server: ScriptedServer) -> None:
    @attrs.define
    class Locked:
        number: int

        def __reduce__(self) -> str:
            raise TypeError("it holds a lock")

    scripted_server.default = answer('{"number": 3}')
    factory = agent_factory(scripted_server.api_base, output_type=Locked)
    (outcome,) = [each async for each in map_runs(["0"], factory, backend="ray")]
    assert "the output of the run, of type Locked, cannot be sent" in str(outcome.error)
    assert isinstance(outcome.error, LLMError)
    assert outcome.error.partial.text == '{"number": 3}'


@pytest.mark.usefixtures("cluster")
async def test_leaving_early_stops_the_server(scripted_server: ScriptedServer, tmp_path: Path) -> None:
    scripted_server.script(answer("Done."))
    scripted_server.default = stall()
    tasks, factory = [str(number) for number in range(20)], agent_factory(scripted_server.api_base)
    fleet = map_runs(tasks, factory, backend="ray", max_in_flight=6, checkpoint=tmp_path / "fleet.db")
    async with aclosing(fleet):
        async for _ in fleet:
            await scripted_server.wait_until(lambda: scripted_server.in_flight == 6, timeout=120)
            break
    await scripted_server.wait_until(lambda: not scripted_server.in_flight, timeout=60)
    assert len(scripted_server.aborts) == 6
    scripted_server.default = answer("Done.")
    before = len(generations(scripted_server))
    options: dict[str, Any] = {"backend": "ray", "max_in_flight": 6, "checkpoint": tmp_path / "fleet.db"}
    outcomes = [each async for each in map_runs(tasks, factory, **options)]
    assert [outcome.error for outcome in outcomes] == [None] * 20
    assert len(generations(scripted_server)) - before == 19


@pytest.mark.usefixtures("cluster")
async def test_a_factory_that_fails_raises_its_error() -> None:
    def fail() -> Agent:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async for _ in map_runs(["0"], fail, backend="ray"):
            pass


@pytest.mark.real
@pytest.mark.usefixtures("cluster")
async def test_200_runs_survive_the_death_of_a_process(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    checkpoint, pids = tmp_path / "fleet.db", tmp_path / "pids"
    pids.mkdir()
    tasks = [f"Say the number {number}." for number in range(RUNS)]
    outcomes: list[Outcome] = []
    async with (
        LocalServer(n_ctx=4096, n_parallel=4) as server,
        Gateway(upstreams=[server.api_base]) as gateway,
    ):
        factory = agent_factory(gateway.api_base, pids, max_tokens=2)
        async for outcome in map_runs(tasks, factory, backend="ray", max_in_flight=16, checkpoint=checkpoint):
            outcomes.append(outcome)
            if len(outcomes) == RUNS // 3:
                first = int(min(each.name for each in pids.iterdir()))
                os.kill(first, signal.SIGKILL)
        # The process that was killed had runs in flight: the gateway has to end them, and the server what it generates.
        async with asyncio.timeout(60):
            while gateway.stats().in_flight:
                await asyncio.sleep(0.05)
        await until_idle(server)
    assert sorted(outcome.index for outcome in outcomes) == list(range(RUNS))
    assert [outcome.error for outcome in outcomes if outcome.error is not None] == []
    # A third process has taken the place of the first one.
    assert len(list(pids.iterdir())) == 3
    with closing(sqlite3.connect(checkpoint)) as journal:
        query = "SELECT count(*), count(DISTINCT run) FROM steps WHERE kind = ?"
        counts = {kind: journal.execute(query, (kind,)).fetchone() for kind in ("reply", "ended")}
    # Each run has exactly one reply, so none that had it was repeated.
    assert counts == {"reply": (RUNS, RUNS), "ended": (RUNS, RUNS)}
