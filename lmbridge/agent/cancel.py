"""`OwnTask`: a task that lmbridge has created, and that only lmbridge cancels.

lmbridge cancels only tasks of this kind, and their waiters get an error of lmbridge. When the caller's own task is
cancelled, the `OwnTask` is cancelled as well and awaited, and the caller's `asyncio.CancelledError` is then raised
unchanged. The alternative was to run in the caller's task and to cancel that. The two kinds of cancellation would then
be indistinguishable: a `wait_for` or a `TaskGroup` around the run would take our cancellation for its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from lmbridge._tasks import call_in_loop, end_task
from lmbridge.errors import TaskCancelledError

T = TypeVar("T")


class OwnTask(Generic[T]):
    """A task that only lmbridge cancels, and the error that its waiters get if it is cancelled.

    Args:
        coroutine: The work of the task.
        name: The name of the task, for debuggers.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T], *, name: str) -> None:
        self._error: TaskCancelledError | None = None
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(coroutine, name=name)

    @property
    def done(self) -> bool:
        """Whether the task has ended, with a result or with an error."""
        return self._task.done()

    @property
    def was_cancelled(self) -> bool:
        """Whether the task has ended because it was cancelled."""
        return self._task.cancelled()

    @property
    def stopping(self) -> bool:
        """Whether the task was cancelled; it may still be cleaning up."""
        return self._error is not None or self._task.cancelling() > 0

    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Registers a function that is called when the task has ended."""
        self._task.add_done_callback(lambda _: callback())

    def cancel(self, error: TaskCancelledError) -> bool:
        """Cancels the task, without waiting for its end. After several calls, the waiters get the error of the first.

        Returns:
            False if the task had already ended.
        """
        if self._task.done():
            return False
        self._error = self._error or error
        self._task.cancel()
        return True

    def cancel_from_anywhere(self, error: TaskCancelledError) -> None:
        """Cancels the task from any thread, or from a finalizer."""
        if not self._task.done():
            call_in_loop(self._loop, self.cancel, error)

    async def end(self, error: TaskCancelledError) -> None:
        """Cancels the task and waits until it has ended.

        On cancellation of the caller, the task is cancelled once more, because its clean-up may hang, and the wait
        continues; the cancellation is raised when the task has ended.
        """
        if not self._task.done():
            self._error = self._error or error
        await end_task(self._task)

    async def wait(self) -> None:
        """Waits until the task has ended. If the caller is cancelled, the task is cancelled and awaited first."""
        try:
            await asyncio.wait((self._task,))
        except asyncio.CancelledError:
            await self.end(TaskCancelledError("the run was cancelled, because a task that awaited it was cancelled"))
            raise

    def outcome(self, complete: Callable[[TaskCancelledError], None]) -> T:
        """Returns the result of the task, or raises the error that ended it.

        Args:
            complete: A function that is called with the error of a cancellation, and adds to it what is known only when
                the task has ended. It is passed here, and not to the constructor, because it is a method of the object
                that owns the task: if the two referred to each other, they would stay in memory until the garbage
                collector runs.

        Raises:
            TaskCancelledError: The task was cancelled.
            Exception: Whatever the task raised.
        """
        if not self._task.cancelled():
            return self._task.result()
        self._error = self._error or TaskCancelledError("the run was cancelled, because its event loop is being closed")
        if self._error.partial is None:
            complete(self._error)
        raise self._error

    def raise_if_cancelled(self) -> None:
        """Raises the cancellation again, in case a tool or a callback has suppressed it. Call it within the task.

        Raises:
            asyncio.CancelledError: The task was cancelled.
        """
        if self._error is not None:
            raise asyncio.CancelledError
