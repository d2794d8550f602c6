"""A hub's servers as runs see them: tools, errors, leases, and the file that changes."""

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
from lmbridge.agent.toolset import Toolset
from lmbridge.mcp import (
    McpEvent,
    McpHub,
    McpText,
    ServerLog,
    ServerState,
    ServerStateChanged,
    ToolProgress,
    ToolsChanged,
)
from lmbridge.mcp.servers.guardian import is_gone
from tests.mcp.conftest import MakeHub
from tests.mcp.support import Recorder, gone, names, noted, scripted, tool

# Tools


async def test_a_text_reaches_the_model_as_it_is(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {}}).tools(["a"])
    result = await tool(lease, "echo")(text=" verbatim\n")
    assert result == " verbatim\n"
    assert isinstance(result, McpText)
    assert result.result["content"] == [{"type": "text", "text": " verbatim\n"}]


async def test_several_parts_are_joined_by_newlines(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {}}).tools()
    assert await tool(lease, "parts")() == "one\ntwo"


async def test_a_tool_that_fails_raises_what_the_server_says_and_keeps_the_result(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {}}).tools()
    with pytest.raises(ToolError, match=r"^no such file: a.txt$") as caught:
        await tool(lease, "fails")()
    assert caught.value.context["result"]["isError"] is True


async def test_an_error_of_the_protocol_is_a_tool_error_and_the_session_goes_on(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match="-32602: bad arguments"):
        await tool(lease, "refuses")()
    assert await tool(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 1


async def test_a_result_without_content_is_told_and_the_session_goes_on(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {}}).tools()
    with pytest.raises(ToolError, match="the tool ran, but its result is none: content: Field required"):
        await tool(lease, "nothing")()
    assert await tool(lease, "echo")(text="on") == "on"


async def test_a_result_that_is_nested_too_deeply_is_told_and_the_session_goes_on(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {"deep_at": ["count"]}}).tools()
    with pytest.raises(ToolError, match="the tool ran, but its result is none: Maximum serialization depth exceeded"):
        await tool(lease, "count")()
    assert await tool(lease, "echo")(text="on") == "on"


async def test_several_servers_with_tools_of_one_name_can_be_told_apart(make_hub: MakeHub) -> None:
    only = {"tools": ["echo"]}
    lease = await make_hub({"a": only, "b": only}).tools()
    toolset = await Toolset.collect([lease])
    assert toolset.names == ["a__echo", "b__echo"]


async def test_a_list_in_pages_is_read_to_its_end(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {"page": 5}}).tools()
    assert names(lease.tools) == names((await make_hub({"b": {}}).tools()).tools)


async def test_a_list_that_goes_round_in_circles_fails_the_server(make_hub: MakeHub) -> None:
    with pytest.raises(MultiMCPError, match="goes round in circles"):
        await make_hub({"a": {"endless": True}}).tools()


async def test_a_list_without_end_fails_the_server(make_hub: MakeHub) -> None:
    more = [{"name": f"t{number}", "inputSchema": {}} for number in range(101)]
    with pytest.raises(MultiMCPError, match="has more than 100 pages"):
        await make_hub({"a": {"tools": [], "more_tools": more, "page": 1}}).tools()


async def test_a_bad_definition_costs_only_itself(make_hub: MakeHub, caplog: pytest.LogCaptureFixture) -> None:
    bad: list[Any] = [
        {"name": "no_schema"},
        {"name": "", "inputSchema": {}},
        {"description": "no name", "inputSchema": {}},
        "no object",
        {"name": "an_array", "inputSchema": {"type": "array"}},
        {"name": "echo", "inputSchema": {"type": "object"}},
        {"name": "task", "inputSchema": {"type": "object"}, "execution": {"taskSupport": "required"}},
        {"name": "empty", "inputSchema": {}},
    ]
    lease = await make_hub({"a": {"tools": ["echo"], "more_tools": bad}}).tools()
    assert names(lease.tools) == ["echo", "empty"]
    assert [each.tool for each in lease.left_out] == [
        "no_schema",
        "number 3",
        "number 4",
        "number 5",
        "an_array",
        "echo",
        "task",
    ]
    assert "'an_array' is left out: its inputSchema is of type 'array'" in caplog.text
    assert await tool(lease, "empty")() == "empty"


async def test_a_definition_that_is_nested_too_deeply_costs_only_itself(make_hub: MakeHub) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(300):
        schema = {"type": "object", "properties": {"a": schema}}
    lease = await make_hub({"a": {"tools": ["echo"], "more_tools": [{"name": "deep", "inputSchema": schema}]}}).tools()
    assert names(lease.tools) == ["echo"]
    assert [each.reason for each in lease.left_out] == ["it is nested too deeply"]


async def test_a_server_without_tools_is_none_that_failed(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"no_tools": True}, "b": {"undeclared": True, "tools": ["echo"]}})
    assert [(each.server, each.name) for each in (await hub.tools()).tools] == [("b", "echo")]


async def test_arguments_that_cannot_be_sent_are_told_and_the_session_goes_on(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match="the arguments cannot be sent"):
        await tool(lease, "echo")(text="half \ud83d of an emoji")
    assert await tool(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 1


async def test_the_file_says_which_tools_are_offered(make_hub: MakeHub) -> None:
    rules = {"lmbridge": {"allow": ["e*", "die"], "deny": ["env"]}}
    lease = await make_hub({"a": rules}).tools()
    assert names(lease.tools) == ["echo", "die"]
    assert lease.left_out == []


async def test_definitions_beyond_the_budget_are_left_out_and_named(
    make_hub: MakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    big = {"name": "big_one", "description": "x" * 3_000, "inputSchema": {"type": "object"}}
    lease = await make_hub(
        {"a": {"tools": ["echo"], "more_tools": [big, {**big, "name": "small", "description": ""}]}}
    ).tools(max_definition_tokens=200)
    assert names(lease.tools) == ["echo", "small"]
    assert [each.tool for each in lease.left_out] == ["big_one"]
    assert "its definition takes about" in caplog.text


async def test_hints_that_a_server_does_not_give_are_the_worst(make_hub: MakeHub) -> None:
    more = [{"name": "reads", "inputSchema": {}, "annotations": {"readOnlyHint": True, "title": "R"}}]
    lease = await make_hub({"a": {"tools": ["echo"], "more_tools": more}}).tools()
    worst = {"readOnlyHint": False, "destructiveHint": True, "idempotentHint": False, "openWorldHint": True}
    assert lease.tools[0].annotations == worst
    assert lease.tools[1].annotations == {**worst, "readOnlyHint": True, "destructiveHint": False, "title": "R"}
    assert [each.server for each in lease.tools] == ["a", "a"]


async def test_the_tools_of_a_run_do_not_change_those_of_the_next_do(
    make_hub: MakeHub, recorder: Recorder[McpEvent]
) -> None:
    hub = make_hub({"a": {"tools": ["change"]}}, on_event=recorder)
    lease = await hub.tools()
    await tool(lease, "change")()
    await recorder.wait_for(lambda event: event == ToolsChanged("a"))
    assert names(lease.tools) == ["change"]
    assert names((await hub.tools()).tools) == ["change", "new"]


async def test_a_list_that_cannot_be_read_again_is_told_and_asked_for_by_the_next_run(
    make_hub: MakeHub, caplog: pytest.LogCaptureFixture, recorder: Recorder[McpEvent]
) -> None:
    hub = make_hub({"a": {"tools": ["change"], "list_refused": True}}, on_event=recorder)
    await tool(await hub.tools(), "change")()
    await recorder.wait_for(lambda event: event == ToolsChanged("a"))
    assert names((await hub.tools()).tools) == ["change"]
    assert "its tools changed, and it does not tell them: -32603: not now" in caplog.text
    assert names((await hub.tools()).tools) == ["change", "new"]


async def test_progress_and_log_messages_are_events(make_hub: MakeHub, recorder: Recorder[McpEvent]) -> None:
    lease = await make_hub({"a": {}}, on_event=recorder).tools()
    await tool(lease, "progress")()
    assert await recorder.wait_for(lambda event: isinstance(event, ToolProgress)) == ToolProgress(
        "a", "progress", 1, 2, "half"
    )
    assert await recorder.wait_for(lambda event: isinstance(event, ServerLog)) == ServerLog("a", "info", "at work")


async def test_what_on_event_raises_is_logged_and_changes_nothing(
    make_hub: MakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: McpEvent) -> None:
        raise KeyError("of the user")

    lease = await make_hub({"a": {}}, on_event=fail).tools()
    assert await tool(lease, "echo")(text="on") == "on"
    assert "on_event raised" in caplog.text


async def test_servers_get_the_few_variables_of_the_specification_and_their_own(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "not for servers")
    lease = await make_hub({"a": {"env": {"OWN": "yes"}}}).tools()
    env = json.loads(await tool(lease, "env")())
    assert env["OWN"] == "yes"
    assert set(env) - {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"} <= {
        "OWN",
        "HOME",
        "LOGNAME",
        "PATH",
        "SHELL",
        "TERM",
        "USER",
    }


async def test_no_shell_reads_the_arguments(make_hub: MakeHub, tmp_path: Path) -> None:
    target = tmp_path / "made"
    entry = {"command": "true", "args": [f"; touch {target}", f"$(touch {target})"]}
    with pytest.raises(MultiMCPError):
        await make_hub({"a": entry}).tools()
    assert not target.exists()


# Servers that fail


async def test_all_servers_that_failed_are_named_and_the_others_stay(make_hub: MakeHub) -> None:
    hub = make_hub({"good": {}, "missing": {"command": "/nowhere/server"}, "dies": {"exit": 3}})
    with pytest.raises(MultiMCPError) as caught:
        await hub.tools()
    assert set(caught.value.errors) == {"missing", "dies"}
    text = str(caught.value)
    assert "MCP server 'missing' could not be started: there is no '/nowhere/server'" in text
    assert "it ended with status 3; the last lines of its stderr: missing API_KEY" in text
    dies = caught.value.errors["dies"]
    assert isinstance(dies, MCPConnectionError)
    assert (dies.server, dies.context["stderr"]) == ("dies", "missing API_KEY")
    assert hub.status()["good"].state == ServerState.READY
    assert hub.status()["dies"].state == ServerState.FAILED


async def test_a_run_may_go_on_without_the_servers_that_failed(
    make_hub: MakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    lease = await make_hub({"dies": {"exit": 0}, "good": {}}).tools(on_error="continue")
    assert "the run goes on without MCP server 'dies'" in caplog.text
    assert list(lease.errors) == ["dies"]
    assert "it ended with status 0" in str(lease.errors["dies"])
    assert {each.server for each in lease.tools} == {"good"}


async def test_a_server_that_does_not_answer_is_given_up_in_time(make_hub: MakeHub) -> None:
    hub = make_hub({"mute": {"hang": True}}, connect_timeout=0.3)
    with pytest.raises(MultiMCPError, match=r"it did not answer within 0.3 seconds.*\"connectTimeout\""):
        await hub.tools()


async def test_the_file_says_how_long_a_server_may_take(make_hub: MakeHub) -> None:
    hub = make_hub({"mute": {"hang": True, "lmbridge": {"connectTimeout": 0.2}}})
    with pytest.raises(MultiMCPError, match=r"it did not answer within 0.2 seconds"):
        await hub.tools()


@pytest.mark.parametrize("on_error", ["raise", "continue"])
async def test_an_unknown_name_is_an_error_before_anything_is_started(make_hub: MakeHub, on_error: Any) -> None:
    hub = make_hub({"a": {}, "off": {"disabled": True}})
    with pytest.raises(MCPError, match=r"there is no MCP server 'b'; there are: a") as caught:
        await hub.tools(["a", "b"], on_error=on_error)
    assert not isinstance(caught.value, MCPConnectionError | MultiMCPError)
    with pytest.raises(MCPError, match="'off' is disabled; there are: a; enable it in"):
        await hub.tools(["a", "off"], on_error=on_error)
    assert hub.status() == {}


@pytest.mark.parametrize("given", [{"names": "a"}, {"names": 5}, {"on_error": "ignore"}, {"call_timeout": 0}])
async def test_wrong_arguments_are_told(make_hub: MakeHub, given: Any) -> None:
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


async def test_secrets_are_in_no_error(make_hub: MakeHub) -> None:
    shout = 'import os, sys; sys.exit("bad key " + os.environ["KEY"])'
    entry = {"command": "python3", "args": ["-c", shout], "env": {"KEY": "sk-very-secret"}}
    lease = await make_hub({"a": entry}).tools(on_error="continue")
    assert "bad key ***" in str(lease.errors["a"])
    assert "sk-very-secret" not in repr(lease) + repr(lease.errors["a"].context)


async def test_secrets_are_in_nothing_that_a_model_is_told_of_errors(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {"env": {"KEY": "bad arguments"}}}).tools()
    with pytest.raises(ToolError, match=r"^-32602: \*\*\*$"):
        await tool(lease, "refuses")()


async def test_secrets_are_not_in_what_is_said_of_a_lost_server(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"env": {"KEY": "SIGKILL"}}})
    with pytest.raises(ToolError, match=r"it was killed by \*\*\*"):
        await tool(await hub.tools(), "die")()
    assert hub.status()["a"].error == "it was killed by ***"


async def test_a_name_that_is_given_twice_is_one_server(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {"tools": ["echo"]}}).tools(["a", "a"])
    assert names(lease.tools) == ["echo"]


# Sharing


async def test_a_hundred_runs_share_one_process_a_server(make_hub: MakeHub, notes: Path) -> None:
    told = {"starts": True, "notes": str(notes)}
    hub = make_hub({"a": told, "b": told})

    async def run(number: int) -> str:
        lease = await hub.tools()
        try:
            return str(await tool(lease, "echo", "a")(text=str(number)))
        finally:
            lease.release()

    assert await asyncio.gather(*map(run, range(100))) == [str(number) for number in range(100)]
    assert notes.read_text().split() == ["started", "started"]


async def test_a_server_that_nobody_uses_is_closed_after_a_while_and_started_again(
    make_hub: MakeHub, recorder: Recorder[McpEvent]
) -> None:
    hub = make_hub({"a": {}}, idle_linger=0.01, on_event=recorder)
    lease = await hub.tools()
    pid = hub.status()["a"].pid
    assert pid
    lease.release()
    lease.release()
    await recorder.wait_for(lambda event: event == ServerStateChanged("a", ServerState.IDLE))
    await gone(pid)
    again = await hub.tools()
    assert await tool(again, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 2


async def test_a_server_in_use_is_not_closed_however_idle(make_hub: MakeHub, recorder: Recorder[McpEvent]) -> None:
    hub = make_hub({"a": {}, "b": {}}, idle_linger=0.01, on_event=recorder)
    held = await hub.tools(["a"])
    (await hub.tools(["a", "b"])).release()
    await recorder.wait_for(lambda event: event == ServerStateChanged("b", ServerState.IDLE))
    assert hub.status()["a"].state == ServerState.READY
    held.release()


# The file


def rewrite(path: Path, servers: Any) -> None:
    """Writes a file that is another one even if the clock stands still."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"mcpServers": {name: scripted(entry) for name, entry in servers.items()}}))
    new.replace(path)


async def test_a_changed_file_changes_only_what_changed(make_hub: MakeHub, tmp_path: Path) -> None:
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
    assert await tool(held, "echo", "goes")(text="still there") == "still there"
    with pytest.raises(MCPError, match="'goes' is disabled"):
        await hub.tools(["goes"])
    held.release()
    for name in ("changes", "goes"):
        pid = before[name].pid
        assert pid
        await gone(pid)


async def test_a_broken_file_keeps_the_last_good_one_and_says_so_once(
    make_hub: MakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub = make_hub({"a": {}})
    lease = await hub.tools()
    (tmp_path / "mcp.json").write_text('{"mcpServers": {')
    assert await hub.names() == ["a"]
    assert await hub.names() == ["a"]
    assert await tool(lease, "echo")(text="on") == "on"
    assert caplog.text.count("the last good MCP configuration stays in use") == 1
    assert "line 1 column" in caplog.text
    rewrite(tmp_path / "mcp.json", {"b": {}})
    assert await hub.names() == ["b"]


async def test_a_file_that_was_never_good_is_an_error_each_time(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    hub = McpHub(tmp_path / "bad.json")
    for _ in range(2):
        with pytest.raises(MCPError, match="is no JSON"):
            await hub.names()


async def test_a_file_of_the_project_is_skipped_with_a_warning_until_it_is_trusted(
    caplog: pytest.LogCaptureFixture, own_home: Path
) -> None:
    Path(".mcp.json").write_text('{"mcpServers": {"theirs": {"command": "evil"}}}')
    (own_home / ".mcp.json").write_text('{"mcpServers": {"mine": {"command": "good"}}}')
    hub = McpHub()
    assert await hub.names() == ["mine"]
    assert await hub.names() == ["mine"]
    assert [record.levelno for record in caplog.records if ".mcp.json is skipped" in record.message] == [
        logging.WARNING
    ]
    (own_home / ".mcp.json").write_text('{"mcpServers": {"mine": {"command": "better"}}}')
    assert await hub.names() == ["mine"]
    assert caplog.text.count(".mcp.json is skipped") == 1
    with pytest.raises(MCPError, match=r"\.mcp\.json was skipped.*trust_project=True"):
        await hub.tools(["theirs"])
    assert await McpHub(trust_project=True).names() == ["theirs"]


async def test_an_entry_that_cannot_be_used_is_an_error_of_that_server(make_hub: MakeHub) -> None:
    hub = make_hub({"bad": {"command": "x", "args": ["${NOT_SET_HERE}"]}, "a": {}})
    lease = await hub.tools(on_error="continue")
    assert "needs the environment variable NOT_SET_HERE" in str(lease.errors["bad"])
    assert await hub.names() == ["bad", "a"]


# The end


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
        await tool(lease, "echo", "a")(text="x")
    lease.release()


async def test_close_while_the_file_is_read_starts_nothing_any_more(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = make_hub({"a": {}})
    reading, go_on, load = threading.Event(), threading.Event(), hub._load

    def slow() -> Any:
        reading.set()
        go_on.wait()
        return load()

    monkeypatch.setattr(hub, "_load", slow)
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


async def test_a_call_that_is_cancelled_is_told_to_the_server(make_hub: MakeHub, notes: Path) -> None:
    lease = await make_hub({"a": {"notes": str(notes), "noted": ["sleep"]}}).tools()
    call = asyncio.create_task(tool(lease, "sleep")())
    await noted(notes)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    assert (await noted(notes, 2))[1].startswith("cancelled ")
    assert await tool(lease, "echo")(text="on") == "on"


async def test_a_call_that_takes_too_long_is_told_to_the_server_and_to_the_model(
    make_hub: MakeHub, notes: Path
) -> None:
    lease = await make_hub({"a": {"notes": str(notes)}}).tools(call_timeout=0.1)
    with pytest.raises(ToolError, match=r"did not answer within 0.1 seconds; it was told to stop"):
        await tool(lease, "sleep")()
    assert (await noted(notes))[0].startswith("cancelled ")


async def test_a_hub_is_of_one_event_loop_at_a_time(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub({"a": {}})

    def other() -> list[str]:
        return asyncio.run(use())

    async def use() -> list[str]:
        return names((await hub.tools()).tools)

    await hub.names()
    with pytest.raises(MCPError, match="in use in another event loop"):
        await asyncio.to_thread(other)


def test_a_hub_that_nobody_closed_begins_anew_in_the_next_event_loop(config: Callable[[Any], Path]) -> None:
    hub = McpHub(config({"a": scripted({"tools": ["echo"]})}))

    async def use() -> list[str]:
        return names((await hub.tools()).tools)

    assert asyncio.run(use()) == ["echo"]
    with pytest.warns(ResourceWarning, match="was not closed before its event loop was"):
        assert asyncio.run(use()) == ["echo"]


async def test_without_the_sdk_the_error_says_what_to_install(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    hub = make_hub({"a": {}, "b": {}})
    assert await hub.names() == ["a", "b"]
    with pytest.raises(ImportError, match=r"pip install lmbridge\[mcp\]"):
        await hub.tools()
