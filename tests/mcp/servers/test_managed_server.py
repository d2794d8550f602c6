"""A server that is started on demand and shared: crashes, restarts, bad output, and the end of its processes."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lmbridge import MCPConnectionError, MultiMCPError, ToolError
from lmbridge.mcp import McpEvent, ServerState, ServerStateChanged
from lmbridge.mcp.sdk import RefusedError
from lmbridge.mcp.servers.guardian import is_gone
from tests.mcp.conftest import MakeHub
from tests.mcp.support import SERVER, Recorder, function_of, wait_for_notes, wait_until_gone
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
        await function_of(lease, "count")()
    assert notes.read_text().split() == ["count"]


async def test_a_server_that_died_is_restarted_at_the_next_call(
    make_hub: MakeHub, recorder: Recorder[McpEvent], caplog: pytest.LogCaptureFixture
) -> None:
    hub = make_hub({"a": {}}, on_event=recorder)
    lease = await hub.tools()
    with pytest.raises(ToolError, match="it was killed by SIGKILL"):
        await function_of(lease, "die")()
    assert hub.status()["a"].state == ServerState.LOST
    assert "MCP server 'a' was lost: it was killed by SIGKILL" in caplog.text
    assert await function_of(lease, "echo")(text="on") == "on"
    assert [event.state for event in recorder.seen if isinstance(event, ServerStateChanged)] == [
        "starting",
        "ready",
        "lost",
        "starting",
        "ready",
    ]
    assert hub.status()["a"].starts == 2


async def test_a_call_after_the_end_of_a_session_is_made_in_a_new_one(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    session = hub._servers["a"]._session
    assert session
    # Its callbacks have not run yet.
    session._mark_lost("it went away")
    assert await function_of(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 2


async def test_a_call_that_the_server_declared_idempotent_is_repeated_once(
    make_hub: MakeHub, notes: Path, tmp_path: Path
) -> None:
    once = {"die_at": ["count"], "once": str(tmp_path / "once")}
    lease = await make_hub({"a": {"idempotent": ["count"], "noted": ["count"], "notes": str(notes), **once}}).tools()
    assert await function_of(lease, "count")() == "alive again"
    assert notes.read_text().split() == ["count", "count"]


async def test_an_idempotent_call_is_not_repeated_twice(make_hub: MakeHub, notes: Path) -> None:
    options = {"die_at": ["count"], "idempotent": ["count"], "noted": ["count"], "notes": str(notes)}
    lease = await make_hub({"a": options}).tools()
    with pytest.raises(ToolError, match="may or may not have run"):
        await function_of(lease, "count")()
    assert notes.read_text().split() == ["count", "count"]


async def test_calls_in_flight_fail_when_the_server_dies_and_later_ones_share_one_restart(
    make_hub: MakeHub,
) -> None:
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    calls = [asyncio.create_task(function_of(lease, "sleep")()) for _ in range(20)]
    await turns()
    with pytest.raises(ToolError):
        await function_of(lease, "die")()
    assert all(isinstance(each, ToolError) for each in await asyncio.gather(*calls, return_exceptions=True))
    assert await asyncio.gather(*(function_of(lease, "echo")(text="on") for _ in range(20))) == ["on"] * 20
    assert hub.status()["a"].starts == 2


async def test_one_server_that_dies_does_not_disturb_another(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {}, "b": {}}).tools()
    with pytest.raises(ToolError):
        await function_of(lease, "die", "a")()
    assert await function_of(lease, "echo", "b")(text="on") == "on"


async def test_a_server_that_dies_after_it_listed_its_tools_is_restarted_for_each_call(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {"die_after_list": True}}).tools(on_error="continue")
    for each in lease.tools[:1]:
        with pytest.raises(ToolError):
            await each.function(text="x")


async def test_a_server_that_keeps_dying_is_restarted_after_growing_pauses(
    make_hub: MakeHub, recorder: Recorder[McpEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.mcp.servers.managed_server._FIRST_BACKOFF_SECONDS", 0.02)
    hub = make_hub({"a": {}}, on_event=recorder)
    lease = await hub.tools()
    server = hub._servers["a"]
    for wait in (0.02, 0.04, 0.08):
        with pytest.raises(ToolError):
            await function_of(lease, "die")()
        assert server._retry_at - asyncio.get_running_loop().time() == pytest.approx(wait, abs=0.02)
    assert await function_of(lease, "echo")(text="on") == "on"
    assert ServerState.BACKOFF in [event.state for event in recorder.seen if isinstance(event, ServerStateChanged)]


async def test_the_pause_has_a_limit_and_is_reset_by_a_stable_session(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    server = hub._servers["a"]
    monkeypatch.setattr("lmbridge.mcp.servers.managed_server._FIRST_BACKOFF_SECONDS", 0.5)
    for _ in range(12):
        server._schedule_backoff()
    assert server._retry_at - asyncio.get_running_loop().time() == pytest.approx(30, abs=0.1)
    monkeypatch.setattr("lmbridge.mcp.servers.managed_server._STABLE_SECONDS", 0.0)
    with pytest.raises(ToolError):
        await function_of(lease, "die")()
    assert (server._failures, server._retry_at) == (0, 0.0)


async def test_the_next_run_tries_again_to_start_a_server_that_failed(make_hub: MakeHub, tmp_path: Path) -> None:
    program = tmp_path / "late"
    hub = make_hub({"a": {"command": str(program)}})
    with pytest.raises(MultiMCPError, match="install it, or give its full path"):
        await hub.tools()
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -I -S {SERVER}\n")
    program.chmod(0o755)
    assert (await hub.tools()).tools


async def test_many_runs_share_one_failed_start_and_each_gets_a_separate_error(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"exit": 1, "starts": True, "notes": str(notes)}})
    failures = await asyncio.gather(*(hub.tools(on_error="continue") for _ in range(10)))
    errors = [each.errors["a"] for each in failures]
    assert len({id(error) for error in errors}) == 10
    assert len(notes.read_text().split()) < 10


# Bad output and missing answers


async def test_a_message_beyond_16_mib_ends_the_session_and_the_call_says_why(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"size": 17 * 2**20}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match="it sent a message of more than 16,777,216 bytes"):
        await function_of(lease, "big")()
    assert await function_of(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 2


async def test_a_message_of_15_mib_arrives(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"size": 15 * 2**20}})
    lease = await hub.tools()
    result = await function_of(lease, "big")()
    assert result == ""
    assert hub.status()["a"].starts == 1


async def test_lines_that_are_not_messages_are_skipped_and_logged_once(
    make_hub: MakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    lease = await make_hub({"a": {"garbage": True}}).tools()
    assert await function_of(lease, "echo")(text="on") == "on"
    assert caplog.text.count("that is not a JSON-RPC message (later ones are not logged): 'Welcome!'") == 1


async def test_text_before_a_message_on_its_line_is_cut_off(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {"unterminated": True}}).tools()
    assert await function_of(lease, "echo")(text="on") == "on"


async def test_a_flood_on_stderr_blocks_nothing_and_its_last_lines_are_kept(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"flood": 5_000_000}})
    lease = await hub.tools()
    assert await function_of(lease, "echo")(text="on") == "on"
    assert 0 < len(hub.status()["a"].stderr_tail) <= 10 * 501


async def test_the_stderr_of_a_server_that_was_lost_is_kept(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"flood": 5000}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match="it was killed by SIGKILL"):
        await function_of(lease, "die")()
    status = hub.status()["a"]
    assert (status.state, bool(status.stderr_tail)) == (ServerState.LOST, True)


async def test_a_server_that_hangs_in_one_call_can_be_called_again(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"notes": str(notes), "lmbridge": {"callTimeout": 0.1}}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match=r"did not answer within 0.1 seconds"):
        await function_of(lease, "sleep")()
    assert await function_of(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 1


async def test_a_server_that_closes_its_stdin_is_lost_although_it_is_running(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"deaf_at": ["count"]}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match=r"lost during the call \(it no longer reads its stdin\)"):
        await function_of(lease, "count")()
    assert await function_of(lease, "echo")(text="on") == "on"


# The end of its processes


async def test_a_grandchild_that_ignores_sigterm_is_gone_when_close_returns(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"grandchild": True, "notes": str(notes), "ignore_term": True, "ignore_eof": True}})
    await hub.tools()
    pid = hub.status()["a"].pid
    assert pid
    await hub.close()
    assert await asyncio.to_thread(is_gone, pid)


async def test_a_grandchild_is_gone_even_if_its_parent_ended_by_itself(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"grandchild": True, "notes": str(notes), "die_at": ["count"]}})
    lease = await hub.tools()
    pid = hub.status()["a"].pid
    assert pid
    # The end of the server is noticed although the grandchild keeps its pipe open.
    with pytest.raises(ToolError, match="lost during the call"):
        await function_of(lease, "count")()
    await wait_until_gone(pid)


async def test_nothing_is_left_of_a_server_that_could_not_be_started(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"grandchild": True, "notes": str(notes), "hang": True}}, connect_timeout=4)
    with pytest.raises(MultiMCPError):
        await hub.tools()
    group = await group_of(notes)
    await wait_until_gone(group)


async def test_cancelling_the_start_ends_the_server(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"grandchild": True, "notes": str(notes), "hang": True}})
    run = asyncio.create_task(hub.tools())
    group = await group_of(notes)
    run.cancel()
    await asyncio.wait([run])
    assert run.cancelled()
    await wait_until_gone(group)
    assert hub.status()["a"].state == ServerState.IDLE


async def test_cancelling_one_of_two_runs_that_wait_for_a_start_does_not_affect_the_other(make_hub: MakeHub) -> None:
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


async def test_closing_a_server_while_it_starts_fails_the_run_that_waits(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"grandchild": True, "notes": str(notes), "hang": True}})
    run = asyncio.create_task(hub.tools(on_error="continue"))
    group = await group_of(notes)
    await hub.close()
    assert await asyncio.to_thread(is_gone, group)
    assert "was closed while it was starting" in str((await run).errors["a"])


async def test_a_server_that_is_closed_before_its_start_has_begun_is_not_started(
    make_hub: MakeHub, notes: Path
) -> None:
    hub = make_hub({"a": {"starts": True, "notes": str(notes)}})
    server = hub._server(await hub.reload(), "a")
    waiting = asyncio.create_task(server.definitions())
    # By then the task that opens the session exists, and has not made its first step.
    await asyncio.sleep(0)
    await server.close()
    with pytest.raises(MCPConnectionError, match="was closed while it was starting"):
        await waiting
    assert server.is_closed
    assert not notes.exists()


async def group_of(notes: Path) -> int:
    """Returns the process group of a scripted server that has noted the id of its grandchild."""
    (line, *_) = await wait_for_notes(notes)
    return os.getpgid(int(line.split()[1]))


async def test_a_call_that_fails_while_it_is_cancelled_leaves_no_unhandled_exception(make_hub: MakeHub) -> None:
    unhandled: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    session = hub._servers["a"]._session
    assert session
    fail = asyncio.Event()

    async def failing(*_: object) -> Any:
        await fail.wait()
        raise RefusedError("late")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session._session, "call", failing)
        call = asyncio.create_task(function_of(lease, "echo")(text="x"))
        await turns()
        fail.set()
        call.cancel()
        await asyncio.wait([call])
    assert call.cancelled()
    del call
    # asyncio reports an exception that was never retrieved when its task is collected.
    gc.collect()
    assert unhandled == []


async def test_a_cancellation_at_any_moment_leaves_nothing_behind(make_hub: MakeHub, recorder: Recorder[Any]) -> None:
    hub = make_hub({"a": {}}, on_event=recorder, idle_linger=None)
    tasks = asyncio.all_tasks()

    async def run() -> None:
        lease = await hub.tools()
        try:
            assert await function_of(lease, "echo")(text="on") == "on"
        finally:
            lease.release()

    async def check() -> None:
        assert hub.status().get("a") is None or hub._servers["a"]._use_count == 0

    await cancel_at_each_step(run, check, at_least=3)
    await hub.close()
    assert asyncio.all_tasks() == tasks
