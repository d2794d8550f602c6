"""`StreamBeginning`: where the answer in an event stream begins, however its bytes are split."""

from __future__ import annotations

import gzip
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge.transport.forwarded_beginning import StreamBeginning

PRELUDE_LINES = [b"", b":", b": ping", b": data: x", b"id: 7", b"retry: 3000", b"id:", b":" + b"x" * 500]


def feed_all(beginning: StreamBeginning, body: bytes, cuts: list[int]) -> None:
    """Feeds a body in parts."""
    places = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    for begin, end in itertools.pairwise(places):
        beginning.feed(body[begin:end])


@given(
    lines=st.lists(st.tuples(st.sampled_from(PRELUDE_LINES), st.sampled_from([b"\n", b"\r", b"\r\n"]))),
    has_bom=st.booleans(),
    encoding=st.sampled_from([None, "gzip"]),
    whole_event=st.booleans(),
    cuts=st.lists(st.integers(0, 10_000)),
)
def test_comments_are_not_an_answer_and_an_event_after_them_is(
    lines: list[tuple[bytes, bytes]], has_bom: bool, encoding: str | None, whole_event: bool, cuts: list[int]
) -> None:
    def packed(body: bytes) -> bytes:
        return body if encoding is None else gzip.compress(body)

    prelude = b"\xef\xbb\xbf" * has_bom + b"".join(line + end for line, end in lines)
    beginning = StreamBeginning(encoding, whole_event=whole_event)
    feed_all(beginning, packed(prelude), cuts)
    assert not beginning.has_begun
    assert not beginning.is_found
    beginning = StreamBeginning(encoding, whole_event=whole_event)
    feed_all(beginning, packed(prelude + b"data: 1\n\n"), cuts)
    assert beginning.has_begun
    assert beginning.is_found
    assert beginning.first_event == (b"1" if whole_event else None)


@pytest.mark.parametrize("line", [b"d", b"data", b"event: x", b"ix", b"ret ", b" :", b"proxy error: no", b"\xef\xbb:"])
@pytest.mark.parametrize("before", [b"", b": ping\n\n"])
def test_any_other_line_is_the_answer_before_it_has_ended(line: bytes, before: bytes) -> None:
    for whole_event in (False, True):
        beginning = StreamBeginning(None, whole_event=whole_event)
        beginning.feed(before + line)
        assert beginning.has_begun
        assert beginning.is_found is not whole_event


@pytest.mark.parametrize("line", [b"i", b"id", b"re", b"retry", b"\xef\xbb", b""])
def test_a_line_whose_kind_is_not_known_yet_is_no_answer(line: bytes) -> None:
    beginning = StreamBeginning(None, whole_event=False)
    beginning.feed(line)
    assert not beginning.has_begun


@pytest.mark.parametrize(("encoding", "part"), [("zstd", b""), ("gzip", b"not gzip at all")])
def test_a_body_that_cannot_be_decompressed_is_an_answer(encoding: str, part: bytes) -> None:
    beginning = StreamBeginning(encoding, whole_event=True)
    beginning.feed(part)
    assert beginning.is_found
