"""`FaultProxy` damages what a server sends exactly where it was told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import pytest_asyncio

from lmbridge import (
    LLMClient,
    LLMConnectionError,
    LLMStreamError,
    LLMTimeoutError,
    LLMValidationError,
    Timeouts,
    collect,
)
from lmbridge.testing import FaultKind, FaultProxy, ScriptedServer, WireFault, answer, forbid_real_requests, raw, stall
from lmbridge.testing.fault_proxy import _Damage
from tests.support import MESSAGES, piece

BYTES = b"abcdefghij"


@pytest_asyncio.fixture
async def proxy(scripted_server: ScriptedServer) -> AsyncIterator[FaultProxy]:
    """A proxy in front of the scripted server, which sends ten bytes that are not HTTP, and hangs up."""
    scripted_server.on_path("/", raw(BYTES))
    async with FaultProxy(scripted_server.origin) as proxy:
        yield proxy


async def received(proxy: FaultProxy, *, pieces: bool = False) -> list[bytes]:
    """Sends a request through the proxy, and returns what arrives until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.origin.rpartition(":")[2]))
    try:
        writer.write(b"POST / HTTP/1.0\r\n\r\n")
        parts: list[bytes] = []
        while data := await reader.read(100):
            parts.append(data)
        return parts if pieces else [b"".join(parts)]
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (None, BYTES),
        (WireFault("end", at=3), b"abc"),
        (WireFault("end", at=0), b""),
        (WireFault("end", at=10), BYTES),
        (WireFault("flip", at=1, length=2), b"acbdefghij"),
        (WireFault("drop", at=8, length=5), b"abcdefgh"),
        (WireFault("repeat", at=2, length=3), b"abcdecdefghij"),
    ],
)
async def test_each_fault_changes_the_bytes_that_it_names(
    proxy: FaultProxy, fault: WireFault | None, expected: bytes
) -> None:
    proxy.fault = fault
    assert await received(proxy) == [expected]
    assert proxy.byte_counts == [len(BYTES)]


@pytest.mark.parametrize("kind", ["end", "reset", "stall", "flip", "drop", "repeat", "split"])
@pytest.mark.parametrize("at", range(12))
@pytest.mark.parametrize("length", [1, 3])
def test_a_fault_does_not_depend_on_how_the_bytes_are_split(kind: FaultKind, at: int, length: int) -> None:
    def damaged(parts: list[bytes]) -> tuple[bytes, list[object]]:
        damage = _Damage(WireFault(kind, at=at, length=length))
        sent: list[object] = []
        for part in parts:
            sent += damage.feed(part)
            if sent and not isinstance(sent[-1], bytes):
                break
        return b"".join(each for each in sent if isinstance(each, bytes)), [
            each for each in sent if not isinstance(each, bytes)
        ]

    whole = damaged([BYTES])
    for end in range(len(BYTES) + 1):
        assert damaged([BYTES[:end], BYTES[end:]]) == whole
    assert damaged([BYTES[index : index + 1] for index in range(len(BYTES))]) == whole


async def test_a_split_sends_each_piece_in_a_packet_of_its_own(proxy: FaultProxy) -> None:
    proxy.fault = WireFault("split", at=4, length=3)
    assert await received(proxy, pieces=True) == [b"abcd", b"efg", b"hij"]


async def test_a_reset_comes_after_the_bytes_before_it(proxy: FaultProxy) -> None:
    proxy.fault = WireFault("reset", at=4)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.origin.rpartition(":")[2]))
    writer.write(b"POST / HTTP/1.0\r\n\r\n")
    assert await reader.readexactly(4) == b"abcd"
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_the_faults_of_the_script_come_first_one_for_each_connection(proxy: FaultProxy) -> None:
    proxy.fault = WireFault("end", at=1)
    proxy.script(WireFault("end", at=2), None)
    assert [await received(proxy) for _ in range(4)] == [[b"ab"], [BYTES], [b"a"], [b"a"]]


async def test_a_client_gets_what_had_arrived_before_a_fault(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("one two three")
    errors: dict[FaultKind, type[Exception]] = {
        "end": LLMStreamError,
        "reset": LLMStreamError,
        "stall": LLMTimeoutError,
    }
    async with FaultProxy(scripted_server.api_base) as proxy:
        async with LLMClient(proxy.api_base, timeout=Timeouts(idle=0.2)) as client:
            assert (await collect(await client.chat_completion(MESSAGES, stream=True)))["choices"]
        for kind, error in errors.items():
            proxy.fault = WireFault(kind, at=proxy.byte_counts[0] // 2)
            async with LLMClient(proxy.api_base, timeout=Timeouts(idle=0.2)) as client:
                with pytest.raises(error) as caught:
                    await collect(await client.chat_completion(MESSAGES, stream=True))
            partial = getattr(caught.value, "partial", None)
            assert partial is not None
            assert "one two three".startswith(partial["choices"][0]["message"]["content"])


async def test_a_client_that_leaves_is_noticed_by_the_server(scripted_server: ScriptedServer) -> None:
    scripted_server.default = stall(after=[piece("one")])
    async with FaultProxy(scripted_server.api_base) as proxy, LLMClient(proxy.api_base) as client:
        async with await client.chat_completion(MESSAGES, stream=True) as stream:
            await anext(stream)
        await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_a_server_that_breaks_the_connection_breaks_that_of_the_client(scripted_server: ScriptedServer) -> None:
    async with FaultProxy(scripted_server.api_base) as proxy:
        await scripted_server.close()
        async with LLMClient(proxy.api_base, max_retries=0) as client:
            with pytest.raises(LLMConnectionError):
                await client.chat_completion(MESSAGES)


async def test_closing_ends_the_open_connections(scripted_server: ScriptedServer) -> None:
    scripted_server.default = stall(after=[piece("one")])
    async with FaultProxy(scripted_server.api_base) as proxy, LLMClient(proxy.api_base) as client:
        stream = await client.chat_completion(MESSAGES, stream=True)
        await anext(stream)
        assert proxy.open_connections == 1
        await proxy.close()
        await proxy.close()
        assert proxy.open_connections == 0
        with pytest.raises(LLMStreamError):
            await anext(stream)


async def test_closing_ends_a_connection_that_was_accepted_a_moment_ago(scripted_server: ScriptedServer) -> None:
    proxy = FaultProxy(scripted_server.origin)
    accept, closing = proxy._accept, []

    def accept_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accept(reader, writer)
        for relay in proxy._relays:
            relay.cancel()
        closing.append(asyncio.create_task(proxy.close()))

    proxy._accept = accept_and_close  # type: ignore[method-assign]  # this closes before the first step of the task
    async with proxy:
        # What the client has sent may not have been read, and then the connection is reset.
        with suppress(ConnectionResetError):
            assert await received(proxy) == [b""]
        await closing[0]


async def test_it_can_be_opened_once_and_has_no_address_before(scripted_server: ScriptedServer) -> None:
    proxy = FaultProxy(scripted_server.origin)
    with pytest.raises(RuntimeError, match="is not open"):
        _ = proxy.api_base
    async with proxy:
        pass
    with pytest.raises(RuntimeError, match="only once"):
        await proxy.__aenter__()


async def test_it_counts_as_a_double(proxy: FaultProxy, scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("Hello")
    with forbid_real_requests():
        async with LLMClient(proxy.api_base) as client:
            assert await client.ask("?") == "Hello"


@pytest.mark.parametrize("upstream", ["https://127.0.0.1:1234/v1", "unix:///run/llm.sock"])
def test_other_upstreams_are_refused(upstream: str) -> None:
    with pytest.raises(LLMValidationError, match="begins with http://"):
        FaultProxy(upstream)


def test_wrong_values_of_a_fault_are_refused() -> None:
    with pytest.raises(LLMValidationError, match="kind must be"):
        # The wrong value is what the test is about.
        WireFault("explode")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(LLMValidationError, match="at must be"):
        WireFault("end", at=-1)
    with pytest.raises(LLMValidationError, match="length must be"):
        WireFault("flip", length=0)
