"""Limits on the size of what a server sends: heads, headers, trailers, interim responses, and whole bodies."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import aiohttp
import pytest
from aiohttp import http_parser
from aiohttp.http_parser import HttpResponseParserPy

from lmbridge import LLMClient, LLMConnectionError, LLMError, LLMResponseError, LLMStreamError, LLMValidationError
from lmbridge.testing import Behaviour, Exchange, MockTransport, ScriptedServer, raw, reply, sse
from lmbridge.testing.mock_transport import MockResponse
from lmbridge.transport import Transport
from lmbridge.transport.faults import HEAD_TOO_LARGE, TOO_MANY_HEADERS, TOO_MUCH_FRAMING
from lmbridge.transport.head_guard import MAX_BYTES_WITHOUT_BODY
from lmbridge.transport.sse import SSEDecoder
from tests.support import MESSAGES, piece
from tests.transport.support import ask

OK: Final = b"HTTP/1.1 200 OK\r\n"
CHUNKED: Final = OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
streamed = pytest.mark.parametrize("stream", [False, True])
COUNTS_HEADERS: Final = "max_headers" in inspect.signature(aiohttp.ClientSession).parameters
"""Whether this aiohttp limits the number of headers."""
PARSER_REFUSES_EMPTY_LINES: Final = (
    "the server's answer is not valid HTTP: Bad status line ''"
    if http_parser.HttpResponseParser is HttpResponseParserPy
    else None
)
"""The error of aiohttp's parser in Python, which is used where the compiled one is missing."""


def endless(beginning: bytes, repeated: bytes) -> Behaviour:
    """Sends the same bytes again and again, until the client disconnects."""

    async def behave(exchange: Exchange) -> None:
        await exchange.raw(beginning)
        while True:
            await exchange.raw(repeated)

    return behave


async def error_of(server: ScriptedServer, stream: bool, **options: Any) -> LLMError:
    async with LLMClient(server.api_base, max_retries=0, **options) as client:
        with pytest.raises(LLMError) as caught:
            await ask(client, stream)
    await server.wait_until(lambda: not server.open_connections)
    return caught.value


# Heads

HEADS: Final = {
    "status line": (b"HTTP/1.1 200 ", b"x" * 20_000),
    "name of a header": (OK, b"x" * 20_000),
    "value of a header": (OK + b"X-A: ", b"x" * 20_000),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "103 Early Hints": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" * 1000),
    "empty lines": (b"", b"\r\n" * 10_000),
}


@streamed
@pytest.mark.parametrize(("beginning", "repeated"), HEADS.values(), ids=HEADS)
async def test_an_endless_head_is_an_error_that_names_the_limit(
    scripted_server: ScriptedServer, beginning: bytes, repeated: bytes, stream: bool
) -> None:
    scripted_server.script(endless(beginning, repeated))
    error = await error_of(scripted_server, stream)
    assert isinstance(error, LLMConnectionError)
    if error.message != PARSER_REFUSES_EMPTY_LINES:
        assert error.message == HEAD_TOO_LARGE.message
        assert "api_base" not in (error.hint or "")


@streamed
async def test_endless_headers_are_an_error_that_names_the_limit(scripted_server: ScriptedServer, stream: bool) -> None:
    scripted_server.script(endless(OK, b"X-A: b\r\n" * 100))
    error = await error_of(scripted_server, stream)
    assert error.message.startswith(
        "the server's answer has more than 128 headers or trailers"
        if COUNTS_HEADERS
        else "the head of the server's answer is larger than 64 KiB"
    )
    assert "api_base" not in (error.hint or "")


# Between two parts of a body

EVENTS: Final = OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FRAMING: Final = {
    "trailers": (b"0\r\n", b"X-A: b\r\n" * 100),
    "trailer": (b"0\r\n", b"x" * 20_000),
    "value of a trailer": (b"0\r\nX-A: ", b"x" * 20_000),
    "extension": (b"1;", b"x" * 20_000),
    "value of an extension": (b'1;a="', b"x" * 20_000),
    "zeros": (b"", b"0" * 20_000),
    "extension of the last chunk": (b"0;", b"x" * 20_000),
    "one large trailer": (b"1\r\n \r\n0\r\nX-A: " + b"x" * 1_000_000, b"x"),
}


@pytest.mark.parametrize(("beginning", "repeated"), FRAMING.values(), ids=FRAMING)
@pytest.mark.parametrize("head", [CHUNKED, EVENTS, EVENTS + b"2\r\n: \r\n"], ids=["reply", "events", "after a byte"])
@streamed
async def test_framing_without_end_is_an_error_that_names_the_limit(
    scripted_server: ScriptedServer, head: bytes, beginning: bytes, repeated: bytes, stream: bool
) -> None:
    scripted_server.script(endless(head + beginning, repeated))
    error = await error_of(scripted_server, stream)
    assert isinstance(error, LLMConnectionError | LLMStreamError)
    assert any(text in error.message for text in (TOO_MUCH_FRAMING.message, TOO_MANY_HEADERS.message))
    assert "api_base" not in (error.hint or "")


@streamed
@pytest.mark.parametrize("status", [400, 503])
async def test_framing_of_the_body_of_an_error_is_limited(
    scripted_server: ScriptedServer, status: int, stream: bool
) -> None:
    head = b"HTTP/1.1 %d x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n1;" % status
    scripted_server.script(endless(head, b"x" * 20_000))
    error = await error_of(scripted_server, stream)
    assert TOO_MUCH_FRAMING.message in str(error)


async def test_many_small_chunks_with_extensions_are_read(scripted_server: ScriptedServer) -> None:
    body = b'{"choices": [{"message": {"content": "Hi"}}]}' + b" " * 200
    chunks = b"".join(b"1;%b\r\n%c\r\n" % (b"x" * 1000, byte) for byte in body)
    head = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    scripted_server.default = raw(head + chunks + b"0\r\nX-A: b\r\n\r\n")
    async with LLMClient(scripted_server.api_base) as client:
        for _ in range(3):
            assert (await client.chat_completion(MESSAGES))["choices"][0]["message"].get("content") == "Hi"


@pytest.mark.parametrize("size", [9_000, MAX_BYTES_WITHOUT_BODY - 1000])
async def test_a_head_within_the_limit_is_read(scripted_server: ScriptedServer, size: int) -> None:
    body = b'{"choices": [{"message": {"content": "Hi"}}]}'
    head = OK + b"X-A: %b\r\nContent-Length: %d\r\n\r\n" % (b"x" * size, len(body))
    scripted_server.script(raw(head + body))
    async with LLMClient(scripted_server.api_base) as client:
        assert (await client.chat_completion(MESSAGES))["choices"]


@pytest.mark.parametrize("interim", [1, 100])
async def test_interim_responses_within_the_limit_are_skipped(scripted_server: ScriptedServer, interim: int) -> None:
    body = b'{"choices": [{"message": {"content": "Hi"}}]}'
    head = b"HTTP/1.1 100 Continue\r\n\r\n" * interim + OK + b"Content-Length: %d\r\n\r\n" % len(body)
    scripted_server.script(raw(head + body))
    async with LLMClient(scripted_server.api_base) as client:
        assert (await client.chat_completion(MESSAGES))["choices"]


async def test_a_large_body_that_arrives_with_its_head_is_read(scripted_server: ScriptedServer) -> None:
    text = "x" * 1_000_000
    scripted_server.default = reply(200, {"choices": [{"message": {"content": text}}]})
    async with LLMClient(scripted_server.api_base) as client:
        for _ in range(3):
            assert (await client.chat_completion(MESSAGES))["choices"][0]["message"].get("content") == text
    assert scripted_server.connections == 1


# Whole replies and errors


@streamed
@pytest.mark.parametrize("status", [200, 400, 503])
async def test_a_body_without_end_is_an_error_that_names_the_limit(
    scripted_server: ScriptedServer, status: int, stream: bool
) -> None:
    scripted_server.script(endless(b"HTTP/1.1 %d x\r\n\r\n" % status, b"x" * 10_000))
    error = await error_of(scripted_server, stream, max_reply_bytes=1024**2)
    assert isinstance(error, LLMResponseError)
    assert error.message == "the reply has more than 1 MiB (max_reply_bytes)"
    assert error.status == status
    assert "raise the client's max_reply_bytes" in (error.hint or "")


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


@streamed
@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", deflated)],
    ids=["gzip", "zlib", "raw"],
)
async def test_a_decompression_bomb_is_an_error_that_names_the_limit(
    scripted_server: ScriptedServer, encoding: str, compress: Callable[[bytes], bytes], status: int, stream: bool
) -> None:
    bomb = compress(bytes(8 * 1024**2))
    head = f"HTTP/1.1 {status} x\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(bomb)}\r\n\r\n"
    scripted_server.script(raw(head.encode() + bomb))
    error = await error_of(scripted_server, stream, max_reply_bytes=1000)
    assert error.message == "the reply has more than 1000 bytes (max_reply_bytes)"


async def test_other_tasks_run_while_a_body_is_decompressed(scripted_server: ScriptedServer) -> None:
    bomb = gzip.compress(bytes(16 * 1024**2))
    scripted_server.script(raw(OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb))
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with LLMClient(scripted_server.api_base, max_retries=0) as client:
        counter = asyncio.create_task(count())
        with pytest.raises(LLMResponseError):
            await client.chat_completion(MESSAGES)
        counter.cancel()
    # A step is 256 KiB.
    assert turns > 64


async def test_an_event_that_is_decompressed_is_limited_as_well(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.transport.events.SSEDecoder", partial(SSEDecoder, 1024**2))
    bomb = gzip.compress(b"data: " + bytes(4 * 1024**2))
    head = OK + b"Content-Type: text/event-stream\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    scripted_server.script(raw(head + bomb))
    error = await error_of(scripted_server, True)
    assert isinstance(error, LLMStreamError)
    assert "an event of more than 1048576 bytes" in error.message


async def test_a_stream_may_be_longer_than_a_reply(scripted_server: ScriptedServer) -> None:
    scripted_server.script(sse(*[piece("x" * 1000)] * 20, piece(finish_reason="stop")))
    async with LLMClient(scripted_server.api_base, max_reply_bytes=2000) as client:
        stream = await client.chat_completion(MESSAGES, stream=True)
        reply_ = await stream.collect()
    assert len(reply_["choices"][0]["message"].get("content") or "") == 20_000


async def test_white_space_in_place_of_a_stream_is_limited(scripted_server: ScriptedServer) -> None:
    scripted_server.script(endless(OK + b"\r\n", b"\r\n" * 10_000))
    error = await error_of(scripted_server, True, max_reply_bytes=100_000)
    assert error.message == "the reply has more than 100000 bytes (max_reply_bytes)"


async def test_a_mock_transport_has_the_limit_as_well() -> None:
    transport = MockTransport(lambda _request: MockResponse(body="x" * 2_000))
    transport._max_reply_bytes = 1_000
    async with LLMClient(transport=transport) as client:
        with pytest.raises(LLMResponseError, match=r"the reply has more than 1000 bytes \(max_reply_bytes\)"):
            await client.chat_completion(MESSAGES)


@pytest.mark.parametrize("size", [0, -1, 1.5, "1 MB", True])
def test_the_limit_must_be_a_positive_integer(size: Any) -> None:
    with pytest.raises(LLMValidationError, match="max_reply_bytes"):
        LLMClient(max_reply_bytes=size)


@pytest.mark.parametrize("size", [0, 1])
def test_the_limit_belongs_to_the_transport(size: int) -> None:
    with pytest.raises(LLMValidationError, match="max_reply_bytes cannot be combined with transport="):
        LLMClient(transport=Transport(), max_reply_bytes=size)


# Encodings


@streamed
@pytest.mark.parametrize("encoding", ["br", "zstd", "lz4", "gzip, br"])
async def test_an_unsupported_encoding_is_named(scripted_server: ScriptedServer, encoding: str, stream: bool) -> None:
    scripted_server.script(raw(OK + f"Content-Encoding: {encoding}\r\nContent-Length: 5\r\n\r\nabcde".encode()))
    error = await error_of(scripted_server, stream)
    assert isinstance(error, LLMResponseError)
    assert error.status == 200
    assert error.message.endswith(f"in a way that lmbridge does not support: {encoding}")
    assert "api_base" not in (error.hint or "")


@streamed
@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream"])
@pytest.mark.parametrize(
    ("body", "reason"),
    [(b"abcde", "incorrect header check"), (gzip.compress(b"{}" * 500)[:-5], "its end is missing")],
    ids=["not compressed", "cut off"],
)
async def test_a_body_that_cannot_be_decompressed_is_an_error(
    scripted_server: ScriptedServer, body: bytes, reason: str, content_type: str, stream: bool
) -> None:
    head = f"Content-Type: {content_type}\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
    scripted_server.script(raw(OK + head.encode() + body))
    error = await error_of(scripted_server, stream)
    assert isinstance(error, LLMConnectionError | LLMStreamError)
    assert error.message.startswith("the server's answer cannot be decompressed: ")
    assert reason in error.message


async def test_only_encodings_that_are_supported_are_announced(scripted_server: ScriptedServer) -> None:
    async with LLMClient(scripted_server.api_base) as client:
        await client.chat_completion(MESSAGES)
    assert scripted_server.requests[0].headers["Accept-Encoding"] == "gzip, deflate"
