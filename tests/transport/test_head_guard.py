"""The limits on heads and on framing, without a connection."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lmbridge.transport.head_guard import HEAD_BYTES, FramingGuard, HeadGuard
from tests.support import turns


class Protocol(asyncio.Protocol):
    def __init__(self) -> None:
        self.received = b""
        self.lost: list[Exception | None] = []
        self.error: Exception | None = None

    def exception(self) -> Exception | None:
        return self.error

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)

    def data_received(self, data: bytes) -> None:
        self.received += data


class Exceeded(Exception):  # noqa: N818 - it stands for any exception
    pass


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.protocol: asyncio.BaseProtocol = Protocol()
        self.is_aborted = False

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True


def guarded() -> tuple[FakeTransport, Protocol, HeadGuard]:
    transport = FakeTransport()
    protocol = transport.protocol
    assert isinstance(protocol, Protocol)
    return transport, protocol, HeadGuard(transport, Exceeded())


@given(st.lists(st.integers(0, HEAD_BYTES), max_size=6), st.integers(0, 5))
def test_everything_arrives_once_and_in_order(sizes: list[int], detach_after: int) -> None:
    async def run() -> None:
        transport, protocol, guard = guarded()
        sent = b""
        for number, size in enumerate(sizes):
            if number == detach_after:
                guard.detach()
            data = bytes([number]) * size
            sent += data
            receiver = transport.get_protocol()
            assert isinstance(receiver, asyncio.Protocol)
            receiver.data_received(data)
        guard.detach()
        assert transport.get_protocol() is protocol
        assert protocol.received == sent
        await turns()
        assert not transport.is_aborted

    asyncio.run(run())


async def test_the_connection_is_closed_if_the_head_goes_on_beyond_the_limit() -> None:
    transport, protocol, guard = guarded()
    guard.data_received(b"x" * HEAD_BYTES)
    await turns()
    assert not transport.is_aborted
    guard.data_received(b"y")
    await turns()
    assert transport.is_aborted
    assert isinstance(guard.failure, Exceeded)
    guard.detach()
    assert protocol.received == b"x" * HEAD_BYTES


class OtherTransport:
    """A transport that does not inherit from those of asyncio, as those of uvloop do not."""

    def __init__(self) -> None:
        self._transport = FakeTransport()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def test_a_transport_of_another_event_loop_is_closed_as_well() -> None:
    transport: Any = OtherTransport()
    guard = HeadGuard(transport, Exceeded())
    guard.data_received(b"x" * (HEAD_BYTES + 1))
    await turns()
    assert transport.is_aborted
    assert isinstance(guard.failure, Exceeded)
    guard.data_received(b"y" * HEAD_BYTES)
    assert len(guard._held_back) == 1


async def test_a_transport_that_is_gone_needs_no_guard() -> None:
    HeadGuard(None, Exceeded()).detach()
    transport = FakeTransport()
    transport.abort()
    protocol = transport.protocol
    HeadGuard(transport, Exceeded()).detach()
    assert transport.protocol is protocol


async def test_a_guard_takes_the_place_of_the_one_for_a_proxy() -> None:
    transport, protocol, guard = guarded()
    second = HeadGuard(transport, Exceeded())
    second.data_received(b"x" * HEAD_BYTES)
    second.detach()
    assert transport.protocol is protocol
    guard.detach()
    await turns()
    assert not transport.is_aborted


def with_framing_guard() -> tuple[FakeTransport, Protocol, FramingGuard, list[int]]:
    transport = FakeTransport()
    protocol = transport.protocol
    assert isinstance(protocol, Protocol)
    size = [0]
    return transport, protocol, FramingGuard(transport, Exceeded(), lambda: size[0]), size


async def test_bytes_without_a_body_close_the_connection_beyond_the_limit() -> None:
    transport, protocol, guard, size = with_framing_guard()
    for _ in range(3):
        guard.data_received(b"x" * HEAD_BYTES)
        assert not transport.is_aborted
        # A part of the body has arrived.
        size[0] += 1
        guard.data_received(b"y")
    guard.data_received(b"x" * HEAD_BYTES)
    guard.data_received(b"z")
    assert transport.is_aborted
    assert isinstance(guard.failure, Exceeded)
    guard.connection_lost(None)
    assert protocol.lost == [guard.failure]


async def test_the_error_of_the_parser_is_remembered() -> None:
    _transport, protocol, guard, _size = with_framing_guard()
    protocol.error = ValueError("not a chunk")
    guard.connection_lost(None)
    assert protocol.lost == [None]
    assert guard.failure is protocol.error


async def test_a_detached_guard_leaves_the_connection_alone() -> None:
    transport, protocol, guard, _size = with_framing_guard()
    guard.detach()
    guard.detach()
    assert transport.protocol is protocol
