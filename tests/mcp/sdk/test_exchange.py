"""What becomes of each message of a server before the SDK sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lmbridge.mcp.sdk.exchange import MessageExchange, NotificationHandlers


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
