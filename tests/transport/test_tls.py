"""Connections over TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import aiohttp
import pytest
import pytest_asyncio

from lmbridge import LLMClient, LLMConnectionError, LLMError
from lmbridge.testing import MockTransport
from lmbridge.transport import faults
from lmbridge.transport.session import _describe_reason
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


@asynccontextmanager
async def listening(certificate: str = "cert.pem") -> AsyncIterator[Listener]:
    """Serves https with a certificate of tests/data/tls. All of them have the same key."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(DATA / certificate, DATA / "key.pem")
    listener = Listener()
    server = await asyncio.start_server(listener.answer, "127.0.0.1", 0, ssl=context)
    listener.port = server.sockets[0].getsockname()[1]
    yield listener
    server.close()


@pytest_asyncio.fixture
async def https() -> AsyncIterator[Listener]:
    async with listening() as listener:
        yield listener


def trusting(*authorities: str, strict: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    for name in authorities:
        context.load_verify_locations(DATA / name)
    if strict:
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


async def error_of(api_base: str, context: ssl.SSLContext | None = None, *, stream: bool = False) -> LLMError:
    async with LLMClient(api_base, ssl=context, max_retries=0) as client:
        with pytest.raises(LLMError) as caught:
            await client.chat_completion(MESSAGES, stream=stream)
    return caught.value


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


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("certificate", "context", "host", "reason", "hint"),
    [
        ("cert.pem", trusting("cert.pem"), "localhost", "is for another host name", "a name in api_base that the cert"),
        ("expired.pem", trusting("expired.pem"), "127.0.0.1", "has expired", "renew it on the server"),
        ("cert.pem", trusting(), "127.0.0.1", "is self-signed", "cafile=...) with this certificate"),
        ("signed_by_authority.pem", trusting(), "127.0.0.1", "an authority that this machine does not know", "cafile="),
        (
            "signed_by_authority.pem",
            trusting("authority_without_key_usage.pem", strict=True),
            "127.0.0.1",
            "key usage",
            "ssl.VERIFY_X509_STRICT",
        ),
    ],
    ids=["wrong name", "expired", "self-signed", "unknown authority", "no key usage"],
)
async def test_the_error_says_what_is_wrong_with_a_certificate(
    certificate: str, context: ssl.SSLContext, host: str, reason: str, hint: str, stream: bool
) -> None:
    async with listening(certificate) as listener:
        error = await error_of(f"https://{host}:{listener.port}", context, stream=stream)
    assert isinstance(error, LLMConnectionError)
    assert error.message.startswith("the server's certificate is not trusted: ")
    assert reason in error.message
    assert hint in (error.hint or "")
    assert "CERTIFICATE_VERIFY_FAILED" in error.message
    assert isinstance(error.__cause__, ssl.SSLError)


def test_a_certificate_error_without_a_cause_is_described() -> None:
    # aiohttp 3.13.0 does not set `os_error` in this class.
    # The error needs no key for its text.
    error = aiohttp.ClientConnectorCertificateError(None, certificate_error(18))  # type: ignore[arg-type]
    assert _describe_reason(error).endswith("certificate verify failed (the reason)")


def certificate_error(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    error.verify_code = code
    error.verify_message = "the reason"
    return error


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (9, "is not valid yet"),
        (10, "has expired"),
        (18, "is self-signed"),
        (19, "is self-signed"),
        (20, "authority that this machine does not know"),
        (21, "authority that this machine does not know"),
        (23, "has been revoked"),
        (62, "is for another host name"),
        (64, "is for another host name"),
        (85, "breaks a rule for certificates"),
        (89, "breaks a rule for certificates"),
        (92, "breaks a rule for certificates"),
        (1, "the server's certificate is not trusted: "),
    ],
)
async def test_the_code_of_openssl_decides_the_error(code: int, reason: str) -> None:
    error = certificate_error(code)
    assert reason in f"{faults.tls_fault(error).message}: "

    def refuse(_request: object) -> NoReturn:
        raise error

    async with LLMClient(transport=MockTransport(refuse)) as client:
        with pytest.raises(LLMConnectionError) as caught:
            await client.chat_completion(MESSAGES)
    assert reason in f"{caught.value.message}: "
    assert "the reason" in caught.value.message


@pytest.mark.parametrize(
    ("reason", "message", "hint"),
    [
        ("WRONG_VERSION_NUMBER", "the server does not speak TLS", "it must begin with http://"),
        ("HTTP_REQUEST", "the server does not speak TLS", "it must begin with http://"),
        ("RECORD_LAYER_FAILURE", "the server does not speak TLS", "it must begin with http://"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "the server refused the TLS handshake", "load_cert_chain()"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "the server refused the TLS handshake", "load_cert_chain()"),
        ("UNSUPPORTED_PROTOCOL", "no version or cipher of TLS in common", "update the server"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "no version or cipher of TLS in common", "update the server"),
        ("TLSV1_UNRECOGNIZED_NAME", "does not know its host name", "use a name in api_base"),
        ("BAD_SIGNATURE", "the TLS handshake failed", "check whether api_base is https or http"),
    ],
)
def test_the_reason_of_openssl_decides_the_error(reason: str, message: str, hint: str) -> None:
    error = ssl.SSLError(1, f"[SSL: {reason}] something")
    fault = faults.tls_fault(error)
    assert message in fault.message
    assert hint in (fault.hint or "")


async def test_http_to_a_server_with_tls_says_so(https: Listener) -> None:
    error = await error_of(f"http://127.0.0.1:{https.port}")
    assert "https://" in (error.hint or "")


@pytest.mark.parametrize(
    "answer",
    [
        b"\x15\x03\x01\x00\x02\x02\x46",
        b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n<html>400 The plain HTTP request was sent to HTTPS port</html>",
        b"HTTP/1.1 400 Bad Request\r\n\r\nReason: You're speaking plain HTTP to an SSL-enabled server port.<br />",
    ],
    ids=["alert", "Go", "nginx", "Apache"],
)
async def test_the_answer_of_a_server_with_tls_to_http_has_a_hint(answer: bytes) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        error = await error_of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert "api_base must begin with https://" in (error.hint or "")
