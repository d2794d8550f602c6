"""Cancelling an operation at any step: the ways in which it happens, and what has to come out.

A step is a moment in which a task has to wait: the task of the operation, or one of those that it has started. At step
N the operation is cancelled, and then, if it still has something to clean up, once more at a later step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal, TypeAlias

Operation: TypeAlias = Callable[[], Awaitable[Any]]
Way: TypeAlias = Literal["cancel", "cancel early", "cancel twice", "timeout", "sibling"]
"""How it is cancelled: by `Task.cancel`, by one that comes before the tasks which the step has created have begun, by
two of them, by `asyncio.timeout`, or by a task of its `TaskGroup`."""
WAYS: Final[tuple[Way, ...]] = ("cancel", "cancel early", "cancel twice", "timeout", "sibling")
_HANGS_AFTER: Final = 60.0


class StepCounter:
    """Counts the steps of all tasks that are created while `counting`, and calls a function at each of them.

    Args:
        is_early: Whether a step is counted when it begins. What the function schedules then comes before everything
            that the step itself schedules, such as the first steps of tasks that it creates.
    """

    def __init__(self, *, is_early: bool = False) -> None:
        self.count = 0
        self._is_early = is_early
        self._at_step: Callable[[int], object] = lambda _: None

    def _note(self) -> None:
        self.count += 1
        self._at_step(self.count)

    @contextmanager
    def counting(self, at_step: Callable[[int], object]) -> Generator[None]:
        self.count, self._at_step = 0, at_step
        loop = asyncio.get_running_loop()

        def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
            return asyncio.Task(_Stepped(coroutine, self._note, is_early=self._is_early), loop=loop, **options)

        before = loop.get_task_factory()
        loop.set_task_factory(make)
        try:
            yield
        finally:
            loop.set_task_factory(before)
            self._at_step = lambda _: None


class _Stepped(Coroutine[Any, Any, Any]):
    """A coroutine that calls a function each time it waits for something.

    It does not await the other one, because a task that is cancelled before its first step would never start that.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], note: Callable[[], object], *, is_early: bool) -> None:
        self._coroutine = coroutine
        self._note = note
        self._is_early = is_early
        self.__qualname__ = getattr(coroutine, "__qualname__", repr(coroutine))

    def send(self, value: Any) -> Any:
        return self._stepped(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        return self._stepped(self._coroutine.throw, *error)

    def _stepped(self, step: Callable[..., Any], *arguments: Any) -> Any:
        if self._is_early:
            self._note()
            return step(*arguments)
        awaited = step(*arguments)
        self._note()
        return awaited

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()


class WrongOutcome(AssertionError):  # noqa: N818 - a failed assertion
    """A cancelled operation ended in another way than by its cancellation."""


async def cancel_at(operation: Operation, way: Way, at: int) -> bool:
    """Runs an operation that is cancelled at a step, and returns False if it had ended before.

    Raises:
        WrongOutcome: Something else than the cancellation came out.
    """
    match way:
        case "cancel":
            return await _cancelled(operation, {at})
        case "cancel early":
            return await _cancelled(operation, {at}, is_early=True)
        case "cancel twice":
            return await _cancelled(operation, {at, at + 1, at + 2})
        case "timeout":
            return await _timed_out(operation, at)
        case "sibling":
            return await _with_sibling(operation, at)


async def _cancelled(operation: Operation, steps: set[int], *, is_early: bool = False) -> bool:
    loop, counter = asyncio.get_running_loop(), StepCounter(is_early=is_early)
    with counter.counting(lambda count: loop.call_soon(task.cancel) if count in steps else None):
        task = asyncio.ensure_future(_awaited(operation))
        await asyncio.wait([task], timeout=_HANGS_AFTER)
    if not task.done():
        raise WrongOutcome(f"it hangs: {task!r}")
    if task.cancelled():
        return True
    # If the result was there before the cancellation could be delivered, it is returned.
    task.result()
    if task.cancelling() and counter.count > min(steps):
        raise WrongOutcome(f"the cancellation at step {min(steps)} of {counter.count} was swallowed")
    return False


async def _timed_out(operation: Operation, at: int) -> bool:
    loop = asyncio.get_running_loop()
    limits: list[asyncio.Timeout] = []

    async def limited() -> None:
        async with asyncio.timeout(None) as limit:
            limits.append(limit)
            await operation()

    def expire() -> None:
        # The operation may have left the block in the same turn.
        with suppress(RuntimeError):
            limits[0].reschedule(loop.time())

    error = await _outcome(limited, lambda count: loop.call_soon(expire) if count == at else None)
    if error is not None and type(error) is not TimeoutError:
        raise WrongOutcome(f"a timeout gave {error!r}") from error
    return error is not None


async def _with_sibling(operation: Operation, at: int) -> bool:
    reached = asyncio.Event()

    async def fail() -> None:
        await reached.wait()
        raise _SiblingError

    async def grouped() -> None:
        async with asyncio.TaskGroup() as group:
            sibling = group.create_task(fail())
            await operation()
            sibling.cancel()

    error = await _outcome(grouped, lambda count: reached.set() if count == at else None)
    if error is None:
        return False
    if not isinstance(error, BaseExceptionGroup) or [type(each) for each in error.exceptions] != [_SiblingError]:
        raise WrongOutcome(f"a sibling gave {error!r}") from error
    return True


async def _outcome(run: Operation, at_step: Callable[[int], object]) -> BaseException | None:
    """Returns the exception that a function raises in a task of its own."""
    with StepCounter().counting(at_step):
        task = asyncio.ensure_future(_awaited(run))
        await asyncio.wait([task], timeout=_HANGS_AFTER)
    if not task.done():
        raise WrongOutcome(f"it hangs: {task!r}")
    if task.cancelled():
        return asyncio.CancelledError()
    return task.exception()


class _SiblingError(Exception):
    """Another task of the group has failed."""


def _awaited(operation: Operation) -> Coroutine[Any, Any, Any]:
    async def call() -> Any:
        return await operation()

    return call()
