"""What a cancel has to wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lmbridge.local.shield import in_thread, settle
from tests.support import cancel_at_each_step


async def test_work_is_finished_before_the_cancel_goes_on() -> None:
    gate, done = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await gate.wait()
        done.set()

    task = asyncio.create_task(settle(work()))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel("mine")
    await asyncio.sleep(0)
    assert not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError, match="mine"):
        await task
    assert done.is_set()


async def test_a_cancel_counts_more_than_what_went_wrong() -> None:
    gate = asyncio.Event()

    async def work() -> None:
        await gate.wait()
        raise OSError

    task = asyncio.create_task(settle(work()))
    await asyncio.sleep(0)
    task.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_results_and_errors_pass_through() -> None:
    assert await settle(asyncio.sleep(0, "result")) == "result"
    with pytest.raises(ZeroDivisionError):
        await settle(asyncio.to_thread(lambda: 1 // 0))


async def test_a_manager_in_a_thread_is_left_wherever_a_cancel_comes() -> None:
    entered, left = 0, 0

    @contextmanager
    def manager() -> Iterator[str]:
        nonlocal entered, left
        entered += 1
        yield "value"
        left += 1

    async def run() -> None:
        async with in_thread(manager()) as value:
            assert value == "value"
            await asyncio.sleep(0)

    async def after() -> None:
        assert entered == left

    await cancel_at_each_step(run, after, at_least=3)
    await after()
    assert entered >= 4


async def test_a_manager_that_does_not_open_is_not_left() -> None:
    @contextmanager
    def manager() -> Iterator[None]:
        raise PermissionError
        yield

    with pytest.raises(PermissionError):
        async with in_thread(manager()):
            pytest.fail("it was entered")
