"""`Backend`, which runs the tasks of a fleet somewhere, and `AsyncioBackend`, which runs them in this process."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import TracebackType
from typing import Protocol, Self

from lmbridge.agent.journal import JournalEntry
from lmbridge.fleet.attempts import AgentFactory, FleetTask, RunsTasks, opened_agent, run_task
from lmbridge.fleet.outcome import Outcome


class Backend(Protocol):
    """Runs the tasks of a fleet. It is an async context manager, in whose block `run` can be called."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends all runs that are still in progress. Their generations on the server are cancelled as well."""
        ...

    async def run(self, slot: int, task: FleetTask) -> Outcome:
        """Runs a task.

        Args:
            slot: The number of the slot, beginning with 0. A slot has one run at a time.
            task: The task.

        Raises:
            Exception: The agent factory raised it. It ends the fleet.
        """
        ...


class AsyncioBackend:
    """Runs all tasks in this event loop, with one agent.

    Args:
        factory: Makes the agent.
        retries: How many times a run that failed is tried again.
        checkpoint: The path of the journal of the fleet, or None.
    """

    def __init__(self, factory: AgentFactory, *, retries: int, checkpoint: str | None) -> None:
        self._factory = factory
        self._retries = retries
        self._checkpoint = checkpoint
        self._stack = AsyncExitStack()
        self._agent: RunsTasks | None = None

    async def __aenter__(self) -> Self:
        self._agent = await self._stack.enter_async_context(opened_agent(self._factory))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def run(self, slot: int, task: FleetTask) -> Outcome:  # noqa: ARG002 - all slots share the agent
        """See `Backend`."""
        if self._agent is None:
            raise RuntimeError("the backend is not open")
        checkpoint = self._checkpoint
        entry = None if checkpoint is None else lambda run_id: JournalEntry(checkpoint, run_id=run_id)
        return await run_task(self._agent, task, retries=self._retries, entry=entry)
