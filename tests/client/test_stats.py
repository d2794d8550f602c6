"""`client.stats()`."""

from __future__ import annotations

import asyncio

from lmbridge import (
    ClientStats,
    Limits,
    LLMClient,
    ModelStats,
)
from lmbridge.testing import ScriptedServer, answer, reply, stall
from tests.support import MESSAGES, piece, turns


async def test_stats_count_requests_in_flight_and_queued_swaps_and_retries(
    scripted_server: ScriptedServer, no_waits: list[float]
) -> None:
    client = LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=2, max_loaded_models=1))
    assert client.stats() == ClientStats(in_flight=0, queued=0, swaps=0, retries=0, by_model={})
    scripted_server.script(reply(503, {"error": "busy"}), answer("a"), stall(after=[piece("b", model="b")]))
    async with client:
        await client.chat_completion(MESSAGES, model="a")
        stream = await client.chat_completion(MESSAGES, model="b", stream=True)
        await anext(stream)
        waiting = asyncio.create_task(client.chat_completion(MESSAGES, model="a"))
        await turns()
        assert client.stats() == ClientStats(
            in_flight=1,
            queued=1,
            swaps=1,
            retries=1,
            by_model={"a": ModelStats(queued=1, retries=1), "b": ModelStats(in_flight=1, swaps=1)},
        )
        await stream.aclose()
        await waiting
    assert client.stats().swaps == 2
