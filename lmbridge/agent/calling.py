"""One call of a tool: in a task or a thread of its own, within its time, and what came of it as text."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import attrs
import msgspec

from lmbridge._text import replace_lone_surrogates
from lmbridge.errors import ToolError
from lmbridge.transport.deadline import DeadlineTimer

if TYPE_CHECKING:
    from lmbridge.agent.tools import Tool, ToolContext

logger = logging.getLogger("lmbridge.agent")

_GRACE: Final = 5.0
"""Seconds that a cancelled tool has for its clean-up."""
_CANCELLED: Final = "it was cancelled from within"
_tasks: Final[set[asyncio.Future[Any]]] = set()
"""Tools that are running, be it after they were let go: asyncio itself does not keep its tasks."""


@attrs.define
class Outcome:
    """What came of a call."""

    text: str
    """For the model."""
    is_error: bool
    raw: Any = attrs.field(repr=False)
    """What the tool returned or raised; None if it ran out of time."""
    seconds: float


class _Flag:
    """Set once, and read from any thread."""

    __slots__ = ("is_set",)

    def __init__(self) -> None:
        self.is_set = False


class _OutOfTimeError(Exception):
    """A tool has not come to its end in time; the text says what that means."""


async def call_tool(
    tool: Tool,
    arguments: Mapping[str, Any],
    context: ToolContext,
    *,
    timeout: float | None,
    max_output: int,
    deadline_timer: DeadlineTimer,
) -> Outcome:
    """Calls a tool; what it raises is an outcome as well.

    An async tool is a task of its own: when its time is up, or the caller is cancelled, it is cancelled and awaited.
    If it goes on all the same, it is let go after 5 seconds. A plain function has a thread of its own, not one of
    asyncio's pool: those are few, so that some that hang would stop all others, and the interpreter waits for them
    when it ends. Nothing can stop it; nobody waits for it either, and `context.cancelled()` tells it.

    Args:
        tool: The tool.
        arguments: Its arguments, converted.
        context: What it may know of the call.
        timeout: Seconds that it may take, or None.
        max_output: Characters of its output that are kept.
        deadline_timer: Where its time is looked after.
    """
    began = time.monotonic()
    over = _Flag()
    if tool.context_names:
        asked = context.cancelled
        context = attrs.evolve(context, cancelled=lambda: over.is_set or asked())
        arguments = {**arguments, **dict.fromkeys(tool.context_names, context)}
    function, timeout = tool.within(timeout)
    call = partial(function, **arguments)
    deadline = None if timeout is None else began + timeout
    raw: Any = None
    try:
        raw = await _result(call, tool.is_async, deadline, timeout, deadline_timer)
        text, is_error = _text(raw), False
    except _OutOfTimeError as exc:
        text, is_error = str(exc), True
    except Exception as exc:  # noqa: BLE001 - whatever a tool raises is for the model to read
        raw, text, is_error = exc, _told(exc), True
    finally:
        over.is_set = True
    return Outcome(capped(text, max_output), is_error, raw, time.monotonic() - began)


async def _result(
    call: Callable[[], Any],
    is_async: bool,
    deadline: float | None,
    timeout: float | None,
    deadline_timer: DeadlineTimer,
) -> Any:
    """What the tool returns, or raises."""
    if is_async:
        value = call()
    else:
        value = await _result_of_thread(call, deadline, timeout)
        if not inspect.isawaitable(value):
            return value
    name = getattr(value, "__qualname__", type(value).__name__)
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()
    task = loop.create_task(_guarded(value, over), name=f"lmbridge-tool-{name}")
    _tasks.add(task)
    task.add_done_callback(partial(_forget, value, over))
    in_time = False
    try:
        await _done(over, deadline, deadline_timer)
        in_time = task.done()
    finally:
        has_ended = task.done() or await _ended(task)
    if not in_time:
        ending = "was cancelled" if has_ended else "does not let itself be cancelled, and may still be running"
        raise _OutOfTimeError(f"it has not come to an end within {timeout:g} seconds, and {ending}")
    if task.cancelled():  # not by us: something that it waited for was
        raise ToolError(_CANCELLED)
    return task.result()


async def _guarded(value: Awaitable[Any], over: asyncio.Future[None]) -> Any:
    """What the tool returns, or raises: a `sys.exit` in it would end the event loop, and no run alone.

    It tells its end itself: a callback of its task would take one turn of the loop more.
    """
    try:
        return await value
    except (Exception, asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as exc:  # a `sys.exit`, or another that nobody else would catch
        raise ToolError(_told(exc), exc) from exc
    finally:
        _set(over)


def _set(over: asyncio.Future[None]) -> None:
    if not (over.done() or over.get_loop().is_closed()):  # a loop may be closed with tools that still run
        over.set_result(None)


@attrs.define(eq=False)
class _Alarm:
    """Wakes who waits for a tool when its time is up."""

    over: asyncio.Future[None]
    when: float

    def on_deadline(self) -> None:
        _set(self.over)


async def _done(over: asyncio.Future[None], deadline: float | None, deadline_timer: DeadlineTimer) -> None:
    """Waits for the end, or for the deadline."""
    if deadline is None:
        await over
        return
    alarm = _Alarm(over, deadline_timer.time() + deadline - time.monotonic())
    deadline_timer.add(alarm)
    try:
        await over
    finally:
        deadline_timer.discard(alarm)


async def _wait(work: asyncio.Future[Any], deadline: float | None) -> asyncio.Future[Any] | None:
    """The work when it is done, or None when its time is up."""
    timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
    done, _ = await asyncio.wait({work}, timeout=timeout)
    return work if done else None


async def _ended(task: asyncio.Future[Any]) -> bool:
    """Cancels the task, and tells whether it has ended after a moment."""
    task.cancel()
    await asyncio.wait({task}, timeout=_GRACE)
    if not task.done():
        logger.warning("a tool goes on %g seconds after it was cancelled: %r", _GRACE, task)
    return task.done()


def _forget(value: Awaitable[Any], over: asyncio.Future[None], task: asyncio.Future[Any]) -> None:
    _tasks.discard(task)
    if not task.cancelled():
        task.exception()  # else asyncio logs that nobody asked for it
        return
    _set(over)  # one that was cancelled before it began has not told
    if inspect.iscoroutine(value):
        value.close()  # else Python warns that nobody awaited it


async def _result_of_thread(call: Callable[[], Any], deadline: float | None, timeout: float | None) -> Any:
    """What a plain function returns, or raises."""
    work = _in_thread(call)
    done = None
    try:
        done = await _wait(work, deadline)
    finally:
        if done is None:
            work.add_done_callback(_close)
    if done is None:
        late = f"it has not come to an end within {timeout:g} seconds; it may still be running, its result is lost"
        raise _OutOfTimeError(late)
    value, error = done.result()
    if isinstance(error, asyncio.CancelledError):
        raise ToolError(_CANCELLED, error)
    if error is None:
        return value
    if isinstance(error, Exception | KeyboardInterrupt):
        raise error
    raise ToolError(_told(error), error)  # a `sys.exit`, which would end the event loop


def _close(work: asyncio.Future[tuple[Any, BaseException | None]]) -> None:
    """Closes a coroutine that a plain function returned and nobody will await: else Python warns of it."""
    value, _ = work.result()
    if inspect.iscoroutine(value):
        value.close()


def _in_thread(call: Callable[[], Any]) -> asyncio.Future[tuple[Any, BaseException | None]]:
    """What the call returns and raises, as soon as it has; a cancel releases who waits, and nothing else."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def run() -> None:
        value, error = None, None
        try:
            value = call()
        except BaseException as exc:  # noqa: BLE001 - raised again where it is awaited
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(future.set_result, (value, error))

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name="lmbridge-tool", daemon=True).start()
    return future


# Texts


def _text(value: Any) -> str:
    """A result for the model: a text as it is, anything else as JSON.

    Raises:
        ToolError: it has no place in JSON.
    """
    if isinstance(value, str):
        text = str.__str__(value)  # of an enum, its value
    else:
        try:
            text = msgspec.json.encode(value).decode()
        except (TypeError, ValueError, RecursionError) as exc:
            reason = str(exc).rpartition("\n")[2]
            raise ToolError(f"it ran, but its result ({type(value).__name__}) is not JSON: {reason}", exc) from exc
    return text


def _told(error: BaseException) -> str:
    """An exception for the model: its class and what it says, without where in the code."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_told(each) for each in error.exceptions)
    try:
        said = str(error)
    except Exception:  # noqa: BLE001 - a tool's exception is a tool's code
        said = ""
    if isinstance(error, ToolError):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def capped(text: str, most: int) -> str:
    """The text, or its head and its tail around how much was left out.

    Half a surrogate pair, which no request can hold, becomes a question mark.

    Args:
        text: Any text.
        most: Characters of it that are kept.
    """
    if len(text) > most:
        tail = most // 2
        omitted = len(text) - most
        text = f"{text[: most - tail]}\n[... {omitted} characters omitted]\n{text[len(text) - tail :]}"
    return replace_lone_surrogates(text)
