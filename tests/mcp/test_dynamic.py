"""Runs of `DynamicAutonomousAgent`: what they return, what they raise, and servers that cannot be started."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from pathlib import Path
from typing import Any, assert_type

import pytest

from lmbridge import (
    Agent,
    DynamicAutonomousAgent,
    LLMClient,
    LLMResponseError,
    LLMValidationError,
    MaxRoundsExceededError,
    MCPConnectionError,
    MCPError,
    MultiMCPError,
    RunFinished,
    RunIncompleteError,
    RunResult,
    ToolCallFinished,
)
from lmbridge.agent.runs import RunStream
from lmbridge.mcp.options import AgentOptions
from lmbridge.testing import Behaviour, ScriptedServer, answer, reply
from tests.agent.support import add, asks, asks_raw, calls, check_valid, sent, tool_texts
from tests.mcp.conftest import MakeAgent
from tests.mcp.dynamic_support import METHODS, ONLY_ECHO, echo_the_task, sent_system_message, sent_tool_names, start_run
from tests.mcp.support import scripted, wait_for_notes

# Return values


@pytest.mark.parametrize("method", METHODS)
async def test_a_run_returns_the_final_text_unchanged(
    scripted_server: ScriptedServer, make_agent: MakeAgent, method: str
) -> None:
    scripted_server.default = echo_the_task
    assert await start_run(make_agent({"a": ONLY_ECHO}), method, " verbatim\n") == " verbatim\n"


@pytest.mark.parametrize("method", METHODS)
async def test_full_returns_the_whole_run_result(
    scripted_server: ScriptedServer, make_agent: MakeAgent, method: str
) -> None:
    scripted_server.default = echo_the_task
    result = await start_run(make_agent({"a": ONLY_ECHO}), method, "Go.", full=True)
    assert isinstance(result, RunResult)
    assert (result.text, result.stop_reason, result.rounds, result.model) == ("Go.", "stop", 2, "test-model")
    assert result.errors == {}
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("echo", {"text": "Go."})]
    assert result.log[0].tool_calls[0].raw.result["content"] == [{"type": "text", "text": "Go."}]
    check_valid(result.messages)


@pytest.mark.parametrize("method", METHODS)
async def test_calls_in_a_text_are_read_and_repaired(
    scripted_server: ScriptedServer, make_agent: MakeAgent, method: str
) -> None:
    text = "<function=Echo>{'text': 'hi',}</function>"
    for options, is_made in (({}, True), ({"repair_calls": False}, False), ({"read_text_calls": "never"}, False)):
        scripted_server.script(answer(text), answer("Done."))
        agent = make_agent({"a": ONLY_ECHO}, max_nudges=0, **options)
        result = await start_run(agent, method, full=True)
        scripted_server.script()
        assert [call.repaired for call in result.tool_calls] == [True] * is_made


@pytest.mark.parametrize("method", METHODS)
async def test_full_returns_the_typed_output(
    scripted_server: ScriptedServer, make_agent: MakeAgent, method: str
) -> None:
    scripted_server.script(answer("Three."), answer('{"answer": 3}'))
    result = await start_run(make_agent({"a": ONLY_ECHO}), method, full=True, output_type=int)
    assert (result.output, result.stop_reason) == (3, "stop")


@pytest.mark.parametrize("method", METHODS)
async def test_stream_returns_the_events_of_the_run(
    scripted_server: ScriptedServer, make_agent: MakeAgent, method: str
) -> None:
    scripted_server.default = echo_the_task
    stream = await start_run(make_agent({"a": ONLY_ECHO}), method, stream=True)
    assert isinstance(stream, RunStream)
    events = [event async for event in stream]
    (finished,) = [event for event in events if isinstance(event, ToolCallFinished)]
    assert (finished.call.name, finished.text) == ("echo", "Go.")
    assert isinstance(events[-1], RunFinished)
    assert events[-1].result.text == "Go."


async def test_type_checkers_know_what_each_method_returns(
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
async def test_the_options_of_a_run_are_sent(
    scripted_server: ScriptedServer, make_agent: MakeAgent, method: str
) -> None:
    agent = make_agent({"a": {}}, max_tokens=70)
    await start_run(agent, method, model="other", max_tokens=50)
    assert (sent(scripted_server)["model"], sent(scripted_server)["max_tokens"]) == ("other", 50)
    await start_run(agent, method)
    assert (sent(scripted_server)["model"], sent(scripted_server)["max_tokens"]) == ("test-model", 70)


@pytest.mark.parametrize("method", METHODS)
async def test_a_run_has_its_own_sampling_options(
    scripted_server: ScriptedServer, make_agent: MakeAgent, method: str
) -> None:
    agent = make_agent({"a": {}}, temperature=1.0, top_p=0.5)
    sampling: dict[str, Any] = {"temperature": 0, "seed": 7, "stop": ["END"], "tool_choice": "auto"}
    await start_run(agent, method, **sampling, parallel_tool_calls=False, extra_body={"top_k": 3})
    expected = {**sampling, "top_p": 0.5, "parallel_tool_calls": False, "top_k": 3}
    assert {name: sent(scripted_server)[name] for name in expected} == expected
    with pytest.raises(LLMValidationError, match="temperature must be a number of at least 0"):
        await start_run(agent, method, temperature=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        await start_run(agent, method, temprature=1)


async def test_a_task_may_be_a_list_of_content_parts(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    parts = [{"type": "text", "text": "What is this?"}]
    await make_agent({"a": {}}).autonomous_with_mcp("a", parts)
    assert sent(scripted_server)["messages"][-1] == {"role": "user", "content": parts}


def test_agent_options_names_every_option_of_agent() -> None:
    # Not open_tools: each run of a DynamicAutonomousAgent opens the tools of its servers.
    accepted = set(inspect.signature(Agent.__init__).parameters) - {"self", "client", "open_tools"}
    assert set(AgentOptions.__annotations__) == accepted


# Runs without an answer

WITHOUT_ANSWER: dict[str, tuple[list[Behaviour], dict[str, Any]]] = {
    "length": ([answer("Once upon", finish_reason="length")], {}),
    "repetition": ([calls(asks("echo", text="again"))] * 6, {}),
    "bad_calls": ([calls(asks_raw("echo", "{"))] * 5, {}),
    "budget": ([calls(asks("echo", text="x"))], {"max_total_tokens": 1}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reason", WITHOUT_ANSWER)
async def test_a_run_without_an_answer_raises_an_error_with_the_result(
    scripted_server: ScriptedServer, make_agent: MakeAgent, reason: str, method: str
) -> None:
    behaviours, options = WITHOUT_ANSWER[reason]
    agent = make_agent({"a": ONLY_ECHO}, **options)
    scripted_server.script(*behaviours)
    with pytest.raises(RunIncompleteError, match=r"without an answer: .*; the run so far is in \.result") as caught:
        await start_run(agent, method)
    assert not isinstance(caught.value, MaxRoundsExceededError)
    assert caught.value.result.stop_reason == reason
    assert caught.value.partial is caught.value.result
    scripted_server.script(*behaviours)
    assert (await start_run(agent, method, full=True)).stop_reason == reason


@pytest.mark.parametrize("method", METHODS)
async def test_an_answer_at_a_limit_is_returned(
    scripted_server: ScriptedServer, make_agent: MakeAgent, method: str
) -> None:
    agent = make_agent({"a": ONLY_ECHO}, on_limit="answer", max_rounds=1)
    scripted_server.script(calls(asks("echo", text="x")), answer("As far as I know."))
    assert await start_run(agent, method) == "As far as I know."


@pytest.mark.parametrize("full", [False, True])
async def test_too_many_rounds_are_an_error_even_with_full(
    scripted_server: ScriptedServer, make_agent: MakeAgent, full: bool
) -> None:
    scripted_server.default = calls(asks("echo", text="x"))
    with pytest.raises(MaxRoundsExceededError) as caught:
        await start_run(make_agent({"a": {}}), "one", full=full, max_rounds=2)
    assert (caught.value.result.rounds, caught.value.result.stop_reason) == (2, "max_rounds")


async def test_max_seconds_ends_a_run_whose_servers_are_still_starting(make_agent: MakeAgent) -> None:
    agent = make_agent({"a": {"hang": True}}, max_seconds=0.2)
    with pytest.raises(RunIncompleteError, match="max_seconds or max_total_tokens was used up") as caught:
        await agent.autonomous_with_mcp("a", "Go.")
    assert (caught.value.result.rounds, caught.value.result.stop_reason) == (0, "budget")
    events = [event async for event in await agent.autonomous_with_mcp("a", "Go.", stream=True)]
    assert [type(event) for event in events] == [RunFinished]


async def test_an_error_of_the_model_server_carries_the_run_so_far(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    scripted_server.script(calls(asks("echo", text="x")), reply(400, {"error": "no such thing"}))
    with pytest.raises(LLMResponseError) as caught:
        await make_agent({"a": {}}).autonomous_with_mcp("a", "Go.")
    assert tool_texts(caught.value.partial.messages) == ["x"]


# Names and arguments that are not valid


@pytest.mark.parametrize("on_error", ["raise", "continue"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_name_is_an_error_that_lists_the_known_ones_and_starts_nothing(
    scripted_server: ScriptedServer, make_agent: MakeAgent, on_error: Any, stream: bool
) -> None:
    agent = make_agent({"a": {}, "off": {"disabled": True}})
    for unknown, message in (("b", r"unknown MCP server 'b'; the enabled ones are: a"), ("off", r"'off' is disabled")):
        with pytest.raises(MCPError, match=message) as caught:
            await agent.autonomous_with_multiple_mcps(["a", unknown], "Go.", on_mcp_error=on_error, stream=stream)
        assert not isinstance(caught.value, MCPConnectionError | MultiMCPError)
        with pytest.raises(MCPError, match=message):
            await agent.autonomous_with_mcp(unknown, "Go.", stream=stream)
    assert agent._hub.status() == {}
    assert scripted_server.requests == []


async def test_an_unknown_name_does_not_cancel_runs_of_another_model(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("to the end", gate=gate))
    agent = make_agent({"a": {}}, switch_policy="cancel")
    first = asyncio.create_task(agent.autonomous_with_mcp("a", "Go."))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    with pytest.raises(MCPError, match="unknown MCP server 'b'"):
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
async def test_an_invalid_argument_is_refused_before_anything_is_sent_or_started(
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
def test_an_invalid_option_of_the_agent_is_refused_at_once(client: LLMClient, options: Any) -> None:
    with pytest.raises(LLMValidationError):
        DynamicAutonomousAgent(client, **options)


def test_an_object_that_is_not_a_client_is_refused_at_once() -> None:
    with pytest.raises(LLMValidationError, match="client must be"):
        DynamicAutonomousAgent("client")  # type: ignore[arg-type]  # what the test is about


# Servers that cannot be started


async def test_the_error_of_a_single_server_is_raised_by_itself(make_agent: MakeAgent) -> None:
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
async def test_failures_of_several_servers_are_one_error_and_the_started_servers_stay(
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
    assert await wait_for_notes(notes) == ["started"]


@pytest.mark.parametrize(("prompt", "before"), [(None, ""), ("Be brief.", "Be brief.\n\n")])
async def test_continue_runs_without_the_failed_servers_and_names_them_to_the_model(
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
    assert warning.message.startswith("the run continues without MCP server 'dies': ")
    note = "The tools of these MCP servers are missing, because the servers could not be started: dies."
    assert sent_system_message(scripted_server) == before + note
    assert sent_tool_names(scripted_server) == ["echo"]


async def test_without_failures_no_system_message_is_added(
    scripted_server: ScriptedServer, make_agent: MakeAgent
) -> None:
    await make_agent({"a": {}}).autonomous_discover_and_execute("Go.")
    assert sent_system_message(scripted_server) is None


async def test_discovery_continues_without_failed_servers_by_default(make_agent: MakeAgent) -> None:
    agent = make_agent({"dies": {"exit": 3}, "good": {}})
    result = await agent.autonomous_discover_and_execute("Go.", full=True)
    assert list(result.errors) == ["dies"]
    with pytest.raises(MultiMCPError, match="status 3"):
        await agent.autonomous_discover_and_execute("Go.", on_mcp_error="raise")


async def test_continue_runs_even_if_all_servers_failed(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    agent = make_agent({"dies": {"exit": 3}, "missing": {"command": "/nowhere/server"}}, tools=[add])
    result = await agent.autonomous_discover_and_execute("Go.", full=True)
    assert set(result.errors) == {"dies", "missing"}
    assert (sent_system_message(scripted_server) or "").endswith("could not be started: dies, missing.")
    assert sent_tool_names(scripted_server) == ["add"]


async def test_discovery_without_an_enabled_server_is_an_error(
    empty_home: Path, client: LLMClient, make_agent: MakeAgent
) -> None:
    for servers in ({}, {"off": {"disabled": True}}, {"bridge": {"command": "lmbridge-mcp"}}):
        with pytest.raises(MCPError, match=r"no MCP server is enabled; enable one in .*mcp\.json"):
            await make_agent(servers).autonomous_discover_and_execute("Go.")
    async with DynamicAutonomousAgent(client) as agent:
        with pytest.raises(
            MCPError, match=r"no MCP server is enabled; write a configuration file; looked for .*mcp\.json"
        ):
            await agent.autonomous_discover_and_execute("Go.")


async def test_a_configuration_file_of_the_project_is_used_only_if_it_is_trusted(
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
    assert await wait_for_notes(notes) == ["started"]


async def test_a_missing_configuration_file_is_an_error_at_each_use(client: LLMClient, tmp_path: Path) -> None:
    agent = DynamicAutonomousAgent(client, config_path=tmp_path / "none.json")
    for use in (agent.list_available_mcps(), agent.autonomous_with_mcp("a", "Go.")):
        with pytest.raises(MCPError, match=r"none\.json', but that file does not exist"):
            await use


async def test_the_bridge_is_never_one_of_the_servers(scripted_server: ScriptedServer, make_agent: MakeAgent) -> None:
    bridge = {"command": "python", "args": ["-m", "lmbridge.mcp"]}
    agent = make_agent({"bridge": bridge, "a": ONLY_ECHO})
    assert await agent.list_available_mcps() == ["a"]
    result = await agent.autonomous_discover_and_execute("Go.", full=True)
    assert (result.errors, sent_tool_names(scripted_server)) == ({}, ["echo"])
    with pytest.raises(MCPConnectionError, match="'bridge' is lmbridge's own server") as caught:
        await agent.autonomous_with_mcp("bridge", "Go.")
    assert caught.value.server == "bridge"
