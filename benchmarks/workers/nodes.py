"""The workload of several servers: conversations with a long beginning on two embedded servers with two slots each.

A person reads each answer for a while. Without these pauses, a conversation would come back at the moment at which it
leaves a server, which is then the least loaded one, and both ways to choose a server would be the same.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from contextlib import AsyncExitStack
from statistics import mean, median
from typing import Any, Final, NamedTuple

from benchmarks.workers import serve
from lmbridge import Limits, LLMClient, LocalServer, NodePool, Transport

_SLOTS: Final = 2
_ANSWER_TOKENS: Final = (8, 32)
"""The fewest and the most tokens of an answer."""
_PAUSE_SECONDS: Final = 1.5
"""The mean of the pauses between an answer and the next question."""


class _Turn(NamedTuple):
    """A turn of a conversation."""

    first_token: float
    """The milliseconds until the first token, including the time in the queue."""
    tokens_read: int
    """The tokens of the prompt that were not in the server's cache."""


class NodeWorkloads:
    """The workloads of one way to choose a server.

    Args:
        peer: "lmbridge" for the preference for warm prompts, anything else for the least loaded server.
    """

    def __init__(self, peer: str) -> None:
        self._prefer_warm = peer == "lmbridge"

    async def first_token(self, conversations: int, turns: int, words: int) -> float:
        """Returns the median milliseconds until the first token of a turn after the first one."""
        return median(turn.first_token for turn in await self._talk(conversations, turns, words))

    async def tokens_read(self, conversations: int, turns: int, words: int) -> float:
        """Returns the mean number of tokens that a server reads for such a turn."""
        return mean(turn.tokens_read for turn in await self._talk(conversations, turns, words))

    async def _talk(self, conversations: int, turns: int, words: int) -> list[_Turn]:
        async with AsyncExitStack() as stack:
            servers = [
                await stack.enter_async_context(LocalServer(n_ctx=4096 * _SLOTS, n_parallel=_SLOTS, threads=1))
                for _ in range(2)
            ]
            limits = Limits(max_concurrency=_SLOTS)
            transports = [Transport(server.api_base, limits=limits) for server in servers]
            pool = await stack.enter_async_context(NodePool(transports, prefer_warm=self._prefer_warm))
            client = LLMClient(transport=pool, model=servers[0].model)
            talks = await asyncio.gather(*(_converse(client, n, turns, words) for n in range(conversations)))
        return [turn for talk in talks for turn in talk]


async def _converse(client: LLMClient, number: int, turns: int, words: int) -> list[_Turn]:
    opening = " ".join(f"{(number + 1) * (word + 7) % 9973}" for word in range(words))
    # Both ways to choose a server get the same conversations.
    choose = random.Random(number)
    messages: list[dict[str, str]] = [{"role": "user", "content": f"Remember these numbers: {opening}"}]
    measured = []
    for _ in range(turns):
        turn, text = await _ask(client, messages, choose.randint(*_ANSWER_TOKENS))
        measured.append(turn)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And what else?"}]
        await asyncio.sleep(choose.expovariate(1 / _PAUSE_SECONDS))
    return measured[1:]


async def _ask(client: LLMClient, messages: list[dict[str, str]], max_tokens: int) -> tuple[_Turn, str]:
    began, first_token, text = time.perf_counter(), 0.0, ""
    timings: dict[str, Any] = {}
    async with client.stream_chat(messages, max_tokens=max_tokens, temperature=0) as stream:
        async for chunk in stream:
            fields: dict[str, Any] = {**chunk}
            timings = fields.get("timings") or timings
            for choice in chunk["choices"]:
                if piece := choice["delta"].get("content"):
                    first_token = first_token or time.perf_counter() - began
                    text += piece
    return _Turn(first_token * 1e3, int(timings.get("prompt_n", 0))), text


if __name__ == "__main__":
    serve(NodeWorkloads(sys.argv[1]))
