"""The event loop behind `lmbridge.sync`: one thread for the whole process, in which everything asynchronous runs.

A blocking call is handed to that loop, and the calling thread waits for its result. There is one loop for the process,
and not one for each call or each thread, because the pooled connections, the schedule and the caches of a client belong
to the loop that opened them: `asyncio.run` for each call would throw them away each time. A loop in a separate thread
also works where the caller has a running loop, as in a notebook.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextvars
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar

from lmbridge.errors import LLMError

_T = TypeVar("_T")

_EXIT_SECONDS: Final = 5.0
"""The seconds that closing all open resources may take when the interpreter exits."""


class _Closable(Protocol):
    async def close(self) -> None: ...


class Portal:
    """A background event loop, and the way into it for threads that block.

    The thread starts with the first call. It is a daemon, so it never keeps the interpreter alive. `shut_down` runs
    when the interpreter exits, and closes the resources that are still open.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._open_resources: weakref.WeakSet[_Closable] = weakref.WeakSet()

    def run(self, make_coroutine: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Runs a coroutine in the background loop, and waits for its result.

        If the waiting thread is interrupted by Ctrl-C, the coroutine is cancelled and its clean-up is awaited before
        `KeyboardInterrupt` is raised. The server therefore stops generating, too.

        Args:
            make_coroutine: A function that returns the coroutine. It is called in the loop's thread.

        Raises:
            LLMError: The caller runs in the background loop itself, and would wait forever.
            Exception: The exception that the coroutine raises.
        """
        loop = self._running_loop()
        finished: concurrent.futures.Future[_T] = concurrent.futures.Future()
        tasks: list[asyncio.Task[_T]] = []

        def start() -> None:
            try:
                task = loop.create_task(make_coroutine())
            except BaseException as error:  # noqa: BLE001 - raised in the waiting thread
                finished.set_exception(error)
                return
            tasks.append(task)
            task.add_done_callback(finish)

        def finish(task: asyncio.Task[_T]) -> None:
            if task.cancelled():
                finished.set_exception(asyncio.CancelledError())
            elif (error := task.exception()) is not None:
                finished.set_exception(error)
            else:
                finished.set_result(task.result())

        def cancel() -> None:
            for task in tasks:
                task.cancel()
            if not tasks and not finished.done():
                # The interrupt came before the coroutine was handed over, so nothing will set the result.
                finished.set_exception(asyncio.CancelledError())

        # The coroutine runs in a copy of the caller's context. If a tool starts a run, the context says to which run
        # the tool belongs.
        context = contextvars.copy_context()
        try:
            # An interrupt may come as soon as this returns, so it belongs to the block.
            loop.call_soon_threadsafe(start, context=context)
            return finished.result()
        except BaseException:
            # The exception was raised in this thread (a KeyboardInterrupt, for example) or is that of the task. Nothing
            # may go on in the background after the call has raised.
            loop.call_soon_threadsafe(cancel)
            concurrent.futures.wait([finished])
            if finished.exception() is None:
                self._discard(finished.result())
            raise

    def _discard(self, result: object) -> None:
        """Closes a stream that was opened at the very moment when its caller was interrupted."""
        aclose = getattr(result, "aclose", None)
        if aclose is not None:
            self.close_soon(aclose)

    def call(self, function: Callable[[], _T]) -> _T:
        """Calls a plain function in the loop's thread, and waits for its result.

        Raises:
            LLMError: The caller runs in the background loop itself, and would wait forever.
            Exception: The exception that the function raises.
        """

        async def call_in_loop() -> _T:
            return function()

        return self.run(call_in_loop)

    def close_at_exit(self, resource: _Closable) -> None:
        """Makes `shut_down` close a resource if it still exists then. The portal does not keep the resource alive."""
        self._open_resources.add(resource)

    def close_soon(self, close: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Runs a coroutine that closes something, without waiting for it. Any thread may call it at any time.

        It is meant for `__del__`, which may run at any moment, so it takes no lock and raises nothing.
        """
        loop = self._loop
        if loop is None or loop.is_closed():
            return

        def start() -> None:
            task = loop.create_task(close())
            _closing_tasks.add(task)
            task.add_done_callback(_forget_closing_task)

        # The call raises if the loop was closed in the meantime.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(start)

    def shut_down(self) -> None:
        """Closes the resources that are still open, and ends the loop and its thread.

        A later call starts a new loop.
        """
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return

        async def close_all() -> None:
            await asyncio.gather(*(each.close() for each in list(self._open_resources)), return_exceptions=True)
            if _closing_tasks:
                await asyncio.wait(_closing_tasks)

        with suppress(concurrent.futures.TimeoutError, asyncio.CancelledError):
            asyncio.run_coroutine_threadsafe(close_all(), loop).result(timeout=_EXIT_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_EXIT_SECONDS)

    def forget_after_fork(self) -> None:
        """Resets the portal in a child process, because threads do not survive a fork."""
        self._lock = threading.Lock()
        self._loop = self._thread = None
        self._open_resources = weakref.WeakSet()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        thread = self._thread
        if thread is not None and thread is threading.current_thread():
            raise LLMError(
                "lmbridge.sync was called inside its own event loop, where it would wait forever",
                hint="use a plain function as the tool or callback, or the asynchronous classes of lmbridge in it",
            )
        with self._lock:
            if self._loop is None:
                self._loop, self._thread = _started_loop()
            return self._loop


_closing_tasks: Final[set[asyncio.Task[object]]] = set()
"""Tasks of `close_soon`, kept alive because asyncio holds only weak references to tasks."""


def _forget_closing_task(task: asyncio.Task[object]) -> None:
    _closing_tasks.discard(task)
    if not task.cancelled():
        # The task is never awaited. Reading its exception keeps asyncio from logging that it was never retrieved.
        task.exception()


def _started_loop() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """Returns a loop that runs in a thread. If the caller is interrupted before that, nothing is left of both."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_run_loop, args=(loop,), name="lmbridge-sync", daemon=True)
    try:
        thread.start()
    except BaseException:
        if thread.ident is None:
            loop.close()
        else:
            loop.call_soon_threadsafe(loop.stop)
        raise
    return loop, thread


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


portal: Final = Portal()
"""The portal that all of `lmbridge.sync` uses."""

atexit.register(portal.shut_down)
# Windows has no fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=portal.forget_after_fork)
