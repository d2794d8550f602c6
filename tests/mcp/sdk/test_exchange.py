"""What becomes of each message of a server before the SDK sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from lmbridge.mcp.sdk.exchange import MessageExchange, NotificationHandlers
from tests.support import turns


@pytest.mark.parametrize("as_id", [int, str, float])
def test_what_arrives_late_is_not_reported_however_its_id_is_written(as_id: Callable[[int], Any]) -> None:
    reported: list[str] = []

    def ignore(*_: object) -> None: ...

    exchange = MessageExchange(NotificationHandlers(ignore, ignore, ignore, lambda kind, _: reported.append(kind)))
    sent = exchange.outgoing({"jsonrpc": "2.0", "id": 3, "method": "tools/call"})
    assert sent
    exchange.outgoing({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 3}})
    params = {"progressToken": as_id(sent["id"]), "progress": 1}
    assert exchange.incoming({"jsonrpc": "2.0", "method": "notifications/progress", "params": params}) is None
    assert exchange.incoming({"jsonrpc": "2.0", "id": as_id(sent["id"]), "result": {}}) is None
    assert reported == []
    exchange.incoming({"jsonrpc": "2.0", "id": 5, "result": {}})
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
        exchange.incoming({"jsonrpc": "2.0", "id": number, "method": "ping"})
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
    exchange.incoming({"jsonrpc": "2.0", "id": 1, "method": "ping"})
    await turns()
    await exchange.close()
    assert sent == [{"jsonrpc": "2.0", "id": 1, "result": {}}]
