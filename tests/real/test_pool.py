"""A pool of clients on a real llama.cpp server."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio

import pytest

from lmbridge import LLMClientPool, LocalServer, PoolStats, collect
from tests.real.conftest import API_KEY

pytestmark = [pytest.mark.real, pytest.mark.slow]


async def test_thirty_tasks_that_share_four_clients_get_their_own_answers(local_server: LocalServer) -> None:
    async with LLMClientPool(
        4, api_base=local_server.api_base, model=local_server.model, api_key=API_KEY, model_mismatch="raise"
    ) as pool:

        async def ask(number: int) -> int:
            # Each prompt has another length. The server counts its tokens, which shows that answers are not mixed up.
            prompt = "word " * (number + 1)
            messages = [{"role": "user", "content": prompt}]
            async with pool.client() as client:
                assert pool.stats().in_use <= 4
                stream = await client.chat_completion(
                    messages, stream=True, max_tokens=4, stream_options={"include_usage": True}
                )
                usage = (await collect(stream))["usage"]
            assert usage is not None
            return usage["prompt_tokens"]

        tokens = await asyncio.gather(*map(ask, range(30)))
        assert pool.stats() == PoolStats(size=4, in_use=0, waiting=0)
    assert [count - tokens[0] for count in tokens] == list(range(30))
