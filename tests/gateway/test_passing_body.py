"""Bodies, statuses, headers and streams pass through the gateway byte for byte."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import itertools

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from lmbridge import Limits
from lmbridge.gateway import Gateway
from lmbridge.testing import Exchange, ScriptedServer, raw, reply, stall
from tests.gateway.support import BODY, CHAT, PATHS, SSE_HEAD, STREAM, Client, chunk, fetch
from tests.support import HALF

MODELS = "/v1/models"
ODD_BODIES = {
    "unknown fields": b'{"model": "test-model", "x_unknown": {"deep": [1, {"a": null}]}}',
    "order and whitespace": b'\n {"z" : 1,\t"model":"test-model" , "a":[ ] }\r\n ',
    "repeated keys": b'{"model": "other", "a": 1, "a": 2, "model": "test-model"}',
    "large numbers": b'{"model": "test-model", "seed": 123456789012345678901234567890, "t": 1E400, "u": 0.10}',
    "escapes": b'{"model": "test-model", "text": "\\u00e9\\/\\ud83d\\ude00 \xc3\xa9"}',
    "no model": b'{"prompt": "x"}',
    "null model": b'{"model": null}',
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", ODD_BODIES.values(), ids=ODD_BODIES)
async def test_a_request_reaches_the_server_as_it_is(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession, path: str, body: bytes
) -> None:
    scripted_server.script(reply(200, {"ok": True}))
    headers = {"Content-Type": "application/json; charset=utf-8", "X-Own": "1", "OpenAI-Beta": "b", "User-Agent": "me"}
    status, _, _ = await fetch(http, gateway, f"{path}?beta=true&x=%20y&x=2&empty=", body, headers=headers)
    assert status == 200
    [received] = scripted_server.requests
    assert received.body == body
    assert {name: received.headers[name] for name in headers} == headers
    assert received.path == path
    assert received.headers["Host"] == scripted_server.origin.removeprefix("http://")


REPLIES = {
    "JSON": (200, b"Content-Type: application/json\r\n", b' {"b": 1,  "a": 1.0, "a": 2}\n'),
    "created": (201, b"Content-Type: text/plain; charset=x\r\nX-Odd: a\r\nX-Odd: b\r\nX-Empty:\r\n", b"\xff\x00"),
    "no type": (200, b"", b"x"),
    "an error that is not JSON": (400, b"Content-Type: text/html\r\n", b"<html>no</html>"),
    "not found": (404, b"Content-Type: application/json\r\n", b'{"error":"x"}'),
    "a status of the server's own": (418, b"Retry-After: 7\r\n", b"teapot"),
    "empty": (200, b"Content-Type: application/json\r\n", b""),
    "redirect": (307, b"Location: http://example.com/\r\n", b""),
    "compressed": (200, b"Content-Type: application/json\r\nContent-Encoding: gzip\r\n", gzip.compress(b'{"a":1}')),
    "unknown compression": (200, b"Content-Encoding: zstd\r\n", b"\x28\xb5\x2f\xfd"),
    "a compressed error": (400, b"Content-Encoding: gzip\r\n", gzip.compress(b'{"error":"x"}')),
    "large": (200, b"Content-Type: application/json\r\n", b'{"x":"' + b"y" * 3_000_000 + b'"}'),
}


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])
@pytest.mark.parametrize(("status", "headers", "answer"), REPLIES.values(), ids=REPLIES)
async def test_a_response_reaches_the_client_as_it_is(
    scripted_server: ScriptedServer,
    gateway: Gateway,
    http: aiohttp.ClientSession,
    status: int,
    headers: bytes,
    answer: bytes,
    body: bytes,
) -> None:
    head = b"HTTP/1.1 %d Odd\r\nDate: Mon, 01 Jan 2001 00:00:00 GMT\r\nServer: odd/1\r\n" % status
    scripted_server.script(raw(head + headers + b"Content-Length: %d\r\n\r\n" % len(answer), answer))
    got_status, got_headers, got = await fetch(http, gateway, CHAT, body)
    assert (got_status, got) == (status, answer)
    expected = [line.split(b":", 1) for line in (head + headers).splitlines()[1:]]
    received = [(name.encode(), value.encode()) for name, value in got_headers.items()]
    for name, value in expected:
        assert (name, value.strip()) in received


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_arrives_as_the_server_sends_it(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession, path: str
) -> None:
    go_on = asyncio.Event()
    parts = [b"event: message_start\ndata: {}\n\n", b": ping\n\n", b"data: [DONE]\n\n"]

    async def behaviour(exchange: Exchange) -> None:
        await exchange.raw(SSE_HEAD)
        for part in parts:
            await exchange.raw(chunk(part))
            await go_on.wait()
            go_on.clear()
        await exchange.raw(b"0\r\n\r\n")

    scripted_server.script(behaviour)
    async with http.post(gateway.origin + path, data=STREAM) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        for part in parts:
            # Nothing of the next part has been sent yet.
            assert await response.content.readexactly(len(part)) == part
            go_on.set()
        assert await response.read() == b""


@given(
    body=st.lists(st.sampled_from([b"data: {}\n", b"\n", b"\r\n", b"x", b"\r", b": c\n", b"data: \xc3\xa9\n\n"])).map(
        b"".join
    ),
    cuts=st.lists(st.integers(0, 60)),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stream_is_the_same_however_it_is_cut(body: bytes, cuts: list[int]) -> None:
    async def run() -> None:
        async with ScriptedServer() as server, Gateway(server.api_base, limits=Limits()) as gateway:
            places = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
            pieces = [body[begin:end] for begin, end in itertools.pairwise(places)]

            async def behaviour(exchange: Exchange) -> None:
                await exchange.raw(SSE_HEAD)
                for piece in pieces:
                    await exchange.raw(chunk(piece))
                await exchange.raw(b"0\r\n\r\n")

            server.script(behaviour)
            async with aiohttp.ClientSession() as http:
                _, _, received = await fetch(http, gateway, CHAT, STREAM)
            assert received == body

    asyncio.run(run())


async def test_a_very_long_line_is_not_held_back(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    line = b"data: " + b"x" * 300_000

    async def behaviour(exchange: Exchange) -> None:
        await exchange.raw(SSE_HEAD + chunk(line))
        await asyncio.Event().wait()

    scripted_server.script(behaviour)
    async with http.post(gateway.origin + CHAT, data=STREAM) as response:
        assert (await response.content.readexactly(200_000)).startswith(b"data: xxx")


async def test_the_encodings_that_a_client_accepts_are_asked_for_where_the_gateway_can_read_them(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    for body, accepted, expected in [
        (BODY, "gzip, deflate, br, zstd", "gzip, deflate"),
        (BODY, "br", "identity"),
        (BODY, "gzip", "gzip"),
        (BODY, "GZIP;q=0.5, deflate; q=0.0, x-deflate", "gzip"),
        (STREAM, "gzip", "identity"),
    ]:
        await fetch(http, gateway, CHAT, body, headers={"Accept-Encoding": accepted})
        assert scripted_server.requests[-1].headers["Accept-Encoding"] == expected


async def test_headers_of_the_connection_are_not_passed_on(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    scripted_server.script(
        raw(
            b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nConnection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\n"
            b"Content-Length: 2\r\n\r\n{}"
        )
    )
    headers = [("Connection", "keep-alive"), ("Connection", "X-Mine"), ("X-Mine", "1"), ("TE", "trailers")]
    headers.append(("X-Lmbridge-Priority", "batch"))
    _, received, _ = await fetch(http, gateway, headers=CIMultiDict(headers))
    assert not {"X-Hop", "Keep-Alive"} & set(received)
    sent = scripted_server.requests[0].headers
    assert not {name for name in ("X-Mine", "TE", "X-Lmbridge-Priority", "Expect") if name in sent}


@pytest.mark.parametrize(
    ("path", "method", "body"), [(CHAT, "POST", BODY), (CHAT, "POST", STREAM), (MODELS, "GET", b"")]
)
@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("content_type", [b"application/json", b"text/event-stream"])
async def test_cors_headers_are_not_passed_on(
    scripted_server: ScriptedServer,
    gateway: Gateway,
    http: aiohttp.ClientSession,
    path: str,
    method: str,
    body: bytes,
    status: int,
    content_type: bytes,
) -> None:
    head = b"HTTP/1.1 %d X\r\nContent-Type: %b\r\nX-Odd: 1\r\nContent-Length: 9\r\n" % (status, content_type)
    cors = b"Access-Control-Allow-Origin: *\r\naccess-control-allow-headers: *\r\n\r\n"
    scripted_server.on_path(path, raw(head, cors, b"data: 1\n\n"))
    got_status, headers, _ = await fetch(http, gateway, path, body, method=method)
    assert (got_status, headers["X-Odd"]) == (status, "1")
    assert not [name for name in headers if name.lower().startswith("access-control-")]


async def test_a_compressed_request_is_passed_on_compressed(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    body = gzip.compress(BODY)
    await fetch(http, gateway, CHAT, body, headers={"Content-Encoding": "gzip"})
    [received] = scripted_server.requests
    assert received.body == body
    assert received.headers["Content-Encoding"] == "gzip"
    assert gateway.stats().by_model.keys() == {"test-model"}


async def test_a_chunked_request_is_passed_on(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    async def parts() -> object:
        yield BODY[:10]
        yield BODY[10:]

    async with http.post(gateway.origin + CHAT, data=parts()) as response:
        assert response.status == 200
    assert scripted_server.requests[0].body == BODY


async def test_the_body_of_a_request_is_not_kept_while_its_answer_arrives(
    scripted_server: ScriptedServer, gateway: Gateway
) -> None:
    scripted_server.script(stall(after=HALF))
    client = await Client.connect(gateway)
    client.post(STREAM)
    await client.reader.readuntil(b"data:")
    kept: list[str] = []
    for task in asyncio.all_tasks():
        awaited: object = task.get_coro()
        while inspect.iscoroutine(awaited):
            kept += [name for name, value in inspect.getcoroutinelocals(awaited).items() if value == STREAM]
            awaited = awaited.cr_await
    assert not kept
