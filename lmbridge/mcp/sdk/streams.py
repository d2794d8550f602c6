"""The message streams between a connection and the SDK.

The SDK accepts any pair of streams in place of its transports, and its own transports are not used: messages on stdio
come from our bounded reader (see `lmbridge.mcp.jsonrpc`), and those over HTTP from `lmbridge.mcp.sdk.http`. What a
client receives passes through a `MessageExchange`. The alternatives were to do without the SDK, or to patch it; the
streams are part of its public interface.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol, Self, TypeAlias

import attrs
import msgspec

from lmbridge._tasks import run_in_slices
from lmbridge.mcp.jsonrpc import MessageLink
from lmbridge.mcp.sdk.message_filter import MessageExchange
from lmbridge.mcp.sdk.package import is_v2
from lmbridge.mcp.sdk.session_errors import SessionLostError, describe_error

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_INVALID_REQUEST: Final = {
    "jsonrpc": "2.0",
    "error": {"code": -32600, "message": "Invalid request: it is not a JSON-RPC 2.0 message as MCP defines it"},
}
_UNREADABLE_ANSWER: Final = {"jsonrpc": "2.0", "error": {"code": 0, "message": "its answer is not valid"}}
_MESSAGES_PER_TURN: Final = 50
"""How many messages are handled in one turn of the event loop if none of them is passed on to the SDK. Without this
limit, a flood of such messages would keep everything else waiting."""


class ReadStream:
    """A stream that the SDK reads messages from.

    Args:
        receive: Returns the next message, or raises `anyio.EndOfStream` after the last one.
    """

    def __init__(self, receive: Callable[[], Awaitable[Any]]) -> None:
        self.receive = receive

    async def aclose(self) -> None:
        """Does nothing, because the owner of the connection closes it."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        from anyio import EndOfStream

        try:
            return await self.receive()
        except EndOfStream:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class WriteStream:
    """A stream that the SDK writes messages to.

    Args:
        send: Sends a message.
    """

    def __init__(self, send: Callable[[Any], Awaitable[None]]) -> None:
        self.send = send

    async def aclose(self) -> None:
        """Does nothing, because the owner of the connection closes it."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


Streams: TypeAlias = tuple[ReadStream, WriteStream]
"""The two streams that the SDK accepts in place of one of its transports."""


@attrs.frozen
class FailedRequest:
    """Stands in for an answer that will not arrive."""

    request_id: Any
    """The id of the request, as it was sent."""
    failure: Exception
    """The error that the caller gets, one of those in `session_errors`."""


class ClientConnection(Protocol):
    """A connection to a server."""

    @property
    def end(self) -> SessionLostError | None:
        """Why the connection can no longer be used; None while it can be, or if only its owner knows the reason."""
        ...

    async def receive(self) -> Any:
        """Returns the next message or `FailedRequest`, or None once there will be no more."""
        ...

    async def send(self, message: dict[str, Any], headers: Mapping[str, str]) -> None:
        """Sends a message.

        Args:
            message: The message.
            headers: The HTTP headers that the protocol requires for this message; ignored on stdio.

        Raises:
            ConnectionError: The server no longer reads.
        """
        ...


class LinkConnection:
    """A `ClientConnection` over a `MessageLink`, for a server on stdio."""

    end: SessionLostError | None = None
    """None, because the owner of the link knows why it ended."""

    def __init__(self, link: MessageLink) -> None:
        self._receive = link.receive
        self._send = link.send

    async def receive(self) -> Any:
        """Returns the next message; see `ClientConnection.receive`."""
        return await self._receive()

    async def send(self, message: dict[str, Any], headers: Mapping[str, str]) -> None:  # noqa: ARG002 - for HTTP
        """Sends a message; see `ClientConnection.send`."""
        await self._send(msgspec.json.encode(message))


def client_streams(connection: ClientConnection, exchange: MessageExchange) -> Streams:
    """Returns the two streams that the SDK needs, for a connection to a server."""
    import anyio
    from mcp.shared.message import SessionMessage

    parse = message_parser()

    async def send_reply(reply: dict[str, Any]) -> None:
        # The server may be gone by now.
        with contextlib.suppress(ConnectionError):
            await connection.send(reply, {})

    exchange.send_reply = send_reply

    async def receive() -> Any:
        unseen = 0
        while (item := await connection.receive()) is not None:
            if isinstance(item, FailedRequest):
                message = exchange.fail(item.request_id, item.failure)
            else:
                message = await run_in_slices(exchange.incoming_in_slices(item))
            if message is not None:
                try:
                    return SessionMessage(parse(message))
                except ValueError as exc:
                    exchange.report("a message that the SDK cannot read", describe_error(exc))
                    if "id" in message:
                        return SessionMessage(parse({**_UNREADABLE_ANSWER, "id": message["id"]}))
            unseen += 1
            if unseen % _MESSAGES_PER_TURN == 0:
                await asyncio.sleep(0)
        raise anyio.EndOfStream

    async def send(session_message: Any) -> None:
        message = exchange.outgoing(_plain(session_message.message))
        if message is not None:
            headers = getattr(session_message.metadata, "headers", None) or {}
            try:
                await connection.send(message, headers)
            except ConnectionError as exc:
                raise anyio.BrokenResourceError from exc

    return ReadStream(receive), WriteStream(send)


def _plain(message: Any) -> dict[str, Any]:
    """Returns a message of the SDK as the dict that is sent."""
    plain: dict[str, Any] = message.model_dump(by_alias=True, mode="json", exclude_none=True)
    return plain


@asynccontextmanager
async def streams_over_link(link: MessageLink) -> AsyncIterator[Streams]:
    """Yields the two streams that the SDK needs as a server. The link is closed by its owner, not here.

    A message that the SDK cannot parse is skipped; if it is a request, it is answered with an error.
    """
    import anyio
    from mcp.shared.message import SessionMessage

    parse = message_parser()

    async def receive() -> Any:
        while (message := await link.receive()) is not None:
            try:
                return SessionMessage(parse(message))
            except ValueError as exc:
                logger.debug("skipped a message that is not valid: %s", exc)
                if _expects_reply(message):
                    # The other side may have closed its end meanwhile.
                    with contextlib.suppress(ConnectionError):
                        await link.send(msgspec.json.encode({**_INVALID_REQUEST, "id": message["id"]}))
        raise anyio.EndOfStream

    async def send(message: Any) -> None:
        try:
            await link.send(message.message.model_dump_json(by_alias=True, exclude_none=True).encode())
        except ConnectionError as exc:
            raise anyio.BrokenResourceError from exc

    yield ReadStream(receive), WriteStream(send)


def _expects_reply(message: Mapping[str, Any]) -> bool:
    """Returns whether a message is a request with an id that a reply can name."""
    request_id = message.get("id")
    return "method" in message and isinstance(request_id, str | int) and not isinstance(request_id, bool)


def message_parser() -> Callable[[Mapping[str, Any]], Any]:
    """Returns the SDK's function that parses a message; it raises `ValueError` if the message is not valid."""
    if is_v2():
        from mcp_types import jsonrpc_message_adapter

        return jsonrpc_message_adapter.validate_python
    from mcp.types import JSONRPCMessage

    message_class: Any = JSONRPCMessage
    return message_class.model_validate  # type: ignore[no-any-return]  # 1.x has another type there than 2.x
