"""Who may use a gateway, and what hostile requests get."""

from __future__ import annotations

import asyncio
import gzip
import hmac
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from lmbridge import Limits, LLMValidationError
from lmbridge._http_access import is_same_key
from lmbridge.gateway import Gateway
from lmbridge.gateway.access import Access
from lmbridge.gateway.gateway_errors import Problem
from lmbridge.testing import Exchange, ScriptedServer, raw, reply
from lmbridge.transport import Transport
from tests.gateway.support import BODY, CHAT, PATHS, STREAM, Client, fetch, fetch_json
from tests.support import turns

KEY = "key-of-the-gateway"


@pytest_asyncio.fixture
async def locked(scripted_server: ScriptedServer) -> AsyncIterator[Gateway]:
    """A gateway that needs a key, in front of a server that needs another one."""
    async with Gateway(scripted_server.api_base, api_key=KEY, upstream_api_key="key-of-the-server") as gateway:
        yield gateway


def error_of(body: bytes) -> Any:
    """Returns the error in a response."""
    error = json.loads(body)["error"]
    assert error["message"]
    return error


# Names and origins


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "LOCALHOST:1", "127.0.0.2:80", "[::1]:8080", "localhost.", "my-pc.lan:9"]
)
async def test_the_names_of_the_gateway_are_accepted(scripted_server: ScriptedServer, host: str) -> None:
    async with Gateway(scripted_server.api_base, allowed_hosts=["My-PC.lan"]) as gateway:
        client = await Client.connect(gateway)
        client.send(f"GET /health HTTP/1.1\nHost: {host}")
        assert await client.status() == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "", "10.0.0.1", "x@localhost", "localhost:x"],
)
@pytest.mark.parametrize("path", [CHAT, "/status.json", "/status", "/health", "/v1/models", "/metrics"])
async def test_other_names_are_refused(scripted_server: ScriptedServer, gateway: Gateway, host: str, path: str) -> None:
    client = await Client.connect(gateway)
    if path == CHAT:
        client.send(f"POST {path} HTTP/1.1\nHost: {host}\nContent-Length: {len(BODY)}", BODY)
    else:
        client.send(f"GET {path} HTTP/1.1\nHost: {host}")
    assert await client.status() == 403
    assert not scripted_server.requests


async def test_a_request_without_a_host_is_refused(gateway: Gateway) -> None:
    client = await Client.connect(gateway)
    client.send("GET /status.json HTTP/1.0")
    assert await client.status() in {400, 403}


async def test_a_target_with_another_host_changes_nothing(gateway: Gateway) -> None:
    client = await Client.connect(gateway)
    client.send("GET http://evil.example/status.json HTTP/1.1\nHost: evil.example")
    assert await client.status() == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "file://", "http://[", ""])
async def test_pages_of_other_sites_are_refused(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession, origin: str
) -> None:
    status, headers, body = await fetch(http, gateway, headers={"Origin": origin})
    assert (status, error_of(body)["code"]) == (403, "origin_not_allowed")
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert not scripted_server.requests


async def test_the_own_page_is_not_another_site(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    status, _, _ = await fetch(http, gateway, headers={"Origin": gateway.origin})
    assert status == 200


async def test_preflights_are_refused(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    headers = {"Origin": gateway.origin, "Access-Control-Request-Method": "POST"}
    status, answered, _ = await fetch(http, gateway, method="OPTIONS", headers=headers)
    assert status == 403
    assert not [name for name in answered if name.lower().startswith("access-control")]


def test_an_address_that_all_can_reach_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "my-pc.lan"):
        with pytest.raises(LLMValidationError, match="everybody on the network"):
            Gateway("http://127.0.0.1:1", host=host)
        Gateway("http://127.0.0.1:1", host=host, api_key="x")
    for host in ("127.0.0.1", "localhost", "::1"):
        Gateway("http://127.0.0.1:1", host=host)


def test_addresses_are_accepted_by_a_gateway_for_the_network_and_names_are_not() -> None:
    access = Access("0.0.0.0", "key", ["my-pc"])
    access.check_source("GET", {"Host": "192.168.1.2:8080"})
    access.check_source("GET", {"Host": "my-pc:8080"})
    with pytest.raises(Problem):
        access.check_source("GET", {"Host": "evil.example"})


# Keys


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer  {KEY} "}, {"X-Api-Key": KEY}],
)
@pytest.mark.parametrize("path", PATHS)
async def test_the_key_opens_and_is_not_passed_on(
    scripted_server: ScriptedServer, locked: Gateway, http: aiohttp.ClientSession, headers: dict[str, str], path: str
) -> None:
    scripted_server.script(reply(200, {}))
    status, _, _ = await fetch(http, locked, path, headers=headers)
    assert status == 200
    sent = scripted_server.requests[-1].headers
    assert sent["Authorization"] == "Bearer key-of-the-server"
    assert "X-Api-Key" not in sent


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"},
     {"X-Api-Key": KEY[:-1]}, {"X-Api-Key": f"{KEY}x"}, {"Authorization": "Bearer \u00e9"}],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, "/status.json", "/metrics", "/v1/models", "/v1/models/x", "/nothing"])
async def test_without_the_key_nothing_is_told(
    scripted_server: ScriptedServer, locked: Gateway, http: aiohttp.ClientSession, path: str, headers: dict[str, str]
) -> None:
    method = "POST" if path == CHAT else "GET"
    status, answered, body = await fetch(http, locked, path, method=method, headers=headers)
    error = error_of(body)
    assert (status, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")
    assert answered["WWW-Authenticate"] == "Bearer"
    assert not scripted_server.requests
    assert KEY not in body.decode()


async def test_health_and_the_page_need_no_key(locked: Gateway, http: aiohttp.ClientSession) -> None:
    for path in ("/health", "/status"):
        status, _, body = await fetch(http, locked, path, method="GET")
        assert status == 200
        assert b"key-of-the" not in body


async def test_keys_of_clients_are_passed_on_where_nobody_else_has_one(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    headers = {"Authorization": "Bearer own", "X-Api-Key": "own too"}
    await fetch(http, gateway, headers=headers)
    await fetch(http, gateway, "/v1/models", method="GET", headers=headers)
    for request in scripted_server.requests[-2:]:
        assert (request.headers["Authorization"], request.headers["X-Api-Key"]) == ("Bearer own", "own too")


async def test_a_key_for_the_server_replaces_those_of_clients(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    async with Gateway(scripted_server.api_base, upstream_api_key="key-of-the-server") as gateway:
        await fetch(http, gateway, headers={"Authorization": "Bearer own", "X-Api-Key": "own"})
        sent = scripted_server.requests[-1].headers
        assert sent["Authorization"] == "Bearer key-of-the-server"
        assert "X-Api-Key" not in sent


async def test_a_key_for_the_server_in_another_header_replaces_those_of_clients(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    async with (
        Transport(scripted_server.api_base, headers={"x-api-key": "key-of-the-server"}) as transport,
        Gateway(transport) as gateway,
    ):
        await fetch(http, gateway, headers={"Authorization": "Bearer own", "X-Api-Key": "own"})
        sent = scripted_server.requests[-1].headers
        assert sent["X-Api-Key"] == "key-of-the-server"
        assert "Authorization" not in sent


async def test_keys_are_never_shown(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    url = scripted_server.api_base.replace("http://", "http://user:password-in-url@")
    async with Gateway(url, api_key=KEY, max_retries=0) as gateway:
        headers = {"Authorization": f"Bearer {KEY}"}
        scripted_server.script(reply(200, {}))
        bodies = [await fetch(http, gateway, headers=headers)]
        client = await Client.connect(gateway)
        client.send(f"GET /status.json HTTP/1.1\nHost: localhost\nAuthorization: Bearer \x01{KEY}")
        assert await client.status() == 400
        async with http.get(f"{gateway.origin}/status.json", headers=headers) as response:
            bodies.append((response.status, response.headers, await response.read()))
        async with http.get(f"{gateway.origin}/metrics", headers=headers) as response:
            bodies.append((response.status, response.headers, await response.read()))
        await scripted_server.close()
        bodies.append(await fetch(http, gateway, headers=headers))
        assert bodies[-1][0] == 502
        shown = repr((bodies, gateway, gateway.stats(), caplog.text))
        assert "password-in-url" not in shown
        assert KEY not in shown


# Hostile requests


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"not JSON", "invalid_json"),
        (b'{"model": "x"', "invalid_json"),
        (b'{"model": "x"} {}', "invalid_json"),
        (b"[]", "invalid_json"),
        (b"null", "invalid_json"),
        (b'"model"', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"model": ' + b"[" * 100_000, "invalid_json"),
        (b'{"model": 1}', "invalid_model"),
        (b'{"model": ["a"]}', "invalid_model"),
        (b'{"model": {"a": 1}}', "invalid_model"),
        (b'{"model": true}', "invalid_model"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_a_body_without_a_model_is_refused(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession, path: str, body: bytes, code: str
) -> None:
    status, headers, answered = await fetch(http, gateway, path, body)
    assert (status, headers["Content-Type"]) == (400, "application/json")
    error = error_of(answered)
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert json.loads(answered).get("type") == ("error" if path == "/v1/messages" else None)
    assert not scripted_server.requests


TARGETS = [
    "/", "/v1", "/v1/", "/v1/chat", "//v1/chat/completions", "/v1/../status.json", "/v1/%2e%2e/status.json",
    "/v1/chat%2Fcompletions", "/v1/chat/completions/", "/V1/chat/completions", "/api/v0/models", "/props", "/v1/files",
    "/status.json/", "/../../etc/passwd", "/v1/models/../../props", "*", "/status.html",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "TRACE", "BREW"])
async def test_everything_else_is_a_clear_404(scripted_server: ScriptedServer, gateway: Gateway, method: str) -> None:
    for target in TARGETS:
        client = await Client.connect(gateway)
        client.send(f"{method} {target} HTTP/1.1\nHost: localhost\nContent-Length: 0\nConnection: close")
        assert await client.status() in {400, 404}, target
        rest = await client.rest()
        if b"application/json" in rest and method != "HEAD":
            assert error_of(rest.partition(b"\r\n\r\n")[2])["code"] in {"unknown_url", "model_not_found"}
    assert {request.path for request in scripted_server.requests} <= {"/v1/models"}


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
async def test_generations_take_only_post(gateway: Gateway, http: aiohttp.ClientSession, method: str) -> None:
    for path in PATHS:
        status, _, body = await fetch(http, gateway, path, method=method)
        assert (status, error_of(body)["code"]) == (405, "method_not_allowed")


async def test_a_body_that_is_too_large_is_refused_before_it_is_sent(gateway: Gateway) -> None:
    client = await Client.connect(gateway)
    client.send(f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Length: {64 * 1024 * 1024 + 1}\nExpect: 100-continue")
    assert await client.status() == 413


async def test_bodies_that_are_too_large_without_saying_so(
    scripted_server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    async with Gateway(scripted_server.api_base, max_body_bytes=1000) as gateway:
        padded = BODY + b" " * (1000 - len(BODY))
        for body, headers, expected in [
            (padded, {}, 200),
            (padded + b" ", {}, 413),
            (gzip.compress(padded), {"Content-Encoding": "gzip"}, 200),
            (gzip.compress(BODY + b" " * 100_000), {"Content-Encoding": "gzip"}, 413),
            (gzip.compress(BODY)[:-9], {"Content-Encoding": "gzip"}, 400),
            (BODY, {"Content-Encoding": "gzip"}, 400),
            (BODY, {"Content-Encoding": "br"}, 415),
        ]:
            status, _, answered = await fetch(http, gateway, CHAT, body, headers=headers)
            assert status == expected, answered

        async def parts() -> AsyncIterator[bytes]:
            yield padded
            yield b" "

        async with http.post(gateway.origin + CHAT, data=parts()) as response:
            assert response.status == 413


async def test_a_client_that_waits_for_100_continue_gets_it(gateway: Gateway) -> None:
    client = await Client.connect(gateway)
    client.send(f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Length: {len(BODY)}\nExpect: 100-continue")
    assert await client.status() == 100
    await client.reader.readline()
    client.writer.write(BODY)
    assert await client.status() == 200


@pytest.mark.slow
async def test_slow_clients_are_not_waited_for(scripted_server: ScriptedServer) -> None:
    async with Gateway(scripted_server.api_base, client_timeout=1) as gateway:
        silent, half_head, half_body, idle = [await Client.connect(gateway) for _ in range(4)]
        half_head.writer.write(b"POST /v1/chat")
        half_body.send(f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Length: 1000", b'{"model":')
        idle.send("GET /health HTTP/1.1\nHost: localhost")
        assert await idle.status() == 200
        assert await half_body.status() == 408
        for client in (silent, half_head, half_body, idle):
            await client.rest()


async def test_a_client_that_does_not_read_is_cut_off(scripted_server: ScriptedServer) -> None:
    async def endless(exchange: Exchange) -> None:
        await exchange.start(200, {"Content-Type": "text/event-stream"})
        while True:
            await exchange.send(b"data: " + b"x" * 100_000 + b"\n\n")

    scripted_server.script(endless)
    async with Gateway(scripted_server.api_base, limits=Limits(), client_timeout=1) as gateway:
        client = await Client.connect(gateway)
        client.post(STREAM)
        await scripted_server.wait_until(lambda: scripted_server.aborts)
        while gateway.stats().in_flight:
            await turns()


@pytest.mark.parametrize("status", [200, 400])
async def test_a_client_that_does_not_read_the_end_is_cut_off(
    scripted_server: ScriptedServer, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    answer = b'{"x": "' + b"x" * 20_000_000 + b'"}'
    head = b"HTTP/1.1 %d Odd\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(answer))
    scripted_server.script(raw(head, answer))
    async with Gateway(scripted_server.api_base, limits=Limits(), client_timeout=1) as gateway:
        client = await Client.connect(gateway)
        client.post(BODY)
        while "its connection is closed" not in caplog.text:
            await turns()
        while gateway.stats().in_flight:
            await turns()


async def test_headers_that_cannot_be_passed_on(scripted_server: ScriptedServer, gateway: Gateway) -> None:
    client = await Client.connect(gateway)
    client.post(BODY, headers="X-Odd: \xff")
    assert await client.status() in {200, 400}
    client = await Client.connect(gateway)
    client.post(BODY, headers="X-Long: " + "x" * 100_000)
    assert await client.status() == 400


async def test_requests_with_two_lengths_are_refused(scripted_server: ScriptedServer, gateway: Gateway) -> None:
    for headers in ("Content-Length: 5", "Transfer-Encoding: chunked"):
        client = await Client.connect(gateway)
        client.post(BODY, headers=headers)
        assert await client.status() == 400
    assert not scripted_server.requests


async def test_the_answers_to_requests_in_one_packet_are_in_order(gateway: Gateway) -> None:
    client = await Client.connect(gateway)
    for path in ("/health", "/nothing", "/health"):
        client.send(f"GET {path} HTTP/1.1\nHost: localhost")
    received = b""
    while received.count(b"HTTP/1.1 ") < 3:
        received += await client.reader.read(1000)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"404", b"200"]


@pytest.mark.parametrize("guess", ["k" * 99, "x" * 100, "k" * 100_000, "\udcff"])
def test_a_key_takes_as_long_to_compare_wherever_it_differs(monkeypatch: pytest.MonkeyPatch, guess: str) -> None:
    # The function that compares is the standard library's; here it is enough that all keys go through it.
    compared: list[tuple[bytes, bytes]] = []

    def compare_digest(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    with pytest.raises(Problem):
        Access("127.0.0.1", "k" * 100).check_key({"X-Api-Key": guess})
    assert len(compared) == 1


@pytest.mark.parametrize("key", ["abc?", "abc\ufffd", "abc\u00ff"])
def test_a_byte_that_is_not_valid_utf8_matches_no_character_of_a_key(key: str) -> None:
    assert is_same_key(key, key)
    for sent in ("abc\udcff", "abc\ud83d"):
        assert not is_same_key(sent, key)


async def test_a_flood_of_connections_is_served(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    clients = await asyncio.gather(*(Client.connect(gateway) for _ in range(200)))
    for client in clients:
        client.writer.write(b"GET /hea")
    assert await fetch_json(http, gateway, "/health") == {"status": "ok"}
