"""`FaultProxy`: a TCP proxy in front of any server that damages what the server sends, at one byte of your choice.

A `ScriptedServer` sends what a test has scripted. The proxy passes on what a real server sends, or a recording of one.
It knows nothing about HTTP, so it can damage a status line, the length of a chunk or a compressed body as well as a
text. The place of the damage is an offset in the bytes of a connection, so that a test can try every offset.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias
from urllib.parse import urlsplit

import attrs

from lmbridge._checks import as_validator, check_choice, check_integer, invalid_argument
from lmbridge.config import normalize_api_base
from lmbridge.testing.connection import reset_transport
from lmbridge.testing.scripted_server import close_listener, running_origins

FaultKind: TypeAlias = Literal["end", "reset", "stall", "flip", "drop", "repeat", "split"]
"""What a `WireFault` does to the bytes of a connection."""
_Ending: TypeAlias = Literal["end", "reset", "stall"]
_KINDS: Final = ("end", "reset", "stall", "flip", "drop", "repeat", "split")
_HOST: Final = "127.0.0.1"
_READ_SIZE: Final = 64 * 1024


@attrs.frozen
class WireFault:
    """One fault in the bytes that a server sends on a connection.

    | `kind` | what the client gets |
    | --- | --- |
    | "end" | the bytes before `at`, and then the end of the connection |
    | "reset" | the bytes before `at`, and then a TCP reset |
    | "stall" | the bytes before `at`, and then nothing, on a connection that stays open |
    | "flip" | all bytes, of which `length` bytes from `at` on have their lowest bit changed |
    | "drop" | all bytes except the `length` bytes from `at` on |
    | "repeat" | all bytes, and the `length` bytes from `at` on twice |
    | "split" | all bytes, those from `at` on in pieces of `length` bytes, each in a separate packet |

    Raises:
        LLMValidationError: A value cannot be used.
    """

    kind: FaultKind = attrs.field(validator=as_validator(check_choice, choices=_KINDS))
    """The kind of fault."""
    at: int = attrs.field(default=0, validator=as_validator(check_integer, minimum=0))
    """The offset of the first byte that is affected, in the bytes that the server sends on the connection."""
    length: int = attrs.field(default=1, validator=as_validator(check_integer, minimum=1))
    """The number of bytes that are affected, or the size of the pieces of a "split"."""


class FaultProxy:
    """A proxy on the loopback interface that passes bytes on to a server, and the server's bytes back with a fault.

    ::

        async with FaultProxy("http://127.0.0.1:1234/v1") as proxy:
            proxy.script(WireFault("reset", at=300))
            client = LLMClient(proxy.api_base)

    Each connection takes the next fault of the script (`script`), or `fault` once the script is used up. A fault whose
    offset is behind the last byte of a connection does nothing. The proxy relays TCP connections, so requests reach the
    server unchanged, with the proxy's address as the host. When the client leaves, the connection to the server is
    closed.

    Args:
        upstream: The URL of the server, with or without a path. A server that expects TLS is not supported.

    Attributes:
        fault: The fault of every connection for which none is scripted. Default: None, which changes nothing.

    Raises:
        LLMValidationError: `upstream` is not a URL that begins with `http://`.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(normalize_api_base(upstream))
        if parts.scheme != "http" or parts.hostname is None:
            raise invalid_argument("upstream", "a URL that begins with http://", upstream)
        self.fault: WireFault | None = None
        self._upstream = (parts.hostname, parts.port or 80)
        self._script: deque[WireFault | None] = deque()
        self._relays: set[asyncio.Task[None]] = set()
        self._byte_counts: list[int] = []
        self._listener: asyncio.Server | None = None
        self._port: int | None = None

    async def __aenter__(self) -> Self:
        if self._port is not None:
            raise RuntimeError("a FaultProxy can be opened only once; create another one")
        self._listener = await asyncio.start_server(self._accept, _HOST, 0, limit=_READ_SIZE, backlog=1024)
        self._port = self._listener.sockets[0].getsockname()[1]
        running_origins.add(self.origin)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stops listening, and closes all connections. Closing twice does nothing."""
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        running_origins.discard(self.origin)
        await close_listener(listener)
        relays = list(self._relays)
        for relay in relays:
            relay.cancel()
        await asyncio.gather(*relays, return_exceptions=True)

    @property
    def origin(self) -> str:
        """The URL of the proxy without a path, such as `http://127.0.0.1:35981`."""
        if self._port is None:
            raise RuntimeError("the FaultProxy is not open; enter it with `async with`")
        return f"http://{_HOST}:{self._port}"

    @property
    def api_base(self) -> str:
        """The base URL for a client: `origin` and `/v1`."""
        return f"{self.origin}/v1"

    @property
    def byte_counts(self) -> list[int]:
        """How many bytes the server has sent so far on each connection, in the order of the connections.

        After a request without a fault, the last number says how many offsets a test can try.
        """
        return list(self._byte_counts)

    @property
    def open_connections(self) -> int:
        """The number of connections that are open."""
        return len(self._relays)

    def script(self, *faults: WireFault | None) -> None:
        """Appends faults for the next connections, one for each connection. None changes nothing."""
        self._script.extend(faults)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # This is not a coroutine function, because the task that asyncio would create for one cannot be awaited.
        relay = asyncio.create_task(self._relay(reader, writer))
        self._relays.add(relay)
        relay.add_done_callback(self._relays.discard)
        # If the task is cancelled before its first step, nothing else closes the connection.
        relay.add_done_callback(lambda _: writer.close())

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        damage = _Damage(self._script.popleft() if self._script else self.fault)
        self._byte_counts.append(0)
        number = len(self._byte_counts) - 1
        try:
            replies, requests = await asyncio.open_connection(*self._upstream)
        except OSError:
            # The client sees a connection that is closed at once, as from a server that is about to start.
            writer.transport.abort()
            return
        except BaseException:
            writer.transport.abort()
            raise
        tasks = [
            asyncio.create_task(_copy(reader, requests)),
            asyncio.create_task(self._damaged_copy(replies, writer, damage, number)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            # What was written reaches the client, unless the connection has been reset.
            writer.close()
            requests.transport.abort()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _damaged_copy(
        self, replies: asyncio.StreamReader, writer: asyncio.StreamWriter, damage: _Damage, number: int
    ) -> None:
        while True:
            try:
                data = await replies.read(_READ_SIZE)
            except ConnectionResetError:
                reset_transport(writer.transport)
                return
            if not data:
                return
            self._byte_counts[number] += len(data)
            for piece in damage.feed(data):
                match piece:
                    case bytes():
                        await _send(writer, piece)
                    case "end":
                        return
                    case "reset":
                        reset_transport(writer.transport)
                        return
                    case "stall":
                        # This task is cancelled when the client leaves.
                        await asyncio.Event().wait()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Passes on what a client sends, until it leaves."""
    try:
        while data := await reader.read(_READ_SIZE):
            writer.write(data)
            await writer.drain()
    except ConnectionResetError:
        return


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Sends a piece, and lets a client in the same loop receive it before anything else happens."""
    if not data:
        return
    writer.write(data)
    await writer.drain()
    for _ in range(2):
        await asyncio.sleep(0)


class _Damage:
    """Turns the bytes of a server into what a client gets. It has no socket."""

    def __init__(self, fault: WireFault | None) -> None:
        self._fault = fault
        self._offset = 0
        self._repeated = b""

    def feed(self, data: bytes) -> list[bytes | _Ending]:
        """Returns what the client gets for the server's next bytes: pieces, and perhaps how the connection ends."""
        fault, start = self._fault, self._offset
        self._offset += len(data)
        if fault is None:
            return [data]
        begin = min(max(fault.at - start, 0), len(data))
        end = min(max(fault.at + fault.length - start, 0), len(data))
        before, affected, after = data[:begin], data[begin:end], data[end:]
        match fault.kind:
            case "end" | "reset" | "stall":
                return [before] if begin == len(data) else [before, fault.kind]
            case "flip":
                return [before + bytes(byte ^ 1 for byte in affected) + after]
            case "drop":
                return [before + after]
            case "repeat":
                self._repeated += affected
                is_whole = affected and len(self._repeated) == fault.length
                return [before + affected + self._repeated + after] if is_whole else [data]
            case "split":
                return [before, *(data[at : at + fault.length] for at in range(begin, len(data), fault.length))]
