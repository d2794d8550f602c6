"""litellm, with its provider for servers that are compatible with OpenAI."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import litellm

from benchmarks.peers.base import MESSAGES, ClientPeer, read_objects


class Client(ClientPeer):
    def __init__(self, base: str, at_once: int) -> None:  # noqa: ARG002 - it has no such limit
        litellm.suppress_debug_info = True
        self._acompletion: Any = litellm.acompletion
        self._options = {"api_base": base, "api_key": "none", "messages": MESSAGES, "timeout": 600.0}

    async def ask(self, model: str) -> int:
        reply = await self._acompletion(model=f"openai/{model}", **self._options)
        return len(reply.choices[0].message.content)

    async def stream(self, model: str) -> AsyncIterator[Any]:
        stream: AsyncIterator[Any] = await self._acompletion(model=f"openai/{model}", stream=True, **self._options)
        return stream

    async def read(self, model: str) -> tuple[int, int]:
        return await read_objects(await self.stream(model))

    async def close(self) -> None:
        """Does nothing: litellm keeps its connections in a cache that cannot be closed here."""
