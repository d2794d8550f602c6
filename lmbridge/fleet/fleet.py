"""`map_runs`: runs an agent on many tasks, and yields their outcomes as they finish.

The runs belong to a task group in a background task, and their outcomes reach the program through a bounded queue. A
generator with the task group around its `yield` would be shorter, but a cancellation by the group would then be raised
in the code of the program, between two outcomes.

What a `checkpoint` changes about a task is decided in `attempts`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sized
from typing import Final, Literal, TypeAlias, get_args

from lmbridge._checks import check_callable, check_choice, check_integer, invalid_argument
from lmbridge._tasks import end_task
from lmbridge.agent.journal import Journal
from lmbridge.agent.settings import Task
from lmbridge.errors import LLMValidationError
from lmbridge.fleet.attempts import AgentFactory, FleetTask, TaskNames
from lmbridge.fleet.backend import AsyncioBackend, Backend
from lmbridge.fleet.outcome import FleetProgress, Outcome
from lmbridge.fleet.progress_bar import ProgressBar

BackendName: TypeAlias = Literal["asyncio", "ray"]
"""Where the tasks of a fleet run: in this event loop, or in the processes of a Ray cluster."""

_TASKS_HINT: Final = "pass a list or another iterable of tasks, each a string or a list of content parts"


def map_runs(
    tasks: Iterable[Task],
    agent_factory: AgentFactory,
    *,
    backend: BackendName = "asyncio",
    max_in_flight: int = 100,
    retries: int = 2,
    checkpoint: Journal | str | os.PathLike[str] | None = None,
    on_progress: Callable[[FleetProgress], object] | None = None,
) -> AsyncGenerator[Outcome, None]:
    """Runs an agent on many tasks, and yields the outcome of each task as soon as there is one, in any order.

    A task that fails does not stop the others. Its outcome contains the error::

        async for outcome in map_runs(tasks, make_agent, checkpoint="night.db"):
            print(outcome.task, outcome.error or outcome.result.text)

    If the loop is left early, all runs are cancelled and awaited, so that the server stops generating. Use
    `contextlib.aclosing` if the program has to wait for that before it goes on.

    Args:
        tasks: The tasks, as for `Agent.run`. An iterator is read only as fast as the tasks are run, so it may be
            endless.
        agent_factory: A function that returns the agent. It is called once in this process, or once in each process of
            a cluster. It may be async. It may also return an async context manager of the agent, which is exited at the
            end, and can open and close the client of the agent.
        backend: "asyncio" runs the tasks in this event loop, and "ray" in the processes of a Ray cluster, which needs
            `lmbridge[ray]`. Default: "asyncio".
        max_in_flight: How many runs may be in progress at the same time, in all processes together. Default: 100.
            More runs than the server has slots are only useful if tools take long. A run fails if one of its requests
            waits longer than the `max_queue` of its client (600 seconds by default).
        retries: How many times a task that fails is tried again. With a checkpoint, its run continues where it stopped.
            A task is not tried again if it is invalid, if its run ended at one of its limits, or if the journal cannot
            be used. Ray also repeats a task up to this many times if its process dies. Default: 2.
        checkpoint: A journal that keeps each step of all runs, as for `Agent.run`. A second call with the same tasks
            takes the results of finished tasks from the journal, and continues the others. Default: none.
        on_progress: A function that is called with a `FleetProgress` after each outcome, such as a `ProgressBar`, which
            draws it. Default: none.

    Raises:
        LLMValidationError: An argument is invalid.
        ImportError: The backend is "ray", and Ray is not installed.
        Exception: While the outcomes are read: what `agent_factory`, the iterator of the tasks or `on_progress` raised.
            It ends the fleet.
    """
    if isinstance(tasks, str | bytes | Mapping) or not isinstance(tasks, Iterable):
        raise invalid_argument("tasks", "an iterable of tasks", tasks, _TASKS_HINT)
    check_callable("agent_factory", agent_factory, hint="pass a function that returns an Agent")
    check_choice("backend", backend, get_args(BackendName))
    check_integer("max_in_flight", max_in_flight)
    check_integer("retries", retries, minimum=0)
    check_callable("on_progress", on_progress, optional=True)
    path = None
    if checkpoint is not None:
        path = checkpoint.path if isinstance(checkpoint, Journal) else Journal(checkpoint).path
    total = len(tasks) if isinstance(tasks, Sized) else None
    slots = max_in_flight if total is None else max(1, min(max_in_flight, total))
    fleet = Fleet(
        tasks,
        _make_backend(backend, agent_factory, slots=slots, retries=retries, checkpoint=path),
        names=None if path is None else TaskNames(),
        slots=slots,
        total=total,
        on_progress=on_progress,
    )
    return _outcomes(fleet)


async def _outcomes(fleet: Fleet) -> AsyncGenerator[Outcome, None]:
    try:
        while (outcome := await fleet.next()) is not None:
            yield outcome
    finally:
        await fleet.close()


def _make_backend(
    name: BackendName, factory: AgentFactory, *, slots: int, retries: int, checkpoint: str | None
) -> Backend:
    if name == "asyncio":
        return AsyncioBackend(factory, retries=retries, checkpoint=checkpoint)
    # Ray is an extra, and takes a second to import.
    from lmbridge.fleet.ray_backend import RayBackend  # noqa: PLC0415

    return RayBackend(factory, slots=slots, retries=retries, checkpoint=checkpoint)


class Fleet:
    """The runs of one call of `map_runs`.

    Args:
        tasks: The tasks.
        backend: Runs them.
        names: Gives the tasks ids for their runs; None without a checkpoint.
        slots: How many runs may be in progress at the same time.
        total: How many tasks there are; None if that is unknown.
        on_progress: A function that is called after each outcome, or None.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        backend: Backend,
        *,
        names: TaskNames | None,
        slots: int,
        total: int | None,
        on_progress: Callable[[FleetProgress], object] | None,
    ) -> None:
        self._tasks = enumerate(tasks)
        self._backend = backend
        self._names = names
        self._slots = slots
        self._total = total
        self._on_progress = on_progress
        self._in_flight = 0
        self._done = 0
        self._failed = 0
        # The queue is bounded, so that a slow program slows the runs down and outcomes do not pile up.
        self._outcomes: asyncio.Queue[Outcome] = asyncio.Queue(maxsize=slots)
        self._work: asyncio.Task[None] | None = None

    async def next(self) -> Outcome | None:
        """Returns the next outcome, or None if there are no more.

        Raises:
            Exception: The backend could not be opened, or the iterator of the tasks or `on_progress` raised it.
        """
        if self._work is None:
            self._work = asyncio.create_task(self._run_all(), name="lmbridge-fleet")
        if self._outcomes.empty():
            getting = asyncio.ensure_future(self._outcomes.get())
            try:
                await asyncio.wait({getting, self._work}, return_when=asyncio.FIRST_COMPLETED)
            except BaseException:
                getting.cancel()
                raise
            if getting.done():
                outcome = getting.result()
            else:
                # The work has ended. No outcome is left, because each outcome wakes this reader before the work ends.
                getting.cancel()
                self._raise_failure()
                return None
        else:
            outcome = self._outcomes.get_nowait()
        self._report(outcome)
        return outcome

    def _raise_failure(self) -> None:
        if self._work is not None and not self._work.cancelled() and (error := self._work.exception()) is not None:
            # All slots fail for the same reason, so the first error is enough.
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error

    async def close(self) -> None:
        """Cancels the runs that are in progress, and waits until they have ended. Calling it again does nothing."""
        if isinstance(self._on_progress, ProgressBar):
            self._on_progress.stop()
        if self._work is not None:
            await end_task(self._work)

    async def _run_all(self) -> None:
        async with self._backend, asyncio.TaskGroup() as group:
            for slot in range(self._slots):
                group.create_task(self._run_slot(slot), name=f"lmbridge-fleet-{slot}")

    async def _run_slot(self, slot: int) -> None:
        for index, task in self._tasks:
            self._in_flight += 1
            try:
                outcome = await self._run_task(slot, index, task)
            finally:
                self._in_flight -= 1
            await self._outcomes.put(outcome)

    async def _run_task(self, slot: int, index: int, task: Task) -> Outcome:
        try:
            run_id = None if self._names is None else self._names.name(task)
        except LLMValidationError as error:
            return Outcome(index=index, task=task, error=error)
        return await self._backend.run(slot, FleetTask(index, task, run_id))

    def _report(self, outcome: Outcome) -> None:
        if outcome.error is None:
            self._done += 1
        else:
            self._failed += 1
        if self._on_progress is not None:
            self._on_progress(
                FleetProgress(total=self._total, done=self._done, failed=self._failed, in_flight=self._in_flight)
            )
