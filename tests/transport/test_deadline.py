"""A deadline turns its own cancellation into a timeout, and leaves every other cancellation alone."""

from __future__ import annotations

import asyncio
import math

import pytest

from lmbridge.transport.deadline import Deadline, DeadlineTimer
from tests.support import turns


async def wait_until(when: float) -> str:
    loop = asyncio.get_running_loop()
    with Deadline(DeadlineTimer(loop), when):
        await asyncio.sleep(0.01)
        return "in time"


async def test_a_block_that_ends_in_time_is_left_alone() -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    for when in (math.inf, loop.time() + 50):
        assert await wait_until(when) == "in time"
    assert task.cancelling() == 0


async def test_a_block_that_is_late_raises_a_timeout_and_leaves_no_cancellation_behind() -> None:
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(TimeoutError) as caught:
        await wait_until(asyncio.get_running_loop().time())
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert task.cancelling() == 0
    # The next wait is not cancelled.
    await asyncio.sleep(0)


async def test_a_cancellation_by_the_caller_stays_a_cancellation() -> None:
    task = asyncio.create_task(wait_until(math.inf))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("deadline_first", [True, False])
async def test_a_cancellation_by_the_caller_at_the_same_moment_wins(deadline_first: bool) -> None:
    loop = asyncio.get_running_loop()
    entered: asyncio.Future[Deadline] = loop.create_future()

    async def work() -> None:
        with Deadline(DeadlineTimer(loop), loop.time() + 50) as deadline:
            entered.set_result(deadline)
            await asyncio.sleep(50)

    task = asyncio.create_task(work())
    deadline = await entered
    if deadline_first:
        deadline.on_deadline()
    task.cancel()
    if not deadline_first:
        deadline.on_deadline()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_an_error_in_the_block_is_passed_on() -> None:
    loop = asyncio.get_running_loop()
    with pytest.raises(KeyError):  # noqa: SIM117 - the deadline is what is tested
        with Deadline(DeadlineTimer(loop), loop.time() + 50):
            raise KeyError


async def test_a_deadline_and_an_asyncio_timeout_can_be_nested() -> None:
    loop = asyncio.get_running_loop()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(50):
            await wait_until(loop.time())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await wait_until(loop.time() + 50)


async def test_each_overdue_object_is_called_even_if_another_one_raises() -> None:
    loop = asyncio.get_running_loop()
    reported: list[object] = []
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
    called: list[str] = []

    class Overdue:
        def __init__(self, name: str, error: Exception | None = None) -> None:
            self.deadline = 0.0
            self._name = name
            self._error = error

        def on_deadline(self) -> None:
            called.append(self._name)
            if self._error is not None:
                raise self._error

    error = KeyError("one")
    timer = DeadlineTimer(loop, [Overdue("three")])
    timer.add(Overdue("one", error))
    timer.add(Overdue("two"))
    await turns()
    assert called == ["one", "two", "three"]
    assert reported == [error]
