"""What becomes of each message of a server before the SDK sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from lmbridge._tasks import run_at_once
from lmbridge.mcp.sdk.message_filter import MessageExchange, NotificationHandlers
from lmbridge.mcp.sdk.sent_requests import track_request
from tests.support import turns


def incoming(exchange: MessageExchange, message: dict[str, Any]) -> dict[str, Any] | None:
    return run_at_once(exchange.incoming_in_slices(message))


@pytest.mark.parametrize("as_id", [int, str, float])
def test_what_arrives_late_is_not_reported_however_its_id_is_written(as_id: Callable[[int], Any]) -> None:
    reported: list[str] = []

    def ignore(*_: object) -> None: ...

    exchange = MessageExchange(NotificationHandlers(ignore, ignore, ignore, lambda kind, _: reported.append(kind)))
    sent = exchange.outgoing({"jsonrpc": "2.0", "id": 3, "method": "tools/call"})
    assert sent
    exchange.outgoing({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 3}})
    params = {"progressToken": as_id(sent["id"]), "progress": 1}
    assert incoming(exchange, {"jsonrpc": "2.0", "method": "notifications/progress", "params": params}) is None
    assert incoming(exchange, {"jsonrpc": "2.0", "id": as_id(sent["id"]), "result": {}}) is None
    assert reported == []
    incoming(exchange, {"jsonrpc": "2.0", "id": 5, "result": {}})
    assert reported == ["an answer to a request that was not sent"]


def ignore(*_: object) -> None: ...


async def test_closing_gives_up_the_replies_that_the_server_does_not_read() -> None:
    exchange = MessageExchange(NotificationHandlers(ignore, ignore, ignore, ignore))
    sent: list[Any] = []
    ended: list[Any] = []

    async def send_reply(reply: dict[str, Any]) -> None:
        sent.append(reply["id"])
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(reply["id"])

    exchange.send_reply = send_reply
    for number in range(3):
        incoming(exchange, {"jsonrpc": "2.0", "id": number, "method": "ping"})
    await turns()
    assert sent == [0, 1, 2]
    await exchange.close()
    assert sorted(ended) == [0, 1, 2]
    # Closing again has nothing to give up.
    await exchange.close()


async def test_replies_that_were_read_are_not_given_up() -> None:
    exchange = MessageExchange(NotificationHandlers(ignore, ignore, ignore, ignore))
    sent: list[Any] = []

    async def send_reply(reply: dict[str, Any]) -> None:
        sent.append(reply)

    exchange.send_reply = send_reply
    incoming(exchange, {"jsonrpc": "2.0", "id": 1, "method": "ping"})
    await turns()
    await exchange.close()
    assert sent == [{"jsonrpc": "2.0", "id": 1, "result": {}}]


def test_each_kind_of_deviation_is_reported_once() -> None:
    reported: list[str] = []
    exchange = MessageExchange(NotificationHandlers(ignore, ignore, ignore, lambda kind, _: reported.append(kind)))
    with track_request("tools/call") as request:
        sent = exchange.outgoing({"jsonrpc": "2.0", "id": 1, "method": "tools/call"})
    assert sent
    content = [1, {}, {"type": "text", "text": 2}] * 1000
    incoming(exchange, {"jsonrpc": "2.0", "id": sent["id"], "result": {"content": content}})
    assert len(request.result["content"] if request.result else []) == 3000
    assert reported == [
        "a content block that is not an object",
        "a content block without a type",
        "a text block without a text",
    ]


def test_a_request_that_is_given_up_while_its_answer_is_read_gets_no_answer() -> None:
    exchange = MessageExchange(NotificationHandlers(ignore, ignore, ignore, ignore))
    with track_request("tools/call") as request:
        sent = exchange.outgoing({"jsonrpc": "2.0", "id": 1, "method": "tools/call"})
    assert sent
    result = {"content": [{"type": "text", "text": "a"}] * 1000}
    slices = exchange.incoming_in_slices({"jsonrpc": "2.0", "id": sent["id"], "result": result})
    next(slices)
    # The notice of the cancellation still names the request, because the server's answer has not been read.
    cancelled = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}
    notice = exchange.outgoing(cancelled)
    assert notice
    assert notice["params"]["requestId"] == sent["id"]
    assert run_at_once(slices) is None
    assert request.result is None
