"""Requests that are piped to the bridge: each is answered before the end of the input ends the session."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lmbridge.mcp.__main__ import main
from lmbridge.mcp.bridge.bridge import Bridge
from lmbridge.mcp.bridge.host_link import HostLink
from lmbridge.mcp.bridge.patient_link import PatientLink
from lmbridge.mcp.sdk.server_session import build_server, serve
from lmbridge.testing import ScriptedServer, answer, stall
from tests.mcp.bridge.support import INITIALIZE, call_request, cancel_notification
from tests.support import HALF

Replies = dict[Any, dict[str, Any]]
LISTEN = {
    "id": 2,
    "method": "subscriptions/listen",
    "params": {
        "notifications": {"toolsListChanged": True},
        "_meta": {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
            "io.modelcontextprotocol/clientCapabilities": {},
        },
    },
}


@pytest.fixture
def serve_piped(bridge: Bridge, tmp_path: Path) -> Callable[..., Any]:
    """Serves messages that are piped to the bridge, and returns the replies by id."""

    async def serve_piped(*messages: Mapping[str, Any], patience: float = 1000, end: bytes = b"\n") -> Replies:
        reading, writing = os.pipe()
        os.write(writing, b"\n".join(json.dumps({"jsonrpc": "2.0", **each}).encode() for each in messages) + end)
        os.close(writing)
        output = tmp_path / "output"
        with output.open("wb") as file:
            link = HostLink(reading, file.fileno())
            await serve(build_server(bridge), PatientLink(link, patience))
            await link.close()
        os.close(reading)
        # SDK 1.x reports a response that nobody asked for in a notification, which has no id.
        replies = [message for line in output.read_text().splitlines() if "id" in (message := json.loads(line))]
        assert len({each["id"] for each in replies}) == len(replies)
        return {each["id"]: each for each in replies}

    return serve_piped


@pytest.mark.parametrize("end", [b"\n", b"", b"\r\n"])
async def test_every_request_is_answered_whatever_the_last_line_ends_with(
    serve_piped: Callable[..., Any], scripted_server: ScriptedServer, end: bytes
) -> None:
    scripted_server.default = answer("Hello.")
    calls = [call_request(each, "chat_completion", prompt="Hi.") for each in range(1, 20)]
    replies = await serve_piped(INITIALIZE, {"method": "notifications/initialized"}, *calls, end=end)
    assert {*replies} == {*range(20)}
    assert {replies[each]["result"]["content"][0]["text"] for each in range(1, 20)} == {"Hello."}


@pytest.mark.parametrize("patience", [0, 0.05])
async def test_a_request_that_takes_too_long_is_cancelled_and_answered_with_an_error(
    serve_piped: Callable[..., Any], scripted_server: ScriptedServer, patience: float
) -> None:
    scripted_server.default = stall([*HALF])
    replies = await serve_piped(
        INITIALIZE,
        call_request(1, "chat_completion", prompt="long"),
        call_request(2, "chat_completion", prompt="long"),
        patience=patience,
    )
    for each in (1, 2):
        assert f"did not end within {patience:g} seconds" in replies[each]["error"]["message"]
        assert "--eof-timeout" in replies[each]["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "ids"),
    [
        ([], []),
        ([INITIALIZE], [0]),
        ([{"id": 1, "method": "ping"}], [1]),
        ([{"id": 1, "method": "tools/list"}], [1]),
        ([call_request(1, "list_models")], [1]),
        ([{"id": 1, "method": "no/such/method"}], [1]),
        ([{"id": 1, "method": "ping", "params": []}], [1]),
        ([{"id": 1, "method": 5}], []),
        ([{"id": 1.5, "method": "ping"}, {"id": None, "method": "ping"}, {"id": True, "method": "ping"}], []),
        ([INITIALIZE, call_request(1, "chat_completion", prompt="Hi."), cancel_notification(1)], [0]),
        ([INITIALIZE, {"method": "notifications/cancelled"}, cancel_notification(7)], [0]),
        ([INITIALIZE, {"method": "notifications/initialized"}, {"id": 5, "result": {}}], [0]),
        ([LISTEN], []),
    ],
)
async def test_input_that_ends_early_ends_the_session(
    serve_piped: Callable[..., Any], messages: Sequence[Mapping[str, Any]], ids: list[int]
) -> None:
    assert {*ids} <= {*await serve_piped(*messages)}


async def test_the_same_id_twice_is_waited_for_twice(tmp_path: Path) -> None:
    ping = b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n'
    requests = tmp_path / "requests"
    requests.write_bytes(2 * ping)
    reading, writing = os.open(requests, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)
    link = PatientLink(HostLink(reading, writing), 1000)
    assert [await link.receive() for _ in range(2)]
    at_the_end = asyncio.create_task(link.receive())
    await link.send(b'{"jsonrpc": "2.0", "id": 1, "result": {}}')
    await link.send(b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}')
    await asyncio.wait({at_the_end}, timeout=0.2)
    assert not at_the_end.done()
    await link.send(b'{"jsonrpc": "2.0", "id": 1, "result": {}}')
    assert await at_the_end is None
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("wrong", ["soon", "-1", "inf", "nan"])
def test_an_eof_timeout_that_is_not_a_number_of_seconds_is_refused(
    wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([f"--eof-timeout={wrong}"])
    assert f"--eof-timeout: '{wrong}' is not a number of seconds" in capsys.readouterr().err


async def test_a_host_that_has_stopped_reading_does_not_extend_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmbridge.mcp.bridge.patient_link._LAST_ERRORS_SECONDS", 0.01)

    class FullPipe:
        can_host_read = True
        messages: ClassVar[list[dict[str, Any]]] = [{"jsonrpc": "2.0", "id": 1, "method": "tools/call"}]

        async def receive(self) -> dict[str, Any] | None:
            return self.messages.pop() if self.messages else None

        async def send(self, _: bytes) -> None:
            await asyncio.get_running_loop().create_future()

    pipe: Any = FullPipe()
    link = PatientLink(pipe, 0)
    assert await link.receive()
    assert await asyncio.wait_for(link.receive(), 10) is None


async def test_an_answer_that_the_host_has_not_read_yet_is_not_followed_by_an_error() -> None:
    class SlowPipe:
        """A pipe whose host reads nothing until it is told to."""

        can_host_read = True
        messages: ClassVar[list[dict[str, Any]]] = [
            {"jsonrpc": "2.0", "id": number, "method": "tools/call"} for number in (2, 1)
        ]

        def __init__(self) -> None:
            self.sent: list[bytes] = []
            self.host_reads = asyncio.Event()

        async def receive(self) -> dict[str, Any] | None:
            return self.messages.pop() if self.messages else None

        async def send(self, message: bytes) -> None:
            self.sent.append(message)
            await self.host_reads.wait()

    pipe: Any = SlowPipe()
    link = PatientLink(pipe, 0.01)
    assert await link.receive()
    assert await link.receive()
    answering = asyncio.create_task(link.send(b'{"jsonrpc": "2.0", "id": 1, "result": {}}'))
    at_the_end = asyncio.create_task(link.receive())
    while len(pipe.sent) < 2:
        await asyncio.sleep(0)
    pipe.host_reads.set()
    assert await at_the_end is None
    await answering
    assert [json.loads(message)["id"] for message in pipe.sent] == [1, 2]


async def test_the_end_of_the_input_waits_until_the_last_answer_is_written() -> None:
    class OneRequest:
        can_host_read = True
        messages: ClassVar[list[dict[str, Any]]] = [{"jsonrpc": "2.0", "id": 1, "method": "tools/call"}]
        host_reads = asyncio.Event()

        async def receive(self) -> dict[str, Any] | None:
            return self.messages.pop() if self.messages else None

        async def send(self, _: bytes) -> None:
            await self.host_reads.wait()

    pipe: Any = OneRequest()
    link = PatientLink(pipe, 1000)
    assert await link.receive()
    answering = asyncio.create_task(link.send(b'{"jsonrpc": "2.0", "id": 1, "result": {}}'))
    at_the_end = asyncio.create_task(link.receive())
    await asyncio.wait({at_the_end}, timeout=0.2)
    assert not at_the_end.done()
    pipe.host_reads.set()
    assert await asyncio.wait_for(at_the_end, 10) is None
    await answering
