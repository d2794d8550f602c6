"""Proxies: which are used, and that their faults are not blamed on the server."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockBuster

from lmbridge import (
    LLMClient,
    LLMConnectionError,
    LLMError,
    LLMResponseError,
    LLMTimeoutError,
    LLMValidationError,
    Timeouts,
)
from lmbridge.config import environment_proxy
from tests.support import MESSAGES
from tests.transport.support import no_such_host

SERVER = "lm.example:1234"
DATA = Path(__file__).parents[1] / "data" / "tls"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answering(answer: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    return serve


async def never_answering(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read()


@asynccontextmanager
async def proxy(serve: Serve, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Serves connections of a proxy, and closes each when `serve` returns."""
    ended: list[asyncio.Future[None]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended.append(end := asyncio.get_running_loop().create_future())
        with suppress(OSError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        end.set_result(None)

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"http{'' if context is None else 's'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await asyncio.gather(*ended)


async def error_through(proxy_url: str, scheme: str, **options: Any) -> LLMError:
    async with LLMClient(f"{scheme}://{SERVER}", proxy=proxy_url, max_retries=0, **options) as client:
        with pytest.raises(LLMError) as caught:
            await client.chat_completion(MESSAGES)
    return caught.value


@pytest.mark.parametrize(
    ("answer", "message", "hint"),
    [
        (b"407 Proxy Authentication Required", "the proxy requires a user and a password", "http://user:password@host"),
        (b"403 Forbidden", "the proxy refused to connect to the server: status 403 Forbidden", "NO_PROXY"),
        (b"405 Method Not Allowed", "the proxy refused to connect to the server: status 405", "NO_PROXY"),
        (b"502 Bad Gateway", "the proxy could not connect to the server: status 502", "check api_base"),
        (b"503 Service Unavailable", "the proxy could not connect to the server: status 503", "check api_base"),
        (b"504 Gateway Timeout", "the proxy could not connect to the server: status 504", "check api_base"),
    ],
)
async def test_a_proxy_that_refuses_is_named(answer: bytes, message: str, hint: str) -> None:
    async with proxy(answering(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % answer)) as url:
        error = await error_through(url, "https")
    assert isinstance(error, LLMConnectionError)
    assert error.message.startswith(message)
    assert hint in (error.hint or "")


@pytest.mark.parametrize("answer", [b"502 Bad Gateway", b"503 x", b"504 x"])
async def test_a_proxy_that_cannot_reach_the_server_is_tried_again(answer: bytes, no_waits: list[float]) -> None:
    refusal = b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % answer
    async with proxy(answering(refusal)) as url, LLMClient(f"https://{SERVER}", proxy=url, max_retries=1) as client:
        with pytest.raises(LLMConnectionError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.context["attempts"] == 2


async def test_a_proxy_that_requires_a_password_for_http_is_named() -> None:
    async with proxy(answering(b"HTTP/1.1 407 x\r\nContent-Length: 0\r\n\r\n")) as url:
        error = await error_through(url, "http")
    assert isinstance(error, LLMResponseError)
    assert error.message == "the proxy answered 407 with an empty body"
    assert "http://user:password@host:port" in (error.hint or "")


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("answer", [b"\x05\x00garbage\r\n", b"SSH-2.0-x\r\n", b""], ids=["binary", "ssh", "nothing"])
@pytest.mark.parametrize("from_environment", [False, True])
async def test_a_proxy_that_does_not_speak_http_is_named(
    answer: bytes,
    scheme: str,
    from_environment: bool,
    monkeypatch: pytest.MonkeyPatch,
    no_blocking_calls: BlockBuster,
) -> None:
    # aiohttp 3.13 looks for a .netrc file in the event loop.
    no_blocking_calls.deactivate()
    async with proxy(answering(answer)) as url:
        if from_environment:
            monkeypatch.setenv(f"{scheme.upper()}_PROXY", url)
            async with LLMClient(f"{scheme}://{SERVER}", trust_env=True, max_retries=0) as client:
                with pytest.raises(LLMConnectionError) as caught:
                    await client.chat_completion(MESSAGES)
            error: LLMError = caught.value
        else:
            error = await error_through(url, scheme)
    assert "the proxy" in error.message
    assert "the server" not in error.message
    assert "check HTTP(S)_PROXY" in (error.hint or "")


async def test_a_tunnel_that_breaks_is_not_blamed_on_the_address() -> None:
    async with proxy(answering(b"HTTP/1.1 200 Connected\r\n\r\n")) as url:
        error = await error_through(url, "https")
    assert error.message.startswith("could not connect to the server through the proxy")
    assert "check that the proxy can reach the server" in (error.hint or "")


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_is_not_there_is_named(scheme: str) -> None:
    async with proxy(never_answering) as url:
        pass
    error = await error_through(url, scheme)
    assert error.message.startswith("the proxy cannot be reached: ")


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_name_of_a_proxy_that_cannot_be_resolved_is_not_that_of_the_server(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", no_such_host)
    error = await error_through("http://proxy.example:3128", scheme)
    assert error.message.startswith("the host name of the proxy cannot be resolved: ")


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_certificate_of_a_proxy_is_not_that_of_the_server(scheme: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(DATA / "cert.pem", DATA / "key.pem")
    async with proxy(never_answering, context) as url:
        error = await error_through(url, scheme)
    assert error.message.startswith("the proxy's certificate is not trusted: it is self-signed")
    assert "cafile=" in (error.hint or "")


async def test_a_proxy_that_never_opens_a_connection_counts_as_connecting() -> None:
    async with proxy(never_answering) as url:
        error = await error_through(url, "https", timeout=Timeouts(connect=0.1))
    assert isinstance(error, LLMTimeoutError)
    assert error.phase == "connect"
    assert error.message == "the proxy did not open a connection to the server within 0.1 s"


async def test_a_request_that_a_proxy_may_have_passed_on_is_not_sent_again(no_waits: list[float]) -> None:
    async with proxy(answering(b"")) as url, LLMClient(f"http://{SERVER}", proxy=url, max_retries=2) as client:
        with pytest.raises(LLMConnectionError) as caught:
            await client.create_response("Hi", model="m")
    assert caught.value.context["attempts"] == 1


# Proxies of the environment


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("socks5://127.0.0.1:1", "is a socks5 proxy, which lmbridge does not support"),
        ("socks4://127.0.0.1:1", "is a socks4 proxy, which lmbridge does not support"),
        ("ftp://127.0.0.1:1", "must be the URL of an HTTP proxy"),
    ],
)
def test_an_unsupported_proxy_of_the_environment_is_refused(
    url: str, message: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if aiohttp-socks were not installed.
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", url)
    with pytest.raises(LLMValidationError, match=f"^HTTP_PROXY or HTTPS_PROXY in the environment {message}"):
        LLMClient(f"{scheme}://{SERVER}", trust_env=True)
    LLMClient(f"{scheme}://{SERVER}")
    LLMClient("http://127.0.0.1:1234", trust_env=True)
    monkeypatch.setenv("NO_PROXY", "lm.example")
    LLMClient(f"{scheme}://{SERVER}", trust_env=True)


async def test_a_proxy_of_the_environment_may_use_tls(
    monkeypatch: pytest.MonkeyPatch, no_blocking_calls: BlockBuster
) -> None:
    # aiohttp 3.13 looks for a .netrc file in the event loop.
    no_blocking_calls.deactivate()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(DATA / "cert.pem", DATA / "key.pem")
    body = b'{"choices": [{"message": {"content": "Hi"}}]}'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with proxy(answering(head + body), context) as url:
        monkeypatch.setenv("HTTP_PROXY", url)
        trusted = ssl.create_default_context(cafile=str(DATA / "cert.pem"))
        async with LLMClient(f"http://{SERVER}", trust_env=True, ssl=trusted) as client:
            assert (await client.chat_completion(MESSAGES))["choices"]


def test_a_proxy_of_the_environment_may_lack_its_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    assert environment_proxy(f"https://{SERVER}/v1") == "http://proxy.example:3128"
    assert environment_proxy(f"http://{SERVER}/v1") is None
    monkeypatch.setenv("NO_PROXY", "lm.example")
    assert environment_proxy(f"https://{SERVER}/v1") is None


@pytest.mark.parametrize(
    ("beginning", "repeated"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 100),
        (b"HTTP/1.1 200 OK\r\nX-A: ", b"x" * 20_000),
    ],
    ids=["100 Continue", "headers", "header"],
)
async def test_an_endless_answer_to_connect_is_an_error_that_names_the_limit(beginning: bytes, repeated: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(beginning)
        while True:
            writer.write(repeated)
            await writer.drain()

    async with proxy(serve) as url:
        error = await error_through(url, "https", timeout=Timeouts(connect=None))
    assert isinstance(error, LLMConnectionError)
    messages = ("the head of the proxy's answer is larger than 64 KiB", "the proxy's answer has more than 128 headers")
    assert error.message.startswith(messages)
    assert "proxy=" in (error.hint or "")


async def test_a_proxy_for_plain_http_can_be_used_again_and_again() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(3):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
            body = b'{"choices": [{"message": {"content": "%b"}}]}' % (b"x" * 100_000)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            await writer.drain()

    async with proxy(serve) as url, LLMClient(f"http://{SERVER}", proxy=url, max_retries=0) as client:
        for _ in range(3):
            assert (await client.chat_completion(MESSAGES))["choices"][0]["message"].get("content") == "x" * 100_000
