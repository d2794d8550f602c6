"""Definitions of tools: how they are listed, read one by one, and offered to the model."""

from __future__ import annotations

from typing import Any

import pytest

from lmbridge import MultiMCPError
from lmbridge.agent.toolset import Toolset
from lmbridge.mcp import (
    McpEvent,
    ToolsChanged,
    sdk,
)
from lmbridge.mcp.sdk import normalize
from lmbridge.mcp.servers.definitions import describe_tool, sanitize_schema
from tests.client.test_subschemas import KEYWORDS_AS_NAMES
from tests.mcp.conftest import MakeHub
from tests.mcp.support import Recorder, function_of, names


async def test_tools_of_one_name_from_several_servers_can_be_distinguished(make_hub: MakeHub) -> None:
    only = {"tools": ["echo"]}
    lease = await make_hub({"a": only, "b": only}).tools()
    toolset = await Toolset.collect([lease])
    assert toolset.names == ["a__echo", "b__echo"]


async def test_all_pages_of_a_list_of_tools_are_read(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": {"page": 5}}).tools()
    assert names(lease.tools) == names((await make_hub({"b": {}}).tools()).tools)


async def test_a_list_of_tools_that_returns_to_an_earlier_page_fails_the_server(make_hub: MakeHub) -> None:
    with pytest.raises(MultiMCPError, match="returns to the page"):
        await make_hub({"a": {"endless": True}}).tools()


async def test_a_list_of_tools_with_too_many_pages_fails_the_server(make_hub: MakeHub) -> None:
    more = [{"name": f"t{number}", "inputSchema": {}} for number in range(101)]
    with pytest.raises(MultiMCPError, match="has more than 100 pages"):
        await make_hub({"a": {"tools": [], "more_tools": more, "page": 1}}).tools()


@pytest.mark.parametrize("page", [5, 1_000])
async def test_a_list_of_too_many_tools_fails_the_server(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    for module in (normalize, sdk):
        monkeypatch.setattr(module, "MOST_TOOLS", 10)
    more = [{"name": f"t{number}", "inputSchema": {}} for number in range(11)]
    with pytest.raises(MultiMCPError, match="its list of tools has more than 5,000 tools"):
        await make_hub({"a": {"tools": [], "more_tools": more, "page": page}}).tools()
    lease = await make_hub({"a": {"tools": [], "more_tools": more[1:], "page": page}}).tools()
    assert len(lease.tools) == 10


async def test_a_bad_definition_costs_only_its_own_tool(make_hub: MakeHub, caplog: pytest.LogCaptureFixture) -> None:
    bad: list[Any] = [
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
        "number 2",
        "number 3",
        "number 4",
        "an_array",
        "echo",
        "task",
    ]
    assert "'an_array' is left out: its inputSchema is of type 'array'" in caplog.text
    assert await function_of(lease, "empty")() == "empty"


async def test_a_definition_that_is_nested_too_deeply_costs_only_its_own_tool(make_hub: MakeHub) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(450):
        schema = {"type": "object", "properties": {"a": schema}}
    lease = await make_hub({"a": {"tools": ["echo"], "more_tools": [{"name": "deep", "inputSchema": schema}]}}).tools()
    assert names(lease.tools) == ["echo"]
    (left_out,) = lease.left_out
    assert "it is nested too deeply" in left_out.reason


async def test_a_definition_whose_schema_is_not_valid_ends_no_run(make_hub: MakeHub) -> None:
    bad = [{"name": "bad", "inputSchema": {"type": "object", "$schema": "http://[bad", "required": "text"}}]
    lease = await make_hub({"a": {"tools": ["echo"], "more_tools": bad}}).tools()
    toolset = await Toolset.collect([lease])
    assert toolset.names == ["echo", "bad"]
    calls = [{"id": "1", "function": {"name": name, "arguments": "{}"}} for name in toolset.names]
    assert [type(toolset.read(call)).__name__ for call in calls] == ["InvalidCall", "ReadyCall"]


async def test_a_server_without_tools_has_not_failed(make_hub: MakeHub) -> None:
    hub = make_hub({"a": {"no_tools": True}, "b": {"undeclared": True, "tools": ["echo"]}})
    assert [(each.server, each.name) for each in (await hub.tools()).tools] == [("b", "echo")]


async def test_the_configuration_decides_which_tools_are_offered(make_hub: MakeHub) -> None:
    rules = {"lmbridge": {"allow": ["e*", "die"], "deny": ["env"]}}
    lease = await make_hub({"a": rules}).tools()
    assert names(lease.tools) == ["echo", "die"]
    assert lease.left_out == []


async def test_definitions_beyond_the_budget_are_left_out_and_logged(
    make_hub: MakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    big = {"name": "big_one", "description": "x" * 3_000, "inputSchema": {"type": "object"}}
    lease = await make_hub(
        {"a": {"tools": ["echo"], "more_tools": [big, {**big, "name": "small", "description": ""}]}}
    ).tools(max_definition_tokens=200)
    assert names(lease.tools) == ["echo", "small"]
    assert [each.tool for each in lease.left_out] == ["big_one"]
    assert "its definition takes about" in caplog.text


async def test_hints_that_a_server_does_not_give_have_the_worst_value(make_hub: MakeHub) -> None:
    more = [{"name": "reads", "inputSchema": {}, "annotations": {"readOnlyHint": True, "title": "R"}}]
    lease = await make_hub({"a": {"tools": ["echo"], "more_tools": more}}).tools()
    worst = {"readOnlyHint": False, "destructiveHint": True, "idempotentHint": False, "openWorldHint": True}
    assert lease.tools[0].annotations == worst
    assert lease.tools[1].annotations == {**worst, "readOnlyHint": True, "destructiveHint": False, "title": "R"}
    assert [each.server for each in lease.tools] == ["a", "a"]


async def test_changed_tools_are_added_to_a_lease_only_when_it_is_asked_for_them(
    make_hub: MakeHub, recorder: Recorder[McpEvent]
) -> None:
    hub = make_hub({"a": {"tools": ["change"]}}, on_event=recorder)
    lease = await hub.tools()
    await function_of(lease, "change")()
    await recorder.wait_for(lambda event: event == ToolsChanged("a"))
    assert names(lease.tools) == ["change"]
    assert names((await hub.tools()).tools) == ["change", "new"]
    assert names(await lease.new_tools()) == ["new"]
    assert await lease.new_tools() == lease.tools[1:]
    assert names(lease.tools) == ["change", "new"]
    lease.release()
    assert names(await lease.new_tools()) == ["new"]


async def test_a_changed_list_that_cannot_be_read_is_logged_and_requested_again_by_the_next_run(
    make_hub: MakeHub, caplog: pytest.LogCaptureFixture, recorder: Recorder[McpEvent]
) -> None:
    hub = make_hub({"a": {"tools": ["change"], "list_refused": True}}, on_event=recorder)
    await function_of(await hub.tools(), "change")()
    await recorder.wait_for(lambda event: event == ToolsChanged("a"))
    assert names((await hub.tools()).tools) == ["change"]
    assert "the new list could not be read, so the old one stays in use: -32603: not now" in caplog.text
    assert names((await hub.tools()).tools) == ["change", "new"]


def test_the_description_of_a_tool_is_cut_to_a_maximum_and_falls_back_to_the_title() -> None:
    assert len(describe_tool({"description": "x" * 10_000})) == 4_003
    assert describe_tool({"description": " ", "title": "T"}) == "T"
    assert describe_tool({"description": 5}) == ""


def test_only_the_prose_in_a_schema_is_sanitized() -> None:
    hidden = "\u200b"
    schema = {
        "title": f"a{hidden}",
        "properties": {"description": {"type": "string", "description": f"b{hidden}", "enum": [hidden]}},
        "default": {"description": hidden},
        "anyOf": [{"description": hidden}],
    }
    assert sanitize_schema(schema) == {
        "title": "a",
        "properties": {"description": {"type": "string", "description": "b", "enum": [hidden]}},
        "default": {"description": hidden},
        "anyOf": [{"description": ""}],
    }


@pytest.mark.parametrize("name", KEYWORDS_AS_NAMES)
def test_a_parameter_with_the_name_of_a_keyword_is_sanitized(name: str) -> None:
    def schema(text: str, data: str) -> dict[str, Any]:
        part = {"type": "string", "title": text, "default": data, "const": {"title": data}}
        return {"type": "object", "properties": {name: {**part, "properties": {name: part}}}}

    assert sanitize_schema(schema("a\u200b", "b\u200b")) == schema("a", "b\u200b")
