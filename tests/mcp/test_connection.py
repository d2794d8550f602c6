"""A session and its owner, where somebody else has a hand in it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from lmbridge import ToolError
from lmbridge.mcp.servers.connection import Connection
from tests.mcp.conftest import MakeHub
from tests.mcp.support import tool


def owner() -> asyncio.Task[Any]:
    """The task that holds the session open."""
    (found,) = [task for task in asyncio.all_tasks() if task.get_name() == "lmbridge-mcp-a"]
    return found


async def test_a_cancel_of_the_owner_ends_the_session_and_the_next_call_starts_another(make_hub: MakeHub) -> None:
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    waiting = asyncio.create_task(tool(lease, "sleep")())
    echo = tool(lease, "echo")
    await echo(text="first")
    owner().cancel()
    with pytest.raises(ToolError, match="may or may not have run"):
        await waiting
    assert await echo(text="again") == "again"
    assert hub.status()["a"].starts == 2
    assert faults == []


async def test_a_hundred_calls_in_flight_all_hear_that_the_server_died(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {}}).tools()
    sleep, die = tool(lease, "sleep"), tool(lease, "die")
    calls = [asyncio.create_task(sleep()) for _ in range(100)]
    with pytest.raises(ToolError):
        await die()
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(each) for each in done} == {ToolError}


async def test_a_call_that_does_not_let_itself_be_cancelled_is_late_all_the_same(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()

    class Stuck:
        async def call(self, *_: object) -> None:
            while not release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await release.wait()

    lease = await make_hub({"a": {}}).tools(call_timeout=0.01)
    monkeypatch.setattr("lmbridge.mcp.servers.connection._CANCEL", 0.01)
    monkeypatch.setattr(Connection, "_usable", lambda _: Stuck())
    try:
        with pytest.raises(ToolError, match="did not answer within"):
            await tool(lease, "echo")(text="on")
    finally:
        release.set()
