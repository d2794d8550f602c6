"""What both halves have of the SDK: the package, its major, and its messages on stdin and stdout."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias

import msgspec

from lmbridge.mcp.jsonrpc import MessageLink
from lmbridge.mcp.sdk.streams import Reading, Tap, Writing

logger = logging.getLogger("lmbridge.mcp")

NAME: Final = "lmbridge"
"""What this client, and this package's own server, call themselves."""

_REFUSAL: Final = {
    "jsonrpc": "2.0",
    "error": {"code": -32600, "message": "Invalid request: it is not as JSON-RPC 2.0, and MCP, have them"},
}

Streams: TypeAlias = tuple[Reading, Writing]


def load() -> Any:
    """The SDK. Its import takes half a second, so it is for a thread.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import mcp
    except ImportError as exc:
        raise ImportError("MCP servers need the official SDK: pip install lmbridge[mcp]") from exc
    return mcp


def is_v2() -> bool:
    """Whether the SDK's major is the second."""
    return hasattr(load(), "Client")


@asynccontextmanager
async def over_stdio(link: MessageLink, tap: Tap) -> AsyncIterator[Streams]:
    """A link as streams of the SDK's messages; it is closed by its owner."""
    import anyio
    from mcp.shared.message import SessionMessage

    parse = _parser()

    async def receive() -> Any:
        while (message := await link.receive()) is not None:
            try:
                return SessionMessage(parse(message))
            except ValueError as exc:
                logger.debug("a message was skipped: %s", exc)
                if _is_asked(message):
                    with contextlib.suppress(ConnectionError):  # who asked has left
                        await link.send(msgspec.json.encode({**_REFUSAL, "id": message["id"]}))
        raise anyio.EndOfStream

    async def send(message: Any) -> None:
        try:
            await link.send(message.message.model_dump_json(by_alias=True, exclude_none=True).encode())
        except ConnectionError as exc:
            raise anyio.BrokenResourceError from exc

    yield Reading(receive, tap, _nothing), Writing(send, _nothing)


def _is_asked(message: Mapping[str, Any]) -> bool:
    """Whether who sent it waits for an answer, and can tell it by a number."""
    number = message.get("id")
    return "method" in message and isinstance(number, str | int) and not isinstance(number, bool)


async def _nothing() -> None:
    """The link is closed by its owner."""


def _parser() -> Callable[[Mapping[str, Any]], Any]:
    """Makes the SDK's messages of dicts; raises `ValueError` for what is none."""
    if is_v2():
        from mcp_types import jsonrpc_message_adapter

        return jsonrpc_message_adapter.validate_python
    from mcp.types import JSONRPCMessage

    message: Any = JSONRPCMessage
    return message.model_validate  # type: ignore[no-any-return]  # 1.x has another type there than 2.x
