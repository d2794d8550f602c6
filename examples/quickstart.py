"""Streams an answer to the terminal, by default from the small model of `lmbridge[local]`.

    python examples/quickstart.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b "What is a llama?"

LMBRIDGE_API_BASE in the environment has the effect of `--api-base`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from contextlib import AsyncExitStack

from lmbridge import LLMClient, LLMError, LocalServer


def show_progress(done: int, total: int) -> None:
    """Prints how much of the model has been downloaded."""
    print(f"{done / 1e6:4.0f} of {total / 1e6:.0f} MB", end="\r", file=sys.stderr, flush=True)


async def main() -> None:
    """Prints the prompt, the answer while it is written, and at the end the model, its tokens and the time."""
    parser = argparse.ArgumentParser(description="Streams a model's answer to the terminal.")
    parser.add_argument("prompt", nargs="?", default="Give me three tips for a good night's sleep.")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="a server of your own")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="a model of that server")
    args = parser.parse_args()
    async with AsyncExitStack() as stack:
        if not args.api_base:
            local = LocalServer(progress=show_progress if sys.stderr.isatty() else None)
            server = await stack.enter_async_context(local)
            args.api_base, args.model = server.api_base, server.model
        client = await stack.enter_async_context(LLMClient(args.api_base, args.model))
        print(f"> {args.prompt}\n")
        began = time.perf_counter()
        messages, options = [{"role": "user", "content": args.prompt}], {"include_usage": True}
        async with client.stream_chat(messages, temperature=0, max_tokens=300, stream_options=options) as stream:
            async for text in stream.text():
                print(text, end="", flush=True)
            reply = await stream.collect()
        tokens = (reply.get("usage") or {}).get("completion_tokens") or "?"
        print(f"\n\n{reply.get('model')}: {tokens} tokens in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    # At this level, the embedded server logs that it downloads its model.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lmbridge.local").setLevel(logging.INFO)
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"quickstart: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
