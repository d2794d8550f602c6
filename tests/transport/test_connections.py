"""Connections: how many there are, which are kept, what replaces a dead one, and which proxies are used."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
import gzip
import logging
import time

import aiohttp
import msgspec
import pytest
from blockbuster import BlockBuster

from lmbridge import (
    Limits,
    LLMClient,
    LLMConnectionError,
    LLMResponseError,
    LLMStreamError,
)
from lmbridge.testing import Exchange, ScriptedServer, answer, hang_up, raw, reply, stall
from tests.support import MESSAGES, piece, read_text, replaced, turns
from tests.transport.support import ask, no_such_host


async def test_two_extra_connections_serve_requests_that_do_not_queue(
    scripted_server: ScriptedServer,
) -> None:
    gate = asyncio.Event()

    async def held(exchange: Exchange) -> None:
        await gate.wait()
        await reply(200, {"data": []})(exchange)

    scripted_server.script(stall(after=[piece("a")]))
    scripted_server.on_path("/v1/models", held)
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:  # noqa: SIM117 - it reads better apart
        async with await client.chat_completion(MESSAGES, stream=True):
            lists = [asyncio.create_task(client.list_models()) for _ in range(3)]
            await scripted_server.wait_until(lambda: len(scripted_server.requests) == 3)
            gate.set()
            assert await asyncio.gather(*lists) == [[]] * 3
            assert scripted_server.connections == 3  # the third list waited for a connection of the other two


@pytest.mark.parametrize(("idle", "connections"), [(3.5, 1), (4.5, 2)])
async def test_a_connection_that_was_idle_for_nearly_five_seconds_is_not_used_again(
    scripted_server: ScriptedServer, client: LLMClient, monkeypatch: pytest.MonkeyPatch, idle: float, connections: int
) -> None:
    await client.chat_completion(MESSAGES)
    now = time.monotonic
    monkeypatch.setattr("aiohttp.connector.monotonic", lambda: now() + idle)
    await client.chat_completion(MESSAGES)
    assert scripted_server.connections == connections


async def test_of_several_dead_connections_one_is_replaced_silently(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()
    scripted_server.default = answer("Hi", gate=gate)
    async with LLMClient(scripted_server.api_base, max_retries=0) as client:
        asked = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(3)]
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 3)
        gate.set()
        await asyncio.gather(*asked)
        scripted_server.hang_up_reused = 3
        with pytest.raises(LLMConnectionError, match="closed the connection without an answer"):
            await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 5


@pytest.mark.parametrize("encoding", [b"identity", b"gzip"])
async def test_a_stream_whose_reader_was_slow_arrives_complete(
    scripted_server: ScriptedServer, client: LLMClient, encoding: bytes
) -> None:
    text = "word " * 1_000_000  # more than the sockets and aiohttp hold
    events = b"".join(
        b"data: %s\n\n" % msgspec.json.encode(piece(text[at : at + 20_000])) for at in range(0, len(text), 20_000)
    )
    body = events + b"data: [DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: %s\r\nConnection: close\r\n\r\n"
    scripted_server.script(raw(head % encoding + (gzip.compress(body) if encoding == b"gzip" else body)))
    async with await client.chat_completion(MESSAGES, stream=True) as stream:
        first = await anext(stream)
        await turns(100)
        rest = [chunk["choices"][0]["delta"]["content"] or "" async for chunk in stream]
    assert (first["choices"][0]["delta"]["content"] or "") + "".join(rest) == text


async def test_a_refused_connection_is_not_replaced_silently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connects = 0
    connect = aiohttp.TCPConnector._create_connection

    async def counted(*arguments: object) -> object:
        nonlocal connects
        connects += 1
        return await connect(*arguments)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr("aiohttp.TCPConnector._create_connection", counted)
    async with ScriptedServer() as server:
        client = LLMClient(server.api_base, max_retries=0)
        await client.chat_completion(MESSAGES)
        await client.chat_completion(MESSAGES)  # on a kept connection
    assert connects == 1
    with pytest.raises(LLMConnectionError, match=r"could not connect|without an answer"):
        await client.chat_completion(MESSAGES)
    with pytest.raises(LLMConnectionError, match="could not connect"):
        await client.chat_completion(MESSAGES)
    assert connects <= 3
    await client.close()


async def test_proxies_of_the_environment_are_ignored_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.origin)
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", no_such_host)
        async with LLMClient("http://lm.example") as client:
            with pytest.raises(LLMConnectionError, match="cannot be resolved"):
                await client.chat_completion(MESSAGES)
        assert not proxy.requests


async def test_loopback_by_name_is_never_proxied(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = replaced(scripted_server.origin, "127.0.0.1", "localhost")
    async with ScriptedServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.origin)
        async with LLMClient(origin, trust_env=True) as client:
            assert (await client.chat_completion(MESSAGES))["choices"]
        assert not proxy.requests


async def test_a_proxy_that_cannot_be_reached_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, no_blocking_calls: BlockBuster
) -> None:
    # aiohttp 3.13 looks for a .netrc file in the event loop.
    no_blocking_calls.deactivate()
    async with ScriptedServer() as gone:
        pass
    monkeypatch.setenv("HTTP_PROXY", gone.origin)
    async with LLMClient("http://lm.example", trust_env=True, max_retries=0) as client:
        with pytest.raises(LLMConnectionError, match=r"the proxy cannot be reached: .*check HTTP\(S\)_PROXY"):
            await client.chat_completion(MESSAGES)


async def test_cookies_are_not_kept(scripted_server: ScriptedServer) -> None:
    scripted_server.default = reply(200, {"choices": [{"message": {}}]}, {"Set-Cookie": "session=1; Path=/"})
    async with LLMClient(replaced(scripted_server.origin, "127.0.0.1", "localhost")) as client:
        for _ in range(2):
            await client.chat_completion(MESSAGES)
    assert "cookie" not in scripted_server.requests[1].headers


async def test_a_request_has_a_user_agent(scripted_server: ScriptedServer, client: LLMClient) -> None:
    await client.chat_completion(MESSAGES)
    assert scripted_server.requests[0].headers["user-agent"].startswith("lmbridge/")


@pytest.mark.parametrize("stream", [True, False])
async def test_broken_framing_ends_a_request_at_once(
    scripted_server: ScriptedServer, client: LLMClient, stream: bool
) -> None:
    kind = b"text/event-stream" if stream else b"application/json"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % kind
    scripted_server.script(raw(head, b"2\r\n{}\r\n", b"zz\r\nno chunk\r\n"))

    async def ask() -> None:
        async with asyncio.timeout(5):
            if stream:
                await read_text(await client.chat_completion(MESSAGES, stream=True))
            else:
                await client.chat_completion(MESSAGES)

    with pytest.raises(LLMStreamError if stream else LLMConnectionError, match="the connection broke"):
        await ask()


async def test_a_get_is_not_sent_again_on_a_fresh_connection(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", hang_up())
    async with LLMClient(scripted_server.api_base, max_retries=0) as client:
        with pytest.raises(LLMConnectionError):
            await client.list_models()
        assert await client.health_check() is False
    assert len(scripted_server.requests) == 2


async def test_a_kept_connection_that_dies_in_a_reply_is_not_replaced_silently(scripted_server: ScriptedServer) -> None:
    async with LLMClient(scripted_server.api_base, max_retries=0) as client:
        await client.chat_completion(MESSAGES)
        scripted_server.script(raw(b"HTTP/1.1 200 OK\r\nContent-Le"))
        with pytest.raises(LLMConnectionError):
            await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 2


async def test_requests_one_after_another_share_a_connection(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    for stream in (True, False, True, False):
        await ask(client, stream)
    await client.list_models()
    assert scripted_server.connections == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_kept_connection_that_is_dead_is_replaced_silently(
    scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    async with LLMClient(scripted_server.api_base, max_retries=0) as client:
        await ask(client, stream)
        scripted_server.hang_up_reused = 1
        with caplog.at_level(logging.INFO, "lmbridge"):
            assert await ask(client, stream) == "Hello from the scripted server."
        assert [request.refused for request in scripted_server.requests] == [False, True, False]
        assert client.stats().retries == 0
    assert [record.levelname for record in caplog.records] == ["INFO"]


async def test_a_fresh_connection_that_breaks_is_not_replaced_silently(scripted_server: ScriptedServer) -> None:
    scripted_server.script(hang_up())
    async with LLMClient(scripted_server.api_base, max_retries=0) as client:
        with pytest.raises(LLMConnectionError, match="closed the connection without an answer"):
            await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 1


async def test_the_silent_resend_happens_once(scripted_server: ScriptedServer) -> None:
    async with LLMClient(scripted_server.api_base, max_retries=0) as client:
        await ask(client, stream=False)
        scripted_server.hang_up_reused = 1
        scripted_server.script(hang_up())
        with pytest.raises(LLMConnectionError):
            await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 3


async def test_sixty_streams_in_a_row_succeed_although_the_server_closes_its_connections() -> None:
    async with (
        ScriptedServer(close_after_stream=True) as server,
        LLMClient(server.api_base, max_retries=0) as client,
    ):
        for _ in range(60):
            assert await ask(client, stream=True) == "Hello from the scripted server."


async def test_a_redirect_is_an_error_that_names_its_target(scripted_server: ScriptedServer) -> None:
    async with ScriptedServer() as elsewhere:
        target = f"http://user:secret@{elsewhere.origin.removeprefix('http://')}/v1/chat/completions?token=secret"
        scripted_server.default = reply(307, b"", {"Location": target})
        async with LLMClient(scripted_server.api_base, api_key="my-key") as client:
            for stream in (True, False):
                with pytest.raises(LLMResponseError, match=r"redirects \(307\) to http") as caught:
                    await ask(client, stream)
                assert elsewhere.origin in str(caught.value)
                assert "secret" not in str(caught.value)
                assert caught.value.status == 307
        assert not elsewhere.requests


@pytest.mark.parametrize("trust_env", [True, False])
async def test_loopback_is_never_proxied(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, trust_env: bool
) -> None:
    async with ScriptedServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.origin)
        async with LLMClient(scripted_server.api_base, trust_env=trust_env) as client:
            await ask(client, stream=False)
        assert not proxy.requests


async def test_a_proxy_is_used_only_if_the_environment_is_trusted(
    monkeypatch: pytest.MonkeyPatch, no_blocking_calls: BlockBuster
) -> None:
    no_blocking_calls.deactivate()  # aiohttp 3.13 looks for a .netrc in the event loop
    async with ScriptedServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.origin)
        proxy.default = answer("through the proxy")
        proxy.on_path("http://lm.example/v1/chat/completions", proxy.default)
        async with LLMClient("http://lm.example", trust_env=True) as client:
            assert await ask(client, stream=False) == "through the proxy"
