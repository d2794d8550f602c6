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

from lmbridge._tasks import mark_retrieved
from lmbridge._text import replace_lone_surrogates
from lmbridge.errors import ToolError

if TYPE_CHECKING:
    from lmbridge.agent.tools import Tool, ToolContext

logger = logging.getLogger("lmbridge.agent")

_GRACE: Final = 5.0
"""Seconds that a cancelled tool has for its clean-up."""
_CANCELLED: Final = "it was cancelled from within"
_running_tools: Final[set[asyncio.Future[Any]]] = set()
"""Tasks of tools that are still running, kept alive because asyncio holds only weak references to tasks."""


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
    tool: Tool, arguments: Mapping[str, Any], context: ToolContext, *, timeout: float | None, max_output: int
) -> Outcome:
    """Calls a tool, and returns an outcome whether it returns, raises, or runs out of time.

    An async tool runs in a task of its own. When its time is up, or the caller is cancelled, the task is cancelled and
    awaited for up to 5 seconds; one that is still running then is left behind. A plain function runs in a thread of its
    own, not in one of asyncio's pool: those are few, so that some that hang would stop all others, and the interpreter
    waits for them at its exit. Nothing can stop a thread. It is not awaited either; `context.cancelled()` returns True
    in it from then on.

    Args:
        tool: The tool.
        arguments: Its arguments, converted.
        context: What the tool may know about the call.
        timeout: The agent's limit in seconds, or None. It counts unless the tool has a `timeout` of its own.
        max_output: Characters of its output that are kept.
    """
    began = time.monotonic()
    over = _Flag()
    leading: tuple[ToolContext, ...] = ()
    if tool.takes_context_first or tool.context_names:
        asked = context.cancelled
        context = attrs.evolve(context, cancelled=lambda: over.is_set or asked())
        arguments = {**arguments, **dict.fromkeys(tool.context_names, context)}
        leading = (context,) if tool.takes_context_first else ()
    if tool.timeout != "agent":
        timeout = tool.timeout
    call = partial(tool.function, *leading, **arguments)
    deadline = None if timeout is None else began + timeout
    raw: Any = None
    try:
        raw = await _result(call, tool.is_async, deadline, timeout)
        text, is_error = _text(raw), False
    except _OutOfTimeError as exc:
        text, is_error = str(exc), True
    except Exception as exc:  # noqa: BLE001 - whatever a tool raises is for the model to read
        raw, text, is_error = exc, _told(exc), True
    finally:
        over.is_set = True
    return Outcome(capped(text, max_output), is_error, raw, time.monotonic() - began)


async def _result(call: Callable[[], Any], is_async: bool, deadline: float | None, timeout: float | None) -> Any:
    """Returns or raises what the tool does.

    Raises:
        _OutOfTimeError: The tool was still running at the deadline.
        ToolError: The tool ended in a way that must not end the run, such as `sys.exit`.
    """
    if is_async:
        value = call()
    else:
        value = await _result_of_thread(call, deadline, timeout)
        if not inspect.isawaitable(value):
            return value
    name = getattr(value, "__qualname__", type(value).__name__)
    task = asyncio.get_running_loop().create_task(_without_exit(value), name=f"lmbridge-tool-{name}")
    _running_tools.add(task)
    task.add_done_callback(partial(_forget, value))
    try:
        in_time = await _wait(task, deadline)
    except asyncio.CancelledError:
        await _end(task)
        raise
    if in_time is None:
        ending = "was cancelled" if await _end(task) else "does not let itself be cancelled, and may still be running"
        raise _OutOfTimeError(f"it has not come to an end within {timeout:g} seconds, and {ending}")
    if task.cancelled():
        # Not by us: something that the tool waited for was cancelled.
        raise ToolError(_CANCELLED)
    return task.result()


async def _without_exit(value: Awaitable[Any]) -> Any:
    """Awaits the tool; a `sys.exit` in it becomes a `ToolError`, because in a task it would end the event loop."""
    try:
        return await value
    except (Exception, asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as exc:
        raise ToolError(_told(exc), exc) from exc


async def _wait(work: asyncio.Future[Any], deadline: float | None) -> asyncio.Future[Any] | None:
    """Returns the work when it is done, or None when its time is up."""
    timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
    done, _ = await asyncio.wait({work}, timeout=timeout)
    return work if done else None


async def _end(task: asyncio.Future[Any]) -> bool:
    """Cancels the task, and returns whether it ended within the grace period. A cancel of the caller ends the wait."""
    task.cancel()
    await asyncio.wait({task}, timeout=_GRACE)
    if not task.done():
        logger.warning("a tool is still running %g seconds after it was cancelled: %r", _GRACE, task)
    return task.done()


def _forget(value: Awaitable[Any], task: asyncio.Future[Any]) -> None:
    _running_tools.discard(task)
    mark_retrieved(task)
    if inspect.iscoroutine(value):
        # A task that was cancelled before its first step has not awaited it, and Python would warn about that.
        value.close()


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
