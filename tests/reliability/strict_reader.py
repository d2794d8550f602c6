"""A second, strict reading of a response, which decides what a changed byte can still mean.

HTTP and JSON have no checksums: a response in which a byte of a text is another one is again a valid response, and no
client can notice that. So a change is exempt from the rule that it has to be noticed exactly if the changed bytes are,
to the letter of RFC 9112, RFC 8259 and the HTML standard (9.2.6), the same kind of response: a successful status, a
body that ends where its framing says, decompressed without an error (gzip has a checksum), valid UTF-8, and a JSON
object. A response without which the client can do may also be a refusal, or something that is not JSON: not every
server has that endpoint. An event stream has known fields only, a JSON object in each event, and ends with a finish
reason, `[DONE]` or the event that ends a response; what follows that does not matter, neither the framing nor the
checksum.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import attrs
import h11

from tests.reliability.steps import Step

_FIELDS = ("data", "event", "id", "retry", "")


class NotStrictError(Exception):
    """The bytes are not a valid response."""


@attrs.frozen
class StrictResponse:
    """A response as its bytes say it."""

    status: int
    content_type: str
    body: bytes
    """The body after decompression."""


def read_response(sent: bytes, *, ended: bool, is_stream: bool) -> StrictResponse:
    """Reads a response.

    Args:
        sent: All bytes that were sent on the connection.
        ended: Whether the server has closed the connection afterwards.
        is_stream: Whether the body is an event stream. It ends with its last event, so what the framing says after that
            does not matter: then this returns the body up to where the framing is broken.

    Raises:
        NotStrictError: There is no complete response.
    """
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "test")]))
    connection.send(h11.EndOfMessage())
    body, status, fields = b"", 0, dict[bytes, bytes]()
    try:
        connection.receive_data(sent)
        if ended:
            connection.receive_data(b"")
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                # h11 accepts any two digits.
                if event.http_version not in (b"1.0", b"1.1"):
                    raise h11.RemoteProtocolError(f"there is no HTTP {event.http_version.decode()}")
                status, fields = event.status_code, dict(event.headers)
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            else:
                raise h11.RemoteProtocolError("there is no complete response")
        if connection.trailing_data[0] and not is_stream:
            raise h11.RemoteProtocolError("bytes follow the end of the response")
    except h11.ProtocolError as error:
        if not (is_stream and status):
            raise NotStrictError(str(error)) from error
    encoding = fields.get(b"content-encoding", b"").decode("latin-1").strip().lower()
    content_type = fields.get(b"content-type", b"").decode("latin-1")
    return StrictResponse(status, content_type, _decompressed(body, encoding, is_stream=is_stream))


def _decompressed(body: bytes, encoding: str, *, is_stream: bool) -> bytes:
    if not encoding or encoding == "identity":
        return body
    if encoding not in ("gzip", "x-gzip"):
        raise NotStrictError(f"unknown encoding {encoding}")
    decompressor = zlib.decompressobj(wbits=31)
    try:
        whole = decompressor.decompress(body)
    except zlib.error as error:
        raise NotStrictError(str(error)) from error
    if is_stream:
        return whole
    if not decompressor.eof or decompressor.unused_data:
        raise NotStrictError("the compressed data does not end with the body")
    return whole


def check_response(step: Step, response: StrictResponse) -> None:
    """Checks that a response is one that the endpoint can have.

    Raises:
        NotStrictError: It is not.
    """
    is_successful = 200 <= response.status < 300
    if step.is_optional and not (is_successful and response.content_type.lower().startswith("application/json")):
        # This server does not have the endpoint.
        return
    if not is_successful:
        raise NotStrictError(f"status {response.status}")
    if not step.is_stream:
        _object(_text(response.body))
        return
    for block in response.body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n"):
        # What follows the end of an answer does not matter.
        if _is_last_event(_text(block)):
            return
    raise NotStrictError("no event ends the stream")


def _is_last_event(block: str) -> bool:
    """Returns whether the lines of an event end the answer."""
    lines = [line.partition(":") for line in block.split("\n") if line]
    if unknown := [name for name, _, _ in lines if name not in _FIELDS]:
        raise NotStrictError(f"there is no field {unknown[0]!r}")
    data = "\n".join(value.removeprefix(" ") for name, _, value in lines if name == "data")
    if not data or data == "[DONE]":
        return bool(data)
    event = _object(data)
    return event.get("type") == "response.completed" or any(
        isinstance(choice, dict) and choice.get("finish_reason") for choice in event.get("choices", ())
    )


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise NotStrictError(str(error)) from error


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise NotStrictError(str(error)) from error
    if not isinstance(value, dict):
        raise NotStrictError("the value is not an object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
