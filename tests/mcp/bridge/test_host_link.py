"""The link to the host: nothing is lost or torn, memory is bounded, and closing does not wait for the host."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import suppress

import pytest

from lmbridge.mcp.bridge.host_link import HostLink, take_over_stdio
from tests.support import turns

PING = b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n'


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The reading and the writing end of a pipe."""
    ends = os.pipe()
    yield ends
    for each in ends:
        os.close(each)


def open_empty_file() -> int:
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
    longest_backlog = 0
    for _ in range(count):
        longest_backlog = max(longest_backlog, len(link._inbox))
        assert await link.receive() is not None
    assert longest_backlog < count / 10
    await sending


async def test_the_last_message_is_written_before_the_link_closes(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    link = HostLink(open_empty_file(), writing)
    sending = asyncio.create_task(link.send(b"{}"))
    await asyncio.sleep(0)
    await link.close()
    os.set_blocking(reading, False)
    assert os.read(reading, 10) == b"{}\n"
    await sending


async def test_closing_does_not_wait_for_a_host_that_does_not_read(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.mcp.bridge.host_link._FLUSH_SECONDS", 0.01)
    reading, writing = pipe
    link = HostLink(open_empty_file(), writing)
    sending = asyncio.create_task(link.send(b"x" * 2**20))
    await asyncio.sleep(0)
    await link.close()
    assert not sending.done()
    # The thread is still writing to the pipe, so the test empties the pipe before it closes it. The last read may come
    # before the loop knows that everything was written.
    os.set_blocking(reading, False)
    while not sending.done():
        with suppress(BlockingIOError):
            os.read(reading, 65536)
        await asyncio.sleep(0)


def test_stdin_and_stdout_are_restored() -> None:
    before = [os.fstat(each).st_ino for each in (0, 1)]
    with take_over_stdio() as copies:
        assert os.read(0, 1) == b""
        assert os.fstat(1).st_ino == os.fstat(2).st_ino
        assert [os.fstat(each).st_ino for each in copies] == before
    assert [os.fstat(each).st_ino for each in (0, 1)] == before
    for each in copies:
        os.close(each)


async def test_a_host_that_no_longer_reads_is_an_error_and_ends_the_link() -> None:
    ours, theirs = os.pipe()
    reading, writing = os.pipe()
    os.close(reading)
    link = HostLink(ours, writing)
    with pytest.raises(ConnectionError, match="the host no longer reads"):
        await link.send(b"{}")
    assert await link.receive() is None
    await link.close()
    for each in (ours, theirs, writing):
        os.close(each)


async def test_a_cancelled_send_is_not_torn(caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    link = HostLink(os.open(os.devnull, os.O_RDONLY), writing)
    # The message is larger than the buffer of a pipe, so that it is written in several pieces.
    message = b"x" * 2**20
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
