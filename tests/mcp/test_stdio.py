"""The reader of messages: bytes split anywhere, and what is no message."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge.mcp.config.spec import ServerSpec
from lmbridge.mcp.servers.stdio import MessageReader, MessageTooLargeError, StdioLink

PING = {"jsonrpc": "2.0", "method": "ping"}
LINE = json.dumps(PING).encode() + b"\n"


def read(data: bytes, reader: MessageReader | None = None) -> list[dict[str, Any]]:
    return list((reader or MessageReader()).feed(data))


@given(st.lists(st.sampled_from([LINE, b"\n", b"garbage\n", b"{}\n", b"\xff\xfe\n"])), st.lists(st.integers(0, 200)))
def test_it_does_not_matter_where_the_bytes_are_split(lines: list[bytes], places: list[int]) -> None:
    data = b"".join(lines)
    reader = MessageReader()
    cuts = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    found = [message for begin, end in itertools.pairwise(cuts) for message in reader.feed(data[begin:end])]
    assert found == [PING] * lines.count(LINE)
    assert reader.garbage == sum(line not in (LINE, b"\n") for line in lines)


@pytest.mark.parametrize(
    "line",
    [
        b"Server ready " + LINE,
        b"{not} json {" + LINE,
        b'\xff {"id" : ' + LINE,
        b'log {"result": 1} ' + LINE,
        LINE.replace(b"\n", b"\r\n"),
        b"  " + LINE,
        LINE.rstrip() + b" and on it goes\n",
        b"\xef\xbb\xbf" + LINE,
        b"\0" + LINE,
    ],
)
def test_what_stands_around_a_message_on_its_line_is_cut_off(line: bytes) -> None:
    assert read(line) == [PING]


def test_a_bad_byte_in_a_message_is_replaced() -> None:
    assert read(b'{"jsonrpc":"2.0","method":"a\xffb"}\n') == [{"jsonrpc": "2.0", "method": "a\ufffdb"}]


def test_two_messages_on_a_line_are_two() -> None:
    assert read(LINE.rstrip() + LINE) == [PING, PING]


@pytest.mark.parametrize(
    ("sent", "read_as"),
    [
        (rb"half \ud83d of", "half \ufffd of"),
        (rb"\udE00 of \ud83d\ude00", "\ufffd of \U0001f600"),
        (rb"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (rb"\ud83d \\ud83d \n", "\ufffd \\ud83d \n"),
    ],
)
def test_half_of_a_surrogate_pair_is_replaced(sent: bytes, read_as: str) -> None:
    line = b'{"jsonrpc":"2.0","method":"%s"}\n' % sent
    assert read(line) == [{"jsonrpc": "2.0", "method": read_as}]


def test_a_number_that_is_none_does_not_cost_the_message() -> None:
    (message,) = read(b'{"jsonrpc":"2.0","result":{"x":NaN,"y":1e999}}\n')
    assert math.isnan(message["result"]["x"])
    assert message["result"]["y"] == math.inf


@pytest.mark.parametrize("line", [b"hello\n", b"[1]\n", b"5\n", b'{"id": 1}\n', b"[" * 100_000 + b"\n", b'"jsonrpc"\n'])
def test_what_is_no_message_is_skipped_and_counted(line: bytes) -> None:
    reader = MessageReader()
    assert read(line + LINE, reader) == [PING]
    assert reader.garbage == 1
    assert reader.first_garbage == line.rstrip()


def test_a_message_may_be_as_large_as_the_limit_and_no_larger() -> None:
    message = LINE.rstrip()
    assert read(message + b"\n", MessageReader(len(message))) == [PING]
    with pytest.raises(MessageTooLargeError, match="more than"):
        read(message + b"\n", MessageReader(len(message) - 1))


def test_a_line_without_end_is_not_kept_beyond_the_limit() -> None:
    reader = MessageReader(100)
    read(b"x" * 100, reader)
    with pytest.raises(MessageTooLargeError):
        read(b"x", reader)


async def test_what_cannot_be_sent_fails_when_it_is_known_why() -> None:
    reasons: list[str] = []
    script = "exit 3"
    link = StdioLink(ServerSpec(name="a", transport="stdio", command="sh", args=("-c", script)), reasons.append)
    await link.start()
    with pytest.raises(ConnectionError):  # noqa: PT012 - it takes a moment until the pipe is known to be closed
        while True:
            await link.send(b"{}")
            await asyncio.sleep(0)
    assert reasons == ["it ended with status 3"]
    await link.end()


async def test_a_server_that_sends_faster_than_is_read_waits() -> None:
    script = "yes '" + json.dumps(PING) + "' | head -n 50000"
    link = StdioLink(ServerSpec(name="a", transport="stdio", command="sh", args=("-c", script)), lambda _: None)
    await link.start()
    while link._child._pipe(1).is_reading():
        await asyncio.sleep(0)
    assert len(link._messages) < 20_000
    read = 0
    while await link.receive():
        read += 1
    assert read == 50_000
    await link.end()
