"""Plain replies that break off: the error has in `body` what had arrived, whatever broke them off."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest

from lmbridge import (
    LLMClient,
    LLMConnectionError,
    LLMError,
    LLMResponseError,
    LLMTimeoutError,
    TaskCancelledError,
    Timeouts,
)
from lmbridge.testing import Behaviour, Exchange, MockRequest, MockResponse, MockTransport, ScriptedServer, raw, reset
from lmbridge.transport import Transport
from tests.support import MESSAGES
from tests.transport.test_forwarding import request

HALF = b'{"choices": [{"message": {"content": "Hel'
JSON = {"Content-Type": "application/json"}


def half(after: Behaviour | None = None, *, status: int = 200, body: bytes = HALF, encoding: str = "") -> Behaviour:
    """Sends the first half of a body, and then does something else. By default it closes the connection."""

    async def send(exchange: Exchange) -> None:
        fields = {"Content-Length": "10000000", "Content-Type": "application/json"}
        await exchange.start(status, fields | ({"Content-Encoding": encoding} if encoding else {}), chunked=False)
        await exchange.send(body)
        await (after or _hang_up)(exchange)

    return send


async def _hang_up(exchange: Exchange) -> None:
    exchange.hang_up()


async def _wait(exchange: Exchange) -> None:
    await exchange.client_left()


async def error_of(server: ScriptedServer, *, stream: bool = False, **options: Any) -> LLMError:
    async with LLMClient(server.api_base, max_retries=0, **options) as client:
        with pytest.raises(LLMError) as caught:
            await client.chat_completion(MESSAGES, stream=stream)
    return caught.value


streamed = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


@streamed
@pytest.mark.parametrize("status", [200, 201, 400, 500])
@pytest.mark.parametrize("after", [None, reset()], ids=["end", "reset"])
async def test_a_broken_connection(
    scripted_server: ScriptedServer, after: Behaviour | None, status: int, stream: bool
) -> None:
    scripted_server.script(half(after, status=status))
    error = await error_of(scripted_server, stream=stream)
    assert isinstance(error, LLMConnectionError)
    assert (error.status, error.body, error.partial) == (status, HALF.decode(), None)


@streamed
@pytest.mark.parametrize("limit", ["first_byte", "total"])
async def test_a_time_limit(scripted_server: ScriptedServer, limit: str, stream: bool) -> None:
    scripted_server.script(half(_wait))
    error = await error_of(scripted_server, stream=stream, timeout=Timeouts(**{limit: 0.2}))
    assert isinstance(error, LLMTimeoutError)
    assert (error.phase, error.status, error.body) == (limit, 200, HALF.decode())


@streamed
async def test_the_client_is_closed(scripted_server: ScriptedServer, stream: bool) -> None:
    scripted_server.script(half(_wait))
    async with LLMClient(scripted_server.api_base) as client:
        asked = asyncio.create_task(client.chat_completion(MESSAGES, stream=stream))
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
        await asyncio.sleep(0.05)  # until the client has read the first half
        await client.close()
        with pytest.raises(TaskCancelledError) as caught:
            await asked
    assert (caught.value.status, caught.value.body) == (200, HALF.decode())


@streamed
async def test_a_reply_that_is_too_large(scripted_server: ScriptedServer, stream: bool) -> None:
    scripted_server.script(half(body=b'{"text": "' + 2_000_000 * b"x"))
    error = await error_of(scripted_server, stream=stream, max_reply_bytes=1024**2)
    assert isinstance(error, LLMResponseError)
    assert error.body is not None
    assert error.body.startswith('{"text": "xxx')
    assert 200_000 < len(error.body) <= 250_000


@streamed
async def test_a_compressed_reply(scripted_server: ScriptedServer, stream: bool) -> None:
    text = json.dumps({"text": list(range(1000))}).encode()
    compressed = gzip.compress(text)
    scripted_server.script(half(body=compressed[: len(compressed) // 2], encoding="gzip"))
    body = (await error_of(scripted_server, stream=stream)).body
    assert body is not None
    assert len(body) > 100
    assert text.decode().startswith(body)


async def test_a_body_that_may_still_be_a_stream(scripted_server: ScriptedServer) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
    scripted_server.script(raw(head, b"\n\n", b"da"))
    assert (await error_of(scripted_server, stream=True)).body == "\n\nda"


async def test_nothing_had_arrived(scripted_server: ScriptedServer) -> None:
    scripted_server.script(half(body=b""))
    error = await error_of(scripted_server)
    assert (error.status, error.body) == (200, None)


async def test_an_earlier_attempt_does_not_count(no_waits: list[float]) -> None:
    def break_off() -> Iterator[bytes]:
        yield HALF
        raise LLMConnectionError("the network is down")

    answers: list[Any] = [MockResponse(events=break_off(), headers=JSON), ConnectionRefusedError()]

    def handler(_: MockRequest) -> Any:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    async with LLMClient(model="m", transport=MockTransport(handler), max_retries=1) as client:
        with pytest.raises(LLMConnectionError, match="could not connect") as caught:
            await client.chat_completion(MESSAGES)
    assert (caught.value.status, caught.value.body, len(no_waits)) == (None, None, 1)


async def test_a_key_in_it_is_not_shown(scripted_server: ScriptedServer) -> None:
    scripted_server.script(half(body=b'{"you sent": "sk-secret-12345678", "and'))
    body = (await error_of(scripted_server, api_key="sk-secret-12345678")).body
    assert body is not None
    assert "sk-secret" not in body
    assert body.endswith('"and')


@pytest.mark.parametrize("encoding", ["", "gzip"])
async def test_a_response_that_is_passed_on(scripted_server: ScriptedServer, encoding: str) -> None:
    body = gzip.compress(HALF) if encoding else HALF
    scripted_server.script(half(body=body, encoding=encoding))
    async with Transport(scripted_server.api_base) as transport:
        with pytest.raises(LLMConnectionError) as caught:
            await transport.forward(request(max_retries=0))
    assert caught.value.body == HALF.decode()


async def test_a_transport_without_a_socket() -> None:
    def break_off() -> Iterator[bytes]:
        yield HALF
        raise ConnectionResetError

    response = MockResponse(events=break_off(), headers=JSON)
    async with LLMClient(model="m", transport=MockTransport(lambda _: response), max_retries=0) as client:
        with pytest.raises(LLMConnectionError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.body == HALF.decode()
