"""Reads the three fields of a request's body that the gateway needs, and ignores all others."""

from __future__ import annotations

from collections.abc import Generator

import attrs
import msgspec

from lmbridge.gateway.gateway_errors import Problem
from lmbridge.transport.decompression import (
    BrokenCompression,
    DecompressedTooLarge,
    UnsupportedEncoding,
    decompress_whole,
    decompressor_for,
)


class _RequestOutline(msgspec.Struct):
    """The fields that are read. If a field is repeated, its last value counts, as it does for the servers."""

    model: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    stream: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    store: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


@attrs.frozen
class RequestFields:
    """What the gateway knows about a request of a client."""

    model: str | None
    """The model that the request names, or None if it leaves the choice to the server."""
    streams: bool
    """Whether the request asks for an event stream."""
    forbids_storing: bool
    """Whether the request says `"store": false`, so that the server must not keep the response."""


def read_fields(body: bytes, content_encoding: str | None, max_bytes: int) -> Generator[None, None, RequestFields]:
    """Returns the fields of a body, and yields after each step of its decompression. `run_in_slices` runs it.

    Args:
        body: The body as the client sent it.
        content_encoding: The value of the header `Content-Encoding`, or None.
        max_bytes: The maximum size of the body after decompression, in bytes.

    Raises:
        Problem: The body is missing, cannot be decompressed, is too large after decompression, or is not a JSON object,
            or its model is not a string.
    """
    if not body:
        raise Problem(400, "the request has no body", code="invalid_json", hint="send a JSON object with a model")
    text = yield from _decompressed_body(body, content_encoding, max_bytes)
    try:
        outline = msgspec.json.decode(text, type=_RequestOutline)
        model = None if outline.model is msgspec.UNSET else msgspec.json.decode(outline.model)
        stream = False if outline.stream is msgspec.UNSET else msgspec.json.decode(outline.stream)
        store = None if outline.store is msgspec.UNSET else msgspec.json.decode(outline.store)
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        message = f"the body of the request is not a JSON object: {exc}"
        raise Problem(400, message, code="invalid_json", hint="send a JSON object with a model") from exc
    if model is not None and not isinstance(model, str):
        raise Problem(400, "the model of the request is not a string", code="invalid_model", param="model")
    return RequestFields(model or None, stream is True, store is False)


def _decompressed_body(body: bytes, content_encoding: str | None, max_bytes: int) -> Generator[None, None, bytes]:
    try:
        decompressor = decompressor_for(content_encoding)
        if decompressor is None:
            return body
        text = yield from decompress_whole(decompressor, body, max_bytes)
        decompressor.finish()
    except UnsupportedEncoding as exc:
        message = f"the body of the request is compressed as {exc}, which the gateway cannot read"
        raise Problem(415, message, code="unsupported_encoding", hint="use gzip, deflate or no compression") from exc
    except BrokenCompression as exc:
        raise Problem(400, "the compressed body of the request is broken", code="invalid_encoding") from exc
    except DecompressedTooLarge as exc:
        raise body_too_large(max_bytes) from exc
    return text


def body_too_large(max_bytes: int) -> Problem:
    """Returns the problem of a request whose body has more than `max_bytes` bytes."""
    message = f"the body of the request has more than {max_bytes} bytes"
    return Problem(413, message, code="body_too_large", hint="send less, or raise the gateway's max_body_bytes")
