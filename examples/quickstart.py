"""Streams an answer to the terminal, by default from the small model of `lmbridge[local]`.

    python examples/quickstart.py
    python examples/quickstart.py "What is a llama?"
    python examples/quickstart.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b "What is a llama?"

With `--api-base`, or LMBRIDGE_API_BASE in the environment, it asks that server instead.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lmbridge import LLMClient, LLMError, LocalServer

PROMPT = "Give me three tips for a good night's sleep."


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """Yields a client of the server at `api_base`, or of an embedded server that it starts if there is no URL."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        progress = show_progress if sys.stderr.isatty() else None
        async with LocalServer(progress=progress) as server, LLMClient(server.api_base, server.model) as client:
            yield client


def show_progress(done: int, total: int) -> None:
    """Prints how much of the model has been downloaded; the next output overwrites the line."""
    print(f"{done / 1e6:4.0f} of {total / 1e6:.0f} MB", end="\r", file=sys.stderr, flush=True)


async def show_answer(client: LLMClient, prompt: str) -> None:
    """Prints the prompt, then each chunk as it arrives, and at the end the model, its tokens and the time."""
    print(f"> {prompt}\n")
    began = time.perf_counter()
    stream = await client.chat_completion(
        [{"role": "user", "content": prompt}],
        stream=True,
        stream_options={"include_usage": True},
        temperature=0,
        max_tokens=300,
    )
    model, tokens = client.model, None
    async for chunk in stream:
        for choice in chunk.get("choices", ()):
            print(choice.get("delta", {}).get("content") or "", end="", flush=True)
        model = chunk.get("model", model)
        if usage := chunk.get("usage"):
            tokens = usage.get("completion_tokens")
    print(f"\n\n{model}: {tokens or '?'} tokens in {time.perf_counter() - began:.1f} s")


async def main() -> None:
    """Reads the arguments and shows the answer."""
    parser = argparse.ArgumentParser(description="Streams a model's answer to the terminal.")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="a server of your own")
    parser.add_argument("--model", default=os.environ.get("DEFAULT_MODEL"), help="a model of that server")
    args = parser.parse_args()
    async with connect(args.api_base, args.model) as client:
        await show_answer(client, args.prompt)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    # At this level, the embedded server logs that it downloads its model.
    logging.getLogger("lmbridge.local").setLevel(logging.INFO)
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"quickstart: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
