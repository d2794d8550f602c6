"""Asks questions of two servers at the same time, with one client, and shows which server did what.

    python examples/several_servers.py
    python examples/several_servers.py http://127.0.0.1:1234/v1 http://127.0.0.1:9931/v1 --model qwen3-4b

Without URLs it starts two embedded servers, which needs the extra `lmbridge[local]`. It stops one of them after the
first questions, and the other one takes over.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from lmbridge import LLMClient, LLMError, LocalServer

ANIMALS = ("bear", "camel", "duck", "eagle", "fox", "goat", "horse", "ibex")


async def ask(client: LLMClient, animal: str) -> None:
    """Asks a question and prints the answer."""
    answer = await client.ask(f"What does a {animal} eat? Answer in a few words.", max_tokens=16)
    print(f"{animal}: {' '.join(answer.split())}", flush=True)


async def ask_all(client: LLMClient) -> None:
    """Asks all questions at once; the client decides which server gets each of them."""
    await asyncio.gather(*[ask(client, animal) for animal in ANIMALS])
    for url, numbers in client.stats().by_server.items():
        print(f"{url}: {'available' if numbers.is_available else 'failed'}")


async def use_servers(urls: list[str], model: str | None) -> None:
    """Asks the servers at these URLs."""
    async with LLMClient(urls, model, limits="auto") as client:
        await ask_all(client)


async def use_embedded_servers() -> None:
    """Starts two servers, asks the questions, stops one of the servers, and asks the questions again."""
    async with (
        LocalServer(n_ctx=2048, n_parallel=2) as first,
        LocalServer(n_ctx=2048, n_parallel=2) as second,
        LLMClient([first.api_base, second.api_base], first.model, limits="auto") as client,
    ):
        await ask_all(client)
        print(f"\nstopping {first.api_base}\n")
        await first.close()
        await ask_all(client)


async def main() -> None:
    """Reads the arguments and asks the questions."""
    parser = argparse.ArgumentParser(description="Asks questions of several servers with one client.")
    parser.add_argument("urls", nargs="*", help="servers of your own")
    parser.add_argument("--model", help="a model of these servers")
    args = parser.parse_args()
    if args.urls:
        await use_servers(args.urls, args.model)
    else:
        await use_embedded_servers()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"several_servers: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
