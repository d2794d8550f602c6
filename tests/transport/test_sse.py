"""Server-sent events: fields, line endings, bytes, sizes, and a comparison with another decoder."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Coroutine, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from aiohttp_sse_client.client import EventSource, MessageEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge.errors import LLMStreamError
from lmbridge.transport import Event, NamedEvent, SSEDecoder
from lmbridge.transport.sse import MAX_EVENT_SIZE, begins_event_stream

BOM = b"\xef\xbb\xbf"


def decode(*pieces: bytes, max_size: int = MAX_EVENT_SIZE) -> tuple[list[Event], str]:
    """Returns the events and the bare text of a whole body that arrives in these pieces."""
    decoder = SSEDecoder(max_size)
    events = [event for piece in pieces for event in decoder.feed(piece)]
    return events + decoder.close(), decoder.bare_text


def events_of(*pieces: bytes) -> list[Event]:
    return decode(*pieces)[0]


def one_by_one(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


def cut(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(at % (len(data) + 1) for at in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


# Fields


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"data: one\n\n", [b"one"]),
        (b"data: one\n\ndata: two\n\n", [b"one", b"two"]),
        (b"data:one\n\n", [b"one"]),
        (b"data:  one \n\n", [b" one "]),
        (b"data:\tone\n\n", [b"\tone"]),
        (b"data: a: b\n\n", [b"a: b"]),
        (b"data: one\ndata: two\ndata:three\n\n", [b"one\ntwo\nthree"]),
        (b"data: one\ndata:\ndata\ndata: two\n\n", [b"one\n\n\ntwo"]),
        (b"data: one\ndata: \n\n", [b"one\n"]),
        (b"data:\ndata: one\n\n", [b"\none"]),
        (b"data\ndata\n\n", [b"\n"]),
        (b"Data: one\n\n", []),
        (b" data: one\n\n", []),
        (b"data : one\n\n", []),
        (b"\n\n\ndata: one\n\n\n\n", [b"one"]),
    ],
)
def test_data_is_the_text_after_the_colon_and_one_space_and_its_lines_are_joined(
    body: bytes, expected: list[Event]
) -> None:
    assert events_of(body) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"event: error\ndata: x\n\n", [NamedEvent("error", b"x")]),
        (b"event:error\ndata:x\n\n", [NamedEvent("error", b"x")]),
        (b"data: x\nevent: late\n\n", [NamedEvent("late", b"x")]),
        (b"event: a\nevent: b\ndata: x\n\n", [NamedEvent("b", b"x")]),
        (b"event: a\ndata: x\ndata: y\n\n", [NamedEvent("a", b"x\ny")]),
        (b"event: a\ndata: x\n\ndata: y\n\n", [NamedEvent("a", b"x"), b"y"]),
        (b"event: a\n\ndata: y\n\n", [b"y"]),
        (b"event: a\nevent:\ndata: y\n\n", [b"y"]),
        (b"event\ndata: y\n\n", [b"y"]),
        ("event: tõkens\ndata: x\n\n".encode(), [NamedEvent("tõkens", b"x")]),
        (b"event: \xff\ndata: x\n\n", [NamedEvent("\ufffd", b"x")]),
    ],
)
def test_a_name_belongs_to_one_event_only(body: bytes, expected: list[Event]) -> None:
    assert events_of(body) == expected


@pytest.mark.parametrize(
    "body", [b"\n", b"data:\n\n", b"data\n\n", b"data: \n\n", b"event: x\n\n", b"id: 1\n\n", b":\n\n"]
)
def test_an_event_without_data_is_skipped(body: bytes) -> None:
    assert events_of(body, b"data: next\n\n") == [b"next"]
    named = b"event: a\ndata: 1\ndata: 2\n\n"
    assert events_of(named + body + b"data: next\n\n") == [NamedEvent("a", b"1\n2"), b"next"]


def test_a_named_event_with_empty_data_is_handed_out() -> None:
    assert events_of(b"event: error\ndata:\n\n") == [NamedEvent("error", b"")]


def test_comments_ids_and_retry_times_are_neither_part_of_an_event_nor_bare_text() -> None:
    body = b": ping\n:\n:data: no\nid: 7\ndata: one\nretry: 1\n: in between\ndata: two\nid\nretry: soon\n\n:\n\n"
    assert decode(body) == ([b"one\ntwo"], "")


def test_lines_that_are_not_a_field_are_kept_as_bare_text() -> None:
    body = b"data: one\n\nproxy error: connection refused\nfoo\ndata: two\n\n{}"
    assert decode(body) == ([b"one", b"two"], "proxy error: connection refused\nfoo\n{}")


def test_bare_text_keeps_only_the_first_4_kib() -> None:
    decoder = SSEDecoder()
    for number in range(10_000):
        decoder.feed(b"line %d\n" % number)
    assert decoder.bare_text.startswith("line 0\nline 1\n")
    assert len(decoder.bare_text) <= 4096
    decoder = SSEDecoder()
    decoder.feed(b"x" * 1_000_000 + b"\n")
    assert decoder.bare_text == "x" * 4096


# Line endings


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_a_line_ends_with_lf_crlf_or_cr(ending: bytes) -> None:
    body = ending.join([b"event: a", b"data: 1", b"data: 2", b"", b": c", b"data: 3", b"", b""])
    expected = [NamedEvent("a", b"1\n2"), b"3"]
    assert decode(body) == decode(*one_by_one(body)) == (expected, "")


def test_line_endings_may_be_mixed() -> None:
    assert events_of(b"data: 1\r\ndata: 2\rdata: 3\n\r\ndata: 4\r\rdata: 5\n\n") == [b"1\n2\n3", b"4", b"5"]


def test_the_lf_of_a_crlf_that_arrives_with_the_next_read_does_not_end_a_second_line() -> None:
    assert events_of(b"data: 1\r", b"\ndata: 2\r", b"", b"\n\r", b"\ndata: 3\n\n") == [b"1\n2", b"3"]


def test_a_cr_at_the_end_of_a_read_ends_its_line_at_once() -> None:
    assert SSEDecoder().feed(b"data: 1\r\r") == [b"1"]
    decoder = SSEDecoder()
    assert decoder.feed(b"data: 1\r") == []
    assert decoder.feed(b"\r") == [b"1"]


def test_two_lfs_after_a_read_that_ended_with_a_cr_are_one_ending_and_one_blank_line() -> None:
    assert SSEDecoder().feed(b"data: 1\r") == []
    assert events_of(b"data: 1\r", b"\n\n", b"data: 2\n\n") == [b"1", b"2"]


@pytest.mark.parametrize("letter", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\x00"])
def test_other_characters_that_unicode_calls_line_ends_do_not_end_a_line(letter: str) -> None:
    body = f"data: a{letter}b\n\n".encode()
    assert events_of(body) == events_of(*one_by_one(body)) == [f"a{letter}b".encode()]


# Bytes


def test_a_bom_at_the_start_is_dropped_however_it_is_cut() -> None:
    body = BOM + b"data: 1\n\n"
    for cuts in itertools.combinations(range(6), 3):
        assert decode(*cut(body, cuts)) == ([b"1"], "")


def test_only_one_bom_is_dropped_and_only_at_the_start() -> None:
    assert decode(BOM + BOM + b"data: 1\n\n") == ([], "\ufeffdata: 1")
    assert decode(b"\n" + BOM + b"data: 1\n\n") == ([], "\ufeffdata: 1")
    assert decode(b"data: 1\n\n", BOM + b"data: 2\n\n") == ([b"1"], "\ufeffdata: 2")


@pytest.mark.parametrize("start", [b"\xef", b"\xef\xbb", b"\xef\xbbdata: 1\n\n", b"\xef\xbb\xbe"])
def test_bytes_that_only_begin_like_a_bom_are_not_lost(start: bytes) -> None:
    assert decode(start) == decode(*one_by_one(start)) == ([], start.decode("utf-8", "replace").strip())


def test_a_body_of_only_a_bom_is_empty() -> None:
    assert decode(BOM) == decode(*one_by_one(BOM)) == decode() == ([], "")


def test_utf_8_may_be_split_anywhere() -> None:
    body = "data: naïve 日本語 🙂\n\n".encode()
    for at in range(len(body) + 1):
        assert events_of(body[:at], body[at:]) == ["naïve 日本語 🙂".encode()]


def test_bytes_that_are_not_utf_8_do_not_end_the_stream() -> None:
    assert events_of(b"data: \xff\xfe\n\ndata: 2\n\n") == [b"\xff\xfe", b"2"]


# The end of the body


@pytest.mark.parametrize("end", [b"", b"\n", b"\r", b"\r\n"])
def test_an_event_that_the_end_cut_off_from_its_blank_line_is_handed_out_by_close(end: bytes) -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: 1\n\nevent: x\ndata: 2\ndata: 3" + end) == [b"1"]
    assert decoder.close() == [NamedEvent("x", b"2\n3")]
    assert decoder.close() == []


def test_close_hands_out_nothing_if_no_event_is_left() -> None:
    decoder = SSEDecoder()
    decoder.feed(b"data: 1\n\n: comment")
    assert decoder.close() == []


def test_an_event_is_handed_out_as_soon_as_its_blank_line_arrives() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: 1\n") == []
    assert decoder.feed(b"\n") == [b"1"]
    assert decoder.feed(b"data: 2\n\nda") == [b"2"]
    assert decoder.feed(b"ta: 3\n\n") == [b"3"]


# The beginning of the body


@pytest.mark.parametrize("line", [b"data: {}", b"data:{}", b"event: x", b"id: 1", b"retry: 1", b": ping", b":"])
@pytest.mark.parametrize("before", [b"", b"\n", b"\r\n", BOM, BOM + b"\n\n"])
def test_a_body_that_begins_with_a_field_or_a_comment_is_an_event_stream(before: bytes, line: bytes) -> None:
    body = before + line + b"\n"
    verdicts = [begins_event_stream(body[:end]) for end in range(len(body) + 1)]
    assert verdicts[-1] is True
    # However little of it has arrived, it is never taken for something else.
    assert False not in verdicts
    assert begins_event_stream(before + line.partition(b":")[0] + b":") is True


@pytest.mark.parametrize(
    "body", [b"{", b'{"error": "x"}', b"<html>", b"proxy error: x", b"dat_", b"events", b" data: x"]
)
def test_a_body_that_begins_with_anything_else_is_not_an_event_stream(body: bytes) -> None:
    assert begins_event_stream(body) is begins_event_stream(b"\r\n" + body) is False


@pytest.mark.parametrize("body", [b"", b"\n\r\n", BOM[:1], BOM, b"d", b"data", b"even", b"i", BOM + b"retry"])
def test_a_body_of_which_too_little_has_arrived_may_be_an_event_stream(body: bytes) -> None:
    assert begins_event_stream(body) is None


# Sizes


def test_a_line_may_be_as_large_as_the_cap_but_not_larger_however_it_is_cut() -> None:
    line = b"data: " + b"x" * 94
    for pieces in ([line + b"\n\n"], [*one_by_one(line + b"\n\n")], [line[:50], line[50:] + b"\n\n"], [line]):
        assert decode(*pieces, max_size=100) == ([b"x" * 94], "")
        with pytest.raises(LLMStreamError, match="more than 99 bytes"):
            decode(*pieces, max_size=99)


def test_the_lines_of_one_event_count_together() -> None:
    body = b"data: 12345678\n" + b"data:\n" * 90 + b"data: 0\n\n"
    for pieces in ([body], [*one_by_one(body)]):
        assert decode(*pieces, max_size=100) == ([b"12345678" + b"\n" * 91 + b"0"], "")
        with pytest.raises(LLMStreamError, match="more than 99 bytes"):
            decode(*pieces, max_size=99)


def test_any_number_of_events_fits_under_a_small_cap() -> None:
    body = b"data: 0123456789\ndata: 0123456789\n\nevent: e\ndata: 0123456789\n\n: comment of 0123456\n"
    decoder = SSEDecoder(max_size=21)
    assert sum(len(decoder.feed(body)) for _ in range(1000)) == 2000
    assert sum(len(decoder.feed(piece)) for _ in range(1000) for piece in cut(body, (5, 20, 40))) == 2000


def test_the_cap_applies_to_comments() -> None:
    for pieces in ([b":" * 101 + b"\n"], [*one_by_one(b":" * 101)]):
        with pytest.raises(LLMStreamError):
            decode(*pieces, max_size=100)


@pytest.mark.parametrize("too_large", [b"data: aaaaaaaaaa", b"data: aaaaaaaaaaaaaaaaaaaaaaaa\n"])
def test_nothing_can_be_read_after_an_event_that_is_too_large(too_large: bytes) -> None:
    decoder = SSEDecoder(max_size=20)
    with pytest.raises(LLMStreamError, match="more than 20 bytes"):
        decoder.feed(too_large + b"b" * 14)
    assert decoder.failure is not None
    for again in (partial(decoder.feed, b"cc\n\ndata: d\n\n"), partial(decoder.feed, b""), decoder.close):
        with pytest.raises(LLMStreamError, match="more than 20 bytes"):
            again()


def test_each_piece_of_a_line_of_20_mb_costs_no_more_than_its_own_size() -> None:
    text = bytes(range(32, 127)) * (20_000_000 // 95)
    body = b"data: " + text + b"\n\n"
    pieces = [body[at : at + 65536] for at in range(0, len(body), 65536)]
    decoder = SSEDecoder()
    for piece in pieces[:100]:
        assert decoder.feed(piece) == []
    tracemalloc.start()
    try:
        for piece in pieces[100:-1]:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            assert decoder.feed(piece) == []
            # A decoder that joins what it has so far would need memory for all of it, each time.
            assert tracemalloc.get_traced_memory()[1] - before <= 2 * 65536
    finally:
        tracemalloc.stop()
    assert decoder.feed(pieces[-1]) == [text]


def test_a_long_line_that_arrives_byte_by_byte_costs_linear_time() -> None:
    text = bytes(range(32, 127)) * 10_000
    decoder = SSEDecoder()
    # With quadratic costs this would take minutes.
    assert not any(map(decoder.feed, one_by_one(b"data: " + text)))
    assert decoder.feed(b"\r\n\r\n") == [text]


# However the bytes are cut

TRICKY = (
    BOM
    + b": ping\r\n\r\nevent: a\r\ndata: 1\rdata:2\n\n\r\nfoo: bar\rdata\n\n"
    + "id: 3\ndata: é\u2028🙂\n\r".encode()
    + b"data: [DONE]\n\nretry: 1\ndata: cut"
)
EXPECTED: tuple[list[Event], str] = (
    [NamedEvent("a", b"1\n2"), "é\u2028🙂".encode(), b"[DONE]", b"cut"],
    "foo: bar",
)


def test_a_stream_gives_the_same_events_wherever_it_is_cut_in_three() -> None:
    assert decode(TRICKY) == decode(*one_by_one(TRICKY)) == EXPECTED
    for cuts in itertools.combinations(range(len(TRICKY) + 1), 2):
        assert decode(*cut(TRICKY, cuts)) == EXPECTED


_texts = st.text(
    st.one_of(
        st.sampled_from(' :\t\x00\x85\u2028\ufeff[]{}"é中🙂'), st.characters(exclude_characters="\r\n", codec="utf-8")
    ),
    max_size=8,
).map(str.encode)
_anything = st.binary(max_size=8).map(lambda line: line.translate(None, b"\r\n"))
_names = st.sampled_from([b"data", b"event", b"id", b"retry", b"", b"foo", b"Data", b" data"])
_separators = st.sampled_from([b": ", b":", b":  ", b" ", b""])
_lines = st.one_of(
    st.just(b""),
    st.sampled_from([b"", b"data", b"data:", b"event: x", b"event:"]),
    st.builds(b"data: ".__add__, _texts),
    st.tuples(_names, _separators, st.one_of(_texts, _anything)).map(b"".join),
    _anything,
)
_endings = st.sampled_from([b"\n", b"\r\n", b"\r"])
_streams = st.builds(
    lambda start, lines, end: start + b"".join(itertools.chain.from_iterable(lines)) + end,
    st.sampled_from([b"", BOM, BOM[:1], BOM[:2], BOM + BOM]),
    st.lists(st.tuples(_lines, _endings), max_size=20),
    _lines,
)
_cuts = st.lists(st.integers(0, 400), max_size=12)


@settings(deadline=None)
@given(body=_streams, cuts=_cuts)
def test_any_stream_gives_the_same_events_wherever_it_is_cut(body: bytes, cuts: list[int]) -> None:
    assert decode(*cut(body, cuts)) == decode(*one_by_one(body)) == decode(body)


@settings(deadline=None)
@given(body=_streams, cuts=_cuts, max_size=st.integers(3, 20))
def test_what_precedes_an_event_that_is_too_large_does_not_depend_on_where_the_stream_is_cut(
    body: bytes, cuts: list[int], max_size: int
) -> None:
    def outcome(*pieces: bytes) -> tuple[list[Event], str]:
        decoder, events = SSEDecoder(max_size), list[Event]()
        try:
            for piece in pieces:
                events += decoder.feed(piece)
            events += decoder.close()
        except LLMStreamError as error:
            return events, str(error)
        return events, ""

    assert outcome(*cut(body, cuts)) == outcome(*one_by_one(body)) == outcome(body)


# Two other decoders


def by_the_standard(body: bytes) -> tuple[list[tuple[str, str]], str]:
    """Returns the names and data of all events, and the bare text, read letter by letter as the WHATWG standard says.

    It differs from the standard where the decoder documents that it does.
    """
    lines = [""]
    previous = ""
    for letter in body.decode("utf-8", "replace").removeprefix("\ufeff"):
        if letter == "\r" or (letter == "\n" and previous != "\r"):
            lines.append("")
        elif letter != "\n":
            lines[-1] += letter
        previous = letter
    # The end of the body ends an event.
    lines.append("")
    events, bare_text, name, data = [], "", "", ""
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "":
            # An event that consists of an empty line of data is skipped.
            if data not in (("", "\n") if name == "" else ("",)):
                events.append((name, data.removesuffix("\n")))
            name, data = "", ""
        elif field == "data":
            data += value + "\n"
        elif field == "event":
            name = value
        elif field not in ("", "id", "retry"):
            bare_text += line + "\n"
    return events, bare_text.strip()


def as_text(event: Event) -> tuple[str, str]:
    name, data = (event.name, event.data) if isinstance(event, NamedEvent) else ("", event)
    return name, data.decode("utf-8", "replace")


@settings(deadline=None)
@given(body=_streams)
def test_the_decoder_agrees_with_the_standard(body: bytes) -> None:
    events, bare_text = decode(body)
    assert ([as_text(event) for event in events], bare_text) == by_the_standard(body)


class _NoMoreLinesError(Exception):
    pass


class _Lines:
    """A response whose body is known, with the interface that `EventSource` iterates."""

    status = 200

    def __init__(self, body: bytes) -> None:
        self.content = self
        # The lines of bytes end at LF, CRLF and CR only.
        self._lines = iter(body.splitlines(keepends=True))

    def __aiter__(self) -> _Lines:
        return self

    async def __anext__(self) -> bytes:
        try:
            return next(self._lines)
        except StopIteration:
            # At a regular end, EventSource would send its request again.
            raise _NoMoreLinesError from None


def by_event_source(body: bytes) -> list[MessageEvent]:
    session: Any = object()
    lines: Any = _Lines(body)
    source = EventSource("http://localhost", session=session)
    source._response = lines
    events = []
    while True:
        step: Coroutine[Any, Any, MessageEvent] = source.__anext__()
        try:
            step.send(None)
        except StopIteration as stop:
            events.append(stop.value)
        except _NoMoreLinesError:
            return events


# Bodies that aiohttp-sse-client decodes correctly: without a lone CR, without a BOM, with at most one space after the
# colon, and without an empty line of data at the end of an event.
_values = _texts.map(lambda text: text.lstrip(b" "))
_spaces = st.sampled_from([b":", b": "])
_data_line = st.tuples(st.just(b"data"), _spaces, _values).map(b"".join)
_last_data_line = st.tuples(st.just(b"data"), _spaces, _values.filter(bool)).map(b"".join)
_other_line = st.one_of(
    st.tuples(st.sampled_from([b"event", b"id", b"foo", b""]), _spaces, _values).map(b"".join),
    st.integers(0, 10_000).map(b"retry: %d".__mod__),
    st.sampled_from([b"event", b"id", b"foo", b"data"]),
)
_blocks = st.one_of(
    st.lists(st.one_of(_other_line, _data_line), max_size=5).flatmap(
        lambda lines: st.tuples(
            _last_data_line, st.lists(_other_line.filter(lambda line: line != b"data"), max_size=2)
        ).map(lambda end: [*lines, end[0], *end[1], b""])
    ),
    st.lists(_other_line.filter(lambda line: line != b"data"), max_size=3).map(lambda lines: [*lines, b""]),
)


@settings(deadline=None)
@given(blocks=st.lists(_blocks, max_size=5), ending=st.sampled_from([b"\n", b"\r\n"]), cuts=_cuts)
def test_the_decoder_agrees_with_aiohttp_sse_client(blocks: list[list[bytes]], ending: bytes, cuts: list[int]) -> None:
    body = b"".join(line + ending for block in blocks for line in block)
    expected = [(event.message, event.data) for event in by_event_source(body)]
    assert [as_text(event) for event in events_of(*cut(body, cuts))] == expected


def test_events_with_names_have_the_same_names_in_aiohttp_sse_client() -> None:
    (event,) = by_event_source(b"event: response.created\ndata: {}\n\n")
    assert events_of(b"event: response.created\ndata: {}\n\n") == [NamedEvent(event.type, event.data.encode())]
