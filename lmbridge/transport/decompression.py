"""Decompresses the bodies of responses in bounded steps.

A kilobyte of gzip can stand for a megabyte. Before its version 3.14, aiohttp decompresses all that has arrived in a
single step, and no version notices that a compressed body was cut off. So aiohttp is set to pass bodies on unchanged,
and they are decompressed here, a limited number of bytes at a time.

Only gzip and deflate are supported, and requests announce only these two. aiohttp would announce br and zstd as well
if the libraries for them are installed. But these gain nothing for the replies of a model server on the same machine or
in the same network, and only new versions of the libraries can limit how much a step decompresses.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator
from typing import Final

ACCEPTED_ENCODINGS: Final = "gzip, deflate"
"""The value of the header `Accept-Encoding`."""
_STEP_BYTES: Final = 256 * 1024
"""The most bytes that one step returns. It takes less than a millisecond."""
_HEADER_BYTES: Final = 2
_GZIP_MAGIC: Final = b"\x1f\x8b"


class BrokenCompression(Exception):  # noqa: N818 - it never reaches a user
    """A body cannot be decompressed, or its end is missing."""


class UnsupportedEncoding(Exception):  # noqa: N818 - it never reaches a user
    """A body is compressed in a way that is not supported. The text is the value of `Content-Encoding`."""


class DecompressedTooLarge(Exception):  # noqa: N818 - it never reaches a user
    """A body is larger after decompression than the caller allows."""


class Decompressor:
    """Decompresses a body that arrives in parts.

    For example::

        decompressor.feed(data)
        while part := decompressor.next_part():
            ...

    Args:
        is_gzip: Whether the body is compressed as gzip. Otherwise it is deflate, with or without the header of zlib:
            servers send both.
    """

    __slots__ = ("_decompressor", "_is_full", "_is_gzip", "_unread")

    def __init__(self, *, is_gzip: bool) -> None:
        self._is_gzip = is_gzip
        # It is created when the first two bytes have arrived, because they determine the format.
        self._decompressor: zlib._Decompress | None = None
        self._unread = b""
        # Whether the last step returned as much as it may, so that there may be more without further input.
        self._is_full = False

    def feed(self, data: bytes) -> None:
        """Adds the next part of the compressed body."""
        self._unread += data

    def next_part(self) -> bytes:
        """Returns the next part of the decompressed body, or `b""` if more of the compressed body is needed.

        Raises:
            BrokenCompression: The body cannot be decompressed.
        """
        while self._unread or self._is_full:
            if self._decompressor is not None and self._decompressor.eof:
                self._begin_next_member()
            elif self._decompressor is None and len(self._unread) < _HEADER_BYTES:
                break
            elif part := self._step():
                return part
        return b""

    def _step(self) -> bytes:
        if self._decompressor is None:
            self._decompressor = zlib.decompressobj(self._format())
        try:
            part = self._decompressor.decompress(self._unread, _STEP_BYTES)
        except zlib.error as exc:
            raise BrokenCompression(str(exc)) from exc
        has_ended = self._decompressor.eof
        self._is_full = len(part) == _STEP_BYTES and not has_ended
        self._unread = self._decompressor.unused_data if has_ended else self._decompressor.unconsumed_tail
        return part

    def finish(self) -> None:
        """Checks that the compressed body has ended where it should.

        Raises:
            BrokenCompression: The end is missing.
        """
        if self._unread or (self._decompressor is not None and not self._decompressor.eof):
            raise BrokenCompression("its end is missing")

    def _begin_next_member(self) -> None:
        """Continues after the end of a gzip member. A body may have several; anything else that follows is ignored."""
        if self._is_gzip and self._unread.startswith(_GZIP_MAGIC[: len(self._unread)]):
            self._decompressor = None
        else:
            self._unread = b""

    def _format(self) -> int:
        """Returns the `wbits` of zlib for the header with which the body begins."""
        if self._is_gzip:
            return 16 + zlib.MAX_WBITS
        first, second = self._unread[:_HEADER_BYTES]
        has_header = first & 0x0F == zlib.DEFLATED and (256 * first + second) % 31 == 0
        return zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS


def decompressor_for(content_encoding: str | None) -> Decompressor | None:
    """Returns a decompressor for the body of a response, or None if the body is not compressed.

    Args:
        content_encoding: The value of the header `Content-Encoding`, or None.

    Raises:
        UnsupportedEncoding: The body is compressed in another way.
    """
    encoding = (content_encoding or "").strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip", "deflate"):
        return Decompressor(is_gzip=encoding != "deflate")
    raise UnsupportedEncoding(encoding)


def decompress_whole(decompressor: Decompressor, body: bytes, max_bytes: int) -> Generator[None, None, bytes]:
    """Decompresses a whole body, and yields after each step of at most a millisecond. `run_in_slices` runs it.

    It does not check that the body has ended where it should; see `Decompressor.finish`.

    Args:
        decompressor: A new decompressor.
        body: The compressed body.
        max_bytes: The maximum size of the body after decompression, in bytes.

    Raises:
        BrokenCompression: The body cannot be decompressed.
        DecompressedTooLarge: The body has more than `max_bytes` bytes.
    """
    decompressor.feed(body)
    parts: list[bytes] = []
    size = 0
    while part := decompressor.next_part():
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise DecompressedTooLarge
        yield
    return b"".join(parts)


def decompressed_beginning(body: bytes, content_encoding: str | None) -> bytes:
    """Returns the beginning of a whole body in plain text, or `b""` if the body cannot be decompressed.

    Args:
        body: The body as it was received. If it is not compressed, it is returned whole.
        content_encoding: The value of the header `Content-Encoding`, or None.
    """
    try:
        decompressor = decompressor_for(content_encoding)
        if decompressor is None:
            return body
        decompressor.feed(body)
        return decompressor.next_part()
    except (BrokenCompression, UnsupportedEncoding):
        return b""
