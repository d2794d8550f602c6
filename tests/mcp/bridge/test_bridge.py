"""The bridge's tools, called in this process: what they send to the model server and what a host reads."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from lmbridge import LLMError
from lmbridge.mcp.bridge import answers
from lmbridge.mcp.bridge.bridge import Bridge
from lmbridge.mcp.bridge.progress import HostProgressReporter
from lmbridge.mcp.sdk.server_session import HostAnswer
from lmbridge.testing import ScriptedServer, answer, reply, sse
from tests.mcp.bridge.support import (
    NO_SERVER_URL,
    TOOL_NAMES,
    WriteConfig,
    final_response_event,
    text_chunk,
    tool_call,
)
from tests.support import HALF, cancel_at_each_step


@pytest.mark.parametrize("tool", TOOL_NAMES)
def test_every_argument_has_a_description(bridge: Bridge, tool: str) -> None:
    definition = next(each for each in bridge.tools if each.name == tool)
    properties = definition.parameters["properties"]
    assert definition.parameters["type"] == "object"
    assert len(definition.description) > 30
    assert all(len(each["description"]) > 20 for each in properties.values())
    assert "$ref" not in json.dumps(definition.parameters)
    assert set(definition.parameters["required"]) <= set(properties)


def test_the_hints_of_the_tools_say_what_they_may_do(bridge: Bridge) -> None:
    assert [tool.name for tool in bridge.tools] == TOOL_NAMES
    hints = {tool.name: tool.annotations for tool in bridge.tools}
    assert all(hint["title"] for hint in hints.values())
    reads = {"health_check", "list_models", "list_available_mcps"}
    assert {name for name, hint in hints.items() if hint["readOnlyHint"]} == reads
    acts = {name for name in TOOL_NAMES if name.startswith("autonomous")}
    assert {name for name, hint in hints.items() if hint["openWorldHint"]} == acts
    assert {name for name, hint in hints.items() if hint.get("destructiveHint")} == acts
    assert {name for name, hint in hints.items() if hint.get("idempotentHint")} == {"generate_embeddings"}


async def test_a_chat_completion_is_streamed_and_sends_its_arguments(
    bridge: Bridge, scripted_server: ScriptedServer
) -> None:
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
    fields = {"model": "test-model", "finish_reason": "stop", "usage": usage}
    assert got.structured == {"text": got.texts[0], **fields}
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
        (
            answer("Half an", finish_reason="content_filter"),
            "the server ended it with the finish reason 'content_filter'",
        ),
        (answer("", reasoning="Hm."), "empty answer"),
    ],
)
async def test_an_incomplete_chat_completion_says_so_in_text_and_in_structured_content(
    bridge: Bridge, scripted_server: ScriptedServer, behaviour: Any, note: str
) -> None:
    scripted_server.script(behaviour)
    got = await bridge.call("chat_completion", {"prompt": "Hi."})
    assert note in got.texts[-1]
    assert not got.is_error
    assert got.structured is not None
    assert got.structured["notes"] == [got.texts[-1]]


async def test_a_text_completion_is_streamed_and_says_that_it_was_cut_off(
    bridge: Bridge, scripted_server: ScriptedServer
) -> None:
    scripted_server.script(sse(text_chunk(" Pa"), text_chunk("ris", "length"), done=True))
    got = await bridge.call("text_completion", {"prompt": "The capital is", "max_tokens": 2})
    assert got.texts[0] == " Paris"
    assert "cut off" in got.texts[1]
    sent = scripted_server.requests[-1]
    assert (sent.path, sent.json["prompt"], sent.json["max_tokens"]) == ("/v1/completions", "The capital is", 2)


async def test_embeddings_are_returned_one_on_each_line(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    data = [{"index": index, "embedding": [index, 0.5]} for index in range(2)]
    scripted_server.script(reply(200, {"data": data, "model": "bge"}))
    got = await bridge.call("generate_embeddings", {"input": ["a", "b"], "model": "bge"})
    assert got.texts == ["[0, 0.5]\n[1, 0.5]"]
    assert got.structured == {"embeddings": [[0, 0.5], [1, 0.5]], "model": "bge"}
    assert scripted_server.requests[-1].json == {"input": ["a", "b"], "model": "bge"}


async def test_a_response_names_the_id_to_continue_from(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    scripted_server.script(
        sse(final_response_event("Hello.")), sse(final_response_event("Hel", status="incomplete", id="resp_2"))
    )
    got = await bridge.call("create_response", {"input": "Hi.", "instructions": "Be kind.", "max_output_tokens": 9})
    assert got.texts == [
        "Hello.",
        (
            "[To continue from this response, pass previous_response_id='resp_1'. "
            "LM Studio supports this, llama.cpp does not.]"
        ),
    ]
    assert got.structured is not None
    assert got.structured["response_id"] == "resp_1"
    sent = scripted_server.requests[-1].json
    expected = {
        "input": "Hi.",
        "instructions": "Be kind.",
        "max_output_tokens": 9,
        "model": "test-model",
        "stream": True,
    }
    assert sent == expected
    got = await bridge.call("create_response", {"input": "Go on.", "previous_response_id": "resp_1"})
    assert got.texts[0] == "Hel"
    assert "may not be the whole answer" in got.texts[1]
    assert scripted_server.requests[-1].json["previous_response_id"] == "resp_1"


async def test_a_response_that_used_all_its_tokens_is_reported_as_cut_off_whatever_its_status(
    bridge: Bridge, scripted_server: ScriptedServer
) -> None:
    usage = {"input_tokens": 3, "output_tokens": 9, "total_tokens": 12}
    scripted_server.default = sse(final_response_event("Once upon a", usage=usage))
    for limit, is_cut_off in ((9, True), (10, False), (None, False)):
        got = await bridge.call("create_response", {"input": "Hi.", "max_output_tokens": limit})
        assert got.structured is not None
        assert got.structured["usage"] == usage
        assert any("larger max_output_tokens" in text for text in got.texts) is is_cut_off


async def test_a_refusal_is_returned_as_the_answer(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    item = {"type": "message", "content": [{"type": "refusal", "refusal": "I will not."}]}
    scripted_server.script(sse(final_response_event("", output=[{"type": "reasoning"}, item])))
    assert (await bridge.call("create_response", {"input": "Hi."})).texts[0] == "I will not."


async def test_the_bridge_asks_the_server_how_many_requests_it_can_run_at_a_time(
    bridge: Bridge, scripted_server: ScriptedServer
) -> None:
    scripted_server.on_path("/v1/models", reply(200, {"data": [{"id": "test-model", "owned_by": "llamacpp"}]}))
    props = {"total_slots": 3, "build_info": "b1", "default_generation_settings": {"n_ctx": 4096}}
    scripted_server.on_path("/props", reply(200, props))
    await bridge.call("chat_completion", {"prompt": "Hi."})
    assert bridge._client._server.transport.nodes[0].limits.max_concurrency == 3


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("chat_completion", {"prompt": "Hi."}),
        ("generate_embeddings", {"input": "a"}),
        ("autonomous_with_mcp", {"mcp_name": "two", "task": "x"}),
    ],
)
async def test_an_answer_from_another_model_has_a_note(
    bridge: Bridge, scripted_server: ScriptedServer, tool: str, arguments: dict[str, Any]
) -> None:
    scripted_server.on_path("/v1/chat/completions", answer("Hello.", model="loaded"))
    scripted_server.on_path("/v1/embeddings", reply(200, {"data": [{"index": 0, "embedding": [1]}], "model": "loaded"}))
    note = "[Another model answered: 'loaded' instead of 'asked'.]"
    got = await bridge.call(tool, {**arguments, "model": "asked"})
    assert got.texts[-1] == note
    assert got.structured is not None
    assert (got.structured["notes"], got.structured["model"]) == ([note], "loaded")
    for model in ("loaded", None):
        same = await bridge.call(tool, {**arguments, "model": model})
        assert note not in same.texts


async def test_models_and_servers_are_listed(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    scripted_server.models = ["a", "b"]
    assert await bridge.call("list_models", {}) == HostAnswer(["a\nb"], {"models": ["a", "b"]})
    servers = ["one", "two", "broken"]
    assert await bridge.call("list_available_mcps", {}) == HostAnswer(["one\ntwo\nbroken"], {"mcps": servers})
    got = await bridge.call("health_check", {})
    assert got.structured == {"healthy": True, "api_base": scripted_server.api_base}


async def test_the_error_for_an_unreachable_model_server_says_what_to_do(config: WriteConfig) -> None:
    async with Bridge.opened(NO_SERVER_URL, config_path=config({})) as bridge:
        got = await bridge.call("chat_completion", {"prompt": "Hi."})
        assert got.is_error
        assert got.texts[0].startswith(f"chat completion at {NO_SERVER_URL}/chat/completions: ")
        assert "; " in got.texts[0]
        health = await bridge.call("health_check", {})
        assert not health.is_error
        assert "does not answer" in health.texts[0]
        assert health.structured == {"healthy": False, "api_base": NO_SERVER_URL}
        assert (await bridge.call("list_available_mcps", {})).texts == ["No MCP server is configured."]


async def test_an_error_shows_the_text_that_had_arrived(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    scripted_server.script(sse(*HALF, {"error": "model crashed"}))
    got = await bridge.call("chat_completion", {"prompt": "Hi."})
    assert got.is_error
    assert "model crashed" in got.texts[0]
    assert got.texts[1].endswith("not the whole answer:]\nHello")


@pytest.mark.parametrize(("tool", "argument"), [("chat_completion", "prompt"), ("create_response", "input")])
async def test_the_text_of_an_error_names_no_python_attributes(
    bridge: Bridge, scripted_server: ScriptedServer, tool: str, argument: str
) -> None:
    scripted_server.script(sse(*HALF))
    got = await bridge.call(tool, {argument: "Hi."})
    assert got.is_error
    assert got.texts[0].endswith("the server stopped, crashed or was cut off")


@pytest.mark.parametrize(
    ("tool", "arguments", "expected"),
    [
        ("chat_completion", {"prompt": {}}, "expected `str | null`, got `object`; it takes: prompt (optional)"),
        ("chat_completion", {"prompt": "Hi.", "tokens": 3}, "tokens"),
        ("chat_completion", {"prompt": "Hi.", "max_tokens": 0}, "max_tokens"),
        ("chat_completion", {}, "neither prompt nor messages is given; give prompt"),
        ("chat_completion", {"messages": [{"content": "Hi."}]}, "messages[0] has no role; add 'role'"),
        ("autonomous_with_mcp", {"task": "x"}, "mcp_name"),
        ("autonomous_with_multiple_mcps", {"task": "x", "mcp_names": []}, "mcp_names"),
        ("autonomous_with_mcp", {"task": "x", "mcp_name": "three"}, "one, two, broken"),
    ],
)
async def test_the_error_for_wrong_arguments_says_what_is_right(
    bridge: Bridge, scripted_server: ScriptedServer, tool: str, arguments: dict[str, Any], expected: str
) -> None:
    got = await bridge.call(tool, arguments)
    assert got.is_error
    assert expected in got.texts[0]
    assert scripted_server.requests == []


async def test_a_run_uses_the_tools_of_its_server_and_reports_progress(
    bridge: Bridge, scripted_server: ScriptedServer
) -> None:
    scripted_server.script(answer("", tool_calls=[tool_call("echo", '{"text": "moo"}')]), answer("It says moo."))
    messages: list[str] = []

    async def report(_progress: float, message: str) -> None:
        messages.append(message)

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
    assert [message for message in messages if "answering" not in message] == steps
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


async def test_a_run_with_an_empty_answer_says_so(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    scripted_server.script(answer("", tool_calls=[tool_call("count")]), answer(""), answer(""))
    got = await bridge.call("autonomous_with_mcp", {"mcp_name": "two", "task": "x"})
    assert got.texts == ["[The model gave an empty answer.]"]


async def test_a_run_says_which_servers_were_missing(bridge: Bridge, scripted_server: ScriptedServer) -> None:
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
    ("arguments", "behaviours", "expected", "called"),
    [
        (
            {},
            [answer("Half an", finish_reason="length")],
            "its last reply was cut off at max_tokens or at the end of the context; raise max_tokens, or ask for less",
            [],
        ),
        (
            {"max_rounds": 2},
            [answer("Well,", tool_calls=[tool_call("count")])] * 2,
            "it used up its rounds; raise max_rounds, or give it a smaller task",
            ["count, count"],
        ),
    ],
)
async def test_a_run_without_an_answer_is_an_error_with_its_text_and_calls(
    bridge: Bridge,
    scripted_server: ScriptedServer,
    arguments: dict[str, Any],
    behaviours: list[Any],
    expected: str,
    called: list[str],
) -> None:
    scripted_server.script(*behaviours)
    got = await bridge.call("autonomous_with_mcp", {"mcp_name": "two", "task": "x", **arguments})
    assert got.is_error
    assert got.texts[0] == f"The run ended without an answer: {expected}"
    assert "not the whole answer" in got.texts[1]
    assert [text for text in got.texts if "had called" in text] == [
        f"[Tools that the model had called before the failure, which may have had effects: {each}]" for each in called
    ]


async def test_a_bug_is_an_error_answer_and_is_logged_with_its_traceback(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lmbridge.client.LLMClient.list_models", lambda _self: 1 / 0)
    got = await bridge.call("list_models", {})
    assert got == HostAnswer(["list_models failed: ZeroDivisionError: division by zero"], is_error=True)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None


async def test_steps_are_reported_at_once_and_ticks_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[tuple[float, str]] = []

    async def report(progress: float, message: str) -> None:
        reported.append((progress, message))

    progress = HostProgressReporter(report)
    monkeypatch.setattr("lmbridge.mcp.bridge.progress._REPORT_INTERVAL_SECONDS", 1e9)
    await progress.tick("first")
    await progress.tick("too early")
    await progress.step("a step is always reported")
    progress._next_report_at = 0.0
    await progress.tick("later")
    assert reported == [(1, "first"), (3, "a step is always reported"), (4, "later")]


@pytest.mark.parametrize("tool", ["chat_completion", "autonomous_with_mcp"])
async def test_a_call_can_be_cancelled_at_any_await(
    bridge: Bridge, scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    # Every event is reported, so that the call is cancelled while it reports progress, too.
    monkeypatch.setattr("lmbridge.mcp.bridge.progress._REPORT_INTERVAL_SECONDS", 0.0)
    arguments = {"prompt": "Hi."} if tool == "chat_completion" else {"mcp_name": "two", "task": "x"}

    async def report(_progress: float, _message: str) -> None:
        await asyncio.sleep(0)

    async def check_idle() -> None:
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 0)
        assert bridge._client.stats().in_flight == 0

    await cancel_at_each_step(lambda: bridge.call(tool, arguments, report), check_idle, at_least=5)


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        ("check the log; what had arrived is in .partial", "it broke; check the log"),
        ("what had arrived is in .partial", "it broke"),
        ("its text is in .body and the run in .partial; use a larger model", "it broke; use a larger model"),
        ("the run so far is in .result", "it broke"),
        ("see config.body or a.result", "it broke; see config.body or a.result"),
        (None, "it broke"),
    ],
)
def test_hints_that_only_help_python_code_are_left_out(hint: str | None, shown: str) -> None:
    error = LLMError("it broke", hint=hint)
    assert answers.from_error(error).texts == [shown]
    assert error.hint == hint
