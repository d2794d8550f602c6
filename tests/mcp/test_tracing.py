"""Traces of calls of MCP tools: attributes on the span of the call, and its context in the metadata of the request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from lmbridge import Agent, ToolCall
from lmbridge.mcp import McpHub
from lmbridge.observe import McpRequestSent, ObservedEvent
from lmbridge.testing import FakeChatClient
from tests.mcp.conftest import MakeHub
from tests.mcp.http_server import HttpServer
from tests.mcp.support import function_of

telemetry_module: Any = pytest.importorskip("tests.observe.telemetry", reason="needs opentelemetry-sdk")


class Recording:
    """An observer that records the requests to MCP servers."""

    def __init__(self) -> None:
        self.sent: list[McpRequestSent] = []

    def on_event(self, event: ObservedEvent) -> None:
        if isinstance(event, McpRequestSent):
            self.sent.append(event)


@pytest.fixture
def telemetry() -> Iterator[Any]:
    telemetry = telemetry_module.Telemetry()
    yield telemetry
    telemetry.close()


async def run_with(hub: McpHub, tool: str, observers: list[Any], calls: int = 1) -> list[dict[str, Any]]:
    """Runs an agent that makes calls of a tool in one reply, and returns their results, which are JSON."""
    tools = (await hub.tools()).tools
    turns: list[Any] = [[ToolCall(str(number), tool, {"number": number}) for number in range(calls)], "Done."]
    result = await Agent(FakeChatClient(turns), tools=tools, observers=observers).run("?")
    return [json.loads(record.text) for round_ in result.log for record in round_.tool_calls]


async def test_the_context_of_the_call_is_in_the_metadata(make_hub: MakeHub, telemetry: Any) -> None:
    hub = make_hub({"s": {"tools": ["meta"]}})
    metas = await run_with(hub, "meta", [telemetry.observer()], calls=2)
    spans = {span.attributes["gen_ai.tool.call.id"]: span.context for span in telemetry.spans if span.parent}
    assert len(spans) == 2
    for call_id, meta in enumerate(metas):
        span = spans[str(call_id)]
        assert meta["traceparent"] == f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
        assert "progressToken" in meta


async def test_the_span_of_the_call_has_the_attributes_of_mcp(make_hub: MakeHub, telemetry: Any) -> None:
    recording = Recording()
    await run_with(make_hub({"s": {"tools": ["meta"]}}), "meta", [telemetry.observer(), recording])
    (sent,) = recording.sent
    assert (sent.method, sent.server, sent.transport, sent.call_id) == ("tools/call", "s", "stdio", "0")
    (span,) = [span for span in telemetry.spans if span.parent]
    assert span.name == "execute_tool meta"
    expected = {
        "mcp.method.name": "tools/call",
        "mcp.protocol.version": sent.protocol,
        "lmbridge.mcp.server": "s",
        "jsonrpc.request.id": sent.request_id,
        "network.transport": "pipe",
    }
    assert expected.items() <= dict(span.attributes).items()
    assert sent.request_id.isdigit()


async def test_a_server_on_http_has_an_address(make_hub: MakeHub, telemetry: Any) -> None:
    server = HttpServer()
    server.responses["tools/call"] = lambda message, _: {
        "jsonrpc": "2.0",
        "id": message["id"],
        "result": {"content": [{"type": "text", "text": json.dumps(message["params"]["_meta"])}]},
    }
    await server.start()
    url = server.url
    try:
        (meta,) = await run_with(make_hub({"s": {"url": url}}), "echo", [telemetry.observer()])
    finally:
        await server.stop()
    (span,) = [span for span in telemetry.spans if span.parent]
    assert span.attributes["network.transport"] == "tcp"
    assert span.attributes["server.address"] == "127.0.0.1"
    assert f":{span.attributes['server.port']}/" in url
    assert f"{span.context.span_id:016x}" in meta["traceparent"]


async def test_without_an_observer_nothing_is_added(make_hub: MakeHub) -> None:
    hub = make_hub({"s": {"tools": ["meta"]}})
    (meta,) = await run_with(hub, "meta", [])
    assert set(meta) == {"progressToken"}


async def test_a_call_outside_of_a_run_tells_nobody(make_hub: MakeHub) -> None:
    recording = Recording()
    hub = make_hub({"s": {"tools": ["meta"]}})
    await run_with(hub, "meta", [recording])
    assert len(recording.sent) == 1
    await function_of(await hub.tools(), "meta")()
    assert len(recording.sent) == 1
