"""The tools of a `DynamicAutonomousAgent`'s runs: their names, their definitions, and the time that a call may take."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from lmbridge import MCPConnectionError, ToolCall, ToolCallFinished, image_part
from lmbridge.mcp import McpEvent, ServerState, ServerStateChanged, ToolDefinitionChanged
from lmbridge.testing import ScriptedServer, answer, reply
from tests.agent.support import add, asks, calls, sent, tool_texts
from tests.mcp.conftest import MakeAgent
from tests.mcp.dynamic_support import sent_tool_names
from tests.mcp.servers.test_results import PNG
from tests.mcp.support import Recorder, wait_for_notes


async def test_listing_servers_follows_the_file_and_starts_nothing(make_agent: MakeAgent) -> None:
    agent = make_agent({"z": {}, "off": {"disabled": True}, "a": {}})
    assert await agent.list_available_mcps() == ["z", "a"]
    assert agent._hub.status() == {}


async def test_a_tool_has_its_server_in_its_name_only_if_names_collide(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    def count(n: int) -> int:
        """Counts."""
        return n

    agent = make_agent({"a": {"tools": ["echo", "count"]}, "b": {"tools": ["echo", "parts"]}}, tools=[add, count])
    scripted_server.script(calls(asks("b__echo", text="x"), asks("a__count", "call_2")), answer("done"))
    result = await agent.autonomous_with_multiple_mcps(["a", "b"], "Go.", full=True)
    assert sent_tool_names(scripted_server) == ["add", "count", "a__echo", "a__count", "b__echo", "parts"]
    assert tool_texts(result.messages) == ["x", "count"]
    await agent.autonomous_with_mcp("b", "Go.")
    assert sent_tool_names(scripted_server) == ["add", "count", "echo", "parts"]


async def test_only_the_named_servers_are_started(make_agent: MakeAgent) -> None:
    agent = make_agent({"a": {}, "b": {}, "c": {}})
    await agent.autonomous_with_multiple_mcps(["c", "a", "c"], "Go.")
    assert list(agent._hub.status()) == ["c", "a"]


async def test_a_failing_tool_is_reported_to_the_model_as_text(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    wrong = calls(asks("fails"), asks("refuses", "call_2"), asks("die", "call_3"))
    scripted_server.script(wrong, calls(asks("echo", text="on")), answer("done"))
    result = await make_agent({"a": {}}, max_parallel_tools=1).autonomous_with_mcp("a", "Go.", full=True)
    texts = tool_texts(result.messages)
    assert texts[0] == "no such file: a.txt"
    assert "bad arguments" in texts[1]
    assert "may or may not have run" in texts[2]
    assert (texts[3], result.text) == ("on", "done")


async def test_a_tool_that_is_announced_within_a_run_can_be_called_in_its_next_round(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    asked: list[str] = []
    events: Recorder[McpEvent] = Recorder()

    def approve(call: ToolCall) -> bool:
        asked.append(call.name)
        return True

    servers = {"a": {"tools": ["change", "echo"]}}
    agent = make_agent(servers, approve=approve, tools=[add], on_mcp_event=events)
    scripted_server.script(calls(asks("change")), calls(asks("new")), answer("done"), answer("done"))
    result = await agent.autonomous_with_mcp("a", "Go.", full=True)
    offered = [sent_tool_names(scripted_server, number) for number in range(3)]
    assert offered == [["add", "change", "echo"], *[["add", "change", "echo", "new"]] * 2]
    assert tool_texts(result.messages) == ["change", "new"]
    assert asked == ["change", "new"]
    await agent.autonomous_with_mcp("a", "Go.")
    assert sent_tool_names(scripted_server) == ["add", "change", "echo", "new"]
    assert ServerStateChanged("a", ServerState.READY) in events.seen


async def test_a_new_tool_that_the_configuration_denies_is_not_offered(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    agent = make_agent({"a": {"tools": ["change"], "lmbridge": {"deny": ["n*"]}}})
    scripted_server.script(calls(asks("change")), calls(asks("new")), answer("done"))
    result = await agent.autonomous_with_mcp("a", "Go.", full=True)
    assert sent_tool_names(scripted_server) == ["change"]
    assert "there is no tool 'new'" in tool_texts(result.messages)[1]


async def test_a_definition_that_changes_within_a_run_stays_as_it_was_and_is_reported(
    scripted_server: ScriptedServer, make_agent: MakeAgent, caplog: pytest.LogCaptureFixture
) -> None:
    events: Recorder[McpEvent] = Recorder()
    agent = make_agent({"a": {"tools": ["redefine", "echo"]}}, on_mcp_event=events)
    scripted_server.script(calls(asks("redefine")), answer("done"), answer("done"))
    await agent.autonomous_with_mcp("a", "Go.")
    assert sent(scripted_server)["tools"] == sent(scripted_server, 0)["tools"]
    assert ToolDefinitionChanged("a", "echo", ("description",)) in events.seen
    assert "MCP server 'a' has changed the description of its tool 'echo'" in caplog.text
    await agent.autonomous_with_mcp("a", "Go.")
    assert sent(scripted_server)["tools"][1]["function"]["description"] == "Does something else."
    assert caplog.text.count("has changed the") == 1


async def test_new_tools_have_to_fit_into_what_is_left_for_definitions(
    scripted_server: ScriptedServer, make_agent: MakeAgent, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"data": [{"id": "test-model", "owned_by": "vllm", "max_model_len": 70}]}
    scripted_server.on_path("/v1/models", reply(200, models))
    scripted_server.script(calls(asks("change")), answer("done"))
    await make_agent({"a": {"tools": ["change"]}}).autonomous_with_mcp("a", "Go.")
    assert sent_tool_names(scripted_server) == ["change"]
    # There is not even room for a search.
    assert "1 of 2 tools are left out, because the definitions do not fit into 35 tokens: new" in caplog.text


async def test_a_new_tool_with_a_name_that_is_taken_gets_the_name_of_its_server(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    agent = make_agent({"a": {"tools": ["change"], "clashing": "count"}, "b": {"tools": ["count"]}})
    scripted_server.script(calls(asks("change")), calls(asks("a__count"), asks("count", "call_2")), answer("done"))
    result = await agent.autonomous_discover_and_execute("Go.", full=True)
    assert sent_tool_names(scripted_server) == ["change", "count", "a__count"]
    assert [each.tool.server for each in result.tool_calls if each.tool] == ["a", "a", "b"]


async def test_approve_can_read_the_hints_of_a_tool(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    asked: list[ToolCall] = []

    def approve(call: ToolCall) -> bool:
        asked.append(call)
        return call.tool is not None and not call.tool.annotations["destructiveHint"]

    reads = {"name": "count", "inputSchema": {"type": "object"}, "annotations": {"readOnlyHint": True}}
    agent = make_agent({"a": {"tools": ["echo"], "more_tools": [reads]}}, approve=approve)
    scripted_server.script(calls(asks("echo", text="x"), asks("count", "call_2")), answer("done"))
    result = await agent.autonomous_with_mcp("a", "Go.", full=True)
    assert [call.tool.server for call in asked if call.tool] == ["a", "a"]
    refused, made = tool_texts(result.messages)
    assert refused.startswith("Refused")
    assert made == "count"


@pytest.mark.parametrize(
    ("tool_search", "names", "logged"),
    [
        ("auto", ["echo", "small", "find_tools"], "1 of 3 tools are left out"),
        ("never", ["echo", "small"], "tool 'big_one' is left out: its definition takes about"),
    ],
)
async def test_definitions_take_at_most_half_of_a_known_context(
    scripted_server: ScriptedServer,
    make_agent: MakeAgent,
    caplog: pytest.LogCaptureFixture,
    tool_search: Literal["auto", "never"],
    names: list[str],
    logged: str,
) -> None:
    models = {"data": [{"id": "test-model", "owned_by": "vllm", "max_model_len": 2048}]}
    scripted_server.on_path("/v1/models", reply(200, models))
    big = {"name": "big_one", "description": "x " * 1_600, "inputSchema": {"type": "object"}}
    small = {"name": "small", "description": "", "inputSchema": {"type": "object"}}
    agent = make_agent({"a": {"tools": ["echo"], "more_tools": [big, small]}}, tool_search=tool_search)
    await agent.autonomous_with_mcp("a", "Go.")
    assert sent_tool_names(scripted_server) == names
    assert logged in caplog.text
    assert "1024" in caplog.text
    assert "big_one" in caplog.text


async def test_a_tool_of_a_server_that_does_not_fit_is_found_and_called(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    others = [
        {"name": f"other_{number}", "description": "Paints. " * 60, "inputSchema": {"type": "object"}}
        for number in range(9)
    ]
    count = {"name": "count", "description": "Counts the stars. " * 20, "inputSchema": {"type": "object"}}
    agent = make_agent({"a": {"tools": [], "more_tools": [*others, count]}}, max_definition_tokens=700)
    scripted_server.script(calls(asks("find_tools", query="stars")), calls(asks("count")), answer("Nine."))
    result = await agent.autonomous_with_mcp("a", "Go.", full=True)
    assert tool_texts(result.messages)[1] == "count"
    assert sent_tool_names(scripted_server)[-2:] == ["find_tools", "count"]


async def test_all_definitions_are_sent_if_the_context_length_is_unknown(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    big = {"name": "big_one", "description": "x" * 4_000, "inputSchema": {"type": "object"}}
    await make_agent({"a": {"tools": [], "more_tools": [big]}}).autonomous_with_mcp("a", "Go.")
    assert sent_tool_names(scripted_server) == ["big_one"]


async def test_an_image_of_a_server_reaches_the_model_and_the_events(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    part = image_part(f"data:image/png;base64,{PNG}")
    content = [{"type": "text", "text": "The screen:"}, {"type": "image", "data": PNG, "mimeType": "image/png"}]
    answers = {"count": [{"jsonrpc": "2.0", "id": "$id", "result": {"content": content}}]}
    scripted_server.script(calls(asks("count")), answer("I see."))
    stream = await make_agent({"a": {"answers": answers}}).autonomous_with_mcp("a", "Look.", stream=True)
    events = [event async for event in stream]
    tool, user = sent(scripted_server)["messages"][-2:]
    assert tool["content"].startswith("The screen:\n[image image/png, ")
    assert part in user["content"]
    (finished,) = [event for event in events if isinstance(event, ToolCallFinished)]
    assert finished.raw.result["content"] == content
    assert finished.record.images == (part,)


# Timeouts


async def test_tool_timeout_covers_a_call(scripted_server: ScriptedServer, make_agent: MakeAgent, notes: Path) -> None:
    agent = make_agent({"a": {"notes": str(notes)}}, tool_timeout=0.1)
    scripted_server.script(calls(asks("sleep")), answer("done"))
    result = await agent.autonomous_with_mcp("a", "Go.", full=True)
    assert "did not answer within 0.1 seconds; the call was cancelled" in tool_texts(result.messages)[0]
    assert (await wait_for_notes(notes))[0].startswith("cancelled ")


async def test_tool_timeout_does_not_cover_a_restart(
    scripted_server: ScriptedServer, make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.mcp.servers.managed_server._FIRST_BACKOFF_SECONDS", 2.5)
    agent = make_agent({"a": {}}, tool_timeout=1.5)
    scripted_server.script(calls(asks("die")), calls(asks("echo", text="on")), answer("done"))
    result = await agent.autonomous_with_mcp("a", "Go.", full=True)
    assert tool_texts(result.messages)[1] == "on"
    assert result.log[1].tool_calls[0].seconds > 1.5


async def test_the_call_timeout_in_the_file_overrides_tool_timeout(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    agent = make_agent({"a": {"lmbridge": {"callTimeout": 0.1}}}, tool_timeout=5)
    scripted_server.script(calls(asks("sleep")), answer("done"))
    result = await agent.autonomous_with_mcp("a", "Go.", full=True)
    assert "did not answer within 0.1 seconds" in tool_texts(result.messages)[0]


async def test_progress_extends_tool_timeout(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    agent = make_agent({"a": {"tools": ["work"], "reports": 9, "pause": 0.2}}, tool_timeout=1.5)
    scripted_server.script(calls(asks("work")), answer("done"))
    result = await agent.autonomous_with_mcp("a", "Go.", full=True)
    assert tool_texts(result.messages) == ["worked"]
    assert result.log[0].tool_calls[0].seconds > 1.5


async def test_connect_timeout_limits_the_start_of_a_server(make_agent: MakeAgent) -> None:
    with pytest.raises(MCPConnectionError, match=r"did not answer within 0.1 seconds"):
        await make_agent({"a": {"hang": True}}, connect_timeout=0.1).autonomous_with_mcp("a", "Go.")


@pytest.mark.parametrize("method", ["vendor/heartbeat", "notifications/message", "ping"])
async def test_a_run_with_a_server_that_floods_its_client_goes_on(
    scripted_server: ScriptedServer, make_agent: MakeAgent, method: str
) -> None:
    message = {"jsonrpc": "2.0", "method": method, "params": {"level": "info", "data": "x"}}
    flooding = {
        "flood_of": message | ({"id": 1} if method == "ping" else {}),
        "tools": ["flood", "sleep"],
        "lmbridge": {"toolTimeouts": {"sleep": 0.5}},
    }
    events: Recorder[McpEvent] = Recorder()
    agent = make_agent({"a": flooding, "b": {"tools": ["echo"]}}, on_mcp_event=events)
    scripted_server.script(calls(asks("flood")), calls(asks("sleep")), calls(asks("echo", text="on")), answer("done"))
    result = await agent.autonomous_with_multiple_mcps(["a", "b"], "Go.", full=True)
    texts = tool_texts(result.messages)
    assert (texts[0], texts[2], result.text) == ("flooding", "on", "done")
    assert "did not answer within 0.5 seconds" in texts[1]
    assert events.seen
