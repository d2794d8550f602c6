"""The workload of model swaps: streamed requests for two models to a server that holds one, and the fate of each."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, NamedTuple, Protocol

from benchmarks.peers.base import MESSAGES
from benchmarks.swap_servers import SWAP_SERVERS, SwapServer, count_swaps, scripted_texts
from benchmarks.workers import serve

_SEED: Final = 1796
_AT_ONCE: Final = 4
"""The number of requests that lmbridge has in flight, which is the number that each of the servers can answer."""
_ERROR_CHARACTERS: Final = 300

Fate = Literal["whole", "truncated", "failed", "wrong model"]


class Answer(NamedTuple):
    """An answer that has arrived."""

    text: str
    finish_reason: str | None
    models: set[str | None]
    """The models that it names."""


class SwapOutcome(NamedTuple):
    """The fate of one request."""

    fate: Fate
    """The way in which the request ended."""
    seconds: float
    """The time from the call to the end of the answer."""
    error: str = ""
    """The exception, if the request failed."""


class StreamRequest(Protocol):
    """Sends a streamed request and returns its chunks as dicts."""

    async def __call__(self, model: str, tokens: int) -> AsyncIterator[Mapping[str, Any]]: ...


# Each client is imported only in the worker that measures it.


@asynccontextmanager
async def _lmbridge_client(api_base: str) -> AsyncIterator[StreamRequest]:
    from lmbridge import Limits, LLMClient  # noqa: PLC0415 - the workers of other clients do not need it

    async with LLMClient(api_base, limits=Limits(max_concurrency=_AT_ONCE, max_loaded_models=1)) as client:

        async def request(model: str, tokens: int) -> AsyncIterator[Mapping[str, Any]]:
            return await client.chat_completion(MESSAGES, model=model, stream=True, max_tokens=tokens)

        yield request


@asynccontextmanager
async def _openai_client(api_base: str, **options: Any) -> AsyncIterator[StreamRequest]:
    from openai import AsyncOpenAI  # noqa: PLC0415 - the workers of other clients do not need it

    async with AsyncOpenAI(base_url=api_base, api_key="none", **options) as client:
        create: Any = client.chat.completions.create

        async def request(model: str, tokens: int) -> AsyncIterator[Mapping[str, Any]]:
            stream = await create(model=model, messages=MESSAGES, stream=True, max_tokens=tokens)
            return (chunk.model_dump() async for chunk in stream)

        yield request


_CLIENTS: Final[Mapping[str, Any]] = {
    "lmbridge": _lmbridge_client,
    "openai": _openai_client,
    "openai-once": lambda api_base: _openai_client(api_base, max_retries=0),
}


class SwapWorkloads:
    """The workload of one client.

    Args:
        client: The name of the client.
    """

    def __init__(self, client: str) -> None:
        self._client = client

    async def answers(self, server: str, scenario: str, requests: int) -> dict[str, Any]:
        """Sends the requests to a new server, and returns their outcomes, the total seconds and the number of swaps.

        Args:
            server: The name of the server in `benchmarks.swap_servers`.
            scenario: "at-once" for requests that start together, with models at random; "callers" for requests that
                start one shortly after another, with alternating models.
            requests: The number of requests.
        """
        info = SWAP_SERVERS[server]
        with SwapServer(server) as running:
            names = running.models
            expected = {} if info.is_real else scripted_texts(names)
            draw = random.Random(_SEED)
            models = [draw.choice(names) if scenario == "at-once" else names[index % 2] for index in range(requests)]
            pause = info.seconds_between_callers if scenario == "callers" else 0.0
            async with _CLIENTS[self._client](running.api_base) as request:
                began = time.monotonic()
                tasks = []
                async with asyncio.TaskGroup() as group:
                    for model in models:
                        outcome = judge(_read_answer(request, model, info.tokens), model, expected.get(model))
                        tasks.append(group.create_task(outcome))
                        if pause:
                            await asyncio.sleep(pause)
                seconds = time.monotonic() - began
            outcomes = [task.result() for task in tasks]
            return {"outcomes": outcomes, "seconds": seconds, "swaps": count_swaps(running.loads())}


async def _read_answer(request: StreamRequest, model: str, tokens: int) -> Answer:
    """Sends one request with the function `request`, and reads its answer to the end."""
    text, finish_reason, models = "", None, set()
    async for chunk in await request(model, tokens):
        models.add(chunk.get("model"))
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
            finish_reason = choice.get("finish_reason") or finish_reason
    return Answer(text, finish_reason, models)


async def judge(request: Awaitable[Answer], model: str, expected: str | None) -> SwapOutcome:
    """Waits for the answer to a request, and judges it.

    Args:
        request: The request, whose result is the answer.
        model: The model that should answer.
        expected: The text of a whole answer, or None for any text.
    """
    began = time.monotonic()
    fate: Fate = "whole"
    error = ""
    try:
        answer = await request
    except Exception as exc:  # noqa: BLE001 - any exception means a lost answer
        fate, error = "failed", f"{type(exc).__name__}: {exc}"[:_ERROR_CHARACTERS]
    else:
        if answer.models - {model}:
            fate = "wrong model"
        elif answer.finish_reason is None or not answer.text or answer.text != (expected or answer.text):
            fate = "truncated"
    return SwapOutcome(fate, time.monotonic() - began, error)


if __name__ == "__main__":
    serve(SwapWorkloads(sys.argv[1]))
