"""One tool call: its thread or task, its time limit, its cancellation, and the text for the model."""

from __future__ import annotations

import asyncio
import contextvars
import datetime as dt
import enum
import functools
import gc
import inspect
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge import LLMValidationError, Tool, ToolContext, ToolError
from lmbridge.agent import tool_execution
from lmbridge.agent.tool_execution import ToolOutcome, call_tool
from lmbridge.agent.tool_results import truncate_output
from tests.support import cancel_at_each_step, turns


async def call(
    function: Callable[..., Any],
    *,
    timeout: float | None = 30,
    max_output: int = 1_000,
    cancelled: Callable[[], bool] = lambda: False,
    **arguments: Any,
) -> ToolOutcome:
    """Calls a function as a tool, and returns the outcome."""
    context = ToolContext("run", "call", "tool", cancelled)
    tool = Tool("tool", "", {}, function)
    return await call_tool(tool, arguments, context, timeout=timeout, max_output=max_output)


class Letter(str, enum.Enum):  # noqa: UP042 - users may write it like this
    A = "a"


# Results


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("plain text", "plain text"),
        ("", ""),
        (Letter.A, "a"),
        (None, "null"),
        (5, "5"),
        ([1, "ä"], '[1,"ä"]'),
        ({"at": dt.date(2026, 1, 1)}, '{"at":"2026-01-01"}'),
        ("half \ud800 a pair", "half ? a pair"),
    ],
)
async def test_a_string_is_unchanged_and_any_other_result_becomes_json(result: Any, text: str) -> None:
    async def tool() -> Any:
        return result

    for function in (tool, lambda: result):
        outcome = await call(function)
        assert (outcome.text, outcome.is_error, outcome.raw) == (text, False, result)
        assert outcome.seconds >= 0


async def test_a_result_that_json_cannot_represent_is_an_error() -> None:
    outcome = await call(lambda: {"a": object()})
    assert outcome.is_error
    assert outcome.text.startswith("it ran, but its result (dict) is not JSON: ")
    assert "\n" not in outcome.text


async def test_arguments_are_passed_as_keywords() -> None:
    assert (await call(lambda a, b: a - b, b=1, a=3)).text == "2"


def call_plainly(tool: Callable[[], Any]) -> Any:
    """Calls an async tool from a plain function, which therefore returns a coroutine."""
    return tool()


async def test_an_awaitable_result_is_awaited() -> None:
    async def tool(text: str) -> str:
        await asyncio.sleep(0)
        return text

    class Speaker:
        async def __call__(self) -> str:
            return await tool("object")

    assert (await call(functools.partial(tool, "partial"))).text == "partial"
    assert (await call(lambda: tool("plain"))).text == "plain"
    assert (await call(Speaker())).text == "object"


# Errors


class UnusualError(BaseException):
    """An exception that `except Exception` does not catch."""


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no such city"), "ValueError: no such city"),
        (ToolError("no such city", hint="ask for a larger one"), "no such city; ask for a larger one"),
        (KeyError("a"), "KeyError: 'a'"),
        (RuntimeError(), "RuntimeError"),
        (StopIteration("x"), "RuntimeError: .*raised StopIteration"),
        (TimeoutError("the tool's own"), "TimeoutError: the tool's own"),
        (asyncio.CancelledError(), "it was cancelled from within"),
        (ExceptionGroup("many", [ValueError("one"), OSError("two")]), "ValueError: one; OSError: two"),
        (UnspeakableError(), "UnspeakableError"),
        (SystemExit("usage: tool"), "SystemExit: usage: tool"),
        (UnusualError("odd"), "UnusualError: odd"),
    ],
)
async def test_an_exception_becomes_text_without_a_traceback(error: BaseException, text: str) -> None:
    def plain() -> None:
        raise error

    async def tool() -> None:
        raise error

    for function in (plain, tool):
        outcome = await call(function)
        assert outcome.is_error
        assert outcome.text == text or text.startswith("RuntimeError: .*")
        assert isinstance(outcome.raw, Exception)


async def test_an_unexpected_argument_is_an_error() -> None:
    async def tool() -> None: ...

    assert "unexpected keyword argument 'a'" in (await call(tool, a=1)).text
    assert "unexpected keyword argument 'a'" in (await call(lambda: 1, a=1)).text


async def test_a_keyboard_interrupt_in_a_thread_is_raised() -> None:
    def tool() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await _await_in_this_task(call(tool))


async def _await_in_this_task(coroutine: Any) -> Any:
    """Awaits in the task of the test: in a new task, the interrupt would stop the event loop."""
    return await coroutine


# Threads


async def test_a_plain_function_runs_in_a_daemon_thread_with_the_context_of_the_caller() -> None:
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("mine")
    seen: list[Any] = []

    def tool() -> str:
        thread = threading.current_thread()
        seen.extend((thread is not threading.main_thread(), thread.daemon))
        return variable.get()

    assert (await call(tool)).text == "mine"
    assert seen == [True, True]


async def test_functions_that_hang_do_not_block_others() -> None:
    release = threading.Event()
    hanging = [asyncio.ensure_future(call(lambda: release.wait(30))) for _ in range(50)]
    try:
        assert (await call(lambda: "done")).text == "done"
    finally:
        release.set()
        await asyncio.gather(*hanging)


async def test_a_function_that_is_out_of_time_is_left_running_and_can_find_out() -> None:
    release, told = threading.Event(), threading.Event()

    def tool(context: ToolContext) -> str:
        release.wait(30)
        if context.cancelled():
            told.set()
        return "too late"

    outcome = await call(tool, timeout=0.01)
    release.set()
    assert outcome.is_error
    assert outcome.raw is None
    assert outcome.text == ("it did not finish within 0.01 seconds; it may still be running, but its result is lost")
    assert await asyncio.to_thread(told.wait, 30)


async def test_a_cancelled_call_does_not_wait_for_its_thread() -> None:
    started, release, told = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def tool(context: ToolContext) -> None:
        loop.call_soon_threadsafe(started.set)
        release.wait(30)
        if context.cancelled():
            told.set()

    task = asyncio.ensure_future(call(tool))
    await started.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert not release.is_set()
    release.set()
    assert await asyncio.to_thread(told.wait, 30)
    await turns()


def test_a_function_that_hangs_does_not_keep_the_interpreter_running() -> None:
    code = """
import asyncio, threading
from lmbridge import ToolContext
from lmbridge.agent.toolset import Toolset
def hang() -> None:
    threading.Event().wait()
async def main():
    tools = await Toolset.collect([hang])
    ready = tools.read({"function": {"name": "hang", "arguments": "{}"}})
    context = ToolContext("", "", "", lambda: False)
    print((await tools.call(ready, context, timeout=0.01, max_output=100)).text)
asyncio.run(main())
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert "may still be running" in process.stdout
    assert not process.stderr


@pytest.mark.parametrize("way", ["timeout", "cancel"])
async def test_a_tool_sees_in_its_clean_up_that_its_result_is_not_wanted(way: str) -> None:
    begun = asyncio.Event()
    seen: list[bool] = []

    async def tool(context: ToolContext) -> None:
        seen.append(context.cancelled())
        try:
            begun.set()
            await asyncio.get_running_loop().create_future()
        finally:
            seen.append(context.cancelled())

    calling = asyncio.create_task(call(tool, timeout=0.01 if way == "timeout" else None))
    await begun.wait()
    if way == "cancel":
        calling.cancel()
    await asyncio.wait({calling})
    assert seen == [False, True]


async def test_the_context_reports_the_cancellation_of_the_run() -> None:
    is_over = False

    async def tool(context: ToolContext) -> list[bool]:
        nonlocal is_over
        before = context.cancelled()
        is_over = True
        return [before, context.cancelled()]

    assert (await call(tool, cancelled=lambda: is_over)).text == "[false,true]"


# Tasks


async def test_an_async_tool_that_is_out_of_time_is_cancelled_and_awaited() -> None:
    cleaned: list[str] = []

    async def tool() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append("up")

    outcome = await call(tool, timeout=0)
    assert outcome.text == "it did not finish within 0 seconds, and was cancelled"
    assert outcome.is_error
    # A task that was cancelled before its first step has nothing to clean up.
    assert cleaned == ["up"] or not cleaned
    outcome = await call(tool, timeout=0.01)
    assert outcome.text == "it did not finish within 0.01 seconds, and was cancelled"
    assert "up" in cleaned


async def test_the_time_limit_covers_a_coroutine_that_a_plain_function_returns() -> None:
    outcome = await call(lambda: asyncio.Event().wait(), timeout=0.01)
    assert outcome.text == "it did not finish within 0.01 seconds, and was cancelled"


async def test_a_coroutine_that_is_returned_too_late_is_closed() -> None:
    release, returned = threading.Event(), threading.Event()

    async def late() -> None: ...

    def tool() -> Any:
        release.wait(30)
        returned.set()
        return late()

    assert (await call(tool, timeout=0.01)).is_error
    release.set()
    await asyncio.to_thread(returned.wait, 30)
    await asyncio.to_thread(_join_tools)
    await turns()
    gc.collect()


def _join_tools() -> None:
    for thread in threading.enumerate():
        if thread.name == "lmbridge-tool":
            thread.join(30)


async def test_a_tool_without_a_timeout_is_awaited() -> None:
    assert (await call(lambda: 1, timeout=None)).text == "1"


async def test_an_exception_at_the_moment_of_a_cancel_is_not_logged() -> None:
    logged_contexts: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: logged_contexts.append(context))
    go = asyncio.Event()

    async def tool() -> None:
        await go.wait()
        # Runs after this task has ended, and before the task that awaits it continues.
        loop.call_soon(callers[0].cancel)
        raise ValueError("too late")

    callers = [asyncio.ensure_future(call(tool))]
    await turns()
    go.set()
    await asyncio.wait(callers)
    assert callers.pop().cancelled()
    gc.collect()
    assert logged_contexts == []


@pytest.mark.parametrize("ending", ["value", "error"])
async def test_a_tool_that_returns_or_raises_when_it_is_cancelled_is_still_out_of_time(ending: str) -> None:
    logged_contexts: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged_contexts.append(context))

    async def tool() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if ending == "error":
                raise OSError("while cleaning up") from None
        return "swallowed"

    outcome = await call(tool, timeout=0.01)
    assert outcome.text == "it did not finish within 0.01 seconds, and was cancelled"
    # An exception that was never retrieved is logged when its task is collected.
    gc.collect()
    assert logged_contexts == []


async def test_a_tool_that_ignores_its_cancellation_is_left_running(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tool_execution, "_CLEAN_UP_SECONDS", 0.01)
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    with caplog.at_level(logging.WARNING, "lmbridge.agent"):
        outcome = await call(stubborn, timeout=0.01)
    assert outcome.text.endswith("ignored its cancellation, so it may still be running")
    assert "a tool is still running 0.01 seconds after it was cancelled" in caplog.text
    (leftover,) = tool_execution._running_tools
    release.set()
    await asyncio.wait([leftover])
    await turns()
    assert not tool_execution._running_tools


async def test_a_second_cancel_does_not_wait_for_a_stubborn_tool() -> None:
    release, begun, cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        begun.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                cancelled.set()

    task = asyncio.ensure_future(call(stubborn))
    await begun.wait()
    task.cancel()
    await cancelled.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    (leftover,) = tool_execution._running_tools
    release.set()
    await asyncio.wait([leftover])
    await turns()


async def test_the_tool_has_ended_before_the_cancelled_call_raises() -> None:
    running: list[int] = []

    async def tool() -> None:
        running.append(1)
        try:
            await turns(5)
        finally:
            await asyncio.sleep(0)
            running.pop()

    async def after() -> None:
        assert running == []
        assert not tool_execution._running_tools

    await cancel_at_each_step(lambda: call(tool), after, at_least=1)
    await cancel_at_each_step(lambda: call(functools.partial(call_plainly, tool)), after, at_least=2)
    # A coroutine that was never awaited warns when it is collected.
    gc.collect()


# Truncation


def test_long_output_keeps_its_beginning_and_its_end() -> None:
    assert truncate_output("abcdefghij", 10) == "abcdefghij"
    assert truncate_output("abcdefghij", 5) == "abc\n[... 5 characters omitted]\nij"
    assert truncate_output("abcdefghij", 1) == "a\n[... 9 characters omitted]\n"
    assert truncate_output("abcdefghij", 0) == "\n[... 10 characters omitted]\n"
    assert truncate_output("", 0) == ""


@given(st.text(max_size=60), st.integers(0, 60))
def test_truncation_keeps_the_limit_and_counts_the_rest(text: str, limit: int) -> None:
    truncated = truncate_output(text, limit)
    if len(text) <= limit:
        assert truncated == text
        return
    head, _, rest = truncated.partition(f"\n[... {len(text) - limit} characters omitted]\n")
    assert text.startswith(head)
    assert text.endswith(rest)
    assert len(head) + len(rest) == limit
    assert 0 <= len(head) - len(rest) <= 1


async def test_the_text_of_results_and_errors_is_truncated_and_the_raw_one_is_not() -> None:
    outcome = await call(lambda: "x" * 50, max_output=10)
    assert outcome.text == "xxxxx\n[... 40 characters omitted]\nxxxxx"
    assert outcome.raw == "x" * 50

    def tool() -> None:
        raise ValueError("x" * 50)

    assert "characters omitted" in (await call(tool, max_output=10)).text


def test_a_tool_whose_event_loop_is_closed_is_dropped_without_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unraisable: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", unraisable.append)
    kept: set[asyncio.Future[Any]] = set()
    monkeypatch.setattr(tool_execution, "_running_tools", kept)
    loop = asyncio.new_event_loop()
    task = loop.create_task(call(asyncio.Event().wait))
    loop.run_until_complete(turns(5))
    assert kept
    loop.close()
    kept.clear()
    del task
    gc.collect()
    assert [record.message.partition("\n")[0] for record in caplog.records] == [
        "Task was destroyed but it is pending!"
    ] * 2
    assert unraisable == []


async def test_a_tool_that_is_cancelled_before_its_first_step_ends_the_call() -> None:
    begun: list[str] = []

    async def tool() -> None:
        begun.append("tool")

    def cancel_tool() -> None:
        for task in asyncio.all_tasks():
            if task.get_name().startswith("lmbridge-tool-"):
                task.cancel()

    called = asyncio.create_task(call(tool, timeout=None))
    # Runs after the call has created the tool's task, and before the first step of that task.
    asyncio.get_running_loop().call_soon(cancel_tool)
    outcome = await called
    assert (outcome.text, outcome.is_error, begun) == ("it was cancelled from within", True, [])
    (coroutine,) = (each for each in gc.get_objects() if inspect.iscoroutine(each) and each.cr_code is tool.__code__)
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


@pytest.mark.parametrize("ending", ["value", "error", "cancel"])
async def test_the_timer_of_a_tool_that_has_ended_is_cancelled(ending: str) -> None:
    async def work() -> None:
        await turns(2)
        if ending == "error":
            raise ValueError
        if ending == "cancel":
            await asyncio.Event().wait()

    before = _pending_timers()
    context = ToolContext("run", "call", "tool", lambda: False)
    called = asyncio.create_task(call_tool(Tool("tool", "", {}, work), {}, context, timeout=30, max_output=100))
    await turns(2)
    assert _pending_timers() == before + 1
    await turns(5)
    called.cancel()
    await asyncio.wait([called])
    assert called.cancelled() == (ending == "cancel")
    assert _pending_timers() == before


async def test_a_tool_that_ends_in_its_first_step_has_no_timer() -> None:
    before = _pending_timers()

    async def tool() -> int:
        asyncio.get_running_loop().call_soon(lambda: seen.append(_pending_timers()))
        return 1

    seen: list[int] = []
    assert (await call(tool, timeout=30)).text == "1"
    await turns(2)
    assert seen == [before]


def _pending_timers() -> int:
    scheduled: list[asyncio.TimerHandle] = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]  # not public
    return sum(not timer.cancelled() for timer in scheduled)


# Tools with a time limit of their own


async def test_a_tool_without_a_timeout_gets_the_limit_of_the_agent_and_is_not_stopped() -> None:
    limits: list[float | None] = []

    async def work(context: ToolContext, /, **arguments: str) -> str:
        limits.append(context.tool_timeout)
        await turns(50)
        return arguments["context"]

    tool = Tool("tool", "", {}, work, timeout=None)
    for timeout in (1e-9, None):
        context = ToolContext("run", "call", "tool", lambda: False, timeout)
        outcome = await call_tool(tool, {"context": "done"}, context, timeout=timeout, max_output=100)
        assert (outcome.text, outcome.is_error) == ("done", False)
    assert limits == [1e-9, None]


@pytest.mark.parametrize("is_async", [True, False])
async def test_the_timeout_of_a_tool_replaces_the_limit_of_the_agent(is_async: bool) -> None:
    release = threading.Event()

    async def hang() -> None:
        await asyncio.Event().wait()

    tool = Tool("hang", "", {}, hang if is_async else release.wait, timeout=0.01)
    context = ToolContext("run", "call", "hang", lambda: False)
    outcome = await call_tool(tool, {}, context, timeout=None, max_output=1_000)
    release.set()
    assert outcome.is_error
    assert "did not finish within 0.01 seconds" in outcome.text


@pytest.mark.parametrize("timeout", [0, -1, True, float("inf"), "60", "none"])
def test_a_timeout_that_is_not_a_number_of_seconds_is_refused(timeout: Any) -> None:
    with pytest.raises(LLMValidationError, match="timeout of tool 'tool' must be"):
        Tool("tool", "", {}, turns, timeout=timeout)
