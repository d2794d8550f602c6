"""Keeps the gateway's own keys for the servers out of what clients get.

Some servers quote the key that they refuse, and the clients of a gateway must not learn that key. Only errors are
searched: any other answer is passed on byte for byte, because no server writes a key into it. In an error, only the
secrets are replaced, so an error without a secret is passed on byte for byte as well. An error that cannot be searched,
because it cannot be decompressed, is replaced by an error of the gateway.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from typing import Final

from lmbridge._tasks import run_in_slices
from lmbridge.client.error_body import Redact
from lmbridge.gateway.gateway_errors import Problem
from lmbridge.transport.decompression import (
    BrokenCompression,
    DecompressedTooLarge,
    UnsupportedEncoding,
    decompress_whole,
    decompressor_for,
)

_STEP: Final = 512 * 1024
"""The number of characters that are searched before other tasks get their turn. It takes about ten milliseconds."""
_OVERLAP: Final = 64 * 1024
"""The number of characters at the end of a step that the next step searches again, because a secret may lie across the
boundary. No secret is longer, even if it is escaped."""
_LARGEST_DECOMPRESSED: Final = 16 * 1024**2
"""The maximum size of a compressed error after decompression, in bytes. A larger error is not passed on."""


def redacted_bytes(text: bytes, redact: Redact) -> bytes:
    """Returns a text without secrets. All other bytes are kept, even if they are not UTF-8."""
    return redact(text.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


async def redacted_body(
    status: int, headers: list[tuple[str, str]], body: bytes, redact: Redact
) -> tuple[list[tuple[str, str]], bytes]:
    """Returns the headers and the body of an error without secrets.

    A compressed body with a secret is returned without compression.

    Args:
        status: The HTTP status of the error.
        headers: The headers that are passed on. `Content-Length` must not be among them.
        body: The whole body as the server has sent it.
        redact: Replaces the secrets.

    Raises:
        Problem: The body cannot be searched, because it cannot be decompressed or would be too large.
    """
    headers = [(name, redact(value)) for name, value in headers]
    # Several of these headers mean the same as one that lists their values.
    encoding = ", ".join(value for name, value in headers if name.lower() == "content-encoding")
    plain = await run_in_slices(_decompressed(body, encoding))
    if plain is None:
        raise Problem(
            status if status >= 400 else 502,
            f"the server answered {status}: its body cannot be read",
            code="upstream_error",
            hint="send the header Accept-Encoding: identity",
        )
    redacted = b"".join([part async for part in _redacted_parts(plain, redact)])
    if redacted == plain:
        return headers, body
    return [each for each in headers if each[0].lower() != "content-encoding"], redacted


async def _redacted_parts(plain: bytes, redact: Redact) -> AsyncIterator[bytes]:
    text, rest = plain.decode("utf-8", "surrogateescape"), ""
    for begin in range(0, len(text), _STEP):
        rest = redact(rest + text[begin : begin + _STEP])
        if begin + _STEP < len(text):
            yield rest[:-_OVERLAP].encode("utf-8", "surrogateescape")
            rest = rest[-_OVERLAP:]
            await asyncio.sleep(0)
    yield rest.encode("utf-8", "surrogateescape")


def _decompressed(body: bytes, content_encoding: str) -> Generator[None, None, bytes | None]:
    """Returns a body after decompression, or None if it cannot be decompressed or would be too large."""
    try:
        decompressor = decompressor_for(content_encoding)
        if decompressor is None:
            return body
        return (yield from decompress_whole(decompressor, body, _LARGEST_DECOMPRESSED))
    except (BrokenCompression, DecompressedTooLarge, UnsupportedEncoding):
        return None
