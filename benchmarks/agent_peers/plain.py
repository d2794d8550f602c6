"""The hand-written loop with plain requests, which a server may continue to answer after a run was cancelled."""

from __future__ import annotations

from typing import Any

from benchmarks.agent_peers import limit
from benchmarks.peers.base import JSON
from benchmarks.peers.json_codec import dumps, loads


class Agent(limit.Agent):
    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        async with self._session.post(self._url, data=dumps(body), headers=JSON) as response:
            message: dict[str, Any] = loads(await response.read())["choices"][0]["message"]
        return message
