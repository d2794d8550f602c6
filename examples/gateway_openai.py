"""Lets two programs that do not use lmbridge share one server through the gateway: two clients of openai-python.

    pip install openai
    python examples/gateway_openai.py

It uses the server of LMBRIDGE_API_BASE, or LM Studio. The urgent question overtakes the batch job, although both
programs believe that they have the server for themselves.
"""

from __future__ import annotations

import asyncio
import os
import sys

from openai import AsyncOpenAI, OpenAIError

from lmbridge import Limits, LLMError
from lmbridge.gateway import Gateway

SERVER = os.environ.get("LMBRIDGE_API_BASE", "http://127.0.0.1:1234/v1")


async def ask(program: AsyncOpenAI, question: str) -> None:
    """Asks a question and prints the first line of the answer."""
    model = (await program.models.list()).data[0].id
    reply = await program.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=30
    )
    print(f"{question} {(reply.choices[0].message.content or '').strip().partition(chr(10))[0]}", flush=True)


async def main() -> None:
    """Starts the gateway, and lets both programs ask at the same time."""
    async with Gateway(upstreams=[SERVER], limits=Limits(max_concurrency=1)) as gateway:
        print(f"status page: {gateway.origin}/status")
        # An existing program needs only this address and, if it is urgent, this header.
        urgent = {"X-Lmbridge-Priority": "interactive"}
        async with (
            AsyncOpenAI(base_url=gateway.api_base, api_key="batch") as batch_job,
            AsyncOpenAI(base_url=gateway.api_base, api_key="chat", default_headers=urgent) as chat,
            asyncio.TaskGroup() as tasks,
        ):
            for animal in ("bear", "duck", "fox", "goat"):
                tasks.create_task(ask(batch_job, f"What does a {animal} eat?"))
            tasks.create_task(ask(chat, "What is the capital of France?"))


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except* (LLMError, OpenAIError) as errors:
        sys.exit(f"gateway_openai: {errors.exceptions[0]}")
