"""Messages over this process's own stdin and stdout: nothing is lost, torn, kept without bounds, or waited for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from lmbridge.mcp.bridge.host import HostLink, taken_over
from tests.support import turns

PING = b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n'


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """What is read, and what is written."""
    ends = os.pipe()
    yield ends
    for each in ends:
        os.close(each)


def nothing_to_read() -> int:
    return os.open(os.devnull, os.O_RDONLY)


async def test_a_host_that_sends_faster_than_it_is_served_has_to_wait(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    link = HostLink(reading, os.open(os.devnull, os.O_WRONLY))
    count = 50_000

    def write() -> None:
        data = PING * count
        while data:
            data = data[os.write(writing, data) :]

    sending = asyncio.create_task(asyncio.to_thread(write))
    while link._has_room.is_set() and not sending.done():
        await asyncio.sleep(0)
    await turns(1000)
    most = 0
    for _ in range(count):
        most = max(most, len(link._messages))
        assert await link.receive() is not None
    assert most < count / 10
    await sending


async def test_what_was_sent_last_is_written_before_the_end(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    link = HostLink(nothing_to_read(), writing)
    sending = asyncio.create_task(link.send(b"{}"))
    await asyncio.sleep(0)
    await link.close()
    os.set_blocking(reading, False)
    assert os.read(reading, 10) == b"{}\n"
    await sending


async def test_the_end_does_not_wait_for_a_host_that_does_not_read(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.mcp.bridge.host._LAST_WRITES", 0.01)
    reading, writing = pipe
    link = HostLink(nothing_to_read(), writing)
    sending = asyncio.create_task(link.send(b"x" * 2**20))
    await asyncio.sleep(0)
    await link.close()
    assert not sending.done()
    while not sending.done():  # its thread goes on with a pipe that is the test's to close
        await asyncio.to_thread(os.read, reading, 65536)


def test_stdin_and_stdout_are_given_back() -> None:
    before = [os.fstat(each).st_ino for each in (0, 1)]
    with taken_over() as copies:
        assert os.read(0, 1) == b""
        assert os.fstat(1).st_ino == os.fstat(2).st_ino
        assert [os.fstat(each).st_ino for each in copies] == before
    assert [os.fstat(each).st_ino for each in (0, 1)] == before
    for each in copies:
        os.close(each)


async def test_a_host_that_does_not_read_any_more_is_an_error_and_the_end() -> None:
    ours, theirs = os.pipe()
    reading, writing = os.pipe()
    os.close(reading)
    link = HostLink(ours, writing)
    with pytest.raises(ConnectionError, match="does not read any more"):
        await link.send(b"{}")
    assert await link.receive() is None
    await link.close()
    for each in (ours, theirs, writing):
        os.close(each)


async def test_a_cancelled_send_is_not_torn(caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    link = HostLink(os.open(os.devnull, os.O_RDONLY), writing)
    message = b"x" * 2**20  # more than a pipe holds
    sending = asyncio.create_task(link.send(message))
    first = await asyncio.to_thread(os.read, reading, 10)
    sending.cancel()
    await asyncio.wait({sending})

    def rest() -> bytes:
        read = first
        while not read.endswith(b"\n"):
            read += os.read(reading, 65536)
        return read

    assert await asyncio.to_thread(rest) == message + b"\n"
    await link.close()
    assert caplog.records == []
    os.close(reading)
    os.close(writing)
