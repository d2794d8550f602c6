"""The limit: a hand-written loop that checks nothing. It streams, so that a server stops when a run is cancelled."""

from __future__ import annotations

from typing import Any

import aiohttp
from yarl import URL

from benchmarks.agent_peers.base import AT_ONCE, SYSTEM, TASK, TOOLS, AgentPeer, add
from benchmarks.peers.base import JSON
from benchmarks.peers.json_codec import dumps, loads


class Agent(AgentPeer):
    def __init__(self, base: str) -> None:
        self._url = URL(f"{base}/chat/completions")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=AT_ONCE),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def run(self, model: str) -> int:
        messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": TASK}]
        while True:
            message = await self.ask({"model": model, "messages": messages, "tools": TOOLS})
            messages.append(message)
            if not message["tool_calls"]:
                return len(message["content"])
            for call in message["tool_calls"]:
                result = await add(**loads(call["function"]["arguments"]))
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": str(result)})

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """Makes one request, and returns the message of the reply."""
        data = dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
        text, calls = "", list[Any]()
        async with self._session.post(self._url, data=data, headers=JSON) as response:
            read, tail = response.content.readany, b""
            while data := await read():
                lines = (tail + data).split(b"\n")
                tail = lines.pop()
                for line in lines:
                    if line[:7] == b"data: {":
                        for choice in loads(line[6:])["choices"]:
                            delta = choice["delta"]
                            text += delta.get("content") or ""
                            for part in delta.get("tool_calls", ()):
                                if part["index"] == len(calls):
                                    calls.append({key: part[key] for key in ("id", "type", "function")})
                                else:
                                    calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        return {"role": "assistant", "content": text, "tool_calls": calls}
