"""Asks many questions through a pool of few clients, each with the model that its task needs.

    python examples/pool.py
    python examples/pool.py --api-base http://127.0.0.1:1234/v1 --models qwen3-4b gemma-3-4b --size 4

Without `--api-base` and without LMBRIDGE_API_BASE in the environment, it starts the embedded server, which needs the
extra `lmbridge[local]`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import cycle

from lmbridge import LLMClientPool, LLMError, LocalServer, collect

ANIMALS = ("bear", "camel", "duck", "eagle", "fox", "goat", "horse", "ibex", "jackal", "koala", "lynx", "mole")


@asynccontextmanager
async def connect(api_base: str | None, size: int) -> AsyncIterator[LLMClientPool]:
    """Yields a pool for the server at `api_base`, or for an embedded server that it starts if there is no URL."""
    if api_base:
        async with LLMClientPool(size, api_base=api_base) as pool:
            yield pool
    else:
        async with (
            LocalServer() as server,
            LLMClientPool(size, api_base=server.api_base, model=server.model) as pool,
        ):
            yield pool


async def ask(pool: LLMClientPool, model: str | None, animal: str) -> None:
    """Waits for a client, asks one question, and gives the client back even if an error occurs."""
    messages = [{"role": "user", "content": f"What does a {animal} eat? Answer in one sentence."}]
    async with pool.client(model) as client:
        reply = await collect(await client.chat_completion(messages, stream=True, max_tokens=30))
        stats = pool.stats()
    answer = " ".join((reply["choices"][0]["message"].get("content") or "").split())
    print(f"[{stats.in_use} of {stats.size} in use, {stats.waiting} waiting] {animal}: {answer}")


async def ask_all(pool: LLMClientPool, models: Sequence[str]) -> None:
    """Starts all questions at the same time; the pool decides when each of them gets a client."""
    turns = cycle(models or [None])
    await asyncio.gather(*[ask(pool, model, animal) for animal, model in zip(ANIMALS, turns, strict=False)])


async def main() -> None:
    """Reads the arguments and asks the questions."""
    parser = argparse.ArgumentParser(description="Asks many questions through a pool of few clients.")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="a server of your own")
    parser.add_argument("--models", nargs="+", default=[], help="models of that server, asked in turn")
    parser.add_argument("--size", type=int, default=2, help="clients in the pool")
    args = parser.parse_args()
    async with connect(args.api_base, args.size) as pool:
        await ask_all(pool, args.models)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"pool: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
