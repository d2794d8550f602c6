"""SOCKS proxies, which need aiohttp-socks."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from blockbuster import BlockBuster

from lmbridge import LLMClient, LLMConnectionError, LLMTimeoutError, LLMValidationError, Timeouts
from lmbridge.testing import ScriptedServer, answer
from tests.support import MESSAGES, in_flight, read_text

needs_package = pytest.mark.skipif(importlib.util.find_spec("aiohttp_socks") is None, reason="needs aiohttp-socks")


class SocksServer:
    """A SOCKS5 proxy, with a user and a password if `auth` is set. It connects every name to 127.0.0.1."""

    def __init__(self) -> None:
        self.auth: tuple[str, str] | None = None
        self.asked: list[str] = []
        self.is_silent = False
        self.reply_code = 0
        self.url = ""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await self._serve(reader, writer)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, count = await reader.readexactly(2)
        methods = await reader.readexactly(count)
        if self.is_silent:
            await reader.read()
        method = 0 if self.auth is None else 2
        writer.write(bytes([5, method if method in methods else 255]))
        if self.auth is not None:
            await reader.readexactly(1)
            given = [(await reader.readexactly((await reader.readexactly(1))[0])).decode() for _ in self.auth]
            writer.write(bytes([1, tuple(given) != self.auth]))
        if self.reply_code:
            await reader.readexactly(4)
            writer.write(bytes([5, self.reply_code, 0, 1]) + bytes(6))
            return
        _, _, _, kind = await reader.readexactly(4)
        if kind == 3:
            host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        else:
            host = socket.inet_ntoa(await reader.readexactly(4))
        (port,) = struct.unpack("!H", await reader.readexactly(2))
        self.asked.append(host)
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.write(b"\x05\x05\x00\x01" + bytes(6))
            return
        writer.write(b"\x05\x00\x00\x01" + bytes(6))
        await asyncio.gather(_pump(reader, upstream_writer), _pump(upstream_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()


@pytest_asyncio.fixture
async def proxy() -> AsyncIterator[SocksServer]:
    proxy = SocksServer()
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.url = f"socks5://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield proxy


def port_of(server: ScriptedServer) -> str:
    return server.api_base.rpartition(":")[2]


@needs_package
@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
async def test_requests_and_streams_go_through_a_socks_proxy(
    proxy: SocksServer, scripted_server: ScriptedServer, scheme: str
) -> None:
    scripted_server.default = answer("Hello there")
    url = proxy.url.replace("socks5", scheme)
    async with LLMClient(f"http://lm.example:{port_of(scripted_server)}", proxy=url) as client:
        assert await client.ask("?") == "Hello there"
        assert await read_text(await client.chat_completion(MESSAGES, stream=True)) == "Hello there"
        async with await client.chat_completion(MESSAGES, stream=True) as stream:
            await anext(stream)
        assert in_flight(client) == 0
    assert set(proxy.asked) == {"lm.example"}
    assert scripted_server.requests[0].headers["Host"].startswith("lm.example:")


@needs_package
async def test_a_proxy_with_a_user_and_a_password(proxy: SocksServer, scripted_server: ScriptedServer) -> None:
    proxy.auth = ("me", "s3cret")
    base = f"http://lm.example:{port_of(scripted_server)}"
    async with LLMClient(base, proxy=proxy.url.replace("//", "//me:s3cret@")) as client:
        assert await client.ask("?")
    for login in ("", "me:wr0ng@"):
        async with LLMClient(base, proxy=proxy.url.replace("//", f"//{login}"), max_retries=2) as client:
            with pytest.raises(LLMConnectionError, match="the proxy requires a user and a password, or ref") as caught:
                await client.ask("?")
        assert caught.value.context["attempts"] == 1
        assert "socks5://user:password@host:port" in str(caught.value)
        assert "wr0ng" not in str(caught.value)
        assert "wr0ng" not in repr(client)


@needs_package
@pytest.mark.parametrize("is_passed", [True, False])
async def test_a_socks_proxy_is_not_asked_for_a_proxy_of_the_environment(
    proxy: SocksServer,
    scripted_server: ScriptedServer,
    is_passed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_blocking_calls: BlockBuster,
) -> None:
    # aiohttp 3.13 looks for a .netrc file in the event loop.
    no_blocking_calls.deactivate()
    (netrc := tmp_path / "netrc").write_text("machine lm.example login me password s3cret")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://env-proxy.test:3128" if is_passed else proxy.url)
    scripted_server.default = answer("Hello there")
    base = f"http://lm.example:{port_of(scripted_server)}"
    chosen = proxy.url if is_passed else None
    async with LLMClient(base, proxy=chosen, trust_env=True, max_retries=0) as client:
        assert await client.ask("?") == "Hello there"
        assert await read_text(await client.chat_completion(MESSAGES, stream=True)) == "Hello there"
    assert set(proxy.asked) == {"lm.example"}
    # The rest of the environment applies all the same.
    assert scripted_server.requests[0].headers["Authorization"].startswith("Basic ")


@needs_package
@pytest.mark.parametrize(("code", "attempts"), [(1, 2), (2, 1), (4, 2), (5, 2)])
async def test_a_proxy_that_forbids_the_address_is_not_asked_again(
    proxy: SocksServer, no_waits: list[float], code: int, attempts: int
) -> None:
    proxy.reply_code = code
    async with LLMClient("http://lm.example:1", proxy=proxy.url, max_retries=1) as client:
        with pytest.raises(LLMConnectionError, match=r"the proxy (refused|could not) ") as caught:
            await client.ask("?")
    assert caught.value.context["attempts"] == attempts


@needs_package
async def test_a_server_that_the_proxy_cannot_reach(proxy: SocksServer, no_waits: list[float]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        base = f"http://lm.example:{unused.getsockname()[1]}"
        async with LLMClient(base, proxy=proxy.url, max_retries=1) as client:
            with pytest.raises(LLMConnectionError, match="the proxy could not connect to the server: ") as caught:
                await client.ask("?")
    assert caught.value.context["attempts"] == 2
    assert "check api_base, and that the proxy can reach it" in str(caught.value)


@needs_package
async def test_a_proxy_that_nobody_runs() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"socks5://127.0.0.1:{unused.getsockname()[1]}"
        async with LLMClient("http://lm.example:1", proxy=url, max_retries=0) as client:
            with pytest.raises(LLMConnectionError, match="the proxy cannot be reached"):
                await client.ask("?")


@needs_package
async def test_a_proxy_that_never_answers_counts_as_connecting(proxy: SocksServer) -> None:
    proxy.is_silent = True
    timeouts = Timeouts(connect=0.1)
    async with LLMClient("http://lm.example:1", proxy=proxy.url, timeout=timeouts, max_retries=0) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await client.ask("?")
    assert caught.value.phase == "connect"


@needs_package
@pytest.mark.parametrize("url", ["socks5://", "socks6://127.0.0.1:1", "socks5://127.0.0.1:x", "socks"])
def test_an_invalid_proxy_is_refused(url: str) -> None:
    with pytest.raises(LLMValidationError, match=r"^proxy is not a valid URL; write it like"):
        LLMClient(proxy=url)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for scheme in ("socks4", "socks4a", "socks5", "socks5h"):
        with pytest.raises(
            LLMValidationError,
            match=f"^proxy is a {scheme} proxy, which lmbridge does not support by itself; pip install",
        ):
            LLMClient(proxy=f"{scheme}://me:s3cret@box:1080")
