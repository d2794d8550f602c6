"""Connections over TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from lmbridge import LLMClient, LLMConnectionError
from tests.support import MESSAGES

DATA = Path(__file__).parents[1] / "data" / "tls"
BODY = b'{"choices": [{"message": {"content": "Hi"}}]}'


class Listener:
    """A server whose connections are counted; it answers each with the same bytes."""

    def __init__(self) -> None:
        self.connections = 0
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(BODY), BODY))
        await writer.drain()
        writer.close()


@pytest_asyncio.fixture
async def https() -> AsyncIterator[Listener]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(DATA / "cert.pem", DATA / "key.pem")
    listener = Listener()
    server = await asyncio.start_server(listener.answer, "127.0.0.1", 0, ssl=context)
    listener.port = server.sockets[0].getsockname()[1]
    yield listener
    server.close()


async def test_a_private_certificate_is_trusted_with_a_context(https: Listener) -> None:
    context = ssl.create_default_context(cafile=str(DATA / "cert.pem"))
    async with LLMClient(f"https://127.0.0.1:{https.port}", ssl=context) as client:
        assert (await client.chat_completion(MESSAGES))["choices"][0]["message"]["content"] == "Hi"


async def test_an_untrusted_certificate_is_an_error_at_once(https: Listener, no_waits: list[float]) -> None:
    async with LLMClient(f"https://127.0.0.1:{https.port}") as client:
        with pytest.raises(
            LLMConnectionError, match=r"certificate is not trusted: .*CERTIFICATE_VERIFY_FAILED.*pass ssl=ssl\.create"
        ) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.context["attempts"] == 1


async def test_https_to_a_server_without_tls_is_an_error_at_once(no_waits: list[float]) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    async with server, LLMClient(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(
            LLMConnectionError,
            match=r"the TLS handshake failed: .*WRONG_VERSION_NUMBER.*whether api_base is https or http",
        ) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.context["attempts"] == 1
