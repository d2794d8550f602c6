"""A hub: starting servers, errors, leases, changes of the configuration file, and closing."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmbridge import LLMValidationError, MCPConnectionError, MCPError, MultiMCPError, ToolError
from lmbridge.mcp import (
    McpEvent,
    McpHub,
    ServerLog,
    ServerState,
    ServerStateChanged,
    ToolProgress,
)
from lmbridge.mcp.servers.environment import INHERITED_VARIABLES
from lmbridge.mcp.servers.guardian import is_gone
from tests.mcp.conftest import MakeHub
from tests.mcp.support import Recorder, function_of, names, rewrite, scripted, wait_until_gone


async def test_progress_and_log_messages_are_events(make_hub: MakeHub, recorder: Recorder[McpEvent]) -> None:
    lease = await make_hub({"a": {}}, on_event=recorder).tools()
    await function_of(lease, "progress")()
    assert await recorder.wait_for(lambda event: isinstance(event, ToolProgress)) == ToolProgress(
        "a", "progress", 1, 2, "half"
    )
    assert await recorder.wait_for(lambda event: isinstance(event, ServerLog)) == ServerLog("a", "info", "at work")


async def test_an_exception_of_on_event_is_logged_and_changes_nothing_else(
    make_hub: MakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: McpEvent) -> None:
        raise KeyError("a bug in the listener")

    lease = await make_hub({"a": {}}, on_event=fail).tools()
    assert await function_of(lease, "echo")(text="on") == "on"
    assert "the function given as on_event raised an exception" in caplog.text


async def test_a_server_gets_a_few_variables_of_the_environment_and_those_of_its_entry(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "not for servers")
    lease = await make_hub({"a": {"env": {"OWN": "yes"}}}).tools()
    env = json.loads(await function_of(lease, "env")())
    assert env["OWN"] == "yes"
    assert "SECRET_TOKEN" not in env
    assert set(env) - {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"} <= {"OWN", *INHERITED_VARIABLES}


async def test_the_arguments_of_a_server_are_not_interpreted_by_a_shell(make_hub: MakeHub, tmp_path: Path) -> None:
    target = tmp_path / "made"
    entry = {"command": "true", "args": [f"; touch {target}", f"$(touch {target})"]}
    with pytest.raises(MultiMCPError):
        await make_hub({"a": entry}).tools()
    assert not target.exists()


# Servers that cannot be started


async def test_the_error_names_all_servers_that_failed_and_the_others_stay_usable(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise the error would name it as a variable that the server did not get.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    hub = make_hub({"good": {}, "missing": {"command": "/nowhere/server"}, "dies": {"exit": 3}})
    with pytest.raises(MultiMCPError) as caught:
        await hub.tools()
    assert set(caught.value.errors) == {"missing", "dies"}
    text = str(caught.value)
    assert "MCP server 'missing' could not be started: '/nowhere/server' was not found" in text
    assert "it ended with status 3; its stderr: missing API_KEY" in text
    dies = caught.value.errors["dies"]
    assert isinstance(dies, MCPConnectionError)
    assert (dies.server, dies.context["stderr"]) == ("dies", "missing API_KEY")
    assert hub.status()["good"].state == ServerState.READY
    assert hub.status()["dies"].state == ServerState.FAILED


async def test_a_run_may_continue_without_the_servers_that_failed(
    make_hub: MakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    lease = await make_hub({"dies": {"exit": 0}, "good": {}}).tools(on_error="continue")
    assert "the run continues without MCP server 'dies'" in caplog.text
    assert list(lease.errors) == ["dies"]
    assert "it ended with status 0" in str(lease.errors["dies"])
    assert {each.server for each in lease.tools} == {"good"}


async def test_a_server_that_does_not_answer_fails_after_the_connect_timeout(make_hub: MakeHub) -> None:
    hub = make_hub({"mute": {"hang": True}}, connect_timeout=0.3)
    with pytest.raises(MultiMCPError, match=r"it did not answer within 0.3 seconds.*\"connectTimeout\""):
        await hub.tools()


async def test_the_configuration_can_change_the_connect_timeout_of_a_server(make_hub: MakeHub) -> None:
    hub = make_hub({"mute": {"hang": True, "lmbridge": {"connectTimeout": 0.2}}})
    with pytest.raises(MultiMCPError, match=r"it did not answer within 0.2 seconds"):
        await hub.tools()


@pytest.mark.parametrize("on_error", ["raise", "continue"])
async def test_an_unknown_name_is_an_error_before_anything_is_started(make_hub: MakeHub, on_error: Any) -> None:
    hub = make_hub({"a": {}, "off": {"disabled": True}})
    with pytest.raises(MCPError, match=r"unknown MCP server 'b'; the enabled ones are: a") as caught:
        await hub.tools(["a", "b"], on_error=on_error)
    assert not isinstance(caught.value, MCPConnectionError | MultiMCPError)
    with pytest.raises(MCPError, match="'off' is disabled; the enabled ones are: a; enable it in"):
        await hub.tools(["a", "off"], on_error=on_error)
    assert hub.status() == {}


@pytest.mark.parametrize(
    "given",
    [
        {"names": "a"},
        {"names": 5},
        {"on_error": "ignore"},
        {"call_timeout": 0},
        {"max_definition_tokens": "many"},
        {"max_definition_tokens": -5},
        {"max_definition_tokens": True},
    ],
)
async def test_invalid_arguments_are_refused(make_hub: MakeHub, given: Any) -> None:
    with pytest.raises(LLMValidationError):
        await make_hub({"a": {}}).tools(**given)


async def test_lmbridge_does_not_connect_to_itself(make_hub: MakeHub) -> None:
    itself = {"command": "python", "args": ["-m", "lmbridge.mcp"]}
    hub = make_hub({"bridge": itself, "wrapped": {"name": "lmbridge"}, "a": {}})
    assert await hub.names() == ["wrapped", "a"]
    lease = await hub.tools(on_error="continue")
    assert {each.server for each in lease.tools} == {"a"}
    assert "it is lmbridge itself" in str(lease.errors["wrapped"])
    with pytest.raises(MultiMCPError, match="'bridge' is lmbridge's own server"):
        await hub.tools(["bridge"])


async def test_secrets_are_not_in_the_error_of_a_failed_start(make_hub: MakeHub) -> None:
    shout = 'import os, sys; sys.exit("bad key " + os.environ["KEY"])'
    entry = {"command": "python3", "args": ["-c", shout], "env": {"KEY": "sk-very-secret"}}
    lease = await make_hub({"a": entry}).tools(on_error="continue")
    assert "bad key ***" in str(lease.errors["a"])
    assert "sk-very-secret" not in repr(lease) + repr(lease.errors["a"].context)


async def test_secrets_are_not_in_the_errors_that_a_model_reads(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {"env": {"KEY": "bad arguments"}}}).tools()
    with pytest.raises(ToolError, match=r"^-32602: \*\*\*$"):
        await function_of(lease, "refuses")()


async def test_secrets_are_not_in_the_description_of_a_lost_server(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"env": {"KEY": "SIGKILL"}}})
    with pytest.raises(ToolError, match=r"it was killed by \*\*\*"):
        await function_of(await hub.tools(), "die")()
    assert hub.status()["a"].error == "it was killed by ***"


async def test_a_name_that_is_given_twice_counts_once(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {"tools": ["echo"]}}).tools(["a", "a"])
    assert names(lease.tools) == ["echo"]


# Sharing servers between runs


async def test_a_hundred_runs_share_one_process_for_each_server(make_hub: MakeHub, notes: Path) -> None:
    options = {"starts": True, "notes": str(notes)}
    hub = make_hub({"a": options, "b": options})

    async def run(number: int) -> str:
        lease = await hub.tools()
        try:
            return str(await function_of(lease, "echo", "a")(text=str(number)))
        finally:
            lease.release()

    assert await asyncio.gather(*map(run, range(100))) == [str(number) for number in range(100)]
    assert notes.read_text().split() == ["started", "started"]


async def test_an_idle_server_is_closed_after_a_while_and_started_again_when_needed(
    make_hub: MakeHub, recorder: Recorder[McpEvent]
) -> None:
    hub = make_hub({"a": {}}, idle_linger=0.01, on_event=recorder)
    lease = await hub.tools()
    pid = hub.status()["a"].pid
    assert pid
    lease.release()
    lease.release()
    await recorder.wait_for(lambda event: event == ServerStateChanged("a", ServerState.IDLE))
    await wait_until_gone(pid)
    again = await hub.tools()
    assert await function_of(again, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 2


async def test_a_server_that_is_leased_is_not_closed_as_idle(make_hub: MakeHub, recorder: Recorder[McpEvent]) -> None:
    hub = make_hub({"a": {}, "b": {}}, idle_linger=0.01, on_event=recorder)
    held = await hub.tools(["a"])
    (await hub.tools(["a", "b"])).release()
    await recorder.wait_for(lambda event: event == ServerStateChanged("b", ServerState.IDLE))
    assert hub.status()["a"].state == ServerState.READY
    held.release()


# Changes of the configuration file


async def test_a_changed_file_affects_only_the_servers_whose_entry_changed(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub({"stays": {}, "changes": {}, "goes": {}})
    held = await hub.tools()
    before = hub.status()
    rewrite(
        tmp_path / "mcp.json", {"stays": {}, "changes": {"tools": ["echo"]}, "comes": {}, "goes": {"disabled": True}}
    )
    assert await hub.names() == ["stays", "changes", "comes"]
    new = await hub.tools()
    after = hub.status()
    assert after["stays"].pid == before["stays"].pid
    assert after["changes"].pid != before["changes"].pid
    assert names([each for each in new.tools if each.server == "changes"]) == ["echo"]
    assert await function_of(held, "echo", "goes")(text="still there") == "still there"
    with pytest.raises(MCPError, match="'goes' is disabled"):
        await hub.tools(["goes"])
    held.release()
    for name in ("changes", "goes"):
        pid = before[name].pid
        assert pid
        await wait_until_gone(pid)


async def test_a_broken_file_keeps_the_last_valid_one_in_use_and_is_logged_once(
    make_hub: MakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    (tmp_path / "mcp.json").write_text('{"mcpServers": {')
    assert await hub.names() == ["a"]
    assert await hub.names() == ["a"]
    assert await function_of(lease, "echo")(text="on") == "on"
    assert caplog.text.count("the last valid MCP configuration stays in use") == 1
    assert "line 1 column" in caplog.text
    rewrite(tmp_path / "mcp.json", {"b": {}})
    assert await hub.names() == ["b"]


async def test_a_file_that_was_never_valid_is_an_error_each_time(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    hub = McpHub(tmp_path / "bad.json")
    for _ in range(2):
        with pytest.raises(MCPError, match="is not valid JSON"):
            await hub.names()


async def test_the_file_of_a_project_is_skipped_with_one_warning_until_it_is_trusted(
    caplog: pytest.LogCaptureFixture, empty_home: Path
) -> None:
    Path(".mcp.json").write_text('{"mcpServers": {"theirs": {"command": "evil"}}}')
    (empty_home / ".mcp.json").write_text('{"mcpServers": {"mine": {"command": "good"}}}')
    hub = McpHub()
    assert await hub.names() == ["mine"]
    assert await hub.names() == ["mine"]
    assert [record.levelno for record in caplog.records if ".mcp.json was skipped" in record.message] == [
        logging.WARNING
    ]
    (empty_home / ".mcp.json").write_text('{"mcpServers": {"mine": {"command": "better"}}}')
    assert await hub.names() == ["mine"]
    assert caplog.text.count(".mcp.json was skipped") == 1
    with pytest.raises(MCPError, match=r"\.mcp\.json was skipped.*trust_project=True"):
        await hub.tools(["theirs"])
    assert await McpHub(trust_project=True).names() == ["theirs"]


async def test_an_entry_that_is_not_valid_is_an_error_of_its_server(make_hub: MakeHub) -> None:
    hub = make_hub({"bad": {"command": "x", "args": ["${NOT_SET_HERE}"]}, "a": {}})
    lease = await hub.tools(on_error="continue")
    assert "needs the environment variable NOT_SET_HERE" in str(lease.errors["bad"])
    assert await hub.names() == ["bad", "a"]


# Closing


async def test_close_ends_all_processes_and_can_be_called_again(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {}, "b": {}})
    lease = await hub.tools()
    pids = [status.pid for status in hub.status().values()]
    await hub.close()
    await hub.close()
    for pid in pids:
        assert pid
        assert await asyncio.to_thread(is_gone, pid)
    with pytest.raises(MCPError, match="is closed"):
        await hub.tools()
    with pytest.raises(ToolError, match="is closed"):
        await function_of(lease, "echo", "a")(text="x")
    lease.release()


async def test_a_hub_that_is_closed_while_the_file_is_read_starts_nothing(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = make_hub({"a": {}})
    reading, go_on, load = threading.Event(), threading.Event(), hub._load_config

    def slow() -> Any:
        reading.set()
        go_on.wait()
        return load()

    monkeypatch.setattr(hub, "_load_config", slow)
    run = asyncio.create_task(hub.tools())
    await asyncio.to_thread(reading.wait)
    await hub.close()
    go_on.set()
    with pytest.raises(MCPError, match="is closed"):
        await run
    assert hub.status() == {}


async def test_close_leaves_no_task(make_hub: MakeHub) -> None:
    before = asyncio.all_tasks()
    hub = make_hub({"a": {}, "mute": {"hang": True}}, connect_timeout=0.2)
    await hub.tools(on_error="continue")
    await hub.close()
    assert asyncio.all_tasks() == before


async def test_a_hub_can_be_used_in_one_event_loop_at_a_time(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub({"a": {}})

    def other() -> list[str]:
        return asyncio.run(use())

    async def use() -> list[str]:
        return names((await hub.tools()).tools)

    await hub.names()
    with pytest.raises(MCPError, match="in use in another event loop"):
        await asyncio.to_thread(other)


async def test_a_close_in_another_event_loop_leaves_the_hub_open(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"tools": ["echo"]}})
    await hub.names()
    with pytest.raises(MCPError, match="in use in another event loop"):
        await asyncio.to_thread(lambda: asyncio.run(hub.close()))
    assert names((await hub.tools()).tools) == ["echo"]


def test_a_hub_that_was_not_closed_starts_anew_in_the_next_event_loop(config: Callable[[Any], Path]) -> None:
    hub = McpHub(config({"a": scripted({"tools": ["echo"]})}))

    async def use() -> list[str]:
        return names((await hub.tools()).tools)

    assert asyncio.run(use()) == ["echo"]
    with pytest.warns(ResourceWarning, match="was not closed before its event loop was"):
        assert asyncio.run(use()) == ["echo"]


async def test_without_the_sdk_the_error_names_the_package_to_install(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    hub = make_hub({"a": {}, "b": {}})
    assert await hub.names() == ["a", "b"]
    with pytest.raises(ImportError, match=r"pip install 'lmbridge\[mcp\]'") as missing:
        await hub.tools()
    # The error of Python itself stays visible in the traceback.
    assert isinstance(missing.value.__cause__, ImportError)


async def test_a_close_that_is_cancelled_at_once_ends_the_processes_all_the_same(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {}, "b": {}})
    (await hub.tools()).release()
    pids = [status.pid for status in hub.status().values()]
    closing = asyncio.create_task(hub.close())
    # By now, there is a task for each server, which has not begun.
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    async with asyncio.timeout(10):
        for pid in pids:
            assert pid is not None
            await wait_until_gone(pid)
