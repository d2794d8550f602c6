"""The link to a server's process: back-pressure, and the reason why nothing can be sent any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.servers import server_process
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


@pytest.mark.parametrize("is_early", [False, True])
async def test_a_server_that_sends_faster_than_its_messages_are_handled_has_to_wait(
    monkeypatch: pytest.MonkeyPatch, *, is_early: bool
) -> None:
    link = link_to("yes '" + json.dumps(PING) + "' | head -n 50000", lambda _: None)
    if is_early:
        # On a busy machine, output arrives before the task that starts the process goes on.
        async def settle_late(starting: asyncio.Future[object]) -> None:
            await starting
            while not len(link._inbox):
                await asyncio.sleep(0)
            for _ in range(200):
                await asyncio.sleep(0)

        monkeypatch.setattr(server_process, "settle", settle_late)
    await link.start()
    monkeypatch.undo()
    while link._process._pipe(1).is_reading():
        await asyncio.sleep(0)
    assert len(link._inbox) < 20_000
    received = 0
    while await link.receive():
        received += 1
    assert received == 50_000
    await link.end()


async def test_many_lines_at_once_are_parsed_in_slices_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    link = link_to("", lambda _: None)
    message = b'{"jsonrpc":"2.0","method":"x","params":{"number":%d}}\n'
    turns: list[int] = []
    monkeypatch.setattr(link._process, "pause_reading", lambda: turns.append(-1))
    monkeypatch.setattr(link._process, "resume_reading", lambda: turns.append(len(link._inbox)))
    link._on_output(b"[]\n" * 20_000 + b"".join(message % number for number in range(50)) + message[:20])
    assert link._inbox.skipped_lines < 5_000
    received = [await link.receive() for _ in range(50)]
    assert [each["params"]["number"] for each in received if each] == list(range(50))
    assert turns[0] == -1
    assert turns[-1] >= 0
    link._on_output((message % 50)[20:])
    assert await link.receive() == {"jsonrpc": "2.0", "method": "x", "params": {"number": 50}}


async def test_lines_that_have_not_been_parsed_at_the_end_are_not_lost() -> None:
    link = link_to("", lambda _: None)
    link._on_output(b"[]\n" * 20_000 + b'{"jsonrpc":"2.0","method":"last"}\n')
    link._end_link("it ended")
    assert await link.receive() == {"jsonrpc": "2.0", "method": "last"}
    assert await link.receive() is None


async def test_output_that_arrives_while_other_output_is_parsed_follows_it() -> None:
    link = link_to("", lambda _: None)
    link._on_output(b"[]\n" * 20_000 + b'{"jsonrpc":"2.0",')
    link._on_output(b'"method":"last"}\n')
    assert await link.receive() == {"jsonrpc": "2.0", "method": "last"}
    assert link._inbox.skipped_lines == 20_000


async def test_an_answer_without_a_line_break_before_the_end_is_not_lost() -> None:
    link = link_to("printf '" + json.dumps({"jsonrpc": "2.0", "id": 1, "result": {}}) + "'", lambda _: None)
    await link.start()
    assert await link.receive() == {"jsonrpc": "2.0", "id": 1, "result": {}}
    assert await link.receive() is None
    await link.end()


async def test_an_answer_that_the_end_has_cut_off_is_not_taken_for_one() -> None:
    link = link_to("", lambda _: None)
    link._on_output(b'{"jsonrpc":"2.0","id":1,"result":{"id":2,"result":{}}')
    link._end_link("it ended")
    assert await link.receive() is None
