"""Reading JSON-RPC messages: bytes split anywhere, lines that are not messages, and the bounded inbox."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge.mcp.jsonrpc import MessageInbox, MessageReader, MessageTooLargeError
from tests.support import replaced, turns

PING = {"jsonrpc": "2.0", "method": "ping"}
LINE = json.dumps(PING).encode() + b"\n"


def parse(data: bytes, reader: MessageReader | None = None) -> list[dict[str, Any]]:
    return list((reader or MessageReader()).feed(data))


@given(st.lists(st.sampled_from([LINE, b"\n", b"garbage\n", b"{}\n", b"\xff\xfe\n"])), st.lists(st.integers(0, 200)))
def test_it_does_not_matter_where_the_bytes_are_split(lines: list[bytes], places: list[int]) -> None:
    data = b"".join(lines)
    reader = MessageReader()
    cuts = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    found = [message for begin, end in itertools.pairwise(cuts) for message in reader.feed(data[begin:end])]
    assert found == [PING] * lines.count(LINE)
    assert reader.skipped_lines == sum(line not in (LINE, b"\n") for line in lines)


@pytest.mark.parametrize(
    "line",
    [
        b"Server ready " + LINE,
        b"{not} json {" + LINE,
        b'\xff {"id" : ' + LINE,
        b'log {"result": 1} ' + LINE,
        replaced(LINE, b"\n", b"\r\n"),
        b"  " + LINE,
        LINE.rstrip() + b" and on it goes\n",
        b"\xef\xbb\xbf" + LINE,
        b"\0" + LINE,
    ],
)
def test_text_around_a_message_on_its_line_is_cut_off(line: bytes) -> None:
    assert parse(line) == [PING]


def test_a_byte_that_is_not_utf8_is_replaced() -> None:
    assert parse(b'{"jsonrpc":"2.0","method":"a\xffb"}\n') == [{"jsonrpc": "2.0", "method": "a\ufffdb"}]


def test_two_messages_on_one_line_are_both_read() -> None:
    assert parse(LINE.rstrip() + LINE) == [PING, PING]


@pytest.mark.parametrize(
    ("sent", "parsed"),
    [
        (rb"half \ud83d of", "half \ufffd of"),
        (rb"\udE00 of \ud83d\ude00", "\ufffd of \U0001f600"),
        (rb"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (rb"\ud83d \\ud83d \n", "\ufffd \\ud83d \n"),
    ],
)
def test_half_of_a_surrogate_pair_is_replaced(sent: bytes, parsed: str) -> None:
    line = b'{"jsonrpc":"2.0","method":"%s"}\n' % sent
    assert parse(line) == [{"jsonrpc": "2.0", "method": parsed}]


def test_a_number_that_json_does_not_have_does_not_cost_the_message() -> None:
    (message,) = parse(b'{"jsonrpc":"2.0","result":{"x":NaN,"y":1e999}}\n')
    assert math.isnan(message["result"]["x"])
    assert message["result"]["y"] == math.inf


@pytest.mark.parametrize("line", [b"hello\n", b"[1]\n", b"5\n", b'{"id": 1}\n', b"[" * 100_000 + b"\n", b'"jsonrpc"\n'])
def test_a_line_that_is_not_a_message_is_skipped_and_counted(line: bytes) -> None:
    reader = MessageReader()
    assert parse(line + LINE, reader) == [PING]
    assert reader.skipped_lines == 1
    assert reader.first_skipped_line == line.rstrip()


def test_a_message_may_be_as_large_as_the_limit_and_no_larger() -> None:
    message = LINE.rstrip()
    assert parse(message + b"\n", MessageReader(len(message))) == [PING]
    with pytest.raises(MessageTooLargeError, match="more than"):
        parse(message + b"\n", MessageReader(len(message) - 1))


def test_a_line_without_an_end_is_not_buffered_beyond_the_limit() -> None:
    reader = MessageReader(100)
    parse(b"x" * 100, reader)
    with pytest.raises(MessageTooLargeError):
        parse(b"x", reader)


def make_inbox() -> tuple[MessageInbox, list[str]]:
    """Returns an inbox, and the list of the callbacks that it has called."""
    calls: list[str] = []
    inbox = MessageInbox(
        on_skipped_line=lambda line: calls.append(line.decode()), resume_reading=lambda: calls.append("has room")
    )
    return inbox, calls


async def test_an_inbox_says_when_it_is_full_and_when_it_has_room_again() -> None:
    inbox, calls = make_inbox()
    inbox.feed(LINE * 256)
    assert inbox.has_room
    inbox.feed(LINE)
    assert not inbox.has_room
    assert await inbox.receive() == PING
    assert inbox.has_room
    assert calls == ["has room"]


async def test_an_inbox_reports_only_the_first_line_that_is_not_a_message() -> None:
    inbox, calls = make_inbox()
    inbox.feed(b"first\nsecond\n")
    inbox.feed(b"third\n")
    assert (calls, inbox.skipped_lines) == (["first"], 3)


async def test_a_closed_inbox_still_delivers_what_had_arrived_and_ignores_the_rest() -> None:
    inbox, _ = make_inbox()
    inbox.feed(LINE)
    inbox.close()
    inbox.feed(LINE)
    assert await inbox.receive() == PING
    assert await inbox.receive() is None


async def test_closing_an_inbox_wakes_the_task_that_receives() -> None:
    inbox, _ = make_inbox()
    receiving = asyncio.create_task(inbox.receive())
    await turns()
    assert not receiving.done()
    inbox.close()
    assert await receiving is None


async def test_the_messages_before_one_that_is_too_large_are_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    inbox, _ = make_inbox()
    monkeypatch.setattr(inbox, "_reader", MessageReader(len(LINE)))
    with pytest.raises(MessageTooLargeError):
        inbox.feed(LINE + b"x" * 100 + b"\n")
    assert await inbox.receive() == PING


def test_a_last_line_without_a_line_break_is_read_unless_it_is_too_large() -> None:
    message = b'{"jsonrpc":"2.0","method":"x"}'
    for largest, expected in ((100, [{"jsonrpc": "2.0", "method": "x"}]), (10, [])):
        reader = MessageReader(largest)
        with contextlib.suppress(MessageTooLargeError):
            list(reader.feed(message))
        assert reader.end() == expected
