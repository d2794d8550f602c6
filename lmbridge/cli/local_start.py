"""Starts the embedded server for a command, and shows the download of its model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lmbridge.cli.terminal import Terminal
from lmbridge.local import LocalServer


@asynccontextmanager
async def start_local(model: str | None, terminal: Terminal) -> AsyncIterator[LocalServer]:
    """Yields a running embedded server, which is stopped at the end of the block.

    Args:
        model: The path of a GGUF file, or None for the small model that is downloaded once.
        terminal: Shows the progress.

    Raises:
        ImportError: The extra `local` is not installed.
        LLMError: The server does not start.
    """
    with terminal.waiting("starting the embedded server ...") as show:

        def show_download(done: int, total: int) -> None:
            show(f"downloading its model, once: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

        server = LocalServer(None if model is None else Path(model), progress=show_download)
        await server.__aenter__()
    try:
        yield server
    finally:
        await server.close()
