"""Runs one task of a fleet. A run that fails is tried again, or resumed if the fleet has a checkpoint."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, Protocol, TypeAlias

import attrs

from lmbridge._checks import invalid_argument
from lmbridge.agent.journal import JournalEntry
from lmbridge.agent.result import RunResult
from lmbridge.agent.settings import Task, check_task
from lmbridge.client.json_codec import encode_body
from lmbridge.errors import JournalError, LLMValidationError, RunIncompleteError, TaskCancelledError
from lmbridge.fleet.outcome import Outcome

logger: logging.Logger = logging.getLogger("lmbridge.fleet")

_FINAL_ERRORS: Final = (LLMValidationError, RunIncompleteError, JournalError)
"""Errors that a second attempt would only repeat: an invalid task, a run at its limits, or an unusable journal."""


class RunsTasks(Protocol):
    """An agent, or another object that runs tasks as `Agent` does."""

    @property
    def run(self) -> Callable[..., Awaitable[RunResult[Any]]]:
        """Runs a task. It is called with the task, and with `journal=` if the fleet has a checkpoint."""
        ...


AgentFactory: TypeAlias = Callable[[], RunsTasks | Awaitable[RunsTasks] | AbstractAsyncContextManager[RunsTasks]]
"""A function that returns the agent of a process, or an async context manager of the agent. It may be async."""


@attrs.frozen
class FleetTask:
    """A task of a fleet."""

    index: int
    """The position of the task among all tasks; the first one is 0."""
    task: Task
    """The task, as the program gave it."""
    run_id: str | None
    """The id of its run in the checkpoint; None without a checkpoint."""


class TaskNames:
    """Gives each task an id for its run. A later fleet with the same tasks gives them the same ids.

    The id depends on the content of the task, and for equal tasks on how many of them came before. So a second fleet
    with the same checkpoint may have additional tasks.
    """

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def name(self, task: Task) -> str:
        """Returns the id for the run of the next task.

        Raises:
            LLMValidationError: The task is not valid.
        """
        digest = hashlib.sha256(encode_body({"task": check_task(task)})).hexdigest()[:32]
        self._times[digest] += 1
        times = self._times[digest]
        return digest if times == 1 else f"{digest}-{times}"


@asynccontextmanager
async def opened_agent(factory: AgentFactory) -> AsyncIterator[RunsTasks]:
    """Makes the agent of this process, and yields it.

    Raises:
        LLMValidationError: The factory returned neither an agent nor an async context manager of one.
    """
    made: Any = factory()
    if isinstance(made, Awaitable):
        made = await made
    if callable(getattr(made, "run", None)):
        yield made
    elif isinstance(made, AbstractAsyncContextManager):
        async with made as agent:
            if not callable(getattr(agent, "run", None)):
                raise invalid_argument("the value of agent_factory()", "an Agent", agent)
            yield agent
    else:
        raise invalid_argument("agent_factory()", "an Agent, or an async context manager of one", made)


async def run_task(
    agent: RunsTasks, task: FleetTask, *, retries: int, entry: Callable[[str], JournalEntry] | None
) -> Outcome:
    """Runs a task until it has a result, or until it has failed too often.

    Args:
        agent: The agent.
        task: The task.
        retries: How many times a run that failed is begun again, or resumed from the checkpoint.
        entry: Returns the `JournalEntry` of a run in the checkpoint, given the id of the run. None if there is no
            checkpoint.
    """
    options: Mapping[str, Any] = {}
    if entry is not None and task.run_id is not None:
        options = {"journal": entry(task.run_id)}
    attempt = 1
    while True:
        try:
            result = await _run(agent, task.task, options)
        # An agent can raise any exception, and a task that fails must not stop the others. The program gets the error.
        except Exception as error:  # noqa: BLE001
            if attempt > retries or isinstance(error, _FINAL_ERRORS):
                return Outcome(index=task.index, task=task.task, error=error, attempts=attempt)
            logger.info("task %d of the fleet failed, and is tried again: %s", task.index, error)
        else:
            return Outcome(index=task.index, task=task.task, result=result, attempts=attempt)
        attempt += 1


async def _run(agent: RunsTasks, task: Task, options: Mapping[str, Any]) -> RunResult[Any]:
    """Runs a task once. A run that was cancelled by something other than the fleet counts as failed.

    Raises:
        TaskCancelledError: Something else has cancelled the run.
    """
    try:
        return await agent.run(task, **options)
    except asyncio.CancelledError as error:
        current = asyncio.current_task()
        if current is None or current.cancelling():
            raise
        # A task group ignores a child task that ends with a CancelledError, so the fleet would lose the outcome.
        raise TaskCancelledError("the run was cancelled, but not by the fleet", error) from error
