"""The interface of the clients that are compared."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

MESSAGES: Final = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Tell me a story about a lighthouse."},
]
JSON: Final = {"Content-Type": "application/json"}


class ClientPeer:
    """A client that is compared.

    Args:
        base: The URL of the API.
        at_once: The most requests that the client has in flight.
    """

    def __init__(self, base: str, at_once: int) -> None:
        raise NotImplementedError

    async def ask(self, model: str) -> int:
        """Makes a plain request, and returns the length of its text."""
        raise NotImplementedError

    async def stream(self, model: str) -> AsyncIterator[Any]:
        """Makes a streamed request, and returns an iterator over its chunks."""
        raise NotImplementedError

    async def read(self, model: str) -> tuple[int, int]:
        """Reads a stream to its end, and returns the number of its chunks and the length of its text."""
        count = length = 0
        async for chunk in await self.stream(model):
            count += 1
            for choice in chunk["choices"]:
                length += len(choice["delta"].get("content") or "")
        return count, length

    async def leave(self, stream: Any) -> None:
        """Closes a stream before its end, in the way that the library documents."""
        await stream.aclose()

    async def close(self) -> None:
        raise NotImplementedError


async def read_objects(stream: AsyncIterator[Any]) -> tuple[int, int]:
    """Does the same as `ClientPeer.read`, for chunks that are objects instead of dicts."""
    count = length = 0
    async for chunk in stream:
        count += 1
        for choice in chunk.choices:
            length += len(choice.delta.content or "")
    return count, length
