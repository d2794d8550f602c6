"""A proxy between agents and a real server, which counts what the server did and checks what it was sent."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import aiohttp

from benchmarks.solving.model import find_problem
from lmbridge.testing import Exchange

_SECONDS = 300.0


class RecordingProxy:
    """A behaviour for a `ScriptedServer` that passes requests on.

    Args:
        session: The session for the requests to the server.
        api_base: The address of the server, with `/v1`.
        max_tokens: The limit on the tokens of each reply, whatever the agent asks for.
    """

    def __init__(self, session: aiohttp.ClientSession, api_base: str, max_tokens: int) -> None:
        self._session = session
        self._url = f"{api_base}/chat/completions"
        self._max_tokens = max_tokens
        self.counts: Counter[str] = Counter()
        """The requests, the tokens of prompts and replies, the refused requests, and the invalid conversations."""

    async def __call__(self, exchange: Exchange) -> None:
        """Passes a request on, and its reply back."""
        body: dict[str, Any] = {**exchange.request.json, "max_tokens": self._max_tokens}
        body.pop("max_completion_tokens", None)
        if body.get("stream"):
            body["stream_options"] = {"include_usage": True}
        self.counts["requests"] += 1
        self.counts["invalid"] += find_problem(body["messages"]) is not None
        async with self._session.post(self._url, json=body, timeout=aiohttp.ClientTimeout(_SECONDS)) as reply:
            self.counts["refused"] += reply.status >= 400
            await exchange.start(reply.status, content_type=reply.headers.get("Content-Type"))
            received = b""
            async for piece in reply.content.iter_any():
                received += piece
                await exchange.send(piece)
            self._count_tokens(received)
        await exchange.end()

    def _count_tokens(self, received: bytes) -> None:
        lines = [line.removeprefix(b"data: ") for line in received.splitlines()]
        for line in [received] if received.startswith(b"{") else lines:
            try:
                usage: Mapping[str, int] = json.loads(line).get("usage") or {}
            except (ValueError, AttributeError):
                continue
            for name in ("prompt_tokens", "completion_tokens"):
                self.counts[name] += usage.get(name, 0)
