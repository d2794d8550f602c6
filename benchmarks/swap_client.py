"""The process of one client: sends streamed requests for several models, and tells what became of each.

It takes a line of JSON, `{"api_base", "models", "gap", "tokens", "expected"}`, and prints one: a list of outcomes.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, NamedTuple, Protocol

from benchmarks.peers.base import MESSAGES

AT_ONCE: Final = 4
"""Requests that lmbridge has in flight at a time: as many as each of the servers answers."""
BOUND: Final = 300.0
"""Seconds that all of them may take."""

Kind = Literal["whole", "truncated", "failed", "wrong model"]


class Outcome(NamedTuple):
    """What became of a request."""

    kind: Kind
    seconds: float
    """From the call to the end."""
    error: str = ""


class Ask(Protocol):
    """Sends a streamed request and returns its chunks as dicts."""

    async def __call__(self, model: str, tokens: int) -> AsyncIterator[Mapping[str, Any]]: ...


@asynccontextmanager
async def lmbridge(api_base: str) -> AsyncIterator[Ask]:
    from lmbridge import Limits, LLMClient  # noqa: PLC0415 - each client in its own process

    async with LLMClient(api_base, limits=Limits(max_concurrency=AT_ONCE, max_loaded_models=1)) as client:

        async def ask(model: str, tokens: int) -> AsyncIterator[Mapping[str, Any]]:
            return await client.chat_completion(MESSAGES, model=model, stream=True, max_tokens=tokens)

        yield ask


@asynccontextmanager
async def openai(api_base: str, **options: Any) -> AsyncIterator[Ask]:
    from openai import AsyncOpenAI  # noqa: PLC0415 - each client in its own process

    async with AsyncOpenAI(base_url=api_base, api_key="none", **options) as client:
        create: Any = client.chat.completions.create

        async def ask(model: str, tokens: int) -> AsyncIterator[Mapping[str, Any]]:
            stream = await create(model=model, messages=MESSAGES, stream=True, max_tokens=tokens)
            return (chunk.model_dump() async for chunk in stream)

        yield ask


CLIENTS: Final[dict[str, tuple[str, Any]]] = {
    "lmbridge": ("lmbridge", lmbridge),
    "openai": ("openai-python", openai),
    "openai-once": ("openai-python, max_retries=0", lambda api_base: openai(api_base, max_retries=0)),
}


async def outcome(ask: Ask, model: str, tokens: int, expected: str | None) -> Outcome:
    """Sends one, reads it to its end, and looks at it.

    Args:
        ask: The client.
        model: Which model is to answer.
        tokens: How long the answer may be.
        expected: What the answer has to say; None for anything.
    """
    began = time.monotonic()
    text, reason, names = "", None, set()
    kind: Kind = "whole"
    error = ""
    try:
        async for chunk in await ask(model, tokens):
            names.add(chunk.get("model"))
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                reason = choice.get("finish_reason") or reason
    except Exception as exc:  # noqa: BLE001 - whatever it is, the answer is lost
        kind, error = "failed", f"{type(exc).__name__}: {exc}"[:300]
    else:
        if names - {model}:
            kind = "wrong model"
        elif reason is None or not text or text != (expected or text):
            kind = "truncated"
    return Outcome(kind, time.monotonic() - began, error)


async def run(name: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """All requests, each in a task of its own, the next one started `gap` seconds after the one before."""
    async with CLIENTS[name][1](job["api_base"]) as ask, asyncio.timeout(BOUND):
        began = time.monotonic()
        tasks = []
        async with asyncio.TaskGroup() as group:
            for model in job["models"]:
                expected = job["expected"].get(model)
                tasks.append(group.create_task(outcome(ask, model, job["tokens"], expected)))
                if job["gap"]:
                    await asyncio.sleep(job["gap"])
        return {"seconds": time.monotonic() - began, "outcomes": [task.result() for task in tasks]}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    answers.write(json.dumps(asyncio.run(run(sys.argv[1], json.loads(sys.stdin.readline())))) + "\n")


if __name__ == "__main__":
    main()
