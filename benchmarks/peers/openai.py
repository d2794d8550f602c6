"""openai-python with its default options, except for the number of connections and the time limits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
from openai import DEFAULT_CONNECTION_LIMITS

from benchmarks.peers.base import MESSAGES, ClientPeer, read_objects


class Client(ClientPeer):
    def __init__(self, base: str, at_once: int) -> None:
        limits = type(DEFAULT_CONNECTION_LIMITS)(max_connections=at_once, max_keepalive_connections=at_once)
        # With the default of 5 s to connect, 1,000 requests at a time end with APITimeoutError.
        client = openai.DefaultAsyncHttpxClient(limits=limits, timeout=600.0)
        self._client = openai.AsyncOpenAI(base_url=base, api_key="none", http_client=client, timeout=600.0)
        self._create: Any = self._client.chat.completions.create

    async def ask(self, model: str) -> int:
        reply = await self._create(model=model, messages=MESSAGES)
        return len(reply.choices[0].message.content)

    async def stream(self, model: str) -> AsyncIterator[Any]:
        stream: AsyncIterator[Any] = await self._create(model=model, messages=MESSAGES, stream=True)
        return stream

    async def read(self, model: str) -> tuple[int, int]:
        return await read_objects(await self.stream(model))

    async def leave(self, stream: Any) -> None:
        await stream.close()

    async def close(self) -> None:
        await self._client.close()
