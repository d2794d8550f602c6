"""Blocking context managers that are entered and left in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lmbridge.local.threads import in_thread
from tests.support import cancel_at_each_step


async def test_a_manager_that_was_entered_is_left_whenever_the_caller_is_cancelled() -> None:
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


async def test_a_manager_that_fails_to_enter_is_not_left() -> None:
    @contextmanager
    def manager() -> Iterator[None]:
        raise PermissionError
        yield

    with pytest.raises(PermissionError):
        async with in_thread(manager()):
            pytest.fail("the block was entered")
