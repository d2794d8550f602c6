"""Runs that name the servers they need: what they return, what they raise, and which tools they have."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import pytest

from lmbridge import (
    Agent,
    DynamicAutonomousAgent,
    LLMClient,
    LLMClientPool,
    LLMResponseError,
    LLMValidationError,
    MaxRoundsExceededError,
    MCPConnectionError,
    MCPError,
    ModelChangedDuringExecutionError,
    MultiMCPError,
    RunFinished,
    RunIncompleteError,
    RunResult,
    ToolCall,
    ToolCallFinished,
)
from lmbridge.agent.runs import RunStream
from lmbridge.config import Limits
from lmbridge.mcp import McpEvent, ServerState, ServerStateChanged
from lmbridge.mcp.options import AgentOptions
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, reply
from tests.agent.support import add, asks, asks_raw, calls, check_valid, generations, sent, tool_texts
from tests.mcp.conftest import MakeAgent
from tests.mcp.support import Recorder, noted, scripted

METHODS = ["one", "several", "all"]
ONLY_ECHO = {"tools": ["echo"]}


async def start(agent: DynamicAutonomousAgent, method: str, task: Any = "Go.", **options: Any) -> Any:
    """A run with the server "a"."""
    if method == "one":
        return await agent.autonomous_with_mcp("a", task, **options)
    if method == "several":
        return await agent.autonomous_with_multiple_mcps(["a"], task, **options)
    return await agent.autonomous_discover_and_execute(task, **options)


async def echoes(exchange: Exchange) -> None:
    """A model that has its task echoed, and answers with what came back."""
    last = exchange.request.json["messages"][-1]
    done = last["role"] == "tool"
    await (answer(last["content"]) if done else calls(asks("echo", text=last["content"])))(exchange)


def tools_sent(server: ScriptedServer, number: int = -1) -> list[str]:
    """The names of the tools that the model was told of."""
    return [each["function"]["name"] for each in sent(server, number).get("tools", [])]


def system_of(server: ScriptedServer) -> str | None:
    """The leading system message that was sent last."""
    first = sent(server)["messages"][0]
    return first["content"] if first["role"] == "system" else None


# What comes back


@pytest.mark.parametrize("method", METHODS)
async def test_a_run_returns_the_answer(scripted_server: ScriptedServer, make_agent: MakeAgent, method: str) -> None:
    scripted_server.default = echoes
    assert await start(make_agent({"a": ONLY_ECHO}), method, " verbatim\n") == " verbatim\n"


@pytest.mark.parametrize("method", METHODS)
async def test_a_full_run_returns_all_that_is_known_of_it(
    scripted_server: ScriptedServer, make_agent: MakeAgent, method: str
) -> None:
    scripted_server.default = echoes
    result = await start(make_agent({"a": ONLY_ECHO}), method, "Go.", full=True)
    assert isinstance(result, RunResult)
    assert (result.text, result.stop_reason, result.rounds, result.model) == ("Go.", "stop", 2, "test-model")
    assert result.errors == {}
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("echo", {"text": "Go."})]
    assert result.log[0].tool_calls[0].raw.result["content"] == [{"type": "text", "text": "Go."}]
    check_valid(result.messages)


@pytest.mark.parametrize("method", METHODS)
async def test_a_streamed_run_tells_its_events(
    scripted_server: ScriptedServer, make_agent: MakeAgent, method: str
) -> None:
    scripted_server.default = echoes
    stream = await start(make_agent({"a": ONLY_ECHO}), method, stream=True)
    assert isinstance(stream, RunStream)
    events = [event async for event in stream]
    (finished,) = [event for event in events if isinstance(event, ToolCallFinished)]
    assert (finished.call.name, finished.text) == ("echo", "Go.")
    assert isinstance(events[-1], RunFinished)
    assert events[-1].result.text == "Go."


async def test_what_a_method_returns_is_known_to_type_checkers(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    agent = make_agent({"a": {}})
    assert_type(await agent.autonomous_with_mcp("a", "Go."), str)
    assert_type(await agent.autonomous_with_mcp("a", "Go.", full=True, max_rounds=2), RunResult)
    streams = [
        assert_type(await agent.autonomous_with_mcp("a", "Go.", stream=True, max_tokens=5), RunStream),
        assert_type(await agent.autonomous_with_multiple_mcps(["a"], "Go.", stream=True, model="m"), RunStream),
        assert_type(await agent.autonomous_discover_and_execute("Go.", stream=True), RunStream),
    ]
    assert_type(await agent.autonomous_with_multiple_mcps(["a"], "Go.", on_mcp_error="continue"), str)
    assert_type(await agent.autonomous_with_multiple_mcps(["a"], "Go.", full=True), RunResult)
    assert_type(await agent.autonomous_discover_and_execute("Go.", on_mcp_error="raise"), str)
    assert_type(await agent.autonomous_discover_and_execute("Go.", full=True), RunResult)
    for stream in streams:
        await stream.aclose()


@pytest.mark.parametrize("method", METHODS)
async def test_the_options_of_a_run_reach_it(
    scripted_server: ScriptedServer, make_agent: MakeAgent, method: str
) -> None:
    agent = make_agent({"a": {}}, max_tokens=70)
    await start(agent, method, model="other", max_tokens=50)
    assert (sent(scripted_server)["model"], sent(scripted_server)["max_tokens"]) == ("other", 50)
    await start(agent, method)
    assert (sent(scripted_server)["model"], sent(scripted_server)["max_tokens"]) == ("test-model", 70)


async def test_a_task_may_be_content_parts(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    parts = [{"type": "text", "text": "What is this?"}]
    await make_agent({"a": {}}).autonomous_with_mcp("a", parts)
    assert sent(scripted_server)["messages"][-1] == {"role": "user", "content": parts}


def test_the_options_of_an_agent_are_those_of_any_agent() -> None:
    own = set(inspect.signature(Agent.__init__).parameters) - {"self", "client"}
    assert set(AgentOptions.__annotations__) == own


# Runs without an answer

CUT: dict[str, tuple[list[Behaviour], dict[str, Any]]] = {
    "length": ([answer("Once upon", finish_reason="length")], {}),
    "repetition": ([calls(asks("echo", text="again"))] * 5, {}),
    "bad_calls": ([calls(asks_raw("echo", "{"))] * 5, {}),
    "budget": ([calls(asks("echo", text="x"))], {"max_total_tokens": 1}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reason", CUT)
async def test_a_run_without_an_answer_is_an_error_which_has_the_result(
    scripted_server: ScriptedServer, make_agent: MakeAgent, reason: str, method: str
) -> None:
    behaviours, options = CUT[reason]
    agent = make_agent({"a": ONLY_ECHO}, **options)
    scripted_server.script(*behaviours)
    with pytest.raises(RunIncompleteError, match=r"without an answer: .*; the run so far is in \.result") as caught:
        await start(agent, method)
    assert not isinstance(caught.value, MaxRoundsExceededError)
    assert caught.value.result.stop_reason == reason
    assert caught.value.partial is caught.value.result
    scripted_server.script(*behaviours)
    assert (await start(agent, method, full=True)).stop_reason == reason


@pytest.mark.parametrize("full", [False, True])
async def test_too_many_rounds_are_an_error_with_full_as_well(
    scripted_server: ScriptedServer, make_agent: MakeAgent, full: bool
) -> None:
    scripted_server.default = calls(asks("echo", text="x"))
    with pytest.raises(MaxRoundsExceededError) as caught:
        await start(make_agent({"a": {}}), "one", full=full, max_rounds=2)
    assert (caught.value.result.rounds, caught.value.result.stop_reason) == (2, "max_rounds")


async def test_time_that_is_up_while_servers_start_ends_the_run(make_agent: MakeAgent) -> None:
    agent = make_agent({"a": {"hang": True}}, max_seconds=0.2)
    with pytest.raises(RunIncompleteError, match="max_seconds or max_total_tokens were used up") as caught:
        await agent.autonomous_with_mcp("a", "Go.")
    assert (caught.value.result.rounds, caught.value.result.stop_reason) == (0, "budget")
    events = [event async for event in await agent.autonomous_with_mcp("a", "Go.", stream=True)]
    assert [type(event) for event in events] == [RunFinished]


async def test_an_error_of_the_model_server_has_the_run_so_far(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    scripted_server.script(calls(asks("echo", text="x")), reply(400, {"error": "no such thing"}))
    with pytest.raises(LLMResponseError) as caught:
        await make_agent({"a": {}}).autonomous_with_mcp("a", "Go.")
    assert tool_texts(caught.value.partial.messages) == ["x"]


# Names and arguments that cannot be right


@pytest.mark.parametrize("on_error", ["raise", "continue"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_name_is_an_error_that_lists_the_known_ones_and_starts_nothing(
    scripted_server: ScriptedServer, make_agent: MakeAgent, on_error: Any, stream: bool
) -> None:
    agent = make_agent({"a": {}, "off": {"disabled": True}})
    for unknown, told in (("b", r"there is no MCP server 'b'; there are: a"), ("off", r"'off' is disabled")):
        with pytest.raises(MCPError, match=told) as caught:
            await agent.autonomous_with_multiple_mcps(["a", unknown], "Go.", on_mcp_error=on_error, stream=stream)
        assert not isinstance(caught.value, MCPConnectionError | MultiMCPError)
        with pytest.raises(MCPError, match=told):
            await agent.autonomous_with_mcp(unknown, "Go.", stream=stream)
    assert agent._hub.status() == {}
    assert scripted_server.requests == []


async def test_an_unknown_name_disturbs_no_run_of_another_model(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("to the end", gate=gate))
    agent = make_agent({"a": {}}, switch_policy="cancel")
    first = asyncio.create_task(agent.autonomous_with_mcp("a", "Go."))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    with pytest.raises(MCPError, match="there is no MCP server 'b'"):
        await agent.autonomous_with_mcp("b", "Go.", model="other")
    gate.set()
    assert await first == "to the end"


@pytest.mark.parametrize(
    ("method", "arguments", "options"),
    [
        ("autonomous_with_mcp", (["a"], "Go."), {}),
        ("autonomous_with_mcp", ("a", ""), {}),
        ("autonomous_with_mcp", ("a", "Go."), {"max_rounds": 0}),
        ("autonomous_with_mcp", ("a", "Go."), {"max_tokens": "all"}),
        ("autonomous_with_mcp", ("a", "Go."), {"model": ""}),
        ("autonomous_with_mcp", ("a", "Go."), {"stream": True, "full": True}),
        ("autonomous_with_multiple_mcps", ("a", "Go."), {}),
        ("autonomous_with_multiple_mcps", ([], "Go."), {}),
        ("autonomous_with_multiple_mcps", ([[]], "Go."), {}),
        ("autonomous_with_multiple_mcps", (None, "Go."), {}),
        ("autonomous_with_multiple_mcps", (["a"], "Go."), {"on_mcp_error": "ignore"}),
        ("autonomous_discover_and_execute", ("Go.",), {"on_mcp_error": "single"}),
        ("autonomous_discover_and_execute", (b"Go.",), {}),
    ],
)
async def test_a_bad_argument_is_told_before_anything_is_sent_or_started(
    scripted_server: ScriptedServer, make_agent: MakeAgent, method: str, arguments: Any, options: Any
) -> None:
    agent = make_agent({"a": {}})
    with pytest.raises(LLMValidationError):
        await getattr(agent, method)(*arguments, **options)
    assert agent._hub.status() == {}
    assert scripted_server.requests == []


@pytest.mark.parametrize(
    "options",
    [
        {"connect_timeout": 0},
        {"max_rounds": 0},
        {"tools": "add"},
        {"tools": [5]},
        {"config_path": ""},
        {"config_path": 5},
        {"trust_project": "no"},
        {"on_mcp_event": "print"},
    ],
)
def test_a_bad_option_of_an_agent_is_told_at_once(client: LLMClient, options: Any) -> None:
    with pytest.raises(LLMValidationError):
        DynamicAutonomousAgent(client, **options)


def test_something_else_than_a_client_is_told_at_once() -> None:
    with pytest.raises(LLMValidationError, match="client is"):
        DynamicAutonomousAgent("client")  # type: ignore[arg-type]  # what the test is about


# Servers that cannot be started


async def test_the_error_of_a_single_server_is_its_own(make_agent: MakeAgent) -> None:
    agent = make_agent({"dies": {"exit": 3}, "broken": {"command": "x", "args": ["${NOT_SET_HERE}"]}})
    for stream in (False, True):
        with pytest.raises(MCPConnectionError, match=r"it ended with status 3.*missing API_KEY") as caught:
            await agent.autonomous_with_mcp("dies", "Go.", stream=stream)
        assert (caught.value.server, caught.value.context["stderr"]) == ("dies", "missing API_KEY")
        assert caught.value.partial.rounds == 0
        with pytest.raises(MCPConnectionError, match=r"environment variable NOT_SET_HERE.*write") as caught:
            await agent.autonomous_with_mcp("broken", "Go.", stream=stream)
        assert caught.value.server == "broken"


@pytest.mark.parametrize("names", [["good", "dies"], ["dies"]])
async def test_several_servers_fail_as_one_error_and_those_that_started_stay(
    scripted_server: ScriptedServer, make_agent: MakeAgent, notes: Path, names: list[str]
) -> None:
    agent = make_agent({"good": {"starts": True, "notes": str(notes)}, "dies": {"exit": 3}})
    with pytest.raises(MultiMCPError, match="it ended with status 3") as caught:
        await agent.autonomous_with_multiple_mcps(names, "Go.")
    assert list(caught.value.errors) == ["dies"]
    assert isinstance(caught.value.errors["dies"], MCPConnectionError)
    scripted_server.default = calls(asks("echo", text="x"))
    scripted_server.script(calls(asks("echo", text="x")), answer("done"))
    assert await agent.autonomous_with_mcp("good", "Go.") == "done"
    assert await noted(notes) == ["started"]


@pytest.mark.parametrize(("prompt", "before"), [(None, ""), ("Be brief.", "Be brief.\n\n")])
async def test_a_run_may_go_on_without_those_that_failed_and_the_model_is_told(
    scripted_server: ScriptedServer,
    make_agent: MakeAgent,
    caplog: pytest.LogCaptureFixture,
    prompt: str | None,
    before: str,
) -> None:
    agent = make_agent({"dies": {"exit": 3}, "good": ONLY_ECHO}, system_prompt=prompt)
    result = await agent.autonomous_with_multiple_mcps(["dies", "good"], "Go.", on_mcp_error="continue", full=True)
    assert list(result.errors) == ["dies"]
    error = result.errors["dies"]
    assert isinstance(error, MCPConnectionError)
    assert "missing API_KEY" in str(error)
    (warning,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert warning.message.startswith("the run goes on without MCP server 'dies': ")
    told = "The tools of these MCP servers are missing, because the servers could not be started: dies."
    assert system_of(scripted_server) == before + told
    assert tools_sent(scripted_server) == ["echo"]


async def test_where_nothing_failed_nothing_is_told(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    await make_agent({"a": {}}).autonomous_discover_and_execute("Go.")
    assert system_of(scripted_server) is None


async def test_discovery_goes_on_without_those_that_failed_unless_it_is_told_not_to(make_agent: MakeAgent) -> None:
    agent = make_agent({"dies": {"exit": 3}, "good": {}})
    result = await agent.autonomous_discover_and_execute("Go.", full=True)
    assert list(result.errors) == ["dies"]
    with pytest.raises(MultiMCPError, match="status 3"):
        await agent.autonomous_discover_and_execute("Go.", on_mcp_error="raise")


async def test_a_run_goes_on_even_if_all_servers_failed(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    agent = make_agent({"dies": {"exit": 3}, "missing": {"command": "/nowhere/server"}}, tools=[add])
    result = await agent.autonomous_discover_and_execute("Go.", full=True)
    assert set(result.errors) == {"dies", "missing"}
    assert (system_of(scripted_server) or "").endswith("could not be started: dies, missing.")
    assert tools_sent(scripted_server) == ["add"]


async def test_discovery_needs_a_server(own_home: Path, client: LLMClient, make_agent: MakeAgent) -> None:
    for servers in ({}, {"off": {"disabled": True}}, {"bridge": {"command": "lmbridge-mcp"}}):
        with pytest.raises(MCPError, match=r"no MCP server is enabled; enable one in .*mcp\.json"):
            await make_agent(servers).autonomous_discover_and_execute("Go.")
    async with DynamicAutonomousAgent(client) as agent:
        with pytest.raises(MCPError, match=r"no MCP server is enabled; write a configuration; looked for .*mcp\.json"):
            await agent.autonomous_discover_and_execute("Go.")


async def test_a_file_of_the_project_starts_nothing_until_it_is_trusted(
    scripted_server: ScriptedServer, client: LLMClient, notes: Path
) -> None:
    entry = scripted({"starts": True, "notes": str(notes)})
    Path(".mcp.json").write_text(json.dumps({"mcpServers": {"a": entry}}))
    async with DynamicAutonomousAgent(client) as agent:
        assert await agent.list_available_mcps() == []
        for run in (agent.autonomous_discover_and_execute("Go."), agent.autonomous_with_mcp("a", "Go.")):
            with pytest.raises(MCPError, match=r"\.mcp\.json was skipped.*trust_project=True"):
                await run
    assert not notes.exists()
    async with DynamicAutonomousAgent(client, trust_project=True) as agent:
        await agent.autonomous_with_mcp("a", "Go.")
    assert await noted(notes) == ["started"]


async def test_a_file_that_is_not_there_is_an_error_of_each_use(client: LLMClient, tmp_path: Path) -> None:
    agent = DynamicAutonomousAgent(client, config_path=tmp_path / "none.json")
    for use in (agent.list_available_mcps(), agent.autonomous_with_mcp("a", "Go.")):
        with pytest.raises(MCPError, match=r"none\.json', and there is no such file"):
            await use


async def test_the_bridge_does_not_connect_to_itself(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    bridge = {"command": "python", "args": ["-m", "lmbridge.mcp"]}
    agent = make_agent({"bridge": bridge, "a": ONLY_ECHO})
    assert await agent.list_available_mcps() == ["a"]
    result = await agent.autonomous_discover_and_execute("Go.", full=True)
    assert (result.errors, tools_sent(scripted_server)) == ({}, ["echo"])
    with pytest.raises(MCPConnectionError, match="'bridge' is lmbridge's own server") as caught:
        await agent.autonomous_with_mcp("bridge", "Go.")
    assert caught.value.server == "bridge"


# Tools


async def test_names_are_listed_in_the_order_of_the_file_and_start_nothing(make_agent: MakeAgent) -> None:
    agent = make_agent({"z": {}, "off": {"disabled": True}, "a": {}})
    assert await agent.list_available_mcps() == ["z", "a"]
    assert agent._hub.status() == {}


async def test_tools_are_named_by_their_server_only_where_they_collide(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    def count(n: int) -> int:
        """Counts."""
        return n

    agent = make_agent({"a": {"tools": ["echo", "count"]}, "b": {"tools": ["echo", "parts"]}}, tools=[add, count])
    scripted_server.script(calls(asks("b__echo", text="x"), asks("a__count", "call_2")), answer("done"))
    result = await agent.autonomous_with_multiple_mcps(["a", "b"], "Go.", full=True)
    assert tools_sent(scripted_server) == ["add", "count", "a__echo", "a__count", "b__echo", "parts"]
    assert tool_texts(result.messages) == ["x", "count"]
    await agent.autonomous_with_mcp("b", "Go.")
    assert tools_sent(scripted_server) == ["add", "count", "echo", "parts"]


async def test_only_the_servers_that_were_named_are_started(make_agent: MakeAgent) -> None:
    agent = make_agent({"a": {}, "b": {}, "c": {}})
    await agent.autonomous_with_multiple_mcps(["c", "a", "c"], "Go.")
    assert list(agent._hub.status()) == ["c", "a"]


async def test_a_failing_tool_is_text_for_the_model(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    wrong = calls(asks("fails"), asks("refuses", "call_2"), asks("die", "call_3"))
    scripted_server.script(wrong, calls(asks("echo", text="on")), answer("done"))
    result = await make_agent({"a": {}}, max_parallel_tools=1).autonomous_with_mcp("a", "Go.", full=True)
    texts = tool_texts(result.messages)
    assert texts[0] == "no such file: a.txt"
    assert "bad arguments" in texts[1]
    assert "may or may not have run" in texts[2]
    assert (texts[3], result.text) == ("on", "done")


async def test_the_tools_of_a_run_do_not_change_those_of_the_next_do(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    events: Recorder[McpEvent] = Recorder()
    agent = make_agent({"a": {"tools": ["change"]}}, on_mcp_event=events)
    scripted_server.script(calls(asks("change")), answer("done"), answer("done"))
    await agent.autonomous_with_mcp("a", "Go.")
    assert [tools_sent(scripted_server, number) for number in (0, 1)] == [["change"], ["change"]]
    await events.wait_for(lambda event: type(event).__name__ == "ToolsChanged")
    await agent.autonomous_with_mcp("a", "Go.")
    assert tools_sent(scripted_server) == ["change", "new"]
    assert ServerStateChanged("a", ServerState.READY) in events.seen


async def test_approve_gets_the_hints_of_a_tool(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
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


async def test_definitions_take_no_more_than_half_of_a_context_that_is_known(
    scripted_server: ScriptedServer, make_agent: MakeAgent, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"data": [{"id": "test-model", "owned_by": "vllm", "max_model_len": 2048}]}
    scripted_server.on_path("/v1/models", reply(200, models))
    big = {"name": "big_one", "description": "x " * 1_600, "inputSchema": {"type": "object"}}
    small = {"name": "small", "description": "", "inputSchema": {"type": "object"}}
    agent = make_agent({"a": {"tools": ["echo"], "more_tools": [big, small]}})
    await agent.autonomous_with_mcp("a", "Go.")
    assert tools_sent(scripted_server) == ["echo", "small"]
    assert "tool 'big_one' is left out: its definition takes about" in caplog.text
    assert "of 1024 for all" in caplog.text


async def test_without_a_context_that_is_known_all_definitions_are_sent(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    big = {"name": "big_one", "description": "x" * 4_000, "inputSchema": {"type": "object"}}
    await make_agent({"a": {"tools": [], "more_tools": [big]}}).autonomous_with_mcp("a", "Go.")
    assert tools_sent(scripted_server) == ["big_one"]


# Time


async def test_tool_timeout_covers_a_call(scripted_server: ScriptedServer, make_agent: MakeAgent, notes: Path) -> None:
    agent = make_agent({"a": {"notes": str(notes)}}, tool_timeout=0.1)
    scripted_server.script(calls(asks("sleep")), answer("done"))
    result = await agent.autonomous_with_mcp("a", "Go.", full=True)
    assert "did not answer within 0.1 seconds; it was told to stop" in tool_texts(result.messages)[0]
    assert (await noted(notes))[0].startswith("cancelled ")


async def test_tool_timeout_does_not_cover_a_restart(
    scripted_server: ScriptedServer, make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.mcp.servers.managed._FIRST_WAIT", 1.0)
    agent = make_agent({"a": {}}, tool_timeout=0.5)
    scripted_server.script(calls(asks("die")), calls(asks("echo", text="on")), answer("done"))
    result = await agent.autonomous_with_mcp("a", "Go.", full=True)
    assert tool_texts(result.messages)[1] == "on"
    assert result.log[1].tool_calls[0].seconds > 0.5


async def test_the_time_that_the_file_gives_a_server_wins(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    agent = make_agent({"a": {"lmbridge": {"callTimeout": 0.1}}}, tool_timeout=5)
    scripted_server.script(calls(asks("sleep")), answer("done"))
    result = await agent.autonomous_with_mcp("a", "Go.", full=True)
    assert "did not answer within 0.1 seconds" in tool_texts(result.messages)[0]


async def test_connect_timeout_is_that_of_the_servers(make_agent: MakeAgent) -> None:
    with pytest.raises(MCPConnectionError, match=r"did not answer within 0.1 seconds"):
        await make_agent({"a": {"hang": True}}, connect_timeout=0.1).autonomous_with_mcp("a", "Go.")


# Clients and models


async def test_a_pool_lends_a_client_for_each_generation(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    scripted_server.default = echoes
    async with LLMClientPool(2, api_base=scripted_server.api_base, model="test-model") as pool:
        agent = make_agent({"a": ONLY_ECHO}, client=pool)
        tasks = [f"task {number}" for number in range(10)]
        assert await asyncio.gather(*(agent.autonomous_with_mcp("a", task) for task in tasks)) == tasks
        assert pool.stats().in_use == 0


async def test_without_a_client_it_has_one_of_its_own_that_asks_what_the_server_can_do(
    scripted_server: ScriptedServer, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMBRIDGE_API_BASE", scripted_server.api_base)
    monkeypatch.setenv("DEFAULT_MODEL", "qwen3-4b")
    scripted_server.on_path("/v1/models", reply(200, {"data": [{"id": "qwen3-4b", "owned_by": "llamacpp"}]}))
    props = {"total_slots": 3, "build_info": "b1", "default_generation_settings": {"n_ctx": 4096}}
    scripted_server.on_path("/props", reply(200, props))
    agent = DynamicAutonomousAgent(config_path=config({"a": scripted({})}))
    assert agent.model == "qwen3-4b"
    assert await agent.autonomous_with_mcp("a", "Go.") == "Hello from the scripted server."
    assert agent._own_client
    assert agent._own_client._server.transport.limits == Limits(max_concurrency=3)
    await agent.close()
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)


async def test_the_callers_client_stays_open(
    scripted_server: ScriptedServer, client: LLMClient, config: Callable[..., Path]
) -> None:
    async with DynamicAutonomousAgent(client, config_path=config({"a": scripted({})})) as agent:
        await agent.autonomous_with_mcp("a", "Go.")
    assert scripted_server.open_connections == 1


async def test_switch_model_is_that_of_the_agent(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    agent = make_agent({"a": {}})
    await agent.switch_model("other")
    await agent.autonomous_with_mcp("a", "Go.")
    assert agent.model == sent(scripted_server)["model"] == "other"
    assert "other" in repr(agent)


async def test_the_seed_a_second_model_raises_while_the_first_run_goes_on(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    gate = asyncio.Event()
    scripted_server.default = answer("done", gate=gate)
    agent = make_agent({"filesystem": {}}, switch_policy="reject")
    slow = agent.autonomous_with_mcp("filesystem", "Analyze large codebase", model="mistralai/magistral-small-2509")
    first = asyncio.create_task(slow)
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    with pytest.raises(ModelChangedDuringExecutionError) as caught:
        await agent.autonomous_with_mcp("filesystem", "Quick task", model="qwen/qwen3-coder-30b")
    assert (caught.value.old_model, caught.value.new_model) == (
        "mistralai/magistral-small-2509",
        "qwen/qwen3-coder-30b",
    )
    gate.set()
    assert await first == "done"


async def test_a_second_model_raises_also_while_the_first_runs_servers_start(
    make_agent: MakeAgent, notes: Path
) -> None:
    agent = make_agent({"slow": {"hang": True, "starts": True, "notes": str(notes)}, "a": {}}, switch_policy="reject")
    first = asyncio.create_task(agent.autonomous_with_mcp("slow", "Go.", model="one"))
    await noted(notes)
    for stream in (False, True):
        with pytest.raises(ModelChangedDuringExecutionError):
            await agent.autonomous_with_mcp("a", "Go.", model="other", stream=stream)
    assert list(agent._hub.status()) == ["slow"]
    first.cancel()
    await asyncio.wait([first])


async def test_the_seed_runs_with_the_same_model_are_fine(make_agent: MakeAgent) -> None:
    agent = make_agent({"filesystem": {}}, switch_policy="reject")
    tasks = [agent.autonomous_with_mcp("filesystem", f"Task {n}", model="qwen/qwen3-coder-30b") for n in (1, 2)]
    assert await asyncio.gather(*tasks) == ["Hello from the scripted server."] * 2


async def test_the_seed_a_hundred_runs_on_two_models_share_one_process(
    scripted_server: ScriptedServer, make_agent: MakeAgent, notes: Path
) -> None:
    scripted_server.default = echoes
    agent = make_agent({"filesystem": {**ONLY_ECHO, "starts": True, "notes": str(notes)}})
    models = ["qwen/qwen3-coder-30b", "mistralai/magistral-small-2509"]
    runs = (agent.autonomous_with_mcp("filesystem", f"Task {n}", model=models[n % 2]) for n in range(100))
    assert await asyncio.gather(*runs) == [f"Task {n}" for n in range(100)]
    assert len(generations(scripted_server)) == 200
    assert await noted(notes) == ["started"]
