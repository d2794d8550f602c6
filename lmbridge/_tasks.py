"""Helpers for asyncio tasks that more than one layer needs.

They share one rule about cancellation. A cancellation of the caller's own task is never swallowed: a helper may put it
off until a bounded piece of work has ended, and then raises it as the plain `asyncio.CancelledError` that it was. Only
tasks that lmbridge has created itself are cancelled by lmbridge.

anyio's cancel scopes and task groups would do some of this, but they cancel again on every turn of the event loop until
the scope is left, which plain asyncio code in a user's tools is not written for; and anyio is not a dependency of the
layers that need these helpers.
"""

from __future__ import annotations

import asyncio
import copy
import signal
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from typing import Any, Final, Generic, TypeVar

import attrs

from lmbridge.errors import LLMError, TaskCancelledError

_T = TypeVar("_T")

_unfinished: Final[set[asyncio.Future[Any]]] = set()
"""Cancelled tasks that are still running, kept alive because asyncio holds only weak references to tasks."""


async def settle(work: Awaitable[_T]) -> _T:
    """Awaits a piece of work to its end, even if the caller is cancelled meanwhile.

    Use it for work that is bounded and must not be left half done: giving a resource back, or a thread, which nothing
    can stop.

    On cancellation of the caller, the work goes on. Once it has ended, the cancellation is raised; it takes precedence
    over the result and over an exception of the work.
    """
    task = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is None:
        return task.result()
    mark_retrieved(task)
    raise cancellation


async def end_task(task: asyncio.Future[Any], *, grace: float | None = None) -> bool:
    """Cancels a task and waits until it has ended.

    On cancellation of the caller, the task is cancelled once more, because it may hang in its own clean-up, and the
    wait goes on; the cancellation is raised when the task has ended or the grace period is over.

    Args:
        task: A task that lmbridge has created.
        grace: Seconds to wait at most. Default: as long as it takes. A task that is still running after that is kept
            alive until it ends; its result or exception is dropped.

    Returns:
        Whether the task has ended.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace if grace is not None else None
    cancellation: asyncio.CancelledError | None = None
    task.cancel()
    while not task.done() and (deadline is None or loop.time() < deadline):
        try:
            await asyncio.wait({task}, timeout=None if deadline is None else deadline - loop.time())
        except asyncio.CancelledError as error:
            cancellation = error
            task.cancel()
    if task.done():
        mark_retrieved(task)
    else:
        _keep_until_done(task)
    if cancellation is not None:
        raise cancellation
    return task.done()


def _keep_until_done(task: asyncio.Future[Any]) -> None:
    _unfinished.add(task)
    task.add_done_callback(_discard_unfinished)


def _discard_unfinished(task: asyncio.Future[Any]) -> None:
    _unfinished.discard(task)
    mark_retrieved(task)


def mark_retrieved(task: asyncio.Future[Any]) -> None:
    """Marks the exception of a finished task as retrieved, so that asyncio does not log it as unhandled.

    It can be used as a done callback.
    """
    if not task.cancelled():
        task.exception()


@attrs.define(eq=False)
class _SharedCall(Generic[_T]):
    task: asyncio.Task[_T]
    waiters: int = 0


class SingleFlight(Generic[_T]):
    """Lets callers that want the same thing at the same time share one call.

    The first caller for a key starts the call in a separate task; callers that come while it is running wait for the
    same task. Nothing is kept once the call has ended. Calls of different event loops are never shared.

    On cancellation of a caller, the others are not affected. If it was the last one that waited, the call is cancelled
    and the caller waits for its end, unless `keep_going` was set. A second cancellation ends that wait.

    Args:
        cancelled_message: The text of the `TaskCancelledError` that callers get when `cancel_all` ends their call.
        keep_going: Whether a call goes on if every caller was cancelled, because its result is useful without them.
    """

    def __init__(self, cancelled_message: str, *, keep_going: bool = False) -> None:
        self._cancelled_message = cancelled_message
        self._keep_going = keep_going
        self._calls: dict[tuple[asyncio.AbstractEventLoop, Hashable], _SharedCall[_T]] = {}

    async def run(self, key: Hashable, call: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Returns the result of the call that is running for `key`, or of a new one.

        An `LLMError` of the call is copied for each caller, so that callers can complete it independently.

        Raises:
            TaskCancelledError: The call was ended by `cancel_all`.
            Exception: Whatever the call raises.
        """
        shared = self._join(key, call)
        shared.waiters += 1
        try:
            # asyncio.wait leaves the task alone if its caller is cancelled.
            await asyncio.wait((shared.task,))
        except asyncio.CancelledError:
            if shared.waiters == 1 and not self._keep_going:
                # Taken off first: a caller that comes now must not join a call that is being cancelled.
                self._forget(shared.task)
                _keep_until_done(shared.task)
                shared.task.cancel()
                await asyncio.wait((shared.task,))
            raise
        finally:
            shared.waiters -= 1
        if shared.task.cancelled():
            raise TaskCancelledError(self._cancelled_message)
        error = shared.task.exception()
        if isinstance(error, LLMError):
            raise copy.copy(error).with_traceback(error.__traceback__) from error.__cause__
        return shared.task.result()

    async def cancel_all(self) -> None:
        """Cancels the calls of the running event loop, and waits until they have ended.

        On cancellation of the caller, the calls have been cancelled, and end by themselves.
        """
        loop = asyncio.get_running_loop()
        tasks = [shared.task for (owner, _), shared in self._calls.items() if owner is loop]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _join(self, key: Hashable, call: Callable[[], Coroutine[Any, Any, _T]]) -> _SharedCall[_T]:
        loop = asyncio.get_running_loop()
        shared = self._calls.get((loop, key))
        if shared is None or shared.task.done() or shared.task.cancelling():
            shared = self._calls[loop, key] = _SharedCall(loop.create_task(call()))
            shared.task.add_done_callback(self._forget)
            shared.task.add_done_callback(mark_retrieved)
        return shared

    def _forget(self, task: asyncio.Task[_T]) -> None:
        # Calls of loops that were closed before they ended go as well: nothing will ever call back for them.
        self._calls = {
            at: shared for at, shared in self._calls.items() if shared.task is not task and not at[0].is_closed()
        }


class LoopGuard:
    """Binds an object to one event loop at a time, because its futures, sockets and tasks belong to that loop.

    Args:
        owner: The object in words that a user understands: "this pool", "this client".
        error: The class of the error that is raised.
    """

    def __init__(self, owner: str, error: type[LLMError] = LLMError) -> None:
        self._owner = owner
        self._error = error
        self.loop: asyncio.AbstractEventLoop | None = None
        """The event loop that the object is bound to, or None before its first use."""

    def enter(self) -> bool:
        """Binds the object to the running event loop.

        Returns:
            Whether it was bound to another loop that has been closed since. What the object holds of that loop
            (waiters, tasks, connections) is lost, and the caller has to drop it.

        Raises:
            LLMError: The object is bound to another event loop that is still alive.
        """
        loop = asyncio.get_running_loop()
        if self.loop is loop:
            return False
        self.check()
        was_bound, self.loop = self.loop is not None, loop
        return was_bound

    def check(self) -> None:
        """Raises if the object is bound to another event loop that is still alive; binds nothing.

        Raises:
            LLMError: It is.
        """
        if self.loop is None or self.loop is asyncio.get_running_loop() or self.loop.is_closed():
            return
        raise self._error(
            f"{self._owner} is in use in another event loop that is still alive",
            hint="make one for each event loop, or close() this one in the loop that used it first",
        )

    def is_running(self) -> bool:
        """Returns whether the caller runs in the object's event loop; it may also run in a thread without a loop."""
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:
            return False


async def run_until_signal(work: Coroutine[Any, Any, _T]) -> _T | None:
    """Runs a coroutine in a separate task, and cancels it on SIGINT or SIGTERM, which counts as its regular end.

    For the main function of a program: it replaces the handlers of both signals, must run in the main thread, and
    leaves the signals ignored, so that an impatient second Ctrl-C interrupts neither the clean-up nor the interpreter's
    exit.

    On cancellation of the caller, the work is cancelled and awaited, and the cancellation is raised.

    Returns:
        The result of the work, or None if a signal ended it.

    Raises:
        Exception: Whatever the work raises, also while it is being cancelled.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    got_signal = False

    def cancel_once() -> None:
        nonlocal got_signal
        if not got_signal:
            got_signal = True
            task.cancel()

    # Not loop.add_signal_handler, which Windows does not have.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(cancel_once))
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        await end_task(task)
        raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    if got_signal and task.cancelled():
        return None
    return task.result()
