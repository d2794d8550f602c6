"""Decompression: every form of gzip and deflate, however it is split, in steps of a limited size."""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge._tasks import run_at_once
from lmbridge.transport.decompression import (
    BrokenCompression,
    DecompressedTooLarge,
    Decompressor,
    UnsupportedEncoding,
    decompress_whole,
    decompressor_for,
)
from tests.support import assert_linear

TEXT: Final = b"Hello, " * 1000


def raw_deflate(text: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(text) + compressor.flush()


FORMS: Final[dict[str, tuple[str, Callable[[bytes], bytes]]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip in two members": ("gzip", lambda text: gzip.compress(text[:100]) + gzip.compress(text[100:])),
    "gzip with a zero behind it": ("gzip", lambda text: gzip.compress(text) + b"\0"),
    "zlib": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
}
form = pytest.mark.parametrize(("encoding", "compress"), FORMS.values(), ids=FORMS)


def opened(encoding: str) -> Decompressor:
    decompressor = decompressor_for(encoding)
    assert decompressor is not None
    return decompressor


def decompress(encoding: str, *pieces: bytes) -> bytes:
    decompressor = opened(encoding)
    parts = []
    for piece in pieces:
        decompressor.feed(piece)
        while part := decompressor.next_part():
            parts.append(part)
    decompressor.finish()
    return b"".join(parts)


@form
@given(cuts=st.lists(st.integers(0, 200)))
def test_a_body_is_decompressed_however_it_is_split(
    encoding: str, compress: Callable[[bytes], bytes], cuts: list[int]
) -> None:
    data = compress(TEXT)
    places = [0, *sorted(cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(places)]
    assert decompress(encoding, *pieces) == TEXT


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", raw_deflate)]
)
def test_a_body_that_is_cut_off_anywhere_is_an_error(encoding: str, compress: Callable[[bytes], bytes]) -> None:
    data = compress(random.Random(1).randbytes(300))
    for end in range(1, len(data)):
        with pytest.raises(BrokenCompression, match="its end is missing"):
            decompress(encoding, data[:end])


def test_what_follows_the_end_is_ignored() -> None:
    assert decompress("gzip", gzip.compress(TEXT), *[b"\0junk"] * 100) == TEXT
    assert decompress("deflate", zlib.compress(TEXT), *[b"junk"] * 100) == TEXT


@form
@pytest.mark.parametrize("size", [256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1, 3_000_000])
def test_each_step_is_limited(encoding: str, compress: Callable[[bytes], bytes], size: int) -> None:
    decompressor = opened(encoding)
    decompressor.feed(compress(bytes(size)))
    steps = []
    while part := decompressor.next_part():
        steps.append(len(part))
    decompressor.finish()
    assert sum(steps) == size
    assert max(steps) <= 256 * 1024


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_an_empty_body_is_not_an_error(encoding: str) -> None:
    assert decompress(encoding) == b""


@pytest.mark.parametrize(
    ("encoding", "data"), [("gzip", b"{}"), ("gzip", b"{"), ("deflate", b"{}" * 10), ("deflate", b"{")]
)
def test_a_body_that_is_not_compressed_is_an_error(encoding: str, data: bytes) -> None:
    with pytest.raises(BrokenCompression):
        decompress(encoding, data)


@pytest.mark.parametrize("encoding", [None, "", "identity", " Identity "])
def test_a_body_without_an_encoding_needs_no_decompressor(encoding: str | None) -> None:
    assert decompressor_for(encoding) is None


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", " gzip"])
def test_the_name_of_an_encoding_may_be_written_in_any_way(encoding: str) -> None:
    assert decompress(encoding, gzip.compress(TEXT)) == TEXT


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "lz4", "gzip, br", "gzip, gzip"])
def test_another_encoding_is_refused_by_name(encoding: str) -> None:
    with pytest.raises(UnsupportedEncoding, match=encoding):
        decompressor_for(encoding)


def test_the_time_does_not_grow_faster_than_the_body() -> None:
    assert_linear(lambda size: decompress("gzip", gzip.compress(bytes(size), 1)), 2_000_000)


def test_a_whole_body_is_decompressed_in_steps_up_to_a_limit() -> None:
    text = bytes(2_000_000)
    steps = decompress_whole(opened("gzip"), gzip.compress(text), len(text))
    assert len([None for _ in steps]) > 5
    assert run_at_once(decompress_whole(opened("gzip"), gzip.compress(text), len(text))) == text
    with pytest.raises(DecompressedTooLarge):
        run_at_once(decompress_whole(opened("gzip"), gzip.compress(text), len(text) - 1))
