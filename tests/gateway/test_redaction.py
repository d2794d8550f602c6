"""The gateway's own keys for the servers never reach a client, and nothing else of a response changes."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio

from lmbridge import Limits
from lmbridge.gateway import Gateway
from lmbridge.gateway.redaction import redacted_body
from lmbridge.testing import Behaviour, ScriptedServer, raw, reply
from tests.gateway.support import BODY, CHAT, PATHS, SSE_HEAD, STREAM, chunk, fetch

SECRET = "sk-upstream-secret"
QUOTING = {"error": {"message": f"Incorrect API key provided: {SECRET}", "code": SECRET}}
LEAK = json.dumps(QUOTING).encode()
CLEAN = LEAK.replace(SECRET.encode(), b"[api_key]")


@pytest_asyncio.fixture
async def keyed(scripted_server: ScriptedServer) -> AsyncIterator[Gateway]:
    """A gateway with a key for its server."""
    async with Gateway(scripted_server.api_base, upstream_api_key=SECRET, limits=Limits(), max_retries=0) as gateway:
        yield gateway


def whole(status: int, body: bytes, headers: bytes = b"Content-Type: application/json\r\n") -> Behaviour:
    """Returns a behaviour that sends a body with its length."""
    return raw(b"HTTP/1.1 %d X\r\n" % status + headers + b"Content-Length: %d\r\n\r\n" % len(body), body)


COMPRESSED = b"Content-Type: application/json\r\nContent-Encoding: gzip\r\n"
QUOTES = {
    "refused": whole(401, LEAK),
    "an error of the server": whole(500, LEAK),
    "status 200": whole(200, LEAK),
    "text": whole(401, LEAK, b"Content-Type: text/plain\r\n"),
    "compressed": whole(401, gzip.compress(LEAK), COMPRESSED),
    "a header": whole(401, CLEAN, b'WWW-Authenticate: Bearer error="%s"\r\n' % SECRET.encode()),
}


@pytest.mark.parametrize("behaviour", QUOTES.values(), ids=QUOTES)
@pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_a_key_that_the_server_quotes_is_replaced(
    scripted_server: ScriptedServer,
    keyed: Gateway,
    http: aiohttp.ClientSession,
    path: str,
    body: bytes,
    behaviour: Behaviour,
) -> None:
    scripted_server.script(behaviour)
    _, headers, received = await fetch(http, keyed, path, body)
    assert received == CLEAN
    assert SECRET not in str(headers)
    assert "Content-Encoding" not in headers


@pytest.mark.parametrize("behaviour", [QUOTES["refused"], QUOTES["compressed"], QUOTES["a header"]])
async def test_a_key_that_the_server_quotes_instead_of_its_models_is_replaced(
    scripted_server: ScriptedServer, keyed: Gateway, http: aiohttp.ClientSession, behaviour: Behaviour
) -> None:
    scripted_server.on_path("/v1/models", behaviour)
    status, headers, received = await fetch(http, keyed, "/v1/models", method="GET")
    assert (status, received) == (401, CLEAN)
    assert SECRET not in str(headers)


@pytest.mark.parametrize("end", [b"\n\n", b"\n", b""])
@pytest.mark.parametrize("has_length", [False, True])
@pytest.mark.parametrize("path", sorted({*PATHS} - {"/v1/embeddings"}))
async def test_a_key_in_the_event_of_an_error_is_replaced(
    scripted_server: ScriptedServer,
    keyed: Gateway,
    http: aiohttp.ClientSession,
    path: str,
    has_length: bool,
    end: bytes,
) -> None:
    # An answer is never changed.
    answer = b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % SECRET.encode()
    body = answer + b"data: " + LEAK + end
    if has_length:
        scripted_server.script(whole(200, body, b"Content-Type: text/event-stream\r\n"))
    else:
        scripted_server.script(raw(SSE_HEAD, chunk(body), b"0\r\n\r\n"))
    _, _, received = await fetch(http, keyed, path, STREAM)
    assert received == answer + b"data: " + CLEAN + end


@pytest.mark.parametrize(
    "body",
    [b'\xff{"error":"x"}\r\n', b'{"error": "' + b"y" * 2_000_000 + b'"}'],
    ids=["not UTF-8", "large"],
)
async def test_an_error_without_the_key_is_passed_on_byte_for_byte(
    scripted_server: ScriptedServer, keyed: Gateway, http: aiohttp.ClientSession, body: bytes
) -> None:
    for sent, headers in (
        (body, b""),
        (gzip.compress(body), b"Content-Encoding: gzip\r\n"),
    ):
        scripted_server.script(whole(400, sent, headers))
        status, _, received = await fetch(http, keyed, CHAT, BODY)
        assert (status, received) == (400, sent)


UNREADABLE = {
    "too large": (gzip.compress(b" " * (16 * 1024**2) + LEAK), b"gzip"),
    "another encoding": (LEAK, b"zstd"),
    "two encodings": (gzip.compress(LEAK), b"identity\r\nContent-Encoding: gzip"),
    "not compressed": (LEAK, b"gzip"),
}


@pytest.mark.parametrize(("body", "encoding"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize(("path", "sent"), [(CHAT, BODY), (CHAT, STREAM), ("/v1/messages", BODY), ("/v1/models", b"")])
async def test_an_error_that_cannot_be_read_is_not_passed_on(
    scripted_server: ScriptedServer,
    keyed: Gateway,
    http: aiohttp.ClientSession,
    path: str,
    sent: bytes,
    body: bytes,
    encoding: bytes,
) -> None:
    scripted_server.on_path(path, whole(401, body, b"Content-Encoding: %b\r\n" % encoding))
    status, headers, received = await fetch(http, keyed, path, sent, method="POST" if sent else "GET")
    assert (status, headers.get("Content-Encoding")) == (401, None)
    assert json.loads(received)["error"]["message"] == "the server answered 401: its body cannot be read"


async def test_a_key_is_found_wherever_it_is_in_a_large_error() -> None:
    for before in (10, 512 * 1024 - 5, 512 * 1024 - 64 * 1024, 1_100_000):
        body = b"y" * before + SECRET.encode() + b"z" * 700_000
        _, redacted = await redacted_body(401, [], body, lambda text: text.replace(SECRET, "[api_key]"))
        assert redacted == b"y" * before + b"[api_key]" + b"z" * 700_000


async def test_a_key_of_any_server_is_replaced(http: aiohttp.ClientSession) -> None:
    async with (
        ScriptedServer() as one,
        ScriptedServer() as two,
        Gateway([one.api_base, two.api_base], upstream_api_key=SECRET, limits=Limits()) as gateway,
    ):
        for server in (one, two):
            server.on_path(CHAT, reply(401, QUOTING))
        status, _, received = await fetch(http, gateway)
    assert (status, SECRET.encode() in received) == (401, False)
