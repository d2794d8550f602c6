"""Agents over clients that are not lmbridge's own, and the Protocols that these have to satisfy."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest

from lmbridge import (
    Agent,
    ChatClient,
    ChatClientPool,
    ChatStream,
    ChunkStream,
    LLMClient,
    LLMClientPool,
    LLMResponseError,
    MaxRoundsExceededError,
)
from lmbridge.agent.chat_client import ReportsServerInfo
from tests.agent.support import add, asks, tool_texts


def accepted_by_the_type_checker(
    client: LLMClient, pool: LLMClientPool, stream: ChatStream, own: ScriptedClient
) -> tuple[ChatClient, ChatClient, ChatClientPool, ChunkStream, ReportsServerInfo]:
    """Is never called: mypy checks that each of these satisfies its Protocol."""
    return client, own, pool, stream, client


class ScriptedClient:
    """A client without a server, written against the documentation of `ChatClient` alone."""

    model = "own-model"

    def __init__(self, *deltas: Mapping[str, Any], finish_reason: str = "stop") -> None:
        self.deltas = list(deltas)
        self.finish_reason = finish_reason
        self.params: list[dict[str, Any]] = []
        self.closed = 0

    async def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None, stream: Literal[True], **params: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Returns the next scripted message in two chunks."""
        self.params.append({"messages": messages, "model": model, "stream": stream, **params})
        return self._chunks(self.deltas.pop(0))

    async def _chunks(self, delta: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {"model": "own-model", "choices": [{"index": 0, "delta": dict(delta), "finish_reason": None}]}
            yield {"model": "own-model", "choices": [{"index": 0, "delta": {}, "finish_reason": self.finish_reason}]}
        finally:
            self.closed += 1


def test_the_clients_of_lmbridge_satisfy_the_protocols_at_run_time_too() -> None:
    assert isinstance(LLMClient(), ReportsServerInfo)
    assert not isinstance(ScriptedClient(), ReportsServerInfo)
    assert callable(accepted_by_the_type_checker)


async def test_an_agent_runs_over_a_client_of_the_users_own() -> None:
    client = ScriptedClient({"tool_calls": [{"index": 0, **asks("add", a=1, b=2)}]}, {"content": "3"})
    result = await Agent(client, tools=[add]).run("What is 1 plus 2?")
    assert (result.text, result.model, tool_texts(result.messages)) == ("3", "own-model", ["3"])
    assert [params["stream"] for params in client.params] == [True, True]
    assert client.closed == 2


async def test_an_agent_runs_over_a_pool_of_the_users_own() -> None:
    client = ScriptedClient({"content": "one"}, {"content": "two"})
    leased: list[str | None] = []

    class Pool:
        @asynccontextmanager
        async def client(self, model: str | None = None) -> AsyncIterator[ScriptedClient]:
            leased.append(model)
            yield client

    agent = Agent(Pool(), model="chosen")
    assert [(await agent.run("Go.")).text, (await agent.run("Go.")).text] == ["one", "two"]
    assert set(leased) == {"chosen"}


async def test_an_error_of_such_a_client_has_the_run_so_far() -> None:
    client = ScriptedClient({"tool_calls": [{"index": 0, **asks("add", a=1, b=2)}]})
    with pytest.raises(MaxRoundsExceededError) as caught:
        await Agent(client, tools=[add]).run("Go.", max_rounds=1)
    assert caught.value.result.rounds == 1


@pytest.mark.parametrize("reason", ["aborted", "Abort", "cancelled", "FAILED", "content_filter"])
async def test_a_reply_that_was_broken_off_is_not_an_answer(reason: str) -> None:
    client = ScriptedClient({"content": "Half of"}, finish_reason=reason)
    with pytest.raises(LLMResponseError, match=f"finish reason '{reason}'") as caught:
        await Agent(client).run("Go.")
    assert caught.value.partial.text == "Half of"
