"""Helpers that the tests of journals share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmbridge import Agent, JournalEntry, RunHandle, TaskCancelledError
from lmbridge.agent.journal.database import Database
from lmbridge.testing import Behaviour, ScriptedServer, stall


async def interrupt(handle: RunHandle[Any]) -> None:
    """Ends a run as if its program had been interrupted: a cancelled run is one that can go on."""
    handle.cancel()
    with pytest.raises(TaskCancelledError):
        await handle.result()


async def interrupt_after(
    server: ScriptedServer,
    agent: Agent,
    journal: Path | JournalEntry,
    *replies: Behaviour,
    task: Any = "Go.",
    **options: Any,
) -> RunHandle[Any]:
    """Begins a run, and interrupts it in the generation after the given replies."""
    server.script(*replies, stall())
    handle = agent.start(task, journal=journal, **options)
    # The last behaviour, which never replies, is the one that is running.
    await server.wait_until(lambda: server.in_flight == 1 and not server._script)
    await interrupt(handle)
    return handle


class Counted:
    """A tool that counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def act(self, name: str) -> str:
        """Acts."""
        self.calls.append(name)
        return f"{name} is done"


def hold_writes(monkeypatch: pytest.MonkeyPatch, wait: Callable[[], object]) -> asyncio.Event:
    """Makes each further step wait in the thread of the journal. The event is set when the first one does."""
    loop, begun = asyncio.get_running_loop(), asyncio.Event()
    add_steps = Database.add_steps

    def held(self: Database, *args: Any) -> None:
        loop.call_soon_threadsafe(begun.set)
        wait()
        add_steps(self, *args)

    monkeypatch.setattr(Database, "add_steps", held)
    return begun
