"""A hand-written client on httpx2, which reads, splits and decodes like the limit.

httpx2 continues httpx. openai-python and the MCP SDK use it now, so it shows how much of their cost is their own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import httpx2

from benchmarks.peers.base import JSON, MESSAGES, ClientPeer
from benchmarks.peers.json_codec import dumps, loads


class Client(ClientPeer):
    def __init__(self, base: str, at_once: int) -> None:
        self._url = f"{base}/chat/completions"
        limits = httpx2.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        self._client = httpx2.AsyncClient(limits=limits, timeout=600.0, trust_env=False)

    async def ask(self, model: str) -> int:
        data = dumps({"model": model, "messages": MESSAGES})
        response = await self._client.post(self._url, content=data, headers=JSON)
        return len(loads(response.content)["choices"][0]["message"]["content"])

    async def stream(self, model: str) -> AsyncGenerator[Any, None]:
        return self._stream(model)

    async def _stream(self, model: str) -> AsyncGenerator[Any, None]:
        data = dumps({"model": model, "messages": MESSAGES, "stream": True})
        tail = b""
        async with self._client.stream("POST", self._url, content=data, headers=JSON) as response:
            async for data in response.aiter_bytes():
                lines = (tail + data).split(b"\n")
                tail = lines.pop()
                for line in lines:
                    if line[:7] == b"data: {":
                        yield loads(line[6:])

    async def close(self) -> None:
        await self._client.aclose()
