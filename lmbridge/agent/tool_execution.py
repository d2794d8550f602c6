"""Executes one tool call, within its time limit, and turns whatever happens into text for the model.

An async tool runs in its own task. Awaiting it directly in the task of the run, under `asyncio.timeout`, would be
simpler. But then a tool that swallows its cancellation would hold up the run forever, a `CancelledError` that the
tool raises itself would look like a cancellation of the run, and the tool could cancel the run through
`asyncio.current_task()`. With a separate task, the run decides how long it waits, and sees exactly how the tool ended.

A plain function runs in its own daemon thread. `asyncio.to_thread` was the alternative: its executor has few threads,
so that a handful of functions that hang would block those of all other runs, and the interpreter waits for these
threads when it exits. A process pool would make it possible to kill a function, but its arguments and results would
have to be picklable, and closures and bound methods could not be tools. So a function that takes too long is left
running; its result is dropped, and it can call `ToolContext.cancelled()` to notice this.

How many calls run at once is decided by `turn_runner`.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import attrs

from lmbridge._tasks import call_in_loop, mark_exception_retrieved
from lmbridge.agent.result_images import split_images
from lmbridge.agent.tool_results import result_as_text, truncate_output
from lmbridge.errors import ToolError

if TYPE_CHECKING:
    from lmbridge.agent.tools import Tool, ToolContext

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_CLEAN_UP_SECONDS: Final = 5.0
"""How long the run waits for a cancelled tool to clean up, in seconds."""
_CANCELLED_FROM_WITHIN: Final = "it was cancelled from within"
_running_tools: Final[set[asyncio.Future[Any]]] = set()
"""Tasks of tools that are still running, kept alive because asyncio holds only weak references to tasks."""


@attrs.define
class ToolOutcome:
    """The result of a tool call, whether the tool returned, raised or ran out of time."""

    text: str
    """The text that the model receives."""
    is_error: bool
    """True if the tool failed. The text then describes the failure."""
    raw: Any = attrs.field(repr=False)
    """The object that the tool returned, or the exception that it raised; None if it ran out of time."""
    seconds: float
    """How long the call took, in seconds."""
    images: tuple[Mapping[str, Any], ...] = attrs.field(default=(), repr=False)
    """The images of the result, as content parts."""


@attrs.define
class _CallLimit:
    """The time limit of one call, and whether its result is still wanted."""

    seconds: float | None
    """The limit in seconds, for error texts; None if there is no limit."""
    at: float | None
    """The value of `time.monotonic()` at the deadline; None if there is no limit."""
    has_ended: bool = False
    """Whether the call has ended, or the tool was cancelled: from then on, the result is not wanted."""

    def remaining(self) -> float | None:
        """Returns the seconds until the deadline, or None if there is no limit."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())


class _ThreadResult(NamedTuple):
    """How a plain function ended: with a value or with an exception."""

    value: Any
    error: BaseException | None


class _OutOfTimeError(Exception):
    """The tool was still running at its deadline. The text is meant for the model."""


async def call_tool(
    tool: Tool, arguments: Mapping[str, Any], context: ToolContext, *, timeout: float | None, max_output: int
) -> ToolOutcome:
    """Calls a tool, and returns an outcome whether it returns, raises or runs out of time.

    When its time is up, an async tool is cancelled, and awaited for up to 5 seconds; a plain function is left running.
    In both cases `context.cancelled()` returns True in the tool from then on.

    On cancellation of the caller, the tool is cancelled or left running in the same way, and the cancellation is
    raised.

    Args:
        tool: The tool.
        arguments: The keyword arguments for its function, already converted.
        context: The information about the call that the function can ask for.
        timeout: The agent's time limit in seconds, or None. A `timeout` of the tool takes precedence over it.
        max_output: The number of characters to which the text of the outcome is truncated.
    """
    began = time.monotonic()
    if tool.timeout != "agent":
        timeout = tool.timeout
    limit = _CallLimit(timeout, None if timeout is None else began + timeout)
    leading: tuple[ToolContext, ...] = ()
    if tool.takes_context_first or tool.context_names:
        run_is_cancelled = context.cancelled
        context = attrs.evolve(context, cancelled=lambda: limit.has_ended or run_is_cancelled())
        arguments = {**arguments, **dict.fromkeys(tool.context_names, context)}
        leading = (context,) if tool.takes_context_first else ()
    call = partial(tool.function, *leading, **arguments)
    raw: Any = None
    images: tuple[Mapping[str, Any], ...] = ()
    try:
        raw = await _execute(call, tool.is_async, limit)
        without_images, images = split_images(raw)
        text, is_error = result_as_text(without_images), False
    except _OutOfTimeError as exc:
        text, is_error = str(exc), True
    except Exception as exc:  # noqa: BLE001 - the model reads every exception of a tool
        raw, text, is_error = exc, _describe_exception(exc), True
        images = exc.images if isinstance(exc, ToolError) else ()
    finally:
        limit.has_ended = True
    return ToolOutcome(truncate_output(text, max_output), is_error, raw, time.monotonic() - began, images)


async def _execute(call: Callable[[], Any], is_async: bool, limit: _CallLimit) -> Any:
    """Runs the tool, and returns its result or raises its exception.

    Raises:
        _OutOfTimeError: The tool was still running at the deadline.
        ToolError: The tool ended in a way that must not end the run, such as `sys.exit`.
    """
    result = call() if is_async else await _execute_in_thread(call, limit)
    if is_async or inspect.isawaitable(result):
        return await _execute_in_task(result, limit)
    return result


# Async tools


async def _execute_in_task(awaitable: Awaitable[Any], limit: _CallLimit) -> Any:
    name = getattr(awaitable, "__qualname__", type(awaitable).__name__)
    task = asyncio.get_running_loop().create_task(_await_without_exit(awaitable), name=f"lmbridge-tool-{name}")
    try:
        # Many tools end in their first step. They need no timer, and no callback, which would take another turn of the
        # event loop.
        await asyncio.sleep(0)
        if task.done():
            _forget_task(awaitable, task)
        else:
            _keep_running_tool(awaitable, task)
            await asyncio.wait({task}, timeout=limit.remaining())
    except asyncio.CancelledError:
        _keep_running_tool(awaitable, task)
        await _cancel_and_wait(task, limit)
        raise
    if not task.done():
        has_ended = await _cancel_and_wait(task, limit)
        ending = "was cancelled" if has_ended else "ignored its cancellation, so it may still be running"
        raise _OutOfTimeError(f"it did not finish within {limit.seconds:g} seconds, and {ending}")
    if task.cancelled():
        # The run has not cancelled the task, so something that the tool awaited was cancelled.
        raise ToolError(_CANCELLED_FROM_WITHIN)
    return task.result()


async def _await_without_exit(awaitable: Awaitable[Any]) -> Any:
    """Awaits the tool. A `sys.exit` in it becomes a `ToolError`, because in a task it would end the event loop."""
    try:
        return await awaitable
    except (Exception, asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as exc:
        raise ToolError(_describe_exception(exc), exc) from exc


async def _cancel_and_wait(task: asyncio.Future[Any], limit: _CallLimit) -> bool:
    """Cancels the task of a tool, and returns True if it ends within the time for its clean-up.

    On cancellation of the caller, the wait ends at once: a tool that hangs must not hold up its run a second time.
    """
    limit.has_ended = True
    task.cancel()
    await asyncio.wait({task}, timeout=_CLEAN_UP_SECONDS)
    if not task.done():
        logger.warning("a tool is still running %g seconds after it was cancelled: %r", _CLEAN_UP_SECONDS, task)
    return task.done()


def _keep_running_tool(awaitable: Awaitable[Any], task: asyncio.Future[Any]) -> None:
    if task not in _running_tools:
        _running_tools.add(task)
        task.add_done_callback(partial(_forget_task, awaitable))


def _forget_task(awaitable: Awaitable[Any], task: asyncio.Future[Any]) -> None:
    _running_tools.discard(task)
    mark_exception_retrieved(task)
    if task.cancelled() and isinstance(awaitable, Coroutine):
        # A task that was cancelled before its first step has not awaited the coroutine, which Python would warn about.
        awaitable.close()


# Plain functions


async def _execute_in_thread(call: Callable[[], Any], limit: _CallLimit) -> Any:
    future = _start_thread(call)
    try:
        await asyncio.wait({future}, timeout=limit.remaining())
    except asyncio.CancelledError:
        future.add_done_callback(_close_unwanted_coroutine)
        raise
    if not future.done():
        future.add_done_callback(_close_unwanted_coroutine)
        raise _OutOfTimeError(
            f"it did not finish within {limit.seconds:g} seconds; it may still be running, but its result is lost"
        )
    value, error = future.result()
    if error is None:
        return value
    if isinstance(error, asyncio.CancelledError):
        raise ToolError(_CANCELLED_FROM_WITHIN, error)
    if isinstance(error, Exception | KeyboardInterrupt):
        raise error
    # A `sys.exit` that is raised unchanged would end the event loop.
    raise ToolError(_describe_exception(error), error)


def _start_thread(call: Callable[[], Any]) -> asyncio.Future[_ThreadResult]:
    """Starts a daemon thread that makes the call, and returns a future for its result.

    The exception of the call is part of the result and not set on the future, which refuses a `StopIteration` and
    would log an exception that is never retrieved.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_ThreadResult] = loop.create_future()

    def run() -> None:
        try:
            result = _ThreadResult(call(), None)
        except BaseException as exc:  # noqa: BLE001 - raised again by the task that awaits the future
            result = _ThreadResult(None, exc)
        # If the event loop has been closed in the meantime, nothing waits for the result.
        call_in_loop(loop, future.set_result, result)

    # The function sees the context variables of its run, as it would with asyncio.to_thread.
    threading.Thread(target=contextvars.copy_context().run, args=(run,), name="lmbridge-tool", daemon=True).start()
    return future


def _close_unwanted_coroutine(future: asyncio.Future[_ThreadResult]) -> None:
    """Closes a coroutine that a plain function returned too late, because Python warns if it is never awaited."""
    value = future.result().value
    if isinstance(value, Coroutine):
        value.close()


# Texts


def _describe_exception(error: BaseException) -> str:
    """Returns the class and the message of an exception, without a traceback; of a `ToolError`, the message alone."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_describe_exception(each) for each in error.exceptions)
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - an exception class of a tool may fail in its own code
        message = ""
    if isinstance(error, ToolError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
