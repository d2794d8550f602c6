"""The message streams between a transport and the SDK, which inspect messages and change some of them.

The SDK accepts any pair of streams in place of its transports. This module uses that for two purposes. First, a stdio
server's messages come from our own bounded reader (see `lmbridge.mcp.jsonrpc`). Second, a `MessageTap` looks at each
message before the SDK does, because the SDK would reject a whole list of tools for one bad definition, and because its
errors do not say what an HTTP server answered. The alternatives were to parse replies without the SDK, or to patch it;
the streams are part of its public interface.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, Final, Self, TypeAlias

import msgspec

from lmbridge.mcp.jsonrpc import MessageLink
from lmbridge.mcp.sdk.package import is_v2

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

sent_call_ids: Final[ContextVar[list[Any] | None]] = ContextVar("sent_call_ids", default=None)
"""The request ids of the tool calls that the current task has sent. None outside of a call."""

_INVALID_REQUEST: Final = {
    "jsonrpc": "2.0",
    "error": {"code": -32600, "message": "Invalid request: it is not a JSON-RPC 2.0 message as MCP defines it"},
}
_HEADER_KEYS: Final = ("type", "x-mcp-header")
"""The keys of a property's schema that decide whether an argument is also sent as an HTTP header."""
_HEADER_DEPTH: Final = 16
"""How many levels of nested properties are searched for these keys."""


class MessageTap:
    """Inspects the messages that arrive, and simplifies lists of tools before the SDK sees them.

    The SDK rejects a whole list for one bad definition. It may also ask for the list again within a call, so that the
    call fails after the tool has run, and it rejects a result that does not fit a tool's output schema. So it gets
    definitions that consist of little more than a name, and the original ones are kept here.
    """

    def __init__(self) -> None:
        self.tool_page: Mapping[str, Any] | None = None
        """The last page of tools, as the server sent it."""
        self.http_problem = ""
        """What was wrong with the last HTTP response, or an empty string. The SDK's own errors do not say it."""
        self.is_session_unknown = False
        """Whether the server said that it does not know the session; the SDK would keep using it."""
        self.is_modern = False
        """True if the session uses a protocol revision in which results have a `resultType`. The SDK rejects a result
        without this field, although the specification says that such a result counts as complete."""
        self.waiting_calls: dict[asyncio.Task[Any], list[Any]] = {}
        """The tasks that wait for the reply to a call, and the request ids of each. `interrupt_call` searches them."""
        self.interrupted_ids: set[Any] = set()
        """The request ids of the calls that `interrupt_call` ended."""

    def interrupt_call(self, request_id: Any) -> None:
        """Cancels a call that still waits for its reply although the HTTP response has ended without it."""
        for task, request_ids in self.waiting_calls.items():
            if request_id in request_ids:
                self.interrupted_ids.add(request_id)
                task.cancel()

    def inspect(self, message: Any) -> None:
        """Inspects a message that has arrived, and changes it if the SDK would reject it needlessly."""
        inner = getattr(message, "message", None)
        result = getattr(getattr(inner, "root", inner), "result", None)
        if not isinstance(result, dict):
            return
        if isinstance(result.get("tools"), list):
            self.tool_page = dict(result)
            result["tools"] = [_minimal_definition(each) for each in result["tools"] if has_name(each)]
        if self.is_modern:
            result.setdefault("resultType", "complete")


def has_name(definition: Any) -> bool:
    """Returns whether something in a list of tools is an object with a name."""
    return isinstance(definition, dict) and isinstance(definition.get("name"), str)


def _minimal_definition(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a definition that is valid and not too deep for the SDK, with only what it needs to send a call."""
    schema = {"type": "object", "properties": _header_properties(definition.get("inputSchema"), _HEADER_DEPTH)}
    return {"name": definition["name"], "inputSchema": schema}


def _header_properties(schema: Any, depth: int) -> dict[str, Any]:
    """Returns a schema's properties, reduced to the keys that say which arguments are also sent as HTTP headers."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or not depth:
        return {}
    return {
        name: {key: each[key] for key in _HEADER_KEYS if key in each}
        | {"properties": _header_properties(each, depth - 1)}
        for name, each in properties.items()
        if isinstance(each, dict)
    }


class ReadStream:
    """A stream that the SDK reads messages from; the tap sees each of them first.

    Args:
        receive: Returns the next message, or raises `anyio.EndOfStream` after the last one.
        tap: Looks at each message.
        close: Closes the stream underneath.
    """

    def __init__(
        self, receive: Callable[[], Awaitable[Any]], tap: MessageTap, close: Callable[[], Awaitable[None]]
    ) -> None:
        self._receive, self._tap, self._close = receive, tap, close

    async def receive(self) -> Any:
        """Returns the next message; raises `anyio.EndOfStream` after the last one."""
        message = await self._receive()
        self._tap.inspect(message)
        return message

    async def aclose(self) -> None:
        """Closes the stream."""
        await self._close()

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
    """A stream that the SDK writes messages to; it records the request ids of tool calls in `sent_call_ids`.

    Args:
        send: Sends a message.
        close: Closes the stream underneath.
    """

    def __init__(self, send: Callable[[Any], Awaitable[None]], close: Callable[[], Awaitable[None]]) -> None:
        self._send, self._close = send, close

    async def send(self, message: Any) -> None:
        """Sends a message."""
        inner = getattr(message.message, "root", message.message)
        request_ids = sent_call_ids.get()
        if request_ids is not None and getattr(inner, "method", None) == "tools/call":
            request_ids.append(inner.id)
        await self._send(message)

    async def aclose(self) -> None:
        """Closes the stream."""
        await self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


Streams: TypeAlias = tuple[ReadStream, WriteStream]
"""The two streams that the SDK accepts in place of one of its transports."""


@asynccontextmanager
async def streams_over_link(link: MessageLink, tap: MessageTap) -> AsyncIterator[Streams]:
    """Yields the two streams that the SDK needs, for a link. The link is closed by its owner, not here.

    A message that the SDK cannot parse is skipped; if it is a request, it is answered with an error.
    """
    import anyio
    from mcp.shared.message import SessionMessage

    parse = _message_parser()

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

    yield ReadStream(receive, tap, _leave_open), WriteStream(send, _leave_open)


async def _leave_open() -> None:
    """Does nothing, because the owner of the link closes it."""


def _expects_reply(message: Mapping[str, Any]) -> bool:
    """Returns whether a message is a request with an id that a reply can name."""
    request_id = message.get("id")
    return "method" in message and isinstance(request_id, str | int) and not isinstance(request_id, bool)


def _message_parser() -> Callable[[Mapping[str, Any]], Any]:
    """Returns the SDK's function that parses a message; it raises `ValueError` if the message is not valid."""
    if is_v2():
        from mcp_types import jsonrpc_message_adapter

        return jsonrpc_message_adapter.validate_python
    from mcp.types import JSONRPCMessage

    message_class: Any = JSONRPCMessage
    return message_class.model_validate  # type: ignore[no-any-return]  # 1.x has another type there than 2.x
