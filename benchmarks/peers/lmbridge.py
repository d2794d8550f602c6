"""lmbridge with its default options, except for the number of concurrent requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from benchmarks.peers.base import MESSAGES, ClientPeer
from lmbridge import Limits, LLMClient


class Client(ClientPeer):
    def __init__(self, base: str, at_once: int) -> None:
        self._client = LLMClient(base, limits=Limits(max_concurrency=at_once))

    async def ask(self, model: str) -> int:
        reply = await self._client.chat_completion(MESSAGES, model=model)
        return len(reply["choices"][0]["message"]["content"] or "")

    async def stream(self, model: str) -> AsyncIterator[Any]:
        return await self._client.chat_completion(MESSAGES, model=model, stream=True)

    async def close(self) -> None:
        await self._client.close()
