"""Lists of tools that grow old: when they are read again, and what is reported about definitions that change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import Agent, LLMClient, MultiMCPError, ToolError
from lmbridge.mcp import McpEvent, McpHub, ToolDefinitionChanged, ToolsChanged
from lmbridge.mcp.servers import definitions
from lmbridge.testing import Exchange, ScriptedServer
from lmbridge.testing import answer as completion
from tests.agent.support import asks, calls, sent
from tests.mcp.conftest import MakeHub
from tests.mcp.http_server import HttpServer, answer
from tests.mcp.support import Recorder, function_of, names, wait_for_notes


@pytest_asyncio.fixture
async def http_server() -> AsyncIterator[HttpServer]:
    server = HttpServer()
    await server.start()
    yield server
    await server.stop()


async def listings(hub: McpHub, notes: Path, *, uses: int = 3) -> int:
    """Uses the hub several times, and returns how often it asked for the list of tools."""
    for _ in range(uses):
        (await hub.tools()).release()
    return (await wait_for_notes(notes)).count("listed")


async def test_a_server_that_cannot_announce_changes_is_asked_for_its_tools_at_each_use(
    make_hub: MakeHub, notes: Path
) -> None:
    options = {"tools": ["change", "redefine", "echo"], "unannounced": True, "listed": True, "notes": str(notes)}
    hub = make_hub({"a": options})
    assert await listings(hub, notes) == 3
    await function_of(await hub.tools(), "change")()
    assert names((await hub.tools()).tools) == ["change", "redefine", "echo", "new"]


async def test_runs_that_begin_at_the_same_time_share_the_request_for_a_list(make_hub: MakeHub, notes: Path) -> None:
    hub = make_hub({"a": {"unannounced": True, "listed": True, "notes": str(notes)}})
    await hub.tools()
    server = hub._servers["a"]
    await asyncio.gather(*(server.definitions() for _ in range(50)))
    assert (await wait_for_notes(notes)).count("listed") == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1),
        ({"ttl": 0}, 3),
        ({"ttl": -5}, 3),
        ({"ttl": 3_600_000}, 1),
        ({"ttl": 3_600_000, "unannounced": True}, 1),
        ({"ttl": 0, "unannounced": True}, 3),
        ({"ttl": "soon", "unannounced": True}, 3),
        ({"ttl": None}, 1),
        ({"ttl": 0, "page": 10}, 6),
    ],
)
async def test_the_time_for_which_a_list_is_valid_decides_when_it_is_read_again(
    make_hub: MakeHub, notes: Path, options: Mapping[str, Any], expected: int
) -> None:
    hub = make_hub({"a": {**options, "listed": True, "notes": str(notes)}})
    assert await listings(hub, notes) == expected


async def test_the_list_of_a_server_that_announces_changes_is_read_again_after_a_while(
    make_hub: MakeHub, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.mcp.servers.session_owner._ANNOUNCED_LIST_SECONDS", 0.0)
    assert await listings(make_hub({"a": {"listed": True, "notes": str(notes)}}), notes) == 3


async def test_a_list_that_could_not_be_read_within_a_run_is_requested_by_the_next_run_only(
    make_hub: MakeHub, recorder: Recorder[McpEvent], caplog: pytest.LogCaptureFixture
) -> None:
    hub = make_hub({"a": {"tools": ["change"], "list_refused": True}}, on_event=recorder)
    lease = await hub.tools()
    await function_of(lease, "change")()
    await recorder.wait_for(lambda event: event == ToolsChanged("a"))
    assert await lease.new_tools() == await lease.new_tools() == []
    assert caplog.text.count("the new list could not be read") == 1
    assert names((await hub.tools()).tools) == ["change", "new"]
    assert names(await lease.new_tools()) == ["new"]


async def test_a_stateless_server_on_http_is_asked_for_its_tools_at_each_use(
    make_hub: MakeHub, http_server: HttpServer
) -> None:
    offered = ["echo"]

    def list_tools(message: Any, _: Any) -> Any:
        return answer(message, {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in offered]})

    def initialize(message: Any, _: Any) -> Any:
        opened = http_server.default(message)
        # Without a stream for its notifications, a server cannot keep this promise.
        opened["result"]["capabilities"] = {"tools": {"listChanged": True}}
        return opened

    http_server.responses |= {"tools/list": list_tools, "initialize": initialize}
    hub = make_hub({"a": {"url": http_server.url}})
    assert names((await hub.tools()).tools) == ["echo"]
    offered[:] = ["new"]
    assert names((await hub.tools()).tools) == ["new"]
    await http_server.stop()
    with pytest.raises(MultiMCPError, match="could not be started"):
        await hub.tools()


async def test_a_definition_that_differs_after_a_restart_is_reported(
    make_hub: MakeHub, tmp_path: Path, recorder: Recorder[McpEvent]
) -> None:
    once = tmp_path / "once"
    options = {"tools": ["count", "echo"], "die_at": ["count"], "once": str(once), "changed_after": str(once)}
    hub = make_hub({"a": options}, on_event=recorder)
    lease = await hub.tools()
    with pytest.raises(ToolError):
        await function_of(lease, "count")()
    await hub.tools()
    assert ToolDefinitionChanged("a", "echo", ("description",)) in recorder.seen
    assert lease.tools[1].description == "Does echo."


async def test_two_runs_that_share_a_lease_both_get_new_tools(
    make_hub: MakeHub, scripted_server: ScriptedServer, client: LLMClient
) -> None:
    lease = await make_hub({"a": {"tools": ["change", "echo"]}}).tools()
    agent = Agent(client, tools=[lease])
    is_changed = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        messages = exchange.request.json["messages"]
        if len(messages) > 1:
            await completion("done")(exchange)
        elif messages[0]["content"] == "change":
            await calls(asks("change"))(exchange)
        else:
            await is_changed.wait()
            await calls(asks("echo", text="x"))(exchange)

    scripted_server.default = behave
    waiting = agent.start("wait")
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
    await agent.run("change")
    is_changed.set()
    await waiting.result()
    for number in (-2, -1):
        assert [tool["function"]["name"] for tool in sent(scripted_server, number)["tools"]] == [
            "change",
            "echo",
            "new",
        ]


async def test_new_tools_are_not_lost_if_a_caller_is_cancelled(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(definitions, "ITEMS_PER_STEP", 1)
    hub = make_hub({"a": {"tools": ["echo"]}})
    lease = await hub.tools()
    (server,) = hub._servers.values()
    newer = [{"name": name, "inputSchema": {"type": "object"}} for name in ("echo", "new", "newer")]

    async def newer_definitions(seen: object) -> object:
        return None if seen is newer else newer

    monkeypatch.setattr(server, "newer_definitions", newer_definitions)
    ends: list[bool] = []
    for steps in range(20):
        asking = asyncio.ensure_future(lease.new_tools())
        for _ in range(steps):
            await asyncio.sleep(0)
        ends.append(not asking.cancel())
        await asyncio.wait({asking})
        if ends[-1]:
            break
        assert names(lease.tools) == ["echo"]
    assert ends[0] is False
    assert ends[-1] is True
    assert names(await lease.new_tools()) == names(lease.tools)[1:] == ["new", "newer"]


async def test_two_callers_at_once_do_not_both_add_a_tool(make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definitions, "ITEMS_PER_STEP", 1)
    hub = make_hub({"a": {"tools": ["echo"]}})
    lease = await hub.tools()
    (server,) = hub._servers.values()
    newer = [{"name": name, "inputSchema": {"type": "object"}} for name in ("echo", "new")]

    async def newer_definitions(_seen: object) -> object:
        return newer

    monkeypatch.setattr(server, "newer_definitions", newer_definitions)
    both = await asyncio.gather(lease.new_tools(), lease.new_tools())
    assert [names(each) for each in both] == [["new"], ["new"]]
    assert names(lease.tools) == ["echo", "new"]


async def test_the_servers_of_a_run_are_asked_at_the_same_time(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = make_hub({"a": {}, "b": {}})
    lease = await hub.tools()
    asked: list[object] = []
    both_are_asked = asyncio.Event()

    async def answer_once_both_are_asked(seen: object) -> None:
        asked.append(seen)
        if len(asked) == 2:
            both_are_asked.set()
        await both_are_asked.wait()

    for server in hub._servers.values():
        monkeypatch.setattr(server, "newer_definitions", answer_once_both_are_asked)
    assert await asyncio.wait_for(lease.new_tools(), 10) == []
