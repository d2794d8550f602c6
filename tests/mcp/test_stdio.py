"""The reader of messages: bytes split anywhere, and what is no message."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge.mcp.stdio import MessageReader, MessageTooLargeError

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
    ],
)
def test_what_stands_before_a_message_on_its_line_is_cut_off(line: bytes) -> None:
    assert read(line) == [PING]


def test_a_bad_byte_in_a_message_is_replaced() -> None:
    assert read(b'{"jsonrpc":"2.0","method":"a\xffb"}\n') == [{"jsonrpc": "2.0", "method": "a\ufffdb"}]


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
