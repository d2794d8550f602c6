"""Tasks of our own, and who cancelled them: we, or the task that awaits them.

A cancel by lmbridge hits only such a task, and comes out of it as an error of ours. A cancel of the caller's own task
is passed on to it, waited for, and goes on as the plain `asyncio.CancelledError` that it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from lmbridge.errors import TaskCancelledError

T = TypeVar("T")


class OwnTask(Generic[T]):
    """A task that only we cancel, with the error to tell.

    Args:
        coroutine: What it does.
        name: Its name, for debuggers.
        complete: Adds to the error of a cancel what is known only at the end.
    """

    def __init__(
        self, coroutine: Coroutine[Any, Any, T], *, name: str, complete: Callable[[TaskCancelledError], None]
    ) -> None:
        self._complete = complete
        self._error: TaskCancelledError | None = None
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(coroutine, name=name)

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._task.done()

    @property
    def was_cancelled(self) -> bool:
        """Whether it has ended by a cancel."""
        return self._task.cancelled()

    @property
    def stopping(self) -> bool:
        """Whether it was cancelled; it may still be cleaning up."""
        return self._error is not None or self._task.cancelling() > 0

    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Has a function called once it has ended."""
        self._task.add_done_callback(lambda _: callback())

    def cancel(self, error: TaskCancelledError) -> bool:
        """Cancels it, without waiting for its end; of several errors the first one is told.

        Returns:
            False if it had ended before.
        """
        if self._task.done():
            return False
        self._error = self._error or error
        self._task.cancel()
        return True

    def cancel_from_anywhere(self, error: TaskCancelledError) -> None:
        """Cancels it from any thread, or from a finalizer."""
        if not self._task.done() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.cancel, error)

    async def end(self, error: TaskCancelledError) -> None:
        """Cancels it and waits until it has ended; being cancelled itself, it goes on waiting before it raises."""
        self.cancel(error)
        cancelled: asyncio.CancelledError | None = None
        while not self._task.done():
            try:
                await asyncio.wait((self._task,))
            except asyncio.CancelledError as exc:
                cancelled = exc
                self._task.cancel()  # as often as the caller is: what it does to clean up may hang
        if not self._task.cancelled():
            self._task.exception()  # whoever ends it does not ask; asyncio would log that nobody did
        if cancelled is not None:
            raise cancelled

    async def wait(self) -> None:
        """Waits until it has ended. A cancel of the caller cancels it as well, and is raised when it has ended."""
        try:
            await asyncio.wait((self._task,))
        except asyncio.CancelledError:
            await self.end(TaskCancelledError("the run was cancelled, as was a task that awaited it"))
            raise

    def outcome(self) -> T:
        """What came of it.

        Raises:
            TaskCancelledError: it was cancelled.
            Exception: what it raised.
        """
        if not self._task.cancelled():
            return self._task.result()
        raise self._cancelled()

    def _cancelled(self) -> TaskCancelledError:
        self._error = self._error or TaskCancelledError("the run's own task was cancelled: its event loop is ending")
        if self._error.partial is None:
            self._complete(self._error)
        return self._error

    def check(self) -> None:
        """Goes on with the cancel if something swallowed it; to be called within the task.

        Raises:
            asyncio.CancelledError: it was cancelled.
        """
        if self._error is not None:
            raise asyncio.CancelledError
