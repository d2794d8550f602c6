"""The bridge as an MCP server: its tools, and its process as a host has it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import mcp
import pytest
import pytest_asyncio
from mcp.client.stdio import stdio_client

from lmbridge import MCPConnectionError, MultiMCPError
from lmbridge._version import __version__
from lmbridge.mcp import sdk
from lmbridge.mcp.bridge.bridge import Bridge, Progress
from lmbridge.mcp.sdk.server_session import Answer, build, serve
from lmbridge.testing import Exchange, ScriptedServer, answer, reply, sse, stall
from tests.mcp.conftest import MakeHub
from tests.mcp.support import gone, noted, scripted
from tests.support import HALF, cancel_at_each_step

NAMES = [
    "health_check",
    "list_models",
    "chat_completion",
    "text_completion",
    "generate_embeddings",
    "create_response",
    "autonomous_with_mcp",
    "autonomous_with_multiple_mcps",
    "autonomous_discover_and_execute",
    "list_available_mcps",
]
INITIALIZE = {
    "id": 0,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}
NOBODY = "http://127.0.0.1:9/v1"
WriteConfig = Callable[[Mapping[str, Any]], Path]


def tool_call(name: str, arguments: str = "{}") -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def text(piece: str, finish_reason: str | None = None) -> dict[str, Any]:
    """A chunk of a text completion."""
    choice = {"text": piece, "index": 0, "finish_reason": finish_reason}
    return {"object": "text_completion", "model": "test-model", "choices": [choice]}


def responded(said: str, **fields: Any) -> bytes:
    """The event that ends a streamed response."""
    item = {"type": "message", "content": [{"type": "output_text", "text": said}]}
    whole = {"id": "resp_1", "model": "test-model", "status": "completed", "output": [item], **fields}
    data = {"type": f"response.{whole['status']}", "response": whole}
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()


# The tools, in this process


@pytest_asyncio.fixture
async def bridge(scripted_server: ScriptedServer, config: WriteConfig, notes: Path) -> AsyncIterator[Bridge]:
    """A bridge to the scripted server, with two MCP servers that work and one that does not."""
    servers = {
        "one": scripted({"tools": ["echo", "sleep"], "noted": ["sleep"], "notes": str(notes)}),
        "two": scripted({"tools": ["count"]}),
        "broken": {"command": sys.executable, "args": ["-c", "raise SystemExit('no key')"]},
    }
    path = config(servers)
    async with Bridge.opened(scripted_server.api_base, "test-model", config_path=path) as bridge:
        yield bridge


@pytest.mark.parametrize("tool", NAMES)
def test_a_model_is_told_what_each_argument_is(bridge: Bridge, tool: str) -> None:
    found = next(each for each in bridge.tools if each.name == tool)
    properties = found.parameters["properties"]
    assert found.parameters["type"] == "object"
    assert len(found.description) > 30
    assert all(len(each["description"]) > 20 for each in properties.values())
    assert "$ref" not in json.dumps(found.parameters)
    assert set(found.parameters["required"]) <= set(properties)


def test_the_tools_say_what_they_may_do(bridge: Bridge) -> None:
    assert [tool.name for tool in bridge.tools] == NAMES
    hints = {tool.name: tool.annotations for tool in bridge.tools}
    assert all(hint["title"] for hint in hints.values())
    reads = {"health_check", "list_models", "list_available_mcps"}
    assert {name for name, hint in hints.items() if hint["readOnlyHint"]} == reads
    acts = {name for name in NAMES if name.startswith("autonomous")}
    assert {name for name, hint in hints.items() if hint["openWorldHint"]} == acts
    assert {name for name, hint in hints.items() if hint.get("destructiveHint")} == acts
    assert {name for name, hint in hints.items() if hint.get("idempotentHint")} == {"generate_embeddings"}


async def test_a_chat_is_streamed_and_holds_what_was_asked_for(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    earlier = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    arguments = {
        "prompt": "Bye.",
        "messages": earlier,
        "system_prompt": "Be kind.",
        "temperature": 0,
        "max_tokens": "9",
    }
    got = await bridge.call("chat_completion", {**arguments, "stop": ["END"], "model": None})
    assert got.texts == ["Hello from the scripted server."]
    usage = {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}
    facts = {"model": "test-model", "finish_reason": "stop", "usage": usage}
    assert got.structured == {"text": got.texts[0], **facts}
    sent = scripted_server.requests[-1].json
    system, last = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Bye."}
    assert sent == {
        "messages": [system, *earlier, last],
        "model": "test-model",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": 9,
        "stop": ["END"],
    }


@pytest.mark.parametrize(
    ("behaviour", "note"),
    [
        (answer("Half an", finish_reason="length"), "This is not the whole answer: it was cut off"),
        (answer("Half an", finish_reason="content_filter"), "it ended because of 'content_filter'"),
        (answer("", reasoning="Hm."), "empty answer"),
    ],
)
async def test_a_chat_that_is_not_whole_says_so_to_the_model_and_to_programs(
    bridge: Bridge, scripted_server: ScriptedServer, behaviour: Any, note: str
) -> None:
    scripted_server.script(behaviour)
    got = await bridge.call("chat_completion", {"prompt": "Hi."})
    assert note in got.texts[-1]
    assert not got.is_error
    assert got.structured is not None
    assert got.structured["notes"] == [got.texts[-1]]


async def test_a_text_goes_on(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    scripted_server.script(sse(text(" Pa"), text("ris", "length"), done=True))
    got = await bridge.call("text_completion", {"prompt": "The capital is", "max_tokens": 2})
    assert got.texts[0] == " Paris"
    assert "cut off" in got.texts[1]
    sent = scripted_server.requests[-1]
    assert (sent.path, sent.json["prompt"], sent.json["max_tokens"]) == ("/v1/completions", "The capital is", 2)


async def test_embeddings_are_a_line_each(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    data = [{"index": index, "embedding": [index, 0.5]} for index in range(2)]
    scripted_server.script(reply(200, {"data": data, "model": "bge"}))
    got = await bridge.call("generate_embeddings", {"input": ["a", "b"], "model": "bge"})
    assert got.texts == ["[0, 0.5]\n[1, 0.5]"]
    assert got.structured == {"embeddings": [[0, 0.5], [1, 0.5]], "model": "bge"}
    assert scripted_server.requests[-1].json == {"input": ["a", "b"], "model": "bge"}


async def test_a_response_says_how_to_go_on(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    scripted_server.script(sse(responded("Hello.")), sse(responded("Hel", status="incomplete", id="resp_2")))
    got = await bridge.call("create_response", {"input": "Hi.", "instructions": "Be kind.", "max_output_tokens": 9})
    assert got.texts == [
        "Hello.",
        "[To go on from this, give previous_response_id='resp_1'; LM Studio can, llama.cpp cannot.]",
    ]
    assert got.structured is not None
    assert got.structured["response_id"] == "resp_1"
    sent = scripted_server.requests[-1].json
    wanted = {"input": "Hi.", "instructions": "Be kind.", "max_output_tokens": 9, "model": "test-model", "stream": True}
    assert sent == wanted
    got = await bridge.call("create_response", {"input": "Go on.", "previous_response_id": "resp_1"})
    assert got.texts[0] == "Hel"
    assert "may not be the whole answer" in got.texts[1]
    assert scripted_server.requests[-1].json["previous_response_id"] == "resp_1"


async def test_a_response_that_took_all_its_tokens_may_be_cut_whatever_the_server_calls_it(
    bridge: Bridge, scripted_server: ScriptedServer
) -> None:
    usage = {"input_tokens": 3, "output_tokens": 9, "total_tokens": 12}
    scripted_server.default = sse(responded("Once upon a", usage=usage))
    for most, is_cut in ((9, True), (10, False), (None, False)):
        got = await bridge.call("create_response", {"input": "Hi.", "max_output_tokens": most})
        assert got.structured is not None
        assert got.structured["usage"] == usage
        assert any("larger max_output_tokens" in text for text in got.texts) is is_cut


async def test_a_refusal_is_an_answer(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    item = {"type": "message", "content": [{"type": "refusal", "refusal": "I will not."}]}
    scripted_server.script(sse(responded("", output=[{"type": "reasoning"}, item])))
    assert (await bridge.call("create_response", {"input": "Hi."})).texts[0] == "I will not."


async def test_it_asks_the_server_how_much_it_can_do_at_a_time(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", reply(200, {"data": [{"id": "test-model", "owned_by": "llamacpp"}]}))
    props = {"total_slots": 3, "build_info": "b1", "default_generation_settings": {"n_ctx": 4096}}
    scripted_server.on_path("/props", reply(200, props))
    await bridge.call("chat_completion", {"prompt": "Hi."})
    assert bridge._client._server.transport.limits.max_concurrency == 3


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("chat_completion", {"prompt": "Hi."}),
        ("generate_embeddings", {"input": "a"}),
        ("autonomous_with_mcp", {"mcp_name": "two", "task": "x"}),
    ],
)
async def test_an_answer_of_another_model_says_so(
    bridge: Bridge, scripted_server: ScriptedServer, tool: str, arguments: dict[str, Any]
) -> None:
    scripted_server.on_path("/v1/chat/completions", answer("Hello.", model="loaded"))
    scripted_server.on_path("/v1/embeddings", reply(200, {"data": [{"index": 0, "embedding": [1]}], "model": "loaded"}))
    note = "[Another model answered: 'loaded', not 'asked'.]"
    got = await bridge.call(tool, {**arguments, "model": "asked"})
    assert got.texts[-1] == note
    assert got.structured is not None
    assert (got.structured["notes"], got.structured["model"]) == ([note], "loaded")
    for model in ("loaded", None):
        same = await bridge.call(tool, {**arguments, "model": model})
        assert note not in same.texts


async def test_what_there_is_is_listed(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    scripted_server.models = ["a", "b"]
    assert await bridge.call("list_models", {}) == Answer(["a\nb"], {"models": ["a", "b"]})
    servers = ["one", "two", "broken"]
    assert await bridge.call("list_available_mcps", {}) == Answer(["one\ntwo\nbroken"], {"mcps": servers})
    got = await bridge.call("health_check", {})
    assert got.structured == {"healthy": True, "api_base": scripted_server.api_base}


async def test_a_server_that_is_not_there_is_told_with_what_to_do(config: WriteConfig) -> None:
    async with Bridge.opened(NOBODY, config_path=config({})) as bridge:
        got = await bridge.call("chat_completion", {"prompt": "Hi."})
        assert got.is_error
        assert got.texts[0].startswith(f"chat completion at {NOBODY}/chat/completions: ")
        assert "; " in got.texts[0]
        health = await bridge.call("health_check", {})
        assert not health.is_error
        assert "does not answer" in health.texts[0]
        assert health.structured == {"healthy": False, "api_base": NOBODY}
        assert (await bridge.call("list_available_mcps", {})).texts == ["No MCP server is configured."]


async def test_an_error_in_an_answer_shows_what_had_arrived_as_a_part(
    bridge: Bridge, scripted_server: ScriptedServer
) -> None:
    scripted_server.script(sse(*HALF, {"error": "model crashed"}))
    got = await bridge.call("chat_completion", {"prompt": "Hi."})
    assert got.is_error
    assert "model crashed" in got.texts[0]
    assert got.texts[1].endswith("not the whole answer:]\nHello")


@pytest.mark.parametrize(("tool", "argument"), [("chat_completion", "prompt"), ("create_response", "input")])
async def test_an_error_in_an_answer_names_no_attributes(
    bridge: Bridge, scripted_server: ScriptedServer, tool: str, argument: str
) -> None:
    scripted_server.script(sse(*HALF))
    got = await bridge.call(tool, {argument: "Hi."})
    assert got.is_error
    assert got.texts[0].endswith("the server stopped, crashed or was cut off")


@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        ("chat_completion", {"prompt": 3}, "$.prompt: expected `str | null`, got `int`; it takes: prompt (optional)"),
        ("chat_completion", {"prompt": "Hi.", "tokens": 3}, "tokens"),
        ("chat_completion", {"prompt": "Hi.", "max_tokens": 0}, "max_tokens"),
        ("chat_completion", {}, "neither prompt nor messages is given; give prompt"),
        ("chat_completion", {"messages": [{"content": "Hi."}]}, "messages[0] has no role; add 'role'"),
        ("autonomous_with_mcp", {"task": "x"}, "mcp_name"),
        ("autonomous_with_multiple_mcps", {"task": "x", "mcp_names": []}, "mcp_names"),
        ("autonomous_with_mcp", {"task": "x", "mcp_name": "three"}, "one, two, broken"),
    ],
)
async def test_wrong_arguments_are_told_with_what_is_right(
    bridge: Bridge, scripted_server: ScriptedServer, tool: str, arguments: dict[str, Any], told: str
) -> None:
    got = await bridge.call(tool, arguments)
    assert got.is_error
    assert told in got.texts[0]
    assert scripted_server.requests == []


async def test_an_agent_works_with_the_tools_of_a_server(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    scripted_server.script(answer("", tool_calls=[tool_call("echo", '{"text": "moo"}')]), answer("It says moo."))
    told: list[str] = []

    async def report(_progress: float, message: str) -> None:
        told.append(message)

    got = await bridge.call("autonomous_with_mcp", {"mcp_name": "one", "task": "Ask it.", "max_tokens": 50}, report)
    assert got.texts == ["It says moo."]
    assert got.structured is not None
    assert got.structured["usage"]["total_tokens"] > 0
    assert {key: got.structured[key] for key in ("text", "model", "rounds", "tool_calls")} == {
        "text": "It says moo.",
        "model": "test-model",
        "rounds": 2,
        "tool_calls": ["echo"],
    }
    steps = ["started", "round 1", "round 1: calling echo", "round 2"]
    assert [message for message in told if "answering" not in message] == steps
    assert scripted_server.requests[-1].json["max_tokens"] == 50


@pytest.mark.parametrize(
    ("tool", "names"),
    [
        ("autonomous_with_mcp", {"mcp_name": "two"}),
        ("autonomous_with_multiple_mcps", {"mcp_names": ["two"]}),
        ("autonomous_discover_and_execute", {}),
    ],
)
async def test_the_options_of_a_run_reach_it(
    bridge: Bridge, scripted_server: ScriptedServer, tool: str, names: dict[str, Any]
) -> None:
    scripted_server.default = answer("", tool_calls=[tool_call("count")])
    options = {"max_rounds": 2, "max_tokens": 50, "model": "other"}
    got = await bridge.call(tool, {"task": "x", **names, **options})
    assert "it used up its rounds" in got.texts[0]
    asked = [request.json for request in scripted_server.requests if request.path.endswith("/completions")]
    assert [(each["max_tokens"], each["model"]) for each in asked] == [(50, "other")] * 2


async def test_a_run_that_ends_without_a_word_says_so(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    scripted_server.script(answer("", tool_calls=[tool_call("count")]), answer(""))
    got = await bridge.call("autonomous_with_mcp", {"mcp_name": "two", "task": "x"})
    assert got.texts == ["[The model gave an empty answer.]"]


async def test_an_agent_says_which_servers_were_missing(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    scripted_server.script(answer("Done."), answer("Done as well."))
    for tool in ("autonomous_with_multiple_mcps", "autonomous_discover_and_execute"):
        names = {"mcp_names": ["two", "broken"]} if "multiple" in tool else {}
        got = await bridge.call(tool, {"task": "x", "on_mcp_error": "continue", **names})
        assert not got.is_error
        assert "broken: " in got.texts[1]
        assert got.structured is not None
        assert list(got.structured["missing"]) == ["broken"]
    got = await bridge.call("autonomous_with_multiple_mcps", {"task": "x", "mcp_names": ["two", "broken"]})
    assert got.is_error
    assert "no key" in got.texts[0]
    assert len(scripted_server.requests) >= 2


@pytest.mark.parametrize(
    ("arguments", "behaviours", "told", "called"),
    [
        (
            {},
            [answer("Half an", finish_reason="length")],
            "its last reply was cut, at max_tokens or the end of the context; raise max_tokens, or ask for less",
            [],
        ),
        (
            {"max_rounds": 2},
            [answer("Well,", tool_calls=[tool_call("count")])] * 2,
            "it used up its rounds; raise max_rounds, or ask for less",
            ["count, count"],
        ),
    ],
)
async def test_a_run_without_an_answer_is_an_error_with_what_it_had_said(
    bridge: Bridge,
    scripted_server: ScriptedServer,
    arguments: dict[str, Any],
    behaviours: list[Any],
    told: str,
    called: list[str],
) -> None:
    scripted_server.script(*behaviours)
    got = await bridge.call("autonomous_with_mcp", {"mcp_name": "two", "task": "x", **arguments})
    assert got.is_error
    assert got.texts[0] == f"The run ended without an answer: {told}"
    assert "not the whole answer" in got.texts[1]
    assert [text for text in got.texts if "had called" in text] == [
        f"[Tools that it had called by then, and that may have done something: {each}]" for each in called
    ]


async def test_a_bug_is_told_and_logged_with_its_traceback(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lmbridge.client.LLMClient.list_models", lambda _self: 1 / 0)
    got = await bridge.call("list_models", {})
    assert got == Answer(["list_models failed: ZeroDivisionError: division by zero"], is_error=True)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None


async def test_progress_is_told_at_once_and_then_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, str]] = []

    async def report(progress: float, message: str) -> None:
        told.append((progress, message))

    progress = Progress(report)
    monkeypatch.setattr("lmbridge.mcp.bridge.bridge._EACH", 1e9)
    await progress.tick("first")
    await progress.tick("too early")
    await progress.step("a step is always told")
    progress._next = 0.0
    await progress.tick("later")
    assert told == [(1, "first"), (3, "a step is always told"), (4, "later")]


@pytest.mark.parametrize("tool", ["chat_completion", "autonomous_with_mcp"])
async def test_a_call_can_be_cancelled_anywhere(
    bridge: Bridge, scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    monkeypatch.setattr("lmbridge.mcp.bridge.bridge._EACH", 0.0)  # also where it tells of progress
    arguments = {"prompt": "Hi."} if tool == "chat_completion" else {"mcp_name": "two", "task": "x"}

    async def report(_progress: float, _message: str) -> None:
        await asyncio.sleep(0)

    async def free() -> None:
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 0)
        assert bridge._client.stats().in_flight == 0

    await cancel_at_each_step(lambda: bridge.call(tool, arguments, report), free, at_least=5)


# Its process, driven by the official client


@asynccontextmanager
async def connected(api_base: str, folder: Path, **env: str) -> AsyncIterator[tuple[Any, Any]]:
    """A session of the official client with the bridge's process, and how it began; nothing is written to stderr."""
    env = {"LMBRIDGE_API_BASE": api_base, "HOME": str(folder), **env}
    parameters = mcp.StdioServerParameters(command=sys.executable, args=["-m", "lmbridge.mcp"], env=env)
    errors = folder / "stderr"
    with errors.open("w") as log:
        async with stdio_client(parameters, errlog=log) as streams, mcp.ClientSession(*streams) as session:
            yield session, plain(await session.initialize())
    assert errors.read_text() == ""


def plain(model: Any) -> Any:
    """What was on the wire."""
    return model.model_dump(by_alias=True, mode="json", exclude_none=True)


async def test_the_official_client_finds_and_calls_the_tools(scripted_server: ScriptedServer, tmp_path: Path) -> None:
    failure: type[Exception] = getattr(mcp, "MCPError", None) or mcp.McpError  # type: ignore[attr-defined]  # of 1.x
    progress: list[tuple[float, str | None]] = []

    async def on_progress(done: float, _total: float | None, message: str | None) -> None:
        progress.append((done, message))

    scripted_server.script(answer("Hello there."))
    async with connected(scripted_server.api_base, tmp_path, DEFAULT_MODEL="gemma-3-4b") as (session, started):
        assert started["serverInfo"]["name"] == sdk.NAME == "lmbridge"
        assert started["serverInfo"]["version"] == __version__
        assert started["instructions"]
        tools = plain(await session.list_tools())["tools"]
        assert [tool["name"] for tool in tools] == NAMES
        assert all(tool["inputSchema"]["type"] == "object" for tool in tools)
        assert tools[0]["annotations"]["readOnlyHint"]
        asked = {"prompt": "Hi."}
        got = plain(await session.call_tool("chat_completion", asked, progress_callback=on_progress))
        assert got["content"] == [{"type": "text", "text": "Hello there."}]
        assert got["structuredContent"]["model"] == "gemma-3-4b"
        assert not got["isError"]
        wrong = plain(await session.call_tool("chat_completion", {"prompt": 3}))
        assert wrong["isError"]
        assert "expected `str | null`" in wrong["content"][0]["text"]
        with pytest.raises(failure, match="Unknown tool: chat; there are: health_check") as error:
            await session.call_tool("chat", {})
        told: Any = getattr(error.value, "error", error.value)
        assert told.code == -32602
    assert progress[0] == (1, "started")
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})


async def test_calls_run_at_the_same_time(scripted_server: ScriptedServer, tmp_path: Path) -> None:
    all_there = asyncio.Event()

    async def together(exchange: Exchange) -> None:
        if scripted_server.in_flight == 3:
            all_there.set()
        await all_there.wait()
        await answer("Hello.")(exchange)

    scripted_server.default = together
    async with connected(scripted_server.api_base, tmp_path) as (session, _):
        calls = (session.call_tool("chat_completion", {"prompt": str(each)}) for each in range(3))
        got = await asyncio.gather(*calls)
    assert [plain(each)["content"][0]["text"] for each in got] == ["Hello."] * 3


async def test_the_newest_protocol_has_progress_and_cancellation(
    scripted_server: ScriptedServer, tmp_path: Path
) -> None:
    if not sdk.is_v2():
        pytest.skip("the first major of the SDK does not speak it")
    env = {"LMBRIDGE_API_BASE": scripted_server.api_base, "HOME": str(tmp_path)}
    parameters = mcp.StdioServerParameters(command=sys.executable, args=["-m", "lmbridge.mcp"], env=env)
    told = asyncio.Event()

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        told.set()

    scripted_server.script(stall([*HALF]))
    async with mcp.Client(stdio_client(parameters), mode="2026-07-28") as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == NAMES
        call = asyncio.create_task(
            client.call_tool("chat_completion", {"prompt": "Hi."}, progress_callback=on_progress)
        )
        await told.wait()
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
        call.cancel()
        await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 1)
        await asyncio.wait({call})
        assert not (await client.call_tool("chat_completion", {"prompt": "Hi."})).is_error


# Its process, byte by byte


class Host:
    """The other end of a bridge's process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.process = process
        self.stdin, self.stdout, self.stderr = process.stdin, process.stdout, process.stderr

    def send(self, *messages: Mapping[str, Any]) -> None:
        """Writes messages, all at once."""
        self.stdin.write(b"".join(json.dumps({"jsonrpc": "2.0", **each}).encode() + b"\n" for each in messages))

    def call(self, number: int, tool: str, **arguments: Any) -> None:
        self.send(called(number, tool, **arguments))

    async def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self.stdout.readline())
        assert message["jsonrpc"] == "2.0"
        return message

    async def end(self) -> tuple[int, str, bytes]:
        """Waits for the end of the process: its status, its stderr, and what was left of its stdout."""
        errors, output = await asyncio.gather(self.stderr.read(), self.stdout.read())
        return await self.process.wait(), errors.decode(), output


def called(number: int, tool: str, **arguments: Any) -> dict[str, Any]:
    return {"id": number, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}


def cancelled(number: int) -> dict[str, Any]:
    return {"method": "notifications/cancelled", "params": {"requestId": number}}


StartBridge = Callable[..., Any]


@pytest_asyncio.fixture
async def start(scripted_server: ScriptedServer, own_home: Path) -> AsyncIterator[StartBridge]:
    """Starts bridges of the scripted server, initialised."""
    hosts: list[Host] = []

    async def start(*args: str, initialise: bool = True, **env: str) -> Host:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *(args or ("-m", "lmbridge.mcp")),
            env={**os.environ, "LMBRIDGE_API_BASE": scripted_server.api_base, "HOME": str(own_home), **env},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        host = Host(process)
        hosts.append(host)
        if initialise:
            host.send(INITIALIZE, {"method": "notifications/initialized"})
            assert (await host.receive())["id"] == 0
        return host

    yield start
    for host in hosts:
        host.stdin.close()
        if host.process.returncode is None:
            host.process.kill()
        await host.end()


@pytest.mark.parametrize("token", [0, "", "a"])
async def test_any_token_of_progress_is_one(start: StartBridge, token: int | str) -> None:
    host = await start()
    asked = {"name": "list_models", "_meta": {"progressToken": token}}
    host.send({"id": 1, "method": "tools/call", "params": asked})
    assert (await host.receive())["params"]["progressToken"] == token
    assert (await host.receive())["id"] == 1


async def test_a_cancelled_call_stops_the_generation(start: StartBridge, scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall([*HALF]))
    host = await start()
    host.call(1, "chat_completion", prompt="Hi.")
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
    host.send(cancelled(1))
    await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 1)
    host.send({"id": 2, "method": "ping"})
    while (message := await host.receive())["id"] != 2:
        assert "error" in message  # the first major of the SDK answers what was cancelled
    host.stdin.close()
    assert await host.end() == (0, "", b"")


async def test_a_cancelled_run_tells_its_servers(
    start: StartBridge, scripted_server: ScriptedServer, config: WriteConfig, notes: Path
) -> None:
    entry = scripted({"tools": ["sleep"], "noted": ["sleep"], "notes": str(notes)})
    host = await start(MCP_JSON_PATH=str(config({"slow": entry})))
    scripted_server.script(answer("", tool_calls=[tool_call("sleep")]), answer("Hello again."))
    host.call(1, "autonomous_with_mcp", mcp_name="slow", task="Sleep.")
    await noted(notes)
    host.send(cancelled(1))
    assert (await noted(notes, 2))[1].startswith("cancelled")
    host.call(2, "autonomous_with_mcp", mcp_name="slow", task="Say hello.")
    while (message := await host.receive())["id"] != 2:
        assert "error" in message  # as above
    assert message["result"]["content"][0]["text"] == "Hello again."
    host.stdin.close()
    assert await host.end() == (0, "", b"")


async def test_a_call_that_is_cancelled_at_once_is_not_made(
    start: StartBridge, scripted_server: ScriptedServer
) -> None:
    host = await start()
    host.send(called(1, "chat_completion", prompt="Hi."), cancelled(1), {"id": 2, "method": "ping"})
    while (await host.receive())["id"] != 2:
        pass
    host.stdin.close()
    assert await host.end() == (0, "", b"")
    assert all(request.path != "/v1/chat/completions" for request in scripted_server.requests)


@pytest.mark.parametrize("ending", ["stdin", "SIGTERM", "SIGINT"])
async def test_it_ends_at_once_with_calls_in_flight(
    start: StartBridge, scripted_server: ScriptedServer, config: WriteConfig, notes: Path, ending: str
) -> None:
    entry = scripted({"tools": ["sleep"], "noted": ["sleep"], "notes": str(notes)})
    host = await start(MCP_JSON_PATH=str(config({"slow": entry})))
    scripted_server.script(answer("", tool_calls=[tool_call("sleep")]), stall([*HALF]))
    host.call(1, "autonomous_with_mcp", mcp_name="slow", task="Sleep.")
    await noted(notes)
    host.call(2, "chat_completion", prompt="Hi.")
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
    groups = await asyncio.to_thread(groups_of_children, host.process.pid)
    assert groups
    if ending == "stdin":
        host.stdin.close()
    else:
        host.process.send_signal(getattr(signal, ending))
    status, errors, _ = await host.end()
    assert (status, errors) == (0, "")
    await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 1)
    for group in groups:
        await gone(group)


def groups_of_children(pid: int) -> list[int]:
    """The process groups that a process has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [group for each in children if (group := os.getpgid(int(each))) != os.getpgid(pid)]


NOISY = """
import os
from lmbridge import LLMClient
from lmbridge.mcp.__main__ import main

async def list_models(self):
    print("noise", flush=True)
    os.write(1, b"noise")
    os.system("echo noise")
    assert os.read(0, 1) == b""
    raise ZeroDivisionError("a bug")

LLMClient.list_models = list_models
main([])
"""


async def test_nothing_but_messages_is_written_to_stdout(start: StartBridge) -> None:
    host = await start("-c", NOISY)
    host.call(1, "list_models")
    got = await host.receive()
    assert got["result"]["content"][0]["text"] == "list_models failed: ZeroDivisionError: a bug"
    host.stdin.close()
    status, errors, output = await host.end()
    assert (status, output) == (0, b"")
    assert errors.count("noise") == 3
    assert "Traceback" in errors


async def test_what_is_no_message_is_skipped_and_logged_once(start: StartBridge) -> None:
    host = await start()
    host.stdin.write(b"hello?\n\xff\xfe\n[]\n{}\n" + b'{"jsonrpc": "2.0", "id": 5}\n')
    host.send({"id": 6, "method": "ping"})
    assert (await host.receive())["id"] == 6
    host.stdin.write(b"hello again?\n")
    host.send({"id": 7, "method": "ping"})
    assert (await host.receive())["id"] == 7
    host.stdin.close()
    assert await host.end() == (0, "WARNING lmbridge.mcp: the host sends what is no message: b'hello?'\n", b"")


@pytest.mark.parametrize("wrong", [{"method": "ping", "params": []}, {"method": 5}, {"method": "ping", "jsonrpc": "1"}])
async def test_a_request_that_is_none_is_answered(start: StartBridge, wrong: dict[str, Any]) -> None:
    host = await start()
    host.send({"id": "a", **wrong}, {"id": 2, "method": "ping"})
    refused = await host.receive()
    assert (refused["id"], refused["error"]["code"]) == ("a", -32600)
    assert (await host.receive())["id"] == 2
    host.send({"id": True, **wrong}, {"id": None, **wrong}, wrong, {"id": 3, "method": "ping"})
    assert (await host.receive())["id"] == 3


async def test_the_requests_of_a_batch_are_answered(start: StartBridge) -> None:
    host = await start()
    host.stdin.write(json.dumps([{"jsonrpc": "2.0", "id": each, "method": "ping"} for each in (1, 2)]).encode() + b"\n")
    assert {(await host.receive())["id"] for _ in range(2)} == {1, 2}


async def test_a_message_beyond_all_bounds_ends_it_with_a_line(start: StartBridge) -> None:
    host = await start("-c", "from lmbridge.mcp.bridge import host\nfrom lmbridge.mcp.servers import stdio\n"
        "from lmbridge.mcp.__main__ import main\n"
                       "stdio.MessageReader.__init__.__defaults__ = (1000,)\nmain([])")  # fmt: skip
    host.stdin.write(b"x" * 2000)
    status, errors, output = await host.end()
    assert (status, output) == (1, b"")
    assert errors == "lmbridge-mcp: the host cannot be understood: it sent a message of more than 1,000 bytes\n"


@pytest.mark.parametrize(
    ("args", "env", "told"),
    [
        (("-m", "lmbridge.mcp"), {"LMBRIDGE_API_BASE": "ftp://x"}, "api_base 'ftp://x' is no http or https URL"),
        (
            ("-c", "import sys; sys.modules['mcp'] = None; from lmbridge.mcp.__main__ import main; main([])"),
            {},
            "it needs the official MCP SDK: pip install 'lmbridge[mcp]'",
        ),
    ],
)
async def test_what_is_wrong_at_the_start_is_a_line(
    start: StartBridge, args: tuple[str, ...], env: dict[str, str], told: str
) -> None:
    host = await start(*args, initialise=False, **env)
    status, errors, output = await host.end()
    assert (status, output) == (1, b"")
    assert errors.startswith(f"lmbridge-mcp: {told}")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
async def test_without_stdin_or_stdout_it_ends_with_a_line(start: StartBridge, closed: str) -> None:
    program = f'import os; os.execlp("sh", "sh", "-c", "exec {sys.executable} -m lmbridge.mcp {closed}")'
    status, errors, output = await (await start("-c", program, initialise=False)).end()
    assert (status, output) == (1, b"")
    assert errors == ("lmbridge-mcp: its stdin or stdout is closed; an MCP host is to start it, with a pipe for each\n")


async def test_its_options_come_before_the_environment(start: StartBridge, scripted_server: ScriptedServer) -> None:
    options = ("--api-base", scripted_server.api_base, "--model", "qwen3-4b")
    host = await start("-m", "lmbridge.mcp", *options, LMBRIDGE_API_BASE=NOBODY, DEFAULT_MODEL="other")
    host.call(1, "chat_completion", prompt="Hi.")
    got = await host.receive()
    assert got["result"]["structuredContent"]["model"] == "qwen3-4b"
    version = await start("-m", "lmbridge.mcp", "--version", initialise=False)
    assert await version.end() == (0, "", f"lmbridge {__version__}\n".encode())


async def test_our_own_hub_refuses_it_under_any_name(make_hub: MakeHub) -> None:
    disguised = "from lmbridge.mcp.__main__ import main; main([])"
    hub = make_hub({"stranger": {"command": sys.executable, "args": ["-c", disguised]}})
    with pytest.raises(MultiMCPError) as failed:
        await hub.tools(["stranger"])
    assert isinstance(failed.value.errors["stranger"], MCPConnectionError)
    assert "it is lmbridge itself" in str(failed.value)


# Its wire


class FakeLink:
    """A host within this process."""

    def __init__(self, *messages: Mapping[str, Any]) -> None:
        self.messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for message in messages:
            self.put(message)

    def put(self, message: Mapping[str, Any]) -> None:
        self.messages.put_nowait({"jsonrpc": "2.0", **message})

    async def receive(self) -> dict[str, Any] | None:
        return await self.messages.get()

    async def send(self, message: bytes) -> None:
        self.sent.append(json.loads(message))
        self.news.put_nowait(self.sent[-1])


class Careful:
    """A service whose call takes a while to clean up, or is cancelled by itself."""

    instructions = "None."

    def __init__(self, bridge: Bridge, *, is_odd: bool = False) -> None:
        self.tools = bridge.tools
        self.began, self.ended = asyncio.Event(), asyncio.Event()
        self._is_odd = is_odd

    async def call(self, name: str, arguments: Mapping[str, Any], report: object) -> Answer:
        if self._is_odd:
            raise asyncio.CancelledError
        try:
            self.began.set()
            await asyncio.Event().wait()
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
            self.ended.set()
        return Answer(["never"])


@pytest.mark.parametrize("ending", ["cancelled", "closed", "left"])
async def test_a_call_that_is_cancelled_has_time_to_clean_up(bridge: Bridge, ending: str) -> None:
    service = Careful(bridge)
    link = FakeLink(INITIALIZE, {"method": "notifications/initialized"}, called(1, "list_models"))
    serving = asyncio.create_task(serve(build(service), link))
    await service.began.wait()
    if ending == "cancelled":
        link.put(cancelled(1))
        await service.ended.wait()
    if ending == "left":
        serving.cancel()
    else:
        link.messages.put_nowait(None)
    await asyncio.wait({serving})
    assert service.ended.is_set()
    assert not [message for message in link.sent if "result" in message and message["id"] == 1]


async def test_a_message_that_comes_while_calls_are_cleaned_up_is_no_error(bridge: Bridge) -> None:
    service = Careful(bridge)
    link = FakeLink(INITIALIZE, {"method": "notifications/initialized"}, called(1, "list_models"))
    serving = asyncio.create_task(serve(build(service), link))
    await service.began.wait()
    serving.cancel()
    link.put({"id": 2, "method": "ping"})
    await asyncio.wait({serving})
    assert serving.cancelled()
    assert service.ended.is_set()


async def test_a_call_that_is_cancelled_by_itself_is_an_error_and_no_end(bridge: Bridge) -> None:
    link = FakeLink(INITIALIZE, {"method": "notifications/initialized"}, called(1, "list_models"))
    serving = asyncio.create_task(serve(build(Careful(bridge, is_odd=True)), link))
    while (message := await link.news.get())["id"] != 1:
        pass
    assert "cancelled from within" in message["error"]["message"]
    link.put({"id": 2, "method": "ping"})
    assert (await link.news.get())["id"] == 2
    link.messages.put_nowait(None)
    await serving
