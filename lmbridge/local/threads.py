"""Enters and leaves blocking context managers in a thread, so that they do not block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TypeVar

from lmbridge._tasks import settle

_T = TypeVar("_T")


@asynccontextmanager
async def in_thread(manager: AbstractContextManager[_T]) -> AsyncIterator[_T]:
    """Enters and leaves a blocking context manager in a thread.

    On cancellation of the caller, entering or leaving goes on, and the cancellation is raised afterwards. A context
    manager that has been entered is always left. Its `__exit__` is called without an exception, even if the block
    raises one.
    """
    entering = asyncio.ensure_future(asyncio.to_thread(manager.__enter__))

    async def leave() -> None:
        await asyncio.wait({entering})
        if entering.exception() is None:
            await asyncio.to_thread(manager.__exit__, None, None, None)

    try:
        yield await asyncio.shield(entering)
    finally:
        await settle(leave())
