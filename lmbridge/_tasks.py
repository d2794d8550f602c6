"""Helpers for asyncio tasks that more than one layer needs.

They share one rule about cancellation. A cancellation of the caller's own task is never swallowed: a helper may put it
off until a bounded piece of work has ended, and then raises it as the plain `asyncio.CancelledError` that it was. Only
tasks that lmbridge has created itself are cancelled by lmbridge.

anyio's cancel scopes and task groups could replace some of these helpers. But a cancelled scope cancels its tasks again
on every turn of the event loop until they have ended, and a user's tools, which are plain asyncio code, do not expect
that. Besides, the layers that need these helpers do not depend on anyio.
"""

from __future__ import annotations

import asyncio
import copy
import signal
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, Final, Generic, TypeVar, cast

import attrs

from lmbridge.errors import LLMError, TaskCancelledError

_T = TypeVar("_T")

_unfinished: Final[set[asyncio.Future[Any]]] = set()
"""Cancelled tasks that are still running, kept alive because asyncio holds only weak references to tasks."""


ITEMS_PER_STEP: Final = 100
"""The number of items after which a task that works through a list of them lets other tasks run."""


SIZE_PER_STEP: Final = 100_000
"""The number of characters or bytes that a task processes, in about a millisecond, before it lets other tasks run."""


async def pause_after(size: int) -> None:
    """Lets other tasks run after a step that has processed more than `SIZE_PER_STEP` characters or bytes.

    A step that consists of one call of C code, such as decoding JSON, cannot be divided. Running it in a thread would
    hold up the event loop for just as long, because such code keeps the global interpreter lock. But a reply of 10 MB
    takes a dozen such steps, and other tasks can run between them.

    Args:
        size: The number of characters or bytes that the step has processed.
    """
    if size > SIZE_PER_STEP:
        await asyncio.sleep(0)


async def list_in_slices(items: Iterable[_T]) -> list[_T]:
    """Returns a list of the items, and lets other tasks run after every 100 of them.

    Use it for an iterable that computes each item when it is asked for, such as a `map` or a generator::

        calls = await list_in_slices(map(read_call, entries))

    With fewer items it does not wait at all. The caller can be cancelled only between two slices; then the items so far
    are dropped.
    """
    iterator = iter(items)
    listed = list(islice(iterator, ITEMS_PER_STEP))
    added = len(listed)
    while added == ITEMS_PER_STEP:
        await asyncio.sleep(0)
        before = len(listed)
        listed += islice(iterator, ITEMS_PER_STEP)
        added = len(listed) - before
    return listed


def run_at_once(slices: Generator[None, None, _T]) -> _T:
    """Runs a generator that yields after each slice of its work, and returns its result. No other task runs meanwhile.

    If some slices have been done already, this does the rest.
    """
    try:
        while True:
            next(slices)
    except StopIteration as end:
        return cast("_T", end.value)


async def run_in_slices(slices: Generator[None, None, _T]) -> _T:
    """Runs a generator that yields after each slice of its work, and returns its result. Other tasks run in between.

    Without a `yield`, it does not wait at all. On cancellation of the caller, the rest is not done.
    """
    try:
        while True:
            next(slices)
            await asyncio.sleep(0)
    except StopIteration as end:
        return cast("_T", end.value)


async def settle(work: Awaitable[_T]) -> _T:
    """Awaits a piece of work until it has ended, even if the caller is cancelled in the meantime.

    Use it for work that ends within a bounded time and must not be left half done, such as returning a resource, or for
    a thread, because a thread cannot be cancelled.

    On cancellation of the caller, the work goes on. The cancellation is raised when the work has ended. It takes
    precedence over the result and over an exception of the work.
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
    mark_exception_retrieved(task)
    raise cancellation


async def run_together(works: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Runs coroutines at the same time, each in a task, and returns their results in the same order.

    If one of them raises an exception, the others are cancelled and awaited, and its exception is raised unchanged. A
    task group would raise a group of exceptions, for which no caller is prepared. Besides, it raises such a group in
    place of a cancellation of the caller, and in Python 3.11 and 3.12 it leaves a cancel request in the caller's task,
    so that an `asyncio.timeout` around it no longer raises a `TimeoutError`.

    On cancellation of the caller, all of them are cancelled and awaited, and cancelled again on each further one. The
    cancellation takes precedence over an exception of one of them, such as one in its clean-up.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    errors: list[BaseException] = []

    def note_error(ended: asyncio.Task[_T]) -> None:
        if not ended.cancelled() and (error := ended.exception()) is not None:
            if not errors:
                for each in tasks:
                    each.cancel()
            errors.append(error)

    for task in tasks:
        task.add_done_callback(note_error)
    cancellation: asyncio.CancelledError | None = None
    while running := [each for each in tasks if not each.done()]:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError as error:
            cancellation = error
            for task in running:
                task.cancel()
    if cancellation is not None:
        raise cancellation
    if not errors:
        return [each.result() for each in tasks]
    first = errors[0]
    # The traceback of the exception refers to this frame. If the frame referred to the exception as well, only the
    # garbage collector could free the two.
    tasks.clear()
    errors.clear()
    try:
        raise first
    finally:
        del first


async def end_task(task: asyncio.Future[Any], *, grace: float | None = None) -> bool:
    """Cancels a task and waits until it has ended.

    On cancellation of the caller, the task is cancelled once more, because it may hang in its own clean-up, and the
    wait goes on. The cancellation is raised when the task has ended or the grace period is over.

    Args:
        task: A task that lmbridge has created.
        grace: The most seconds to wait. The default, None, means no limit. A task that is still running after the grace
            period is kept alive until it ends, and its result or exception is dropped.

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
        mark_exception_retrieved(task)
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
    mark_exception_retrieved(task)


def mark_exception_retrieved(task: asyncio.Future[Any]) -> None:
    """Marks the exception of a finished task as retrieved, so that asyncio does not log it as unhandled.

    It can be used as a done callback.
    """
    if not task.cancelled():
        task.exception()


@attrs.define(eq=False)
class _SharedCall(Generic[_T]):
    """A call of a `SingleFlight` that is running, and the number of callers that wait for it."""

    task: asyncio.Task[_T]
    waiters: int = 0


class SingleFlight(Generic[_T]):
    """Lets callers that want the same thing at the same time share one call.

    The first caller for a key starts the call in a separate task. Callers that arrive while it is running wait for the
    same task. Results are not kept after the call has ended, and calls are never shared between event loops.

    On cancellation of a caller, the others are not affected. If no other caller is waiting, the call is cancelled and
    the caller waits until it has ended, unless `keep_going` is set. A second cancellation ends that wait.

    Args:
        cancelled_message: The text of the `TaskCancelledError` that callers get when `cancel_all` ends their call.
        keep_going: Whether a call goes on after every caller has been cancelled. Set it if a later call benefits from
            the result.
    """

    def __init__(self, cancelled_message: str, *, keep_going: bool = False) -> None:
        self._cancelled_message = cancelled_message
        self._keep_going = keep_going
        self._calls: dict[tuple[asyncio.AbstractEventLoop, Hashable], _SharedCall[_T]] = {}

    async def run(self, key: Hashable, call: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Waits for the call that is running for `key`, or starts it, and returns its result.

        If the call raises an `LLMError`, each caller gets a copy, so that callers can complete it independently.

        Raises:
            TaskCancelledError: The call was ended by `cancel_all`.
            Exception: Whatever the call raises.
        """
        shared = self._join(key, call)
        shared.waiters += 1
        try:
            # Unlike `await task`, asyncio.wait does not cancel the task if the caller is cancelled.
            await asyncio.wait((shared.task,))
        except asyncio.CancelledError:
            if shared.waiters == 1 and not self._keep_going:
                # The call is forgotten first, because a caller that arrives from now on must not join it.
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

        On cancellation of the caller, the wait ends at once. The calls stay cancelled, and end on their own.
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
            shared.task.add_done_callback(mark_exception_retrieved)
        return shared

    def _forget(self, task: asyncio.Task[_T]) -> None:
        # Calls of closed loops are dropped as well, because their done callbacks will never run.
        self._calls = {
            (loop, key): shared
            for (loop, key), shared in self._calls.items()
            if shared.task is not task and not loop.is_closed()
        }


class LoopGuard:
    """Binds an object to one event loop at a time, because its futures, sockets and tasks belong to that loop.

    Args:
        owner: What errors call the object, such as "this pool" or "this client".
        error: The class of the errors.
    """

    def __init__(self, owner: str, error: type[LLMError] = LLMError) -> None:
        self._owner = owner
        self._error = error
        self.loop: asyncio.AbstractEventLoop | None = None
        """The event loop that the object is bound to, or None before its first use."""

    def enter(self) -> bool:
        """Binds the object to the running event loop.

        Returns:
            Whether the object was bound to another loop, which has been closed since. If so, the waiters, tasks and
            connections of that loop are lost, and the caller has to drop them.

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
        """Checks that the object can be used in the running event loop, without binding it.

        Raises:
            LLMError: The object is bound to another event loop that is still alive.
        """
        if self.loop is None or self.loop is asyncio.get_running_loop() or self.loop.is_closed():
            return
        raise self._error(
            f"{self._owner} is in use in another event loop that is still alive",
            hint="make one for each event loop, or close() this one in the loop that used it first",
        )

    def is_running(self) -> bool:
        """Returns whether the calling thread is running the object's event loop, and not another one or none."""
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:
            return False


def call_in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> None:
    """Makes an event loop call a function soon. Any thread may call this, and so may a finalizer.

    If the loop is closed, nothing happens, because no task is left in it that could need the call. Asking the loop
    first whether it is closed would not be enough: its own thread may close it right after the answer.

    Args:
        loop: The event loop.
        function: The function.
        *args: The arguments of the function.
    """
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)


@contextmanager
def calling_on_signal(callback: Callable[[], None]) -> Iterator[None]:
    """Calls a function in the running event loop on each SIGINT and SIGTERM within the block.

    It is meant for the main function of a program: it must be used in the main thread, and it replaces the handlers of
    both signals. After the block the signals are ignored, because a handler that uses the event loop would raise an
    exception once the loop has been closed.
    """
    loop = asyncio.get_running_loop()
    # loop.add_signal_handler would be simpler, but it does not exist on Windows.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(callback))
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


async def run_until_signal(work: Coroutine[Any, Any, _T]) -> _T | None:
    """Runs a coroutine in a separate task, and cancels it on SIGINT or SIGTERM. That counts as a normal end.

    It is meant for the main function of a program: it must be called in the main thread, and it replaces the handlers
    of both signals. Afterwards the signals are ignored, so that an impatient second Ctrl-C interrupts neither the
    clean-up nor the exit of the interpreter.

    On cancellation of the caller, the work is cancelled and awaited, and the cancellation is raised.

    Returns:
        The result of the work, or None if a signal ended it.

    Raises:
        Exception: Whatever the work raises, even while it is being cancelled.
        ValueError: The calling thread is not the main thread. The work has not begun.
    """
    task = asyncio.get_running_loop().create_task(work)
    got_signal = False

    def cancel_once() -> None:
        nonlocal got_signal
        if not got_signal:
            got_signal = True
            task.cancel()

    try:
        with calling_on_signal(cancel_once):
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                await end_task(task)
                raise
    except ValueError:
        # This is not the main thread, and nobody else knows the task.
        await end_task(task)
        raise
    if got_signal and task.cancelled():
        return None
    return task.result()
