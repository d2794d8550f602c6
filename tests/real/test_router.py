"""Requests for two models to real servers that hold one model at a time.

The tests run on a small router in front of the embedded server, and on the router of llama-server if its binary is
installed and runs on this CPU. Both models are the same file under two names, because the next smallest model with a
free licence is too large to download for a test. The server loads and unloads them like two different models.
"""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
import importlib.util
import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import TypeAlias

import pytest
import pytest_asyncio

from benchmarks.routers import EmbeddedRouter, LlamaServerRouter, two_models, why_no_llama_server
from benchmarks.swap_servers import count_swaps
from lmbridge import Limits, LLMClient, LLMError, collect
from tests.support import MESSAGES

pytestmark = [pytest.mark.real, pytest.mark.slow]

Router: TypeAlias = EmbeddedRouter | LlamaServerRouter


@pytest_asyncio.fixture(params=["llama-server", "embedded"])
async def router(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Router]:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs lmbridge[local]")
    if request.param == "llama-server" and (missing := why_no_llama_server()):
        pytest.skip(missing)
    kind = LlamaServerRouter if request.param == "llama-server" else EmbeddedRouter
    async with kind(await two_models(tmp_path, alike=True)) as router:
        yield router


@pytest_asyncio.fixture
async def scheduled(router: Router) -> AsyncIterator[LLMClient]:
    limits = Limits(max_concurrency=4, max_loaded_models=1)
    async with LLMClient(router.api_base, limits=limits, model_mismatch="raise") as client:
        yield client


async def test_mixed_requests_are_answered_by_their_model_with_one_swap(router: Router, scheduled: LLMClient) -> None:
    names = random.Random(1).choices(list(router.models), k=24)

    async def ask(index: int, model: str) -> tuple[str | None, str | None]:
        if index % 2:
            stream = await scheduled.chat_completion(MESSAGES, model=model, stream=True, max_tokens=8)
            reply = await collect(stream)
        else:
            reply = await scheduled.chat_completion(MESSAGES, model=model, max_tokens=8)
        assert reply["choices"][0]["message"]["content"]
        return reply["model"], reply["choices"][0]["finish_reason"]

    replies = await asyncio.gather(*(ask(index, model) for index, model in enumerate(names)))
    assert [model for model, _ in replies] == names
    assert {reason for _, reason in replies} <= {"length", "stop"}
    assert sorted(router.loads) == sorted(router.models)
    assert count_swaps(router.loads) == scheduled.stats().swaps == 1


async def test_a_request_for_another_model_waits_until_a_stream_has_ended(router: Router, scheduled: LLMClient) -> None:
    first, second = router.models
    stream = await scheduled.chat_completion(MESSAGES, model=first, stream=True, max_tokens=60)
    waiting = asyncio.create_task(scheduled.chat_completion(MESSAGES, model=second, max_tokens=4))
    async with aclosing(stream):
        async for _ in stream:
            assert router.loads == [first]
    assert (await collect(stream))["choices"][0]["finish_reason"]
    assert (await waiting)["model"] == second
    assert router.loads == [first, second]


async def test_leaving_a_stream_lets_another_model_load(router: Router, scheduled: LLMClient) -> None:
    first, second = router.models
    async with await scheduled.chat_completion(MESSAGES, model=first, stream=True, max_tokens=2000) as stream:
        await anext(stream)
        waiting = asyncio.create_task(scheduled.chat_completion(MESSAGES, model=second, max_tokens=4))
    assert (await waiting)["model"] == second
    assert router.loads == [first, second]
    with pytest.raises(LLMError):
        await anext(stream)
