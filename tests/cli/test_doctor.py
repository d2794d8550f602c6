"""`lmbridge doctor`: what each check finds on servers that work, and on servers that do not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import LLMClient, LLMConnectionError, ModelInfo, ServerInfo
from lmbridge.cli import doctor, security_checks, server_checks
from lmbridge.cli.connection import ServerConnection
from lmbridge.cli.findings import Finding, FindingState, any_broken
from lmbridge.cli.mcp_checks import check_mcp_servers
from lmbridge.cli.security_checks import check_network, check_websites
from lmbridge.cli.server_checks import (
    check_cancelling,
    check_embeddings,
    check_model,
    check_model_switch,
    check_streaming,
    check_structured_output,
    check_tools,
    check_truncation,
)
from lmbridge.cli.terminal import Terminal
from lmbridge.cli.tool_options import ToolOptions
from lmbridge.testing import Behaviour, Exchange, OneModelServer, ScriptedServer, answer, reply
from tests.cli.support import Command
from tests.mcp.support import rewrite
from tests.threaded_server import ThreadedServer

A = ModelInfo(id="a", loaded=True, context_length=10)
B = ModelInfo(id="b", loaded=False)
LONG_ANSWER = answer("one two three four five six seven eight nine ten")
TOO_LONG = {"error": {"message": "the request exceeds the available context size", "type": "exceed_context_size_error"}}


def connection_to(client: LLMClient, *models: ModelInfo, **info: Any) -> ServerConnection:
    described = ServerInfo(kind="llama.cpp", models=models, context_length=models[0].context_length, **info)
    return ServerConnection(client=client, info=described, model=models[0].id)


@pytest_asyncio.fixture
async def connection(scripted_server: ScriptedServer) -> AsyncIterator[ServerConnection]:
    async with LLMClient(scripted_server.api_base, "a") as client:
        yield connection_to(client, A)


@pytest.mark.parametrize(
    ("models", "state", "text"),
    [
        ([A], "ok", "a is loaded, context 10"),
        ([B], "warning", "no model is loaded; b is loaded on demand"),
        ([ModelInfo(id="c")], "ok", "c (the server does not say whether it is loaded)"),
        ([ModelInfo(id="e", embeds=True)], "broken", "the server has no model that can chat"),
        ([ModelInfo(id="nomic-embed-text")], "broken", "the server has no model that can chat"),
    ],
)
async def test_the_model(connection: ServerConnection, models: list[ModelInfo], state: str, text: str) -> None:
    finding = await check_model(connection_to(connection.client, *models))
    assert (finding.state, finding.text) == (state, text)
    assert bool(finding.fix) == (state != "ok")


async def test_a_server_that_does_not_list_its_models_may_still_chat(connection: ServerConnection) -> None:
    unlisted = ServerConnection(client=connection.client, info=ServerInfo(kind="unknown"), model=None)
    finding = await check_model(unlisted)
    assert (finding.state, finding.text) == ("warning", "the server does not list its models")


async def test_streaming_works(scripted_server: ScriptedServer, connection: ServerConnection) -> None:
    scripted_server.default = LONG_ANSWER
    assert (await check_streaming(connection)).state == "ok"


async def test_a_stream_in_one_piece_is_a_warning(
    scripted_server: ScriptedServer, connection: ServerConnection
) -> None:
    scripted_server.default = answer("all")
    finding = await check_streaming(connection)
    assert finding.state == "warning"
    assert "proxy" in str(finding.fix)


async def test_a_server_that_stops_for_clients_that_leave(
    scripted_server: ScriptedServer, connection: ServerConnection
) -> None:
    scripted_server.default = LONG_ANSWER
    finding = await check_cancelling(connection_to(connection.client, A, slots=2))
    assert finding.state == "ok"
    assert len(scripted_server.aborts) <= 2
    assert len(scripted_server.requests) == 5


async def test_a_server_that_goes_on_for_clients_that_have_left(
    scripted_server: ScriptedServer, connection: ServerConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each question for the time takes a second, and the last short answer a hundred.
    clock = iter([0, 1, 1, 2, 2, 3, 100, 200])
    monkeypatch.setattr(server_checks, "_now", lambda: next(clock))
    scripted_server.default = LONG_ANSWER
    monkeypatch.setattr(server_checks, "_LONG_ANSWER", 40)
    finding = await check_cancelling(connection)
    assert finding.state == "warning"
    assert finding.text == "100.00 s for a short answer after 1 stream was closed early, 1.00 s before"


async def test_an_answer_that_ends_before_its_stream_can_be_left_is_skipped(
    scripted_server: ScriptedServer, connection: ServerConnection
) -> None:
    scripted_server.default = answer("all")
    finding = await check_cancelling(connection)
    assert (finding.state, finding.text) == ("skipped", "an answer ended before its stream could be closed")
    assert "proxy" in str(finding.fix)


def calls_the_tool() -> Behaviour:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_word", "arguments": "{}"}}
    return answer("", tool_calls=[call])


@pytest.mark.parametrize(
    ("replies", "state", "text"),
    [
        ([calls_the_tool(), answer("It is blue-tulip.")], "ok", "the model called a tool and answered with its result"),
        (
            [calls_the_tool(), answer("I do not know.")],
            "warning",
            "the model called the tool, but did not use its result",
        ),
        ([answer("It is red-rose.")], "warning", "the model did not call the tool"),
    ],
)
async def test_a_round_trip_of_a_tool(
    scripted_server: ScriptedServer, connection: ServerConnection, replies: list[Behaviour], state: str, text: str
) -> None:
    scripted_server.script(*replies)
    finding = await check_tools(connection)
    assert (finding.state, finding.text) == (state, text)


@pytest.mark.parametrize(
    ("text", "state"), [('{"country": "France", "capital": "Paris"}', "ok"), ("France: Paris", "warning")]
)
async def test_structured_output(
    scripted_server: ScriptedServer, connection: ServerConnection, text: str, state: str
) -> None:
    scripted_server.default = answer(text)
    assert (await check_structured_output(connection)).state == state


async def test_embeddings(scripted_server: ScriptedServer, connection: ServerConnection) -> None:
    scripted_server.script(reply(501, {"error": "not supported"}))
    assert (await check_embeddings(connection)).state == "skipped"
    vector = {"object": "list", "model": "a", "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}]}
    scripted_server.script(reply(200, vector))
    assert await check_embeddings(connection) == Finding("embeddings", "ok", "2 numbers from a")


async def test_a_prompt_that_does_not_fit_is_refused(
    scripted_server: ScriptedServer, connection: ServerConnection
) -> None:
    scripted_server.default = reply(400, TOO_LONG)
    assert (await check_truncation(connection)).state == "ok"


async def test_a_prompt_that_is_cut_without_a_word_is_a_warning(
    scripted_server: ScriptedServer, connection: ServerConnection
) -> None:
    finding = await check_truncation(connection)
    assert finding.state == "warning"
    assert "cut off without an error" in finding.text
    assert "num_ctx" in str(finding.fix)


@pytest.mark.parametrize("context", [None, 100_000])
async def test_a_context_of_unknown_or_great_length_is_not_filled(
    scripted_server: ScriptedServer, connection: ServerConnection, context: int | None
) -> None:
    model = ModelInfo(id="a", loaded=True, context_length=context)
    finding = await check_truncation(connection_to(connection.client, model))
    assert (finding.state, bool(finding.fix)) == ("skipped", True)
    assert scripted_server.requests == []


async def test_a_server_that_kills_a_generation_for_another_model_is_a_warning() -> None:
    async with OneModelServer(["a", "b"]) as server, LLMClient(server.api_base, "a") as client:
        finding = await check_model_switch(connection_to(client, A, B))
    assert finding.state == "warning"
    assert finding.text.startswith("it killed the generation")
    assert "lmbridge gateway" in str(finding.fix)


async def test_a_server_that_holds_both_models_is_fine(
    scripted_server: ScriptedServer, connection: ServerConnection
) -> None:
    assert (await check_model_switch(connection_to(connection.client, A, B))).state == "ok"
    assert (await check_model_switch(connection)).state == "skipped"


async def test_a_model_that_cannot_answer_beside_the_other_is_a_warning(
    scripted_server: ScriptedServer, connection: ServerConnection
) -> None:
    async def refuse_the_other(exchange: Exchange) -> None:
        behave = reply(400, {"error": "no room for it"}) if exchange.request.json["model"] == "b" else LONG_ANSWER
        await behave(exchange)

    scripted_server.default = refuse_the_other
    finding = await check_model_switch(connection_to(connection.client, A, B))
    assert finding.state == "warning"
    assert finding.text.startswith("b could not answer meanwhile: ")
    assert "no room for it" in finding.text
    assert "lmbridge gateway" in str(finding.fix)


async def test_cancelling_the_check_leaves_no_request_behind(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()
    scripted_server.default = answer("one two", gate=gate)
    async with LLMClient(scripted_server.api_base, "a") as client:
        task = asyncio.create_task(check_model_switch(connection_to(client, A, B)))
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 2)
        task.cancel()
        await asyncio.wait({task})
        await scripted_server.wait_until(lambda: scripted_server.open_connections == 0)


# Security


def with_cors(origin: str) -> Behaviour:
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]}
    return reply(200, body, headers={"Access-Control-Allow-Origin": origin})


@pytest.mark.parametrize(
    ("origin", "state"),
    [("*", "warning"), ("https://stranger.example", "warning"), ("http://localhost:3000", "ok")],
)
async def test_websites(scripted_server: ScriptedServer, connection: ServerConnection, origin: str, state: str) -> None:
    scripted_server.default = with_cors(origin)
    finding = await check_websites(connection)
    assert finding.state == state
    if state == "warning":
        assert finding.fix == "start llama-server with --api-key"


async def test_a_server_that_requires_a_key_is_closed_to_websites(
    scripted_server: ScriptedServer, connection: ServerConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def behave(exchange: Exchange) -> None:
        assert "Authorization" not in exchange.request.headers
        await reply(401, {"error": "no key"})(exchange)

    monkeypatch.setenv("LM_API_TOKEN", "a-key")
    scripted_server.default = behave
    assert (await check_websites(connection)).text == "the server requires a key"


async def test_a_server_that_listens_on_all_addresses_is_a_warning(
    scripted_server: ScriptedServer, connection: ServerConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The scripted server listens on 127.0.0.1 alone, which plays the address in the network.
    monkeypatch.setattr(security_checks, "_own_address", lambda: "127.0.0.1")
    finding = await check_network(connection)
    assert finding.state == "warning"
    assert finding.fix == "start llama-server with --host 127.0.0.1, or with --api-key"
    scripted_server.on_path("/v1/models", reply(401, {"error": "no key"}))
    assert (await check_network(connection)).text == "other machines need a key"
    monkeypatch.setattr(security_checks, "_own_address", lambda: "127.0.0.2")
    assert (await check_network(connection)).text == "other machines cannot reach the server"
    monkeypatch.setattr(security_checks, "_own_address", lambda: None)
    assert (await check_network(connection)).text == "this machine has no network"


async def test_the_address_in_the_network_has_the_port_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    @asynccontextmanager
    async def no_server(api_base: str, _model: str | None) -> AsyncIterator[LLMClient]:
        tried.append(api_base)
        raise LLMConnectionError
        yield

    monkeypatch.setattr(security_checks, "_own_address", lambda: "192.0.2.9")
    monkeypatch.setattr(security_checks, "stranger", no_server)
    for api_base in ("http://127.0.0.1:1234", "http://localhost"):
        with pytest.raises(LLMConnectionError):
            await check_network(connection_to(LLMClient(api_base), A))
    assert tried == ["http://192.0.2.9:1234/v1", "http://192.0.2.9/v1"]


async def test_a_unix_socket_is_closed_to_other_machines() -> None:
    finding = await check_network(connection_to(LLMClient("unix:///run/llm.sock"), A))
    assert (finding.state, finding.text) == ("ok", "the server listens on a socket of this machine")


# MCP servers


# Importing the MCP SDK takes seconds.
@pytest.mark.slow
async def test_mcp_servers_that_start_and_that_do_not(tmp_path: Path) -> None:
    config = tmp_path / "mcp.json"
    servers = {
        "one": {"tools": ["echo"]},
        "two": {"tools": ["echo", "add"]},
        "gone": {"command": "/nowhere/to/be/found"},
        "off": {"command": "/nowhere/to/be/found", "disabled": True},
    }
    rewrite(config, servers)
    found = await check_mcp_servers(ToolOptions(config=config))
    assert [(each.check, each.state, bool(each.fix)) for each in found] == [
        ("MCP: one", "ok", False),
        ("MCP: two", "ok", False),
        ("MCP: gone", "broken", True),
    ]
    assert [each.text for each in found[:2]] == ["1 tool", "2 tools"]


@pytest.mark.slow
async def test_no_configuration_and_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (nothing,) = await check_mcp_servers(ToolOptions())
    assert (nothing.state, nothing.text) == ("skipped", "none is configured")
    broken = tmp_path / "mcp.json"
    broken.write_text("{")
    (finding,) = await check_mcp_servers(ToolOptions(config=broken))
    assert finding.state == "broken"


# The command


@pytest.fixture
def no_mcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the MCP SDK takes longer than all other checks together."""

    async def skip(_options: ToolOptions) -> list[Finding]:
        return [Finding("MCP servers", "skipped", "none is configured")]

    monkeypatch.setattr(doctor, "check_mcp_servers", skip)


def test_all_findings_are_in_one_table_with_what_to_do(command: Command, server: ThreadedServer, no_mcp: None) -> None:
    server.answer(answer("It did not call a tool, and does not follow a schema."))
    status, output, errors = command("doctor")
    assert (status, errors) == (0, "")
    table, _, advice = output.partition("\nWhat to do:\n")
    assert [line.split("  ")[0] for line in table.splitlines()] == [
        "check",
        "server",
        "model",
        "streaming",
        "cancelling",
        "tools",
        "structured output",
        "embeddings",
        "long prompts",
        "model switch",
        "websites",
        "network",
        "MCP servers",
    ]
    assert "  tools: the server accepts tools, but this model does not call them" in advice


def test_something_broken_is_the_exit_status(command: Command, server: ThreadedServer, no_mcp: None) -> None:
    server.answer(reply(500, {"error": "failed to load model"}))
    status, output, _ = command("doctor", "--json")
    assert status == 1
    report = json.loads(output)
    assert report["broken"] is True
    states = {each["check"]: each["state"] for each in report["findings"]}
    assert states["server"] == states["model"] == "ok"
    assert states["streaming"] == states["tools"] == "broken"


def test_no_server_is_a_finding(monkeypatch: pytest.MonkeyPatch, no_mcp: None) -> None:
    monkeypatch.setenv("LMBRIDGE_API_BASE", "http://127.0.0.1:1/v1")
    status, output, errors = Command()("doctor")
    assert (status, errors) == (1, "")
    assert "BROKEN" in output.splitlines()[1]


async def test_a_check_that_does_not_end_is_broken(connection: ServerConnection) -> None:
    async def hang(_connection: ServerConnection) -> Finding:
        await asyncio.sleep(60)
        raise AssertionError

    examination = doctor.Examination(Terminal(), seconds=0.01)
    await examination._run("hanging", hang, connection)
    assert examination.findings[0].text == "it did not end within 0.01 s"
    assert any_broken(examination.findings)


@pytest.mark.parametrize("state", ["warning", "broken"])
def test_a_finding_without_a_fix_is_refused(state: FindingState) -> None:
    with pytest.raises(ValueError, match="needs a fix"):
        Finding("streaming", state, "it does not work")


async def test_an_error_without_a_hint_has_a_fix_all_the_same(connection: ServerConnection) -> None:
    async def fail(_connection: ServerConnection) -> Finding:
        raise LLMConnectionError("it broke")

    examination = doctor.Examination(Terminal(), seconds=10)
    await examination._run("failing", fail, connection)
    (finding,) = examination.findings
    assert (finding.state, finding.text) == ("broken", "it broke")
    assert "lmbridge doctor --debug" in str(finding.fix)


@pytest.mark.parametrize(("try_switch", "tried"), [(None, False), (False, False), (True, True)])
async def test_another_model_is_loaded_only_if_the_person_agrees(
    scripted_server: ScriptedServer, connection: ServerConnection, try_switch: bool | None, tried: bool
) -> None:
    examination = doctor.Examination(Terminal(), seconds=10)
    await examination._check_switch(connection_to(connection.client, A, B), try_switch)
    assert examination.findings[0].state == ("ok" if tried else "skipped")
    assert bool(scripted_server.requests) == tried
