"""Give-backs that a cancel cannot cut short, and threads that a cancel waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TypeVar

_T = TypeVar("_T")


async def settle(work: Awaitable[_T]) -> _T:
    """Waits until the work is done, also if the caller is cancelled meanwhile; the cancel goes on after that.

    For work that is bounded and must not be left half done: a give-back, or a thread, which nothing can stop.
    """
    task = asyncio.ensure_future(work)
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # looked at, so that asyncio does not report it as lost: the cancel is what counts
    raise cancelled


@asynccontextmanager
async def in_thread(manager: AbstractContextManager[_T]) -> AsyncIterator[_T]:
    """Enters and leaves a blocking context manager off the event loop."""
    entering = asyncio.ensure_future(asyncio.to_thread(manager.__enter__))

    async def leave() -> None:
        await asyncio.wait({entering})
        if entering.exception() is None:
            await asyncio.to_thread(manager.__exit__, None, None, None)

    try:
        yield await asyncio.shield(entering)
    finally:
        await settle(leave())
