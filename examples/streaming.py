"""Streams: leave one early, stop it from another task, limit its time, collect it, and run several at a time.

    python examples/streaming.py
    python examples/streaming.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b

Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, it starts a server (`lmbridge[local]`).
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
    """Yields a client of the server at `api_base`, or of a server that is started for this program."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


async def ask(client: LLMClient, prompt: str, max_tokens: int = 1000) -> ChatStream:
    """Opens the stream of an answer."""
    messages = [{"role": "user", "content": prompt}]
    return await client.chat_completion(messages, stream=True, max_tokens=max_tokens)


async def show(chunks: AsyncIterable[ChatCompletionChunk]) -> None:
    """Prints the text of each chunk as it arrives."""
    async for chunk in chunks:
        print(text_of(chunk), end="", flush=True)


def text_of(chunk: ChatCompletionChunk) -> str:
    """Returns the text in a chunk. Chunks with only a role, tool calls or the usage have none."""
    return "".join(choice.get("delta", {}).get("content") or "" for choice in chunk.get("choices", ()))


def answer_text(reply: ChatCompletion | None) -> str:
    """Returns the text of a whole reply, or of a partial one."""
    return (reply["choices"][0]["message"]["content"] or "") if reply else ""


async def leave_early(client: LLMClient) -> None:
    """Leaves the `async with` early, which closes the connection, so that the server stops generating."""
    received = ""
    async with await ask(client, LONG) as stream:
        async for chunk in stream:
            received += text_of(chunk)
            print(text_of(chunk), end="", flush=True)
            if len(received) > 200:
                break
    print("\n-- left early")


async def stop_from_another_task(client: LLMClient) -> None:
    """Closes the stream like a stop button does: the reader gets an error, never an end that looks complete."""
    stream = await ask(client, LONG)
    reader = asyncio.create_task(show(stream))
    await asyncio.wait({reader}, timeout=1)
    await stream.aclose()
    try:
        await reader
    except TaskCancelledError as error:
        print(f"\n-- stopped after {len(answer_text(error.partial))} characters")
    else:
        print("\n-- the answer was complete before that")


async def exceed_a_time_limit(client: LLMClient) -> None:
    """Shows that an error has what had arrived in `.partial`, in the shape of a whole reply."""
    async with LLMClient(client.api_base, client.model, timeout=Timeouts(total=1)) as impatient:
        try:
            async with await ask(impatient, LONG) as stream:
                await show(stream)
        except LLMTimeoutError as error:
            print(f"\n-- {error}\n-- .partial has {len(answer_text(error.partial))} characters")
        else:
            print("\n-- the answer was complete in time")


async def collect_one(client: LLMClient) -> None:
    """Collects a stream into the dict that the call without `stream=True` would have returned."""
    reply = await collect(await ask(client, "Say hello.", max_tokens=30))
    print(f"{answer_text(reply)}\n-- finish_reason: {reply['choices'][0].get('finish_reason')}")


async def many_at_a_time(client: LLMClient) -> None:
    """Opens eight streams, of which two run at a time while the others wait."""

    async def ask_about(animal: str) -> None:
        reply = await collect(await ask(crowd, f"What does a {animal} eat?", max_tokens=20))
        print(f"{animal}: {' '.join(answer_text(reply).split())}")

    animals = ("bear", "camel", "duck", "eagle", "fox", "goat", "horse", "ibex")
    async with LLMClient(client.api_base, client.model, limits=Limits(max_concurrency=2)) as crowd:
        await asyncio.gather(*map(ask_about, animals))


async def main() -> None:
    """Parses the arguments and runs each demonstration."""
    parser = argparse.ArgumentParser(description="Shows what a stream can do.")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="the URL of your server")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="a model of that server")
    args = parser.parse_args()
    async with connect(args.api_base, args.model) as client:
        for demo in (leave_early, stop_from_another_task, exceed_a_time_limit, collect_one, many_at_a_time):
            print(f"\n== {demo.__name__}")
            await demo(client)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"streaming: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
