"""The SDK's server with a service of ours: cancellation, clean-up, and messages that arrive meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from lmbridge.mcp.bridge.bridge import Bridge
from lmbridge.mcp.sdk.server_session import HostAnswer, build_server, serve
from tests.mcp.bridge.support import INITIALIZE, call_request, cancel_notification


class FakeLink:
    """A host in this process: the test puts messages in, and reads what the server sent."""

    def __init__(self, *messages: Mapping[str, Any]) -> None:
        self.messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.sent_queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for message in messages:
            self.put(message)

    def put(self, message: Mapping[str, Any]) -> None:
        self.messages.put_nowait({"jsonrpc": "2.0", **message})

    async def receive(self) -> dict[str, Any] | None:
        return await self.messages.get()

    async def send(self, message: bytes) -> None:
        self.sent.append(json.loads(message))
        self.sent_queue.put_nowait(self.sent[-1])


class SlowToCleanUpService:
    """A service whose call needs several turns of the event loop to clean up, or raises CancelledError by itself."""

    instructions = "None."

    def __init__(self, bridge: Bridge, *, cancels_itself: bool = False) -> None:
        self.tools = bridge.tools
        self.started, self.cleaned_up = asyncio.Event(), asyncio.Event()
        self._cancels_itself = cancels_itself

    async def call(self, name: str, arguments: Mapping[str, Any], report: object) -> HostAnswer:
        if self._cancels_itself:
            raise asyncio.CancelledError
        try:
            self.started.set()
            await asyncio.Event().wait()
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
            self.cleaned_up.set()
        return HostAnswer(["never"])


@pytest.mark.parametrize("ending", ["call cancelled", "host left", "server cancelled"])
async def test_a_cancelled_call_can_await_its_clean_up(bridge: Bridge, ending: str) -> None:
    service = SlowToCleanUpService(bridge)
    link = FakeLink(INITIALIZE, {"method": "notifications/initialized"}, call_request(1, "list_models"))
    serving = asyncio.create_task(serve(build_server(service), link))
    await service.started.wait()
    if ending == "call cancelled":
        link.put(cancel_notification(1))
        await service.cleaned_up.wait()
    if ending == "server cancelled":
        serving.cancel()
    else:
        link.messages.put_nowait(None)
    await asyncio.wait({serving})
    assert service.cleaned_up.is_set()
    assert not [message for message in link.sent if "result" in message and message["id"] == 1]


async def test_a_message_that_arrives_during_clean_up_does_not_hide_the_cancellation(bridge: Bridge) -> None:
    service = SlowToCleanUpService(bridge)
    link = FakeLink(INITIALIZE, {"method": "notifications/initialized"}, call_request(1, "list_models"))
    serving = asyncio.create_task(serve(build_server(service), link))
    await service.started.wait()
    serving.cancel()
    link.put({"id": 2, "method": "ping"})
    await asyncio.wait({serving})
    assert serving.cancelled()
    assert service.cleaned_up.is_set()


async def test_a_call_that_raises_cancelled_error_by_itself_fails_and_the_server_goes_on(bridge: Bridge) -> None:
    link = FakeLink(INITIALIZE, {"method": "notifications/initialized"}, call_request(1, "list_models"))
    serving = asyncio.create_task(serve(build_server(SlowToCleanUpService(bridge, cancels_itself=True)), link))
    while (message := await link.sent_queue.get())["id"] != 1:
        pass
    assert "cancelled from within" in message["error"]["message"]
    link.put({"id": 2, "method": "ping"})
    assert (await link.sent_queue.get())["id"] == 2
    link.messages.put_nowait(None)
    await serving
