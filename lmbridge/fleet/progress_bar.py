"""`ProgressBar`: draws the progress of a fleet on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lmbridge.fleet.outcome import FleetProgress

if TYPE_CHECKING:
    from rich.progress import Progress


class ProgressBar:
    """Draws the progress of a fleet on the standard error output if that is a terminal, and does nothing otherwise.

    Example::

        async for outcome in map_runs(tasks, make_agent, on_progress=ProgressBar()):
            ...

    Args:
        description: The text before the bar. Default: "runs".

    Raises:
        ImportError: There is a terminal, but rich is not installed.
    """

    def __init__(self, description: str = "runs") -> None:
        self._description = description
        self._progress = _make_progress() if sys.stderr.isatty() else None
        self._bar = None if self._progress is None else self._progress.add_task(description, total=None, failed="")

    def __call__(self, progress: FleetProgress) -> None:
        """Draws the progress."""
        if self._progress is None or self._bar is None:
            return
        self._progress.start()
        ended = progress.done + progress.failed
        failed = f"{progress.failed} failed" if progress.failed else ""
        self._progress.update(self._bar, completed=ended, total=progress.total, failed=failed, refresh=True)

    def stop(self) -> None:
        """Stops drawing, and leaves the bar on the screen. The fleet calls this method at its end."""
        if self._progress is not None:
            self._progress.stop()


def _make_progress() -> Progress:
    try:
        # rich is an extra.
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415 - see above
    except ImportError as exc:
        raise ImportError("the progress bar needs rich: pip install 'lmbridge[cli]'", name="rich") from exc
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[red]{task.fields[failed]}"),
    )
    return Progress(*columns, console=Console(stderr=True))
