"""Three real servers behind one client, one of which is killed and started again under load."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack

import pytest

from lmbridge import LLMClient, LLMStreamError, LocalServer, NodePool, Transport, collect
from lmbridge.config import Limits
from lmbridge.transport.http_interface import HttpRequest, HttpResponse, HttpSession

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]

REQUESTS = 40


class CountedResponse:
    """A response that reports when the first event of its body arrives."""

    def __init__(self, response: HttpResponse, body: bytes, begun: Counter[bytes]) -> None:
        self._response = response
        self._body = body
        self._begun: Counter[bytes] | None = begun

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        return self._response.headers

    async def read_some(self) -> bytes:
        data = await self._response.read_some()
        # While llama.cpp reads the prompt, it sends comments.
        if b"data: " in data and self.status == 200 and self._begun is not None:
            self._begun[self._body] += 1
            self._begun = None
        return data

    def take_arrived(self) -> bytes:
        return self._response.take_arrived()

    def close(self) -> None:
        self._response.close()


class CountedSession:
    """A session that counts for each body how often an answer to it has begun."""

    def __init__(self, session: HttpSession, begun: Counter[bytes]) -> None:
        self._session = session
        self._begun = begun

    async def send(self, request: HttpRequest) -> HttpResponse:
        response = await self._session.send(request)
        return response if request.body is None else CountedResponse(response, request.body, self._begun)

    async def close(self) -> None:
        await self._session.close()

    def abandon(self) -> None:
        self._session.abandon()


class CountedTransport(Transport):
    """A transport whose sessions count the answers that have begun."""

    def __init__(self, api_base: str, begun: Counter[bytes]) -> None:
        super().__init__(api_base, limits=Limits(max_concurrency=2))
        self._begun = begun

    def open_session(self) -> HttpSession:
        return CountedSession(super().open_session(), self._begun)


async def test_a_server_that_is_killed_and_started_again_under_load_loses_and_doubles_nothing() -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    begun: Counter[bytes] = Counter()
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(LocalServer(n_ctx=4096, n_parallel=2, threads=1)) for _ in range(3)]
        pool = NodePool([CountedTransport(server.api_base, begun) for server in servers])
        client = LLMClient(transport=await stack.enter_async_context(pool), model=servers[0].model, max_retries=5)
        broken: list[int] = []

        async def ask(number: int) -> int:
            # Each prompt has another length. The server counts its tokens, which shows that answers are not mixed up.
            messages = [{"role": "user", "content": "word " * (number + 1)}]
            stream = await client.chat_completion(
                messages, stream=True, max_tokens=12, stream_options={"include_usage": True}
            )
            try:
                reply = await collect(stream)
            except LLMStreamError:
                # The server was killed after the answer had begun, so only the caller may ask again.
                broken.append(number)
                return -1
            assert reply["usage"] is not None
            return reply["usage"]["prompt_tokens"]

        tasks = [asyncio.create_task(ask(number)) for number in range(REQUESTS)]
        victim = servers[0]
        while sum(task.done() for task in tasks) < REQUESTS // 6 or not pool.nodes[0].in_flight:
            await asyncio.sleep(0.01)
        port = int(victim.api_base.removesuffix("/v1").rpartition(":")[2])
        assert victim._process is not None
        victim._process.kill()
        await victim.wait()
        while sum(task.done() for task in tasks) < REQUESTS // 2:
            await asyncio.sleep(0.01)
        assert not client.stats().by_server[pool.nodes[0].api_base].is_available
        await victim.close()
        await stack.enter_async_context(LocalServer(n_ctx=4096, n_parallel=2, threads=1, port=port))
        tokens = await asyncio.gather(*tasks)

        first = next(count - number for number, count in enumerate(tokens) if count >= 0)
        assert [count - number for number, count in enumerate(tokens) if count >= 0] == [first] * (
            REQUESTS - len(broken)
        )
        assert len(broken) <= 2, "only what the killed server had begun"
        assert len(begun) == REQUESTS, "no request is lost"
        assert set(begun.values()) == {1}, "and none is answered twice"

        # The server that was started again is found to work, while the others answer.
        while not client.stats().by_server[pool.nodes[0].api_base].is_available:
            await client.ask("Say hello.", max_tokens=1)
