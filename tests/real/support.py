"""Helpers of the tests that run against a real llama.cpp server."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from lmbridge import ChatStream, LLMClient, LocalServer
from tests.real.conftest import API_KEY

STORY = [{"role": "user", "content": "Tell me a long story about the sea."}]
"""Messages whose answer would go on for thousands of tokens."""
GREETING = [{"role": "user", "content": "Say hello."}]


async def busy_slots(server: LocalServer) -> int:
    """Returns how many generations the server reports as running."""
    origin = server.api_base.removesuffix("/v1")
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{origin}/slots") as response:
        slots = await response.json()
    return sum(slot["is_processing"] for slot in slots)


async def until_idle(server: LocalServer) -> None:
    """Waits until the server has stopped all generations, and fails if they go on for several seconds."""
    async with asyncio.timeout(5):
        while await busy_slots(server):
            await asyncio.sleep(0.02)


class GreedyClient:
    """A client whose model gives the same answer each time.

    Args:
        client: The client that sends the requests.
        params: Additional parameters of every request.
    """

    def __init__(self, client: LLMClient, **params: Any) -> None:
        self._client = client
        self._params = {"temperature": 0, "seed": 1, **params}

    @property
    def model(self) -> str | None:
        return self._client.model

    async def chat_completion(self, messages: Any, *, model: str | None, stream: Any, **params: Any) -> ChatStream:
        params = {**params, **self._params}
        opened: ChatStream = await self._client.chat_completion(messages, model=model, stream=True, **params)
        return opened

    async def server_info(self) -> Any:
        return await self._client.server_info()
