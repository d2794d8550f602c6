"""Servers on stdio that do not quite follow the protocol: results, envelopes, handshakes, and floods of messages."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import Sequence
from typing import Any, Final

import pytest

from lmbridge import MultiMCPError, ToolError
from lmbridge.mcp import McpEvent, ServerLog, ToolProgress, UnexpectedMessage
from tests.mcp.conftest import MakeHub
from tests.mcp.support import Recorder, function_of, names

# Results


def answered(result: Any) -> dict[str, Any]:
    return {"answers": {"count": [{"jsonrpc": "2.0", "id": "$id", "result": result}]}}


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({"content": [], "structuredContent": [1, 2]}, "[1, 2]"),
        ({"structuredContent": {"a": 1}}, '{"a": 1}'),
        ({"content": [{"type": "text", "text": ""}], "structuredContent": {"a": 1}}, '{"a": 1}'),
        ({"content": None, "structuredContent": "text"}, '"text"'),
        ({"toolResult": {"a": 1}}, '{"a": 1}'),
        ({"temperature": 21}, '{"temperature": 21}'),
        ({"content": "a text"}, "a text"),
        ({"content": {"type": "text", "text": "one block"}}, "one block"),
        ({"content": ["one", {"type": "text", "text": "two"}, 3]}, "one\ntwo\n3"),
        ({"content": [{"type": "text", "text": 21.5}]}, "21.5"),
        ({"content": [{"type": "text", "text": {"a": 1}}]}, '{"a": 1}'),
        ({"content": [{"type": "text", "text": None}]}, ""),
        ({"content": [{"text": "no type"}]}, "no type"),
        ({"content": [{"type": "chart", "x": 1}]}, '{"type": "chart", "x": 1}'),
        ({"content": [{"type": "resource_link", "uri": "file:///a"}]}, "[link to resource file:///a]"),
        ({"content": [{"type": "resource", "resource": {"uri": "file:///a", "text": 5}}]}, "5"),
        ({"content": [{"type": "image", "data": None}]}, "[image , no data]"),
        ([{"type": "text", "text": "blocks"}], "blocks"),
        ([1, 2], "[1, 2]"),
        ("a text", "a text"),
        (5, "5"),
        ({"content": [], "isError": "false"}, ""),
        ({}, ""),
        (None, ""),
    ],
)
async def test_the_data_of_an_irregular_result_reaches_the_model(make_hub: MakeHub, result: Any, text: str) -> None:
    lease = await make_hub({"a": answered(result)}).tools()
    assert await function_of(lease, "count")() == text


@pytest.mark.parametrize("flag", [True, "true", 1])
async def test_a_result_may_say_in_several_ways_that_it_is_an_error(make_hub: MakeHub, flag: Any) -> None:
    lease = await make_hub({"a": answered({"content": "no such file", "isError": flag})}).tools()
    with pytest.raises(ToolError, match=r"^no such file$"):
        await function_of(lease, "count")()


async def test_each_kind_of_irregular_message_is_logged_and_reported_once(
    make_hub: MakeHub, recorder: Recorder[McpEvent], caplog: pytest.LogCaptureFixture
) -> None:
    lease = await make_hub({"a": answered({"structuredContent": [1]})}, on_event=recorder).tools()
    for _ in range(3):
        await function_of(lease, "count")()
    reported = [event for event in recorder.seen if isinstance(event, UnexpectedMessage)]
    assert reported == [
        UnexpectedMessage("a", "a result without a list as content", "tools/call"),
        UnexpectedMessage("a", "structured content that is not an object", "tools/call"),
    ]
    assert caplog.text.count("MCP server 'a' sent structured content that is not an object") == 1


# Envelopes


@pytest.mark.parametrize(
    ("envelope", "words"),
    [
        ({"error": "it is full"}, "^it is full$"),
        ({"error": {"message": "it is full"}}, "^it is full$"),
        ({"error": {"code": "-32602", "message": "bad path"}}, "^-32602: bad path$"),
        ({"error": {"code": -1, "message": {"why": "full"}}}, '^-1: {"why": "full"}$'),
        ({"error": {"code": -5, "message": "", "data": "the disk is full"}}, "^-5: the disk is full$"),
        ({"error": {"detail": "full"}}, '^{"detail": "full"}$'),
        ({"error": {"code": -5, "message": "full", "data": {"free": 0}}}, r'^-5: full \({"free": 0}\)$'),
        ({"error": {"code": -5, "message": "full", "data": "x" * 1000}}, "^-5: full$"),
        ({"error": ["full"]}, r'^\["full"\]$'),
        ({"error": {"code": -32000, "message": "Connection closed"}}, "^-32000: Connection closed$"),
        ({"error": {"code": -32600, "message": "Session terminated"}}, "^-32600: Session terminated$"),
        ({"error": {"code": 5, "message": "both"}, "result": None}, "^5: both$"),
        ({}, "^its answer has neither a result nor an error$"),
    ],
)
async def test_a_refusal_is_told_at_once_in_the_words_of_the_server(
    make_hub: MakeHub, envelope: dict[str, Any], words: str
) -> None:
    hub = make_hub({"a": {"answers": {"count": [{"jsonrpc": "2.0", "id": "$id", **envelope}]}}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match=words):
        await function_of(lease, "count")()
    assert await function_of(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 1


@pytest.mark.parametrize(
    "answer",
    [
        {"jsonrpc": "2.0", "id": "$id", "result": {"content": "on"}, "error": None},
        {"jsonrpc": "1.0", "id": "$id", "result": {"content": "on"}},
        {"jsonrpc": 2.0, "id": "$id", "result": {"content": "on"}},
        {"id": "$id", "result": {"content": "on"}},
        [{"jsonrpc": "2.0", "id": "$id", "result": {"content": "on"}}],
        '{"jsonrpc": "2.0", "id": "$id", "result": {"content": "on", "x": NaN}}',
        {"jsonrpc": "2.0", "id": "$id", "result": {"content": "on"}, "time": 5},
        {"jsonrpc": "2.0", "id": "$text_id", "result": {"content": "on"}},
        {"jsonrpc": "2.0", "id": "$id", "method": "tools/call", "result": {"content": "on"}},
    ],
)
async def test_an_answer_in_an_irregular_envelope_is_read(make_hub: MakeHub, answer: Any) -> None:
    lease = await make_hub({"a": {"answers": {"count": [answer]}}}).tools()
    assert await function_of(lease, "count")() == "on"


@pytest.mark.parametrize(
    "line",
    [
        '{"jsonrpc": "2.0", "id": "$id", "result": {"content": [{"type": "text", "text": "half',
        '{"jsonrpc": "2.0", "id": "$id", "result": {"content": [{"type": "text", "text": "a \\x"}]}}',
        '{"result": {"a": ' + "[" * 60_000 + "]" * 60_000 + '}, "id": "$id", "jsonrpc": "2.0"}',
    ],
)
async def test_an_answer_that_cannot_be_read_fails_its_call_at_once(make_hub: MakeHub, line: str) -> None:
    hub = make_hub({"a": {"answers": {"count": [line]}}})
    lease = await hub.tools()
    with pytest.raises(ToolError, match="the answer is not valid JSON, or is nested too deeply"):
        await function_of(lease, "count")()
    assert await function_of(lease, "echo")(text="on") == "on"
    assert hub.status()["a"].starts == 1


# Handshakes and lists of tools

HANDSHAKE = {
    "protocolVersion": "2025-06-18",
    "capabilities": {"tools": {}},
    "serverInfo": {"name": "n", "version": "1"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"serverInfo": None},
        {"serverInfo": "a name"},
        {"serverInfo": {"name": "n"}},
        {"serverInfo": {"name": 5, "version": 1.5}},
        {"capabilities": None},
        {"capabilities": []},
        {"capabilities": ["tools"]},
        {"capabilities": {"tools": True}},
        {"capabilities": {"tools": {"listChanged": "yes"}, "logging": False, "experimental": []}},
        {"capabilities": {"tools": None}},
        {"protocolVersion": None},
        {"protocolVersion": 2},
        {"protocolVersion": "1.0"},
        {"protocolVersion": "2020-01-01"},
        {"protocolVersion": "2099-01-01"},
        {"instructions": ["a list"]},
        {"resultType": "complete", "_meta": None},
    ],
)
async def test_an_irregular_handshake_opens_the_session(make_hub: MakeHub, change: dict[str, Any]) -> None:
    result = HANDSHAKE | change
    answers = {"initialize": [{"jsonrpc": "2.0", "id": "$id", "result": result}]}
    lease = await make_hub({"a": {"tools": ["echo"], "answers": answers}}).tools()
    assert names(lease.tools) == ["echo"]
    assert await function_of(lease, "echo")(text="on") == "on"


async def test_the_status_names_the_protocol_revision_that_the_server_named(
    make_hub: MakeHub, recorder: Recorder[McpEvent]
) -> None:
    result = HANDSHAKE | {"protocolVersion": "2099-01-01"}
    hub = make_hub(
        {"a": {"answers": {"initialize": [{"jsonrpc": "2.0", "id": "$id", "result": result}]}}}, on_event=recorder
    )
    await hub.tools()
    assert hub.status()["a"].protocol == "2099-01-01"
    assert UnexpectedMessage("a", "the unknown protocol revision 2099-01-01", "initialize") in recorder.seen


@pytest.mark.parametrize(
    ("envelope", "words"),
    [
        ({"error": "no licence"}, "no licence"),
        ({"error": {"code": -32000, "message": "no licence"}}, "-32000: no licence"),
        ({"result": None}, "its answer to 'initialize' is not an object"),
        ({"result": "hello"}, "its answer to 'initialize' is not an object"),
        ({}, "its answer has neither a result nor an error"),
    ],
)
async def test_a_refused_handshake_is_told_at_once(make_hub: MakeHub, envelope: dict[str, Any], words: str) -> None:
    answers = {"initialize": [{"jsonrpc": "2.0", "id": "$id", **envelope}]}
    with pytest.raises(MultiMCPError, match=f"could not be started: {words}"):
        await make_hub({"a": {"answers": answers}}).tools()


@pytest.mark.parametrize(
    "schema", [None, True, {}, {"properties": None}, {"type": None}, {"type": ["object", "null"], "required": None}]
)
async def test_a_tool_with_an_irregular_schema_is_offered(make_hub: MakeHub, schema: Any) -> None:
    lease = await make_hub({"a": {"tools": ["echo"], "more_tools": [{"name": "count", "inputSchema": schema}]}}).tools()
    assert names(lease.tools) == ["echo", "count"]
    assert lease.tools[1].parameters["type"] == "object"
    assert await function_of(lease, "count")() == "count"


@pytest.mark.parametrize(
    "result",
    [
        {"tools": [{"name": "count"}]},
        [{"name": "count", "inputSchema": {}}],
        {"tools": {"count": {"inputSchema": {}}}},
        {
            "tools": [{"name": "count", "description": 5, "annotations": None, "outputSchema": "text"}],
            "nextCursor": None,
        },
    ],
)
async def test_an_irregular_list_of_tools_is_read(make_hub: MakeHub, result: Any) -> None:
    answers = {"tools/list": [{"jsonrpc": "2.0", "id": "$id", "result": result}]}
    lease = await make_hub({"a": {"answers": answers}}).tools()
    assert names(lease.tools) == ["count"]
    assert await function_of(lease, "count")() == "count"


@pytest.mark.parametrize("result", [{}, {"tools": "none"}, "none", 5])
async def test_an_answer_without_a_list_of_tools_says_so(make_hub: MakeHub, result: Any) -> None:
    answers = {"tools/list": [{"jsonrpc": "2.0", "id": "$id", "result": result}]}
    with pytest.raises(MultiMCPError, match="could not be started: its list of tools is not valid"):
        await make_hub({"a": {"answers": answers}}).tools()


# Notifications, requests, and forged answers


async def test_irregular_notifications_are_used_as_far_as_possible(
    make_hub: MakeHub, recorder: Recorder[McpEvent]
) -> None:
    notifications: list[dict[str, Any]] = [
        {"method": "notifications/message", "params": {"level": "loud", "data": {"a": 1}}},
        {"method": "notifications/message", "params": None},
        {"method": "notifications/message", "params": ["a list"]},
        {"method": "notifications/progress", "params": {"progressToken": "$id", "progress": "0.5", "total": "1"}},
        {"method": "notifications/progress", "params": {"progressToken": "$id", "progress": "half"}},
        {"method": "notifications/progress", "params": {"progressToken": ["odd"], "progress": 1}},
        {"method": "notifications/message", "params": {"level": "info", "data": "with an id"}, "id": None},
        {"method": "vendor/heartbeat", "params": 5},
        {"method": 5},
    ]
    end = {"jsonrpc": "2.0", "id": "$id", "result": {"content": [{"type": "text", "text": "on"}]}}
    answers = {"count": [*({"jsonrpc": "2.0", **each} for each in notifications), end]}
    lease = await make_hub({"a": {"answers": answers}}, on_event=recorder).tools()
    assert await function_of(lease, "count")() == "on"
    assert ServerLog("a", "loud", {"a": 1}) in recorder.seen
    assert ServerLog("a", "info", "with an id") in recorder.seen
    assert ToolProgress("a", "count", 0.5, 1.0) in recorder.seen
    assert [event.kind for event in recorder.seen if isinstance(event, UnexpectedMessage)] == [
        "a malformed notification",
        "progress that is not a number",
        "progress of a request that was not sent",
        "a message whose method is not a string",
    ]


FLOODS: Final[Sequence[Any]] = (
    {"jsonrpc": "2.0", "method": "vendor/heartbeat", "params": {}},
    {"jsonrpc": "2.0", "id": 1, "method": "ping"},
    {"jsonrpc": "2.0", "id": 1, "result": {}},
    {"jsonrpc": "2.0", "id": "x", "method": "sampling/createMessage", "params": {}},
    {"level": "info", "text": "a log line on stdout"},
    {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": "x"}},
    {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": 1, "progress": 1}},
    {"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": {"uri": 5}},
    {"jsonrpc": "2.0", "id": None, "method": "roots/list"},
    {"jsonrpc": "2.0", "id": None, "error": "x"},
    {"jsonrpc": "2.0", "id": "9" * 5_000, "result": {}},
    {"jsonrpc": "2.0", "method": "notifications/tools/list_changed"},
    [],
)


@pytest.mark.parametrize("message", [*FLOODS[:5], *(pytest.param(each, marks=pytest.mark.slow) for each in FLOODS[5:])])
async def test_a_server_that_floods_its_client_delays_neither_its_own_calls_nor_others(
    make_hub: MakeHub, message: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    # The flood begins before the session is open.
    hub = make_hub({"a": {"flood_of": message, "floods_at_once": True, "tools": ["echo"]}, "b": {}})
    lease = await hub.tools(call_timeout=20)
    for _ in range(3):
        assert await function_of(lease, "echo", "b")(text="on") == "on"
    assert await function_of(lease, "echo", "a")(text="on") == "on"
    assert len(caplog.records) <= 3
    await hub.close()


async def test_a_call_to_a_server_that_floods_ends_at_its_time_limit(make_hub: MakeHub) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    limits = {"toolTimeouts": {"sleep": 0.3}}
    hub = make_hub({"a": {"flood_of": message, "tools": ["flood", "sleep"], "lmbridge": limits}})
    lease = await hub.tools(call_timeout=20)
    assert await function_of(lease, "flood")() == "flooding"
    with pytest.raises(ToolError, match=r"did not answer within 0.3 seconds"):
        await function_of(lease, "sleep")()
    await hub.close()


async def test_requests_of_a_server_are_answered(make_hub: MakeHub) -> None:
    # The server reads our replies as messages without a method, and ignores them.
    requests = [{"jsonrpc": "2.0", "id": number, "method": "ping"} for number in range(500)]
    answers = {"count": [*requests, {"jsonrpc": "2.0", "id": "$id", "result": {"content": "on"}}]}
    lease = await make_hub({"a": {"answers": answers}}).tools()
    assert await function_of(lease, "count")() == "on"
    assert await function_of(lease, "echo")(text="on") == "on"


async def test_forged_answers_are_ignored_even_before_the_session_is_open(
    make_hub: MakeHub, recorder: Recorder[McpEvent]
) -> None:
    forged: list[Any] = []
    for number in range(10):
        result = {**HANDSHAKE, "tools": [{"name": "forged", "inputSchema": {}}], "content": "forged"}
        forged += [{"jsonrpc": "2.0", "id": number, "result": result}, {"jsonrpc": "2.0", "id": number, "error": "x"}]
    hub = make_hub({"a": {"tools": ["echo"], "first": forged}}, on_event=recorder)
    lease = await hub.tools()
    assert names(lease.tools) == ["echo"]
    assert await function_of(lease, "echo")(text="on") == "on"
    kinds = [event.kind for event in recorder.seen if isinstance(event, UnexpectedMessage)]
    assert kinds == ["an answer to a request that was not sent"]


async def test_a_second_and_a_late_answer_are_ignored(make_hub: MakeHub, recorder: Recorder[McpEvent]) -> None:
    one, two = (
        {"jsonrpc": "2.0", "id": "$id", "result": {"content": [{"type": "text", "text": each}]}} for each in "12"
    )
    lease = await make_hub({"a": {"answers": {"count": [one, two]}}}, on_event=recorder).tools()
    assert await asyncio.gather(*(function_of(lease, "count")() for _ in range(5))) == ["1"] * 5
    assert await function_of(lease, "echo")(text="on") == "on"
    assert not [event for event in recorder.seen if isinstance(event, UnexpectedMessage)]


async def test_the_ids_of_requests_cannot_be_guessed(make_hub: MakeHub) -> None:
    lease = await make_hub(
        {"a": {"answers": {"count": ['{"jsonrpc":"2.0","id":"$id","result":{"content":["$id"]}}']}}}
    ).tools()
    ids = [json.loads(await function_of(lease, "count")()) for _ in range(3)]
    assert len({later - earlier for earlier, later in itertools.pairwise(ids)}) == 2
    assert all(2**30 <= each < 2**31 for each in ids)
