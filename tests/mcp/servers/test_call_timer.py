"""The time limits of a call, and the errors that say which of them was reached."""

from __future__ import annotations

import asyncio

from lmbridge.mcp.servers.call_timer import CallTimer


def test_a_request_without_a_limit_has_an_error_as_well() -> None:
    timer = CallTimer(None)
    assert "before the request was cancelled" in str(timer.error())
    timer.extend()
    assert "before the request was cancelled" in str(timer.error())


async def test_the_error_names_the_limit_that_was_reached_whatever_happens_after_that() -> None:
    timer = CallTimer(0.01, 0.02)
    await timer.wait(asyncio.get_running_loop().create_future())
    # The request is cancelled, which takes longer than the rest of the second limit.
    await asyncio.sleep(0.05)
    timer.extend()
    assert str(timer.error()) == "did not answer within 0.01 seconds"


async def test_the_error_names_the_limit_for_the_whole_call_if_that_was_reached() -> None:
    timer = CallTimer(60, 0.01)
    timer.extend()
    await timer.wait(asyncio.get_running_loop().create_future())
    assert str(timer.error()) == "did not answer within 0.01 seconds, although it reported progress"
