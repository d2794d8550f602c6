"""`PauseGate`: holds a run between two of its steps, for example while a person decides something.

A generation or a tool that is in progress is not interrupted: its result would be lost, and making the call again could
have its effect twice. So a paused run stops before its next generation or call.
"""

from __future__ import annotations

import asyncio


class PauseGate:
    """Lets a run pass while it is open, and holds the run while it is closed."""

    def __init__(self) -> None:
        self._opened: asyncio.Future[None] | None = None

    @property
    def is_closed(self) -> bool:
        """Whether the gate is closed, so that the run is held when it reaches the gate."""
        return self._opened is not None

    def close(self) -> None:
        """Closes the gate. The run is held when it reaches the gate."""
        self._opened = self._opened or asyncio.get_running_loop().create_future()

    def open(self) -> None:
        """Opens the gate, and lets the tasks that are waiting at it pass."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.set_result(None)

    async def wait(self) -> None:
        """Waits until the gate is open. Several tasks may wait at the same time."""
        while self._opened is not None:
            await asyncio.shield(self._opened)
