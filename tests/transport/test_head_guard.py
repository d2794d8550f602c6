"""The limits on heads and on framing, without a connection."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lmbridge.transport.head_guard import MAX_BYTES_WITHOUT_BODY, ConnectionGuard, guard_of
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


class TooLong(Exceeded):
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


def guarded() -> tuple[FakeTransport, Protocol, ConnectionGuard]:
    transport = FakeTransport()
    protocol = transport.protocol
    assert isinstance(protocol, Protocol)
    guard = guard_of(transport)
    guard.limit_head(Exceeded)
    return transport, protocol, guard


@given(st.lists(st.integers(0, MAX_BYTES_WITHOUT_BODY), max_size=6), st.integers(0, 5))
def test_everything_arrives_once_and_in_order(sizes: list[int], end_after: int) -> None:
    async def run() -> None:
        transport, protocol, guard = guarded()
        sent = b""
        for number, size in enumerate(sizes):
            if number == end_after:
                guard.end_head()
            data = bytes([number]) * size
            sent += data
            guard.data_received(data)
        guard.end_head()
        assert protocol.received == sent
        await turns()
        assert not transport.is_aborted

    asyncio.run(run())


async def test_the_connection_is_closed_if_the_head_goes_on_beyond_the_limit() -> None:
    transport, protocol, guard = guarded()
    guard.data_received(b"x" * MAX_BYTES_WITHOUT_BODY)
    await turns()
    assert not transport.is_aborted
    guard.data_received(b"y")
    await turns()
    assert transport.is_aborted
    assert isinstance(guard.failure, Exceeded)
    guard.data_received(b"z" * MAX_BYTES_WITHOUT_BODY)
    guard.end_head()
    assert protocol.received == b"x" * MAX_BYTES_WITHOUT_BODY


async def test_a_head_that_ends_in_time_costs_the_next_one_nothing() -> None:
    transport, protocol, guard = guarded()
    guard.data_received(b"x" * (MAX_BYTES_WITHOUT_BODY + 1))
    guard.end_head()
    guard.limit_head(Exceeded)
    assert not guard.has_received
    guard.data_received(b"y" * MAX_BYTES_WITHOUT_BODY)
    assert guard.has_received
    await turns()
    assert not transport.is_aborted
    assert len(protocol.received) == 2 * MAX_BYTES_WITHOUT_BODY + 1


async def test_what_is_held_back_counts_for_the_framing_of_the_body() -> None:
    transport, protocol, guard = guarded()
    guard.data_received(b"x" * (2 * MAX_BYTES_WITHOUT_BODY))
    body = Body()
    guard.limit_framing(body, TooLong)
    guard.end_head()
    assert len(protocol.received) == 2 * MAX_BYTES_WITHOUT_BODY
    assert not transport.is_aborted
    guard.data_received(b"y")
    assert isinstance(guard.failure, TooLong)


async def test_a_connection_keeps_its_guard() -> None:
    transport, protocol, guard = guarded()
    assert not guard.note_request()
    guard.end_head()
    assert guard_of(transport) is guard
    assert guard.note_request()
    assert guard.protocol is protocol


async def test_a_connection_that_is_closing_is_known_to_have_been_used() -> None:
    transport, _protocol, guard = guarded()
    unused = FakeTransport()
    guard_of(unused)
    guard.note_request()
    for each in (transport, unused):
        each.abort()
    assert guard_of(transport).note_request()
    assert not guard_of(unused).note_request()


class OtherTransport:
    """A transport that does not inherit from those of asyncio, as those of uvloop do not."""

    def __init__(self) -> None:
        self._transport = FakeTransport()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def test_a_transport_of_another_event_loop_is_closed_as_well() -> None:
    transport: Any = OtherTransport()
    guard = guard_of(transport)
    guard.limit_head(Exceeded)
    guard.data_received(b"x" * (MAX_BYTES_WITHOUT_BODY + 1))
    await turns()
    assert transport.is_aborted
    assert isinstance(guard.failure, Exceeded)
    guard.data_received(b"y" * MAX_BYTES_WITHOUT_BODY)
    assert len(guard._held_back) == 1


async def test_a_transport_that_is_gone_needs_no_guard() -> None:
    guard = guard_of(None)
    assert not guard.note_request()
    guard.limit_head(Exceeded)
    guard.end_head()
    transport = FakeTransport()
    transport.abort()
    protocol = transport.protocol
    guard_of(transport).limit_head(Exceeded)
    assert transport.protocol is protocol


class Body:
    def __init__(self) -> None:
        self.total_bytes = 0


def with_limited_framing() -> tuple[FakeTransport, Protocol, ConnectionGuard, Body]:
    transport, protocol, guard = guarded()
    body = Body()
    guard.limit_framing(body, TooLong)
    guard.end_head()
    return transport, protocol, guard, body


async def test_bytes_without_a_body_close_the_connection_beyond_the_limit() -> None:
    transport, protocol, guard, body = with_limited_framing()
    for _ in range(3):
        guard.data_received(b"x" * MAX_BYTES_WITHOUT_BODY)
        assert not transport.is_aborted
        # A part of the body has arrived.
        body.total_bytes += 1
        guard.data_received(b"y")
    guard.data_received(b"x" * MAX_BYTES_WITHOUT_BODY)
    guard.data_received(b"z")
    assert transport.is_aborted
    assert isinstance(guard.failure, TooLong)
    guard.connection_lost(None)
    assert protocol.lost == [guard.failure]


async def test_the_error_of_the_parser_is_remembered() -> None:
    _transport, protocol, guard, _body = with_limited_framing()
    protocol.error = ValueError("not a chunk")
    guard.connection_lost(None)
    assert protocol.lost == [None]
    assert guard.failure is protocol.error


class Watcher:
    def __init__(self) -> None:
        self.calls = 0

    def on_connection_lost(self) -> None:
        self.calls += 1


async def test_what_follows_a_body_is_not_limited() -> None:
    transport, protocol, guard, _body = with_limited_framing()
    watcher = Watcher()
    guard.watch(watcher)
    guard.unwatch(watcher)
    guard.data_received(b"x" * (2 * MAX_BYTES_WITHOUT_BODY))
    await turns()
    assert not transport.is_aborted
    assert len(protocol.received) == 2 * MAX_BYTES_WITHOUT_BODY
    protocol.error = ValueError("not a head")
    guard.connection_lost(None)
    assert guard.failure is None
    assert watcher.calls == 0


async def test_the_reader_of_one_body_does_not_lift_the_limit_on_the_next_head() -> None:
    transport, _protocol, guard, _body = with_limited_framing()
    late, next_reader = Watcher(), Watcher()
    guard.watch(late)
    guard.limit_head(Exceeded)
    guard.unwatch(late)
    guard.data_received(b"x" * (MAX_BYTES_WITHOUT_BODY + 1))
    await turns()
    assert transport.is_aborted
    guard.watch(next_reader)
    guard.connection_lost(None)
    assert (late.calls, next_reader.calls) == (0, 1)


async def test_a_watcher_is_told_once_that_the_connection_is_lost() -> None:
    _transport, protocol, guard, _body = with_limited_framing()
    watcher = Watcher()
    guard.watch(watcher)
    for _ in range(2):
        guard.connection_lost(None)
    assert len(protocol.lost) == 2
    assert watcher.calls == 1


async def test_a_watcher_of_a_lost_connection_is_told_as_well() -> None:
    _transport, _protocol, guard, _body = with_limited_framing()
    guard.connection_lost(None)
    for each in (guard, guard_of(None)):
        watcher = Watcher()
        each.watch(watcher)
        await turns()
        assert watcher.calls == 1
