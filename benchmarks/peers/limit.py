"""The limit: a hand-written client that only reads, splits and decodes, without checks, errors or time limits.

A client that uses aiohttp cannot be much faster.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import aiohttp
from yarl import URL

from benchmarks.peers.base import JSON, MESSAGES, ClientPeer
from benchmarks.peers.json_codec import dumps, loads


class Client(ClientPeer):
    def __init__(self, base: str, at_once: int) -> None:
        self._url = URL(f"{base}/chat/completions")
        # In the workload where requests have to wait, they wait in aiohttp's queue; 0 stands for no limit.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=at_once if at_once < 100 else 0),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def ask(self, model: str) -> int:
        data = dumps({"model": model, "messages": MESSAGES})
        async with self._session.post(self._url, data=data, headers=JSON) as response:
            reply = loads(await response.read())
        return len(reply["choices"][0]["message"]["content"])

    async def stream(self, model: str) -> AsyncGenerator[Any, None]:
        return self._stream(model)

    async def _stream(self, model: str) -> AsyncGenerator[Any, None]:
        data = dumps({"model": model, "messages": MESSAGES, "stream": True})
        response = await self._session.post(self._url, data=data, headers=JSON)
        read, tail = response.content.readany, b""
        try:
            while data := await read():
                lines = (tail + data).split(b"\n")
                tail = lines.pop()
                for line in lines:
                    if line[:7] == b"data: {":
                        yield loads(line[6:])
        finally:
            response.close()

    async def close(self) -> None:
        await self._session.close()
