"""Streams of messages between a transport and the SDK, and what is read off them on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any, Final, Self

request_numbers: Final[ContextVar[list[Any] | None]] = ContextVar("request_numbers", default=None)
"""Where the numbers of the calls that the current task sends are noted, if somebody wants them."""

_ABOUT_HEADERS: Final = ("type", "x-mcp-header")
_DEPTH: Final = 16


class Tap:
    """Keeps lists of tools as they were sent, and shows the SDK what it needs of them.

    It would refuse a list for one bad definition, and even ask for it again within a call, so that the call fails
    after the tool has run; and it would refuse results that are not what a definition promises.

    Attributes:
        page: The last list.
        refusal: What the last response on HTTP was, if it was none that helps: the SDK's errors do not say.
        calls: The calls that wait for answers, each with the numbers of its requests; for `break_off`.
        broken: The numbers of those that `break_off` ended.
        is_forgotten: Whether the server said that it does not know the session: the SDK would go on with it for ever.
        is_modern: Whether the protocol is one in which results have a type: the SDK refuses one that has none, where
            the protocol tells clients to take it for a complete one.
    """

    def __init__(self) -> None:
        self.page: Mapping[str, Any] | None = None
        self.refusal = ""
        self.is_forgotten = False
        self.is_modern = False
        self.calls: dict[asyncio.Task[Any], list[Any]] = {}
        self.broken: set[Any] = set()

    def break_off(self, number: Any) -> None:
        """Ends the call of that number, if it still waits: the response to it has ended."""
        for task, numbers in self.calls.items():
            if number in numbers:
                self.broken.add(number)
                task.cancel()

    def see(self, message: Any) -> None:
        """Looks at a message that came."""
        inner = getattr(message, "message", None)
        result = getattr(getattr(inner, "root", inner), "result", None)
        if not isinstance(result, dict):
            return
        if isinstance(result.get("tools"), list):
            self.page = dict(result)
            result["tools"] = [_shown(each) for each in result["tools"] if has_name(each)]
        if self.is_modern:
            result.setdefault("resultType", "complete")


def has_name(definition: Any) -> bool:
    """Whether it can be a tool's definition."""
    return isinstance(definition, dict) and isinstance(definition.get("name"), str)


def _shown(definition: Mapping[str, Any]) -> dict[str, Any]:
    """A definition that cannot be wrong, nor too deep for the SDK."""
    schema = {"type": "object", "properties": _headers(definition.get("inputSchema"), _DEPTH)}
    return {"name": definition["name"], "inputSchema": schema}


def _headers(schema: Any, depth: int) -> dict[str, Any]:
    """The properties of a schema, with what says which of them are sent as HTTP headers."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or not depth:
        return {}
    return {
        name: {key: each[key] for key in _ABOUT_HEADERS if key in each} | {"properties": _headers(each, depth - 1)}
        for name, each in properties.items()
        if isinstance(each, dict)
    }


class Reading:
    """A stream that is read, as the SDK expects one."""

    def __init__(self, receive: Callable[[], Awaitable[Any]], tap: Tap, close: Callable[[], Awaitable[None]]) -> None:
        self._receive, self._tap, self._close = receive, tap, close

    async def receive(self) -> Any:
        """The next message; `anyio.EndOfStream` after the last."""
        message = await self._receive()
        self._tap.see(message)
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


class Writing:
    """A stream that is written, as the SDK expects one; it notes the number of a request for who wants it."""

    def __init__(self, send: Callable[[Any], Awaitable[None]], close: Callable[[], Awaitable[None]]) -> None:
        self._send, self._close = send, close

    async def send(self, message: Any) -> None:
        """Sends a message."""
        inner = getattr(message.message, "root", message.message)
        wanted = request_numbers.get()
        if wanted is not None and getattr(inner, "method", None) == "tools/call":
            wanted.append(inner.id)
        await self._send(message)

    async def aclose(self) -> None:
        """Closes the stream."""
        await self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
