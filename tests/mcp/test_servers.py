"""One server's life: crashes, restarts, silence, noise, and what is left of it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lmbridge import MultiMCPError, ToolError
from lmbridge.mcp import McpEvent, ServerState, ServerStateChanged
from lmbridge.mcp.sdk import RefusedError
from lmbridge.mcp.servers.guardian import is_gone
from tests.mcp.conftest import MakeHub
from tests.mcp.support import SERVER, Recorder, gone, noted, tool
from tests.support import cancel_at_each_step, turns

# Crashes


async def test_a_call_whose_server_dies_may_or_may_not_have_run_and_is_not_repeated(
    make_hub: MakeHub, notes: Path
) -> None:
    hub = make_hub({"a": {"die_at": ["count"], "noted": ["count"], "notes": str(notes)}})
    lease = await hub.tools()
    with pytest.raises(
        ToolError, match=r"lost during the call \(it ended with status 7\); the tool may or may not have run"
    ):
        await tool(lease, "count")()
    assert notes.read_text().split() == ["count"]


async def test_a_server_that_died_is_started_again_at_the_next_call(
    make_hub: MakeHub, recorder: Recorder[McpEvent], caplog: pytest.LogCaptureFixture
) -> None:
    hub = make_hub({"a": {}}, on_event=recorder)
    lease = await hub.tools()
    with pytest.raises(ToolError, match="it was killed by SIGKILL"):
        await tool(lease, "die")()
    assert hub.status()["a"].state == ServerState.LOST
    assert "MCP server 'a' was lost: it was killed by SIGKILL" in caplog.text
    assert await tool(lease, "echo")(text="on") == "on"
    assert [event.state for event in recorder.seen if isinstance(event, ServerStateChanged)] == [
        "starting",
        "ready",
        "lost",
        "starting",
        "ready",
    ]
    assert hub.status()["a"].starts == 2


async def test_a_call_after_the_end_of_a_session_is_sent_on_the_next_one(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    connection = hub._servers["a"]._connection
    assert connection
    connection.finish("it went away")  # a moment ago: nobody has been told yet
    assert await tool(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 2


async def test_a_call_that_the_server_declared_idempotent_is_made_once_more(
    make_hub: MakeHub, notes: Path, tmp_path: Path
) -> None:
    once = {"die_at": ["count"], "once": str(tmp_path / "once")}
    lease = await make_hub({"a": {"idempotent": ["count"], "noted": ["count"], "notes": str(notes), **once}}).tools()
    assert await tool(lease, "count")() == "alive again"
    assert notes.read_text().split() == ["count", "count"]


async def test_an_idempotent_call_is_not_made_a_third_time(make_hub: MakeHub, notes: Path) -> None:
    told = {"die_at": ["count"], "idempotent": ["count"], "noted": ["count"], "notes": str(notes)}
    lease = await make_hub({"a": told}).tools()
    with pytest.raises(ToolError, match="may or may not have run"):
        await tool(lease, "count")()
    assert notes.read_text().split() == ["count", "count"]


async def test_all_calls_in_flight_end_when_the_server_dies_and_share_one_restart(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    calls = [asyncio.create_task(tool(lease, "sleep")()) for _ in range(20)]
    await turns()
    with pytest.raises(ToolError):
        await tool(lease, "die")()
    assert all(isinstance(each, ToolError) for each in await asyncio.gather(*calls, return_exceptions=True))
    assert await asyncio.gather(*(tool(lease, "echo")(text="on") for _ in range(20))) == ["on"] * 20
    assert hub.status()["a"].starts == 2


async def test_one_server_that_dies_does_not_disturb_another(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {}, "b": {}}).tools()
    with pytest.raises(ToolError):
        await tool(lease, "die", "a")()
    assert await tool(lease, "echo", "b")(text="on") == "on"


async def test_a_server_that_dies_after_it_listed_its_tools_is_restarted_for_each_call(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {"die_after_list": True}}).tools(on_error="continue")
    for each in lease.tools[:1]:
        with pytest.raises(ToolError):
            await each.function(text="x")


async def test_a_server_that_keeps_dying_is_started_after_a_pause_that_grows(
    make_hub: MakeHub, recorder: Recorder[McpEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.mcp.servers.managed._FIRST_WAIT", 0.02)
    hub = make_hub({"a": {}}, on_event=recorder)
    lease = await hub.tools()
    server = hub._servers["a"]
    for wait in (0.02, 0.04, 0.08):
        with pytest.raises(ToolError):
            await tool(lease, "die")()
        assert server._not_before - asyncio.get_running_loop().time() == pytest.approx(wait, abs=0.02)
    assert await tool(lease, "echo")(text="on") == "on"
    assert ServerState.BACKOFF in [event.state for event in recorder.seen if isinstance(event, ServerStateChanged)]


async def test_the_pause_has_a_limit_and_ends_with_a_server_that_stayed(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    server = hub._servers["a"]
    monkeypatch.setattr("lmbridge.mcp.servers.managed._FIRST_WAIT", 0.5)
    for _ in range(12):
        server._failed_again()
    assert server._not_before - asyncio.get_running_loop().time() == pytest.approx(30, abs=0.1)
    monkeypatch.setattr("lmbridge.mcp.servers.managed._STABLE", 0.0)
    with pytest.raises(ToolError):
        await tool(lease, "die")()
    assert (server._failures, server._not_before) == (0, 0.0)


async def test_a_server_that_could_not_be_started_is_tried_again_by_the_next_run(
    make_hub: MakeHub, tmp_path: Path
) -> None:
    program = tmp_path / "late"
    hub = make_hub({"a": {"command": str(program)}})
    with pytest.raises(MultiMCPError, match="install it, or give its full path"):
        await hub.tools()
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -I -S {SERVER}\n")
    program.chmod(0o755)
    assert (await hub.tools()).tools


async def test_many_runs_share_one_failure_and_each_gets_an_error_of_its_own(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"exit": 1, "starts": True, "notes": str(notes)}})
    failures = await asyncio.gather(*(hub.tools(on_error="continue") for _ in range(10)))
    errors = [each.errors["a"] for each in failures]
    assert len({id(error) for error in errors}) == 10
    assert len(notes.read_text().split()) < 10


# Silence and noise


async def test_a_message_beyond_16_mib_ends_the_session_and_the_call_says_why(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"size": 17 * 2**20}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match="it sent a message of more than 16,777,216 bytes"):
        await tool(lease, "big")()
    assert await tool(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 2


async def test_a_message_of_15_mib_arrives(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"size": 15 * 2**20}})
    lease = await hub.tools()
    result = await tool(lease, "big")()
    assert result == ""
    assert hub.status()["a"].starts == 1


async def test_garbage_on_stdout_is_skipped_and_logged_once(
    make_hub: MakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    lease = await make_hub({"a": {"garbage": True}}).tools()
    assert await tool(lease, "echo")(text="on") == "on"
    assert caplog.text.count("that is not a JSON-RPC message (later ones are not logged): 'Welcome!'") == 1


async def test_text_before_a_message_on_its_line_is_cut_off(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {"unterminated": True}}).tools()
    assert await tool(lease, "echo")(text="on") == "on"


async def test_a_flood_on_stderr_blocks_nothing_and_its_end_is_kept(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"flood": 5_000_000}})
    lease = await hub.tools()
    assert await tool(lease, "echo")(text="on") == "on"
    assert 0 < len(hub.status()["a"].last_words) <= 10 * 501


async def test_a_server_that_hangs_in_a_call_goes_on_with_the_next(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"notes": str(notes), "lmbridge": {"callTimeout": 0.1}}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match=r"did not answer within 0.1 seconds"):
        await tool(lease, "sleep")()
    assert await tool(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 1


async def test_a_server_that_closes_its_stdin_is_lost_though_it_lives(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"deaf_at": ["count"]}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match=r"lost during the call \(it does not read any more\)"):
        await tool(lease, "count")()
    assert await tool(lease, "echo")(text="on") == "on"


# What is left


async def test_a_grandchild_that_ignores_sigterm_is_gone_when_close_returns(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"grandchild": True, "notes": str(notes), "ignore_term": True, "ignore_eof": True}})
    await hub.tools()
    pid = hub.status()["a"].pid
    assert pid
    await hub.close()
    assert await asyncio.to_thread(is_gone, pid)


async def test_a_grandchild_is_gone_even_if_its_parent_left_by_itself(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"grandchild": True, "notes": str(notes), "die_at": ["count"]}})
    lease = await hub.tools()
    pid = hub.status()["a"].pid
    assert pid
    with pytest.raises(ToolError, match="lost during the call"):  # although the grandchild holds the pipe
        await tool(lease, "count")()
    await gone(pid)


async def test_nothing_is_left_of_a_server_that_could_not_be_started(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"grandchild": True, "notes": str(notes), "hang": True}}, connect_timeout=0.5)
    with pytest.raises(MultiMCPError):
        await hub.tools()
    group = await group_of(notes)
    await gone(group)


async def test_a_cancel_while_it_starts_ends_the_server(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"grandchild": True, "notes": str(notes), "hang": True}})
    run = asyncio.create_task(hub.tools())
    group = await group_of(notes)
    run.cancel()
    await asyncio.wait([run])
    assert run.cancelled()
    await gone(group)
    assert hub.status()["a"].state == ServerState.IDLE


async def test_a_cancel_of_one_who_waits_does_not_disturb_another(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {}})
    first, second = (asyncio.create_task(hub.tools()) for _ in range(2))
    await asyncio.sleep(0)
    while "a" not in hub.status():
        await asyncio.sleep(0)
    await turns()
    first.cancel()
    assert (await second).tools
    assert hub.status()["a"].starts == 1
    assert first.cancelled()


async def test_close_while_it_starts_is_an_error_for_who_waits(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"grandchild": True, "notes": str(notes), "hang": True}})
    run = asyncio.create_task(hub.tools(on_error="continue"))
    group = await group_of(notes)
    await hub.close()
    assert await asyncio.to_thread(is_gone, group)
    assert "was closed while it was starting" in str((await run).errors["a"])


async def group_of(notes: Path) -> int:
    """The process group of a scripted server that noted its grandchild."""
    (line, *_) = await noted(notes)
    return os.getpgid(int(line.split()[1]))


async def test_a_cancel_in_the_moment_of_a_failure_is_all_that_is_heard_of(make_hub: MakeHub) -> None:
    heard: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    connection = hub._servers["a"]._connection
    assert connection
    fail = asyncio.Event()

    async def failing(*_: object) -> Any:
        await fail.wait()
        raise RefusedError("late")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection._session, "call", failing)
        call = asyncio.create_task(tool(lease, "echo")(text="x"))
        await turns()
        fail.set()
        call.cancel()
        await asyncio.wait([call])
    assert call.cancelled()
    del call
    gc.collect()  # asyncio tells of errors that nobody looked at when they are forgotten
    assert heard == []


async def test_cancels_at_any_moment_leave_nothing_behind(make_hub: MakeHub, recorder: Recorder[Any]) -> None:
    hub = make_hub({"a": {}}, on_event=recorder, idle_linger=None)
    tasks = asyncio.all_tasks()

    async def run() -> None:
        lease = await hub.tools()
        try:
            assert await tool(lease, "echo")(text="on") == "on"
        finally:
            lease.release()

    async def check() -> None:
        assert hub.status().get("a") is None or hub._servers["a"]._users == 0

    await cancel_at_each_step(run, check, at_least=3)
    await hub.close()
    assert asyncio.all_tasks() == tasks
