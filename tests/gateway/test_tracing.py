"""Traces through the gateway: its request to the server belongs to the trace of the client."""

from __future__ import annotations

from lmbridge import LLMClient
from lmbridge.gateway import Gateway
from lmbridge.testing import ScriptedServer
from tests.observe.telemetry import Telemetry
from tests.support import MESSAGES, opened, read_text


async def test_the_server_behind_the_gateway_gets_the_context_of_the_client(scripted_server: ScriptedServer) -> None:
    telemetry = Telemetry()
    observers = [telemetry.observer()]
    try:
        async with (
            Gateway(upstreams=[scripted_server.api_base]) as gateway,
            LLMClient(gateway.api_base, "m", observers=observers) as client,
        ):
            await client.chat_completion(MESSAGES, extra_headers={"tracestate": "vendor=1"})
            await read_text(await opened(client))
        contexts = [span.context for span in telemetry.spans]
    finally:
        telemetry.close()
    chats = [request for request in scripted_server.requests if request.method == "POST"]
    assert [request.headers["traceparent"] for request in chats] == [
        f"00-{each.trace_id:032x}-{each.span_id:016x}-{each.trace_flags:02x}" for each in contexts if each is not None
    ]
    assert chats[0].headers["tracestate"] == "vendor=1"
