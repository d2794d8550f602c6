"""Puts the gateway in front of a server, and sends it requests of two programs: a batch job, and an urgent question.

    python examples/gateway.py
    python examples/gateway.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b

Without `--api-base` and without LMBRIDGE_API_BASE in the environment, it starts the embedded server, which needs the
extra `lmbridge[local]`. While it runs, the status page is at the address that it prints.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from contextlib import AsyncExitStack

from lmbridge import Limits, LLMClient, LLMError, LocalServer, collect
from lmbridge.gateway import Gateway

LIMITS = Limits(max_concurrency=1, max_loaded_models=1)


async def ask(client: LLMClient, question: str, priority: str) -> None:
    """Asks a question, as any other program could do it over HTTP."""
    messages = [{"role": "user", "content": question}]
    headers = {"X-Lmbridge-Priority": priority}
    stream = await client.chat_completion(messages, stream=True, max_tokens=20, extra_headers=headers)
    answer = (await collect(stream))["choices"][0]["message"].get("content") or ""
    print(f"{priority:11} {question} {' '.join(answer.split())}")


async def main() -> None:
    """Reads the arguments, starts the gateway, and asks all questions at the same time."""
    parser = argparse.ArgumentParser(description="Sends the requests of two programs through the gateway.")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="a server of your own")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="a model of that server")
    args = parser.parse_args()
    async with AsyncExitStack() as stack:
        local = None if args.api_base else await stack.enter_async_context(LocalServer())
        upstream, model = (local.api_base, local.model) if local else (args.api_base, args.model)
        gateway = await stack.enter_async_context(Gateway(upstreams=[upstream], limits=LIMITS))
        print(f"status page: {gateway.origin}/status")
        batch_job = await stack.enter_async_context(LLMClient(gateway.api_base, model, "key-of-the-job"))
        chat = await stack.enter_async_context(LLMClient(gateway.api_base, model, "key-of-the-chat"))
        async with asyncio.TaskGroup() as tasks:
            for animal in ("bear", "duck", "fox", "goat"):
                tasks.create_task(ask(batch_job, f"What does a {animal} eat?", "batch"))
            tasks.create_task(ask(chat, "What is the capital of France?", "interactive"))


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except* (LLMError, ImportError) as errors:
        sys.exit(f"gateway: {errors.exceptions[0]}")
    except* KeyboardInterrupt:
        sys.exit(130)
