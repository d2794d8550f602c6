"""Reading server-sent events with their ids and retry times, from bytes that are split anywhere."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge.mcp.jsonrpc import MessageTooLargeError
from lmbridge.mcp.sdk.event_stream import Event, EventReader

STREAM = (
    b"\xef\xbb\xbf: a comment\nid: 1\nretry: 20\ndata:\n\n"
    b"event: message\r\nid: 2\r\ndata: one\r\ndata:two\r\n\r\n"
    b"data: three\r\rretry: soon\n\nfield\n\nevent: endpoint\ndata: /messages\n\ndata: not finished\n"
)
EVENTS = [
    Event(id="1", retry=20),
    Event(id="2", data=b"one\ntwo"),
    Event(data=b"three"),
    Event("endpoint", b"/messages"),
]


@given(st.lists(st.integers(0, len(STREAM))))
def test_it_does_not_matter_where_the_bytes_are_split(places: list[int]) -> None:
    reader = EventReader()
    cuts = [0, *sorted(places), len(STREAM)]
    found = [event for begin, end in itertools.pairwise(cuts) for event in reader.feed(STREAM[begin:end])]
    assert found == EVENTS


@pytest.mark.parametrize("data", [b"data: " + b"x" * 100, b"data: xxxxxxxxx\n" * 12, b"data:\n" * 101])
def test_an_event_that_is_too_large_is_refused(data: bytes) -> None:
    reader = EventReader(100)
    with pytest.raises(MessageTooLargeError, match="more than 100 bytes"):
        list(reader.feed(data))


def test_a_retry_time_of_any_length_is_read() -> None:
    (event,) = EventReader().feed(b"retry: " + b"9" * 10_000 + b"\n\n")
    assert event.retry == 999_999_999


def test_an_event_is_complete_before_the_second_half_of_a_line_break_arrives() -> None:
    reader = EventReader()
    assert list(reader.feed(b"data: one\r\r")) == [Event(data=b"one")]
    assert list(reader.feed(b"")) == []
    assert list(reader.feed(b"\ndata: two\r\n\r")) == [Event(data=b"two")]
    assert list(reader.feed(b"\ndata: three\r\ndata: four\n\n")) == [Event(data=b"three\nfour")]
