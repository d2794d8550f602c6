"""`RayBackend`: runs the tasks of a fleet in the processes of a Ray cluster. No other module imports Ray.

Ray Core does all that a fleet of processes needs: it distributes the processes, starts a new one when one dies, repeats
the calls that were lost with it, and ends all processes with the program. Each process is an async actor with one
agent, and therefore with one client and one pool of connections. It has as many runs at the same time as its share of
`max_in_flight`. `ray.data` was the alternative, but it works on tables in batches, and cannot cancel a generation.

The checkpoint is a file on one machine. So an actor on the machine of the program opens the file, and all other
processes write through this actor.

Facts about Ray: https://docs.ray.io/en/latest/ray-core/fault_tolerance/actors.html (restarts and repeated calls),
https://docs.ray.io/en/latest/ray-core/actors/async_api.html (async actors, cancellation).
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Final, Self

import attrs

from lmbridge._tasks import settle
from lmbridge.agent.journal import Journal, JournalEntry
from lmbridge.agent.journal.database import StoredStep
from lmbridge.agent.journal.journal import JournalState
from lmbridge.agent.journal.run_store import FileStore, RunStore
from lmbridge.agent.journal.steps import RunStart, Step
from lmbridge.agent.result import RunResult
from lmbridge.errors import LLMError, RunIncompleteError
from lmbridge.fleet.attempts import AgentFactory, FleetTask, RunsTasks, opened_agent, run_task
from lmbridge.fleet.outcome import Outcome

try:
    import ray
    from ray import cloudpickle
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as _error:
    raise ImportError("the backend 'ray' needs Ray: pip install 'lmbridge[ray]'", name="ray") from _error

_CLOSE_SECONDS: Final = 30.0
"""How long the runs may take for their clean-up when a fleet is closed, in seconds."""
_OTHER_CALLS: Final = 4
"""How many other calls an actor can execute at the same time as its runs, such as the one that closes it."""


class _Keeper:
    """The actor that has the file of the checkpoint open.

    Its methods return errors instead of raising them, because Ray would wrap an error that is raised.
    """

    def __init__(self, path: str) -> None:
        self._store = FileStore(path)

    async def open_run(self, run_id: str, start: RunStart) -> Any:
        return await _result_or_error(self._store.open_run(run_id, start))

    async def add_step(self, run_id: str, number: int, step: Step, state: JournalState | None) -> Any:
        return await _result_or_error(self._store.add_step(run_id, number, step, state))

    async def release_run(self, run_id: str) -> Any:
        return await _result_or_error(self._store.release_run(run_id))


class _RemoteStore:
    """A `RunStore` that writes the steps of runs through the actor with the file."""

    def __init__(self, path: str, keeper: Any) -> None:
        self._path = path
        self._keeper = keeper

    @property
    def path(self) -> str:
        return self._path

    async def open_run(self, run_id: str, start: RunStart) -> list[StoredStep]:
        steps: list[StoredStep] = _raise_if_error(await self._keeper.open_run.remote(run_id, start))
        return steps

    async def add_step(self, run_id: str, number: int, step: Step, state: JournalState | None) -> None:
        _raise_if_error(await self._keeper.add_step.remote(run_id, number, step, state))

    async def release_run(self, run_id: str) -> None:
        _raise_if_error(await self._keeper.release_run.remote(run_id))


@attrs.frozen
class _RemoteEntry(JournalEntry):
    """A run in a journal that another process has open."""

    store: RunStore | None = attrs.field(default=None, kw_only=True)

    def open_store(self) -> RunStore:
        return super().open_store() if self.store is None else self.store


@attrs.frozen
class _Checkpoint:
    """The path of the checkpoint, and the name of the actor that has it open.

    A worker finds the actor by its name. A handle of the actor would not survive a restart of the worker.
    """

    path: str
    keeper: str


async def _find_entries(checkpoint: _Checkpoint) -> Callable[[str], JournalEntry]:
    """Returns a function that makes the `JournalEntry` of a run in the checkpoint, given the id of the run."""
    keeper = await asyncio.to_thread(ray.get_actor, checkpoint.keeper)
    journal, store = Journal(checkpoint.path), _RemoteStore(checkpoint.path, keeper)
    return lambda run_id: _RemoteEntry(journal, run_id=run_id, store=store)


class _Worker:
    """An actor with an agent, which runs some of the tasks."""

    def __init__(self, factory: AgentFactory, retries: int, checkpoint: _Checkpoint | None) -> None:
        self._factory = factory
        self._retries = retries
        self._checkpoint = checkpoint
        self._entry: Callable[[str], JournalEntry] | None = None
        self._stack = AsyncExitStack()
        self._agent: RunsTasks | None = None
        self._opening = asyncio.Lock()
        self._runs: set[asyncio.Task[Outcome]] = set()

    async def run(self, task: FleetTask) -> Outcome | Exception:
        """Returns the outcome of a task, or the error of the factory."""
        try:
            async with self._opening:
                if self._agent is None:
                    self._entry = None if self._checkpoint is None else await _find_entries(self._checkpoint)
                    self._agent = await self._stack.enter_async_context(opened_agent(self._factory))
        # The factory may raise any error, which the program has to get.
        except Exception as error:  # noqa: BLE001
            return _portable_error(error)
        run = asyncio.ensure_future(run_task(self._agent, task, retries=self._retries, entry=self._entry))
        self._runs.add(run)
        try:
            return _portable(await run)
        finally:
            self._runs.discard(run)

    async def close(self) -> None:
        """Cancels the runs, waits until they have ended, and closes the agent."""
        for run in self._runs:
            run.cancel()
        if self._runs:
            await asyncio.wait(self._runs)
        await self._stack.aclose()


class RayBackend:
    """Runs the tasks in async actors of a Ray cluster, with at most one actor for each processor of the cluster.

    If the program has not called `ray.init` itself, the backend does so, and disconnects from the cluster at the end.

    Args:
        factory: Makes the agent in each process. Ray sends the function to the processes, so it must not hold a
            connection.
        slots: How many runs may be in progress at the same time.
        retries: How many times a run that failed, or that was lost with its process, is tried again.
        checkpoint: The path of the journal of the fleet, or None.
    """

    def __init__(self, factory: AgentFactory, *, slots: int, retries: int, checkpoint: str | None) -> None:
        self._factory = factory
        self._slots = slots
        self._retries = retries
        self._checkpoint = checkpoint
        self._owns_connection = False
        self._keeper: Any = None
        self._workers: list[Any] = []

    async def __aenter__(self) -> Self:
        try:
            await settle(asyncio.to_thread(self._start))
        except BaseException:
            # `__aexit__` is not called now. The thread may have connected to the cluster and created actors, even if
            # the caller was cancelled. The actors can be killed, because they have no runs yet.
            await settle(asyncio.to_thread(self._kill))
            raise
        return self

    def _start(self) -> None:
        if not ray.is_initialized():
            # Set before `ray.init`, so that the processes are ended even if only some of them could be started.
            self._owns_connection = True
            ray.init(log_to_driver=False)
        checkpoint = None
        if self._checkpoint is not None:
            checkpoint = _Checkpoint(self._checkpoint, f"lmbridge-checkpoint-{os.urandom(8).hex()}")
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            # Ray does not repeat calls of this actor. If it is uncertain whether a step was written, the run fails, and
            # the next attempt continues from what is in the file.
            options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 1000, "scheduling_strategy": here}
            self._keeper = ray.remote(_Keeper).options(name=checkpoint.keeper, **options).remote(checkpoint.path)
        # This function of Ray has no types.
        cluster: Any = ray
        processors = int(cluster.cluster_resources().get("CPU", 1))
        number = max(1, min(processors, self._slots))
        share = -(-self._slots // number)
        actor = ray.remote(_Worker).options(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=self._retries,
            max_concurrency=share + _OTHER_CALLS,
            scheduling_strategy="SPREAD",
        )
        for _ in range(number):
            self._workers.append(actor.remote(self._factory, self._retries, checkpoint))

    async def run(self, slot: int, task: FleetTask) -> Outcome:
        """See `Backend`."""
        worker = self._workers[slot % len(self._workers)]
        try:
            outcome: Outcome | Exception = await worker.run.remote(task)
        except RayError as error:
            # Ray raises a RayTaskError if the process is still there, and something in it went wrong.
            problem = "Ray could not run the task" if isinstance(error, RayTaskError) else "its process was lost"
            lost = LLMError(
                f"the run has no outcome, because {problem}: {error}",
                error,
                hint="see the log of Ray; if there is a checkpoint, the run can be resumed from it",
                context={"operation": "agent run"},
            )
            return Outcome(index=task.index, task=task.task, error=lost, attempts=self._retries + 1)
        if isinstance(outcome, Exception):
            raise outcome
        # The program gets its own task object, and not the copy that came back from the other process.
        return attrs.evolve(outcome, task=task.task)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await settle(self._close())

    async def _close(self) -> None:
        closing = [asyncio.ensure_future(_awaited(worker.close.remote())) for worker in self._workers]
        if closing:
            await asyncio.wait(closing, timeout=_CLOSE_SECONDS)
        for each in closing:
            each.cancel()
        await asyncio.to_thread(self._kill)

    def _kill(self) -> None:
        try:
            for actor in itertools.chain(self._workers, [] if self._keeper is None else [self._keeper]):
                ray.kill(actor, no_restart=True)
        finally:
            if self._owns_connection:
                ray.shutdown()


async def _awaited(reference: Awaitable[Any]) -> None:
    try:
        await reference
    except RayError:
        # The process is gone, and so are its connections.
        return


async def _result_or_error(work: Awaitable[Any]) -> Any:
    """Returns the result of some work, or the error that it raised."""
    try:
        return await work
    except LLMError as error:
        return error


def _raise_if_error(value: Any) -> Any:
    """Returns a value that `_result_or_error` has returned, or raises it if it is an error."""
    if isinstance(value, LLMError):
        raise value
    return value


def _portable(outcome: Outcome) -> Outcome:
    """Returns an outcome that can be sent to another process. It has neither the tools nor their raw results.

    If the output of the run cannot be sent, the outcome is an error that says so.
    """
    if outcome.error is not None:
        return attrs.evolve(outcome, error=_portable_error(outcome.error))
    if outcome.result is None:
        return outcome
    result = _portable_result(outcome.result)
    problem = _pickling_error(result.output)
    if problem is None:
        return attrs.evolve(outcome, result=result)
    error = LLMError(
        f"the output of the run, of type {type(result.output).__name__}, cannot be sent from its process to the"
        f" program: {problem}",
        problem,
        hint="use an output_type whose instances can be pickled, or backend='asyncio'",
        context={"operation": "agent run", "model": result.model},
        partial=attrs.evolve(result, output=None),
    )
    return attrs.evolve(outcome, result=None, error=error)


def _portable_result(result: RunResult) -> RunResult:
    calls = tuple(attrs.evolve(call, tool=None) for call in result.tool_calls)
    rounds = tuple(
        attrs.evolve(
            each,
            tool_calls=tuple(
                attrs.evolve(
                    record,
                    call=attrs.evolve(record.call, tool=None),
                    edited=None if record.edited is None else attrs.evolve(record.edited, tool=None),
                    raw=None,
                )
                for record in each.tool_calls
            ),
        )
        for each in result.log
    )
    errors = {name: _portable_error(error) for name, error in result.errors.items()}
    return attrs.evolve(result, tool_calls=calls, log=rounds, errors=errors)


def _portable_error(error: Exception) -> Exception:
    """Returns an error that can be sent to another process: the error itself if it can be pickled."""
    if isinstance(error, LLMError) and isinstance(error.partial, RunResult):
        error.partial = _portable_result(error.partial)
    if isinstance(error, RunIncompleteError) and isinstance(error.result, RunResult):
        error.result = _portable_result(error.result)
    return error if _pickling_error(error) is None else LLMError(f"{type(error).__name__}: {error}")


def _pickling_error(value: Any) -> Exception | None:
    """Returns the error that is raised if a value is pickled as Ray does it, or None if it can be pickled."""
    # The functions of Ray's pickler have no types.
    pickler: Any = cloudpickle
    try:
        pickler.loads(pickler.dumps(value))
    except Exception as error:  # noqa: BLE001 - a foreign class may raise anything here
        return error
    return None
