"""What a stream can do: be left early, be stopped, run into a limit, be collected, run beside others.

    python examples/streaming.py
    python examples/streaming.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b

Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, it starts the server of `lmbridge[local]`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager

from lmbridge import (
    ChatStream,
    Limits,
    LLMClient,
    LLMError,
    LLMTimeoutError,
    LocalServer,
    TaskCancelledError,
    Timeouts,
    collect,
)
from lmbridge.types import ChatCompletion, ChatCompletionChunk

LONG = "Write a long story about a lighthouse and the people who live near it."


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """A client of the server at `api_base`, or else of one that is started here."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


async def ask(client: LLMClient, prompt: str, max_tokens: int = 1000) -> ChatStream:
    """A stream of the answer to one question."""
    messages = [{"role": "user", "content": prompt}]
    return await client.chat_completion(messages, stream=True, max_tokens=max_tokens)


async def show(chunks: AsyncIterable[ChatCompletionChunk]) -> None:
    """Prints the text of each chunk as it arrives."""
    async for chunk in chunks:
        print(text_of(chunk), end="", flush=True)


def text_of(chunk: ChatCompletionChunk) -> str:
    """The text that a chunk adds; chunks with a role, tool calls or the usage add none."""
    return "".join(choice.get("delta", {}).get("content") or "" for choice in chunk.get("choices", ()))


def answer_of(reply: ChatCompletion | None) -> str:
    """The text of a whole reply, or of what had arrived of one."""
    return reply["choices"][0]["message"].get("content", "") if reply else ""


async def leave_early(client: LLMClient) -> None:
    """Leaving the `async with` closes the connection, and the server stops generating."""
    received = ""
    async with await ask(client, LONG) as stream:
        async for chunk in stream:
            received += text_of(chunk)
            print(text_of(chunk), end="", flush=True)
            if len(received) > 200:
                break
    print("\n-- left")


async def stop_from_another_task(client: LLMClient) -> None:
    """`aclose` is the stop button: whoever reads gets an error, never an end that looks complete."""
    stream = await ask(client, LONG)
    reader = asyncio.create_task(show(stream))
    await asyncio.wait({reader}, timeout=1)
    await stream.aclose()
    try:
        await reader
    except TaskCancelledError as error:
        print(f"\n-- stopped after {len(answer_of(error.partial))} characters")
    else:
        print("\n-- it had ended before")


async def run_into_a_limit(client: LLMClient) -> None:
    """Every error of a stream has what had arrived in `.partial`, in the shape of a whole reply."""
    async with LLMClient(client.api_base, client.model, timeout=Timeouts(total=1)) as hurried:
        try:
            async with await ask(hurried, LONG) as stream:
                await show(stream)
        except LLMTimeoutError as error:
            print(f"\n-- {error}\n-- .partial has {len(answer_of(error.partial))} characters")
        else:
            print("\n-- it ended in time")


async def collect_one(client: LLMClient) -> None:
    """`collect` makes the dict that the call without `stream=True` would have returned."""
    reply = await collect(await ask(client, "Say hello.", max_tokens=30))
    print(f"{answer_of(reply)}\n-- finish_reason: {reply['choices'][0]['finish_reason']}")


async def many_at_a_time(client: LLMClient) -> None:
    """Eight streams, of which two generate at a time; the others wait their turn."""

    async def one(animal: str) -> None:
        reply = await collect(await ask(crowd, f"What does a {animal} eat?", max_tokens=20))
        print(f"{animal}: {' '.join(answer_of(reply).split())}")

    animals = ("bear", "camel", "duck", "eagle", "fox", "goat", "horse", "ibex")
    async with LLMClient(client.api_base, client.model, limits=Limits(max_concurrency=2)) as crowd:
        await asyncio.gather(*map(one, animals))


async def main() -> None:
    """Reads the arguments and runs everything above."""
    parser = argparse.ArgumentParser(description="Shows what a stream can do.")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="a server of your own")
    parser.add_argument("--model", default=os.environ.get("DEFAULT_MODEL"), help="a model of that server")
    args = parser.parse_args()
    async with connect(args.api_base, args.model) as client:
        for part in (leave_early, stop_from_another_task, run_into_a_limit, collect_one, many_at_a_time):
            print(f"\n== {part.__name__}")
            await part(client)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"streaming: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
