"""The task that owns a session: what happens to calls when the task is cancelled, or the server dies."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from lmbridge import ToolError
from lmbridge.mcp.servers.session_owner import SessionOwner
from tests.mcp.conftest import MakeHub
from tests.mcp.support import function_of


def owner_task() -> asyncio.Task[Any]:
    """Returns the task that holds the session with the server "a" open."""
    (found,) = [task for task in asyncio.all_tasks() if task.get_name() == "lmbridge-mcp-a"]
    return found


async def test_cancelling_the_owner_ends_the_session_and_the_next_call_starts_another(make_hub: MakeHub) -> None:
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unhandled.append(context))
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    waiting = asyncio.create_task(function_of(lease, "sleep")())
    echo = function_of(lease, "echo")
    await echo(text="first")
    owner_task().cancel()
    with pytest.raises(ToolError, match="may or may not have run"):
        await waiting
    assert await echo(text="again") == "again"
    assert hub.status()["a"].starts == 2
    assert unhandled == []


async def test_all_of_a_hundred_calls_in_flight_fail_when_the_server_dies(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {}}).tools()
    sleep, die = function_of(lease, "sleep"), function_of(lease, "die")
    calls = [asyncio.create_task(sleep()) for _ in range(100)]
    with pytest.raises(ToolError):
        await die()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(each) for each in outcomes} == {ToolError}


async def test_a_call_that_ignores_its_cancellation_times_out_all_the_same(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()

    class StuckSession:
        async def call(self, *_: object) -> None:
            while not release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await release.wait()

    lease = await make_hub({"a": {}}).tools(call_timeout=0.01)
    monkeypatch.setattr("lmbridge.mcp.servers.session_owner._CANCEL_GRACE_SECONDS", 0.01)
    monkeypatch.setattr(SessionOwner, "_live_session", lambda _: StuckSession())
    try:
        with pytest.raises(ToolError, match="did not answer within"):
            await function_of(lease, "echo")(text="on")
    finally:
        release.set()
