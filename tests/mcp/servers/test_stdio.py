"""The link to a server's process: back-pressure, and the reason why nothing can be sent any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.servers.stdio import StdioLink

PING = {"jsonrpc": "2.0", "method": "ping"}


def link_to(script: str, on_end: Callable[[str], None]) -> StdioLink:
    """Returns a link to a shell that runs a script."""
    return StdioLink(ServerSpec(name="a", transport="stdio", command="sh", args=("-c", script)), on_end)


async def test_sending_to_a_process_that_ended_fails_after_the_reason_is_known() -> None:
    reasons: list[str] = []
    link = link_to("exit 3", reasons.append)
    await link.start()
    with pytest.raises(ConnectionError):  # noqa: PT012 - it takes a moment until the pipe is known to be closed
        while True:
            await link.send(b"{}")
            await asyncio.sleep(0)
    assert reasons == ["it ended with status 3"]
    await link.end()


async def test_a_server_that_sends_faster_than_its_messages_are_handled_has_to_wait() -> None:
    link = link_to("yes '" + json.dumps(PING) + "' | head -n 50000", lambda _: None)
    await link.start()
    while link._process._pipe(1).is_reading():
        await asyncio.sleep(0)
    assert len(link._inbox) < 20_000
    received = 0
    while await link.receive():
        received += 1
    assert received == 50_000
    await link.end()
