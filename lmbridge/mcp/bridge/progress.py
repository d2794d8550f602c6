"""Sends the progress notifications of a call, and limits how often they are sent."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Final

from lmbridge.mcp.sdk.server_session import ReportProgress

_REPORT_INTERVAL_SECONDS: Final = 0.5
"""The minimum time between two notifications while an answer streams in, in seconds."""


class HostProgressReporter:
    """Reports the progress of one call to the host.

    The total is not known in advance, so the reported number only counts what has happened so far.

    Args:
        report: Sends a notification; None if the host did not ask for progress.
    """

    def __init__(self, report: ReportProgress | None) -> None:
        self._report = report
        self._count = 0
        self._next_report_at = 0.0

    async def step(self, message: str) -> None:
        """Reports an event that the host should always see, such as a new round of a run."""
        self._count += 1
        if self._report is not None:
            self._next_report_at = asyncio.get_running_loop().time() + _REPORT_INTERVAL_SECONDS
            await self._report(self._count, message)

    async def tick(self, message: str) -> None:
        """Counts an event that happens often, such as a chunk, and reports it if the last report is old enough."""
        if asyncio.get_running_loop().time() >= self._next_report_at:
            await self.step(message)
        else:
            self._count += 1


current_progress: Final[ContextVar[HostProgressReporter]] = ContextVar("lmbridge_bridge_progress")
"""The progress reporter of the current call. The bridge sets it before it calls the function of a tool."""
