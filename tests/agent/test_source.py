"""What is known of the models of a client or a pool."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, LLMClientPool, LLMResponseError
from lmbridge.agent.source import ClientSource
from lmbridge.client.server_info import ModelInfo, ServerInfo
from lmbridge.testing import ScriptedServer, reply
from tests.agent.support import sent


class Double:
    """A client that tells what it is given, when it is let to."""

    model = "own"

    def __init__(self, info: Any) -> None:
        self.info = info
        self.requested_model = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def chat_completion(self, messages: Any, **options: Any) -> Any:
        raise NotImplementedError

    async def server_info(self) -> Any:
        self.requested_model += 1
        await self.gate.wait()
        if isinstance(self.info, Exception):
            raise self.info
        return self.info


INFO = ServerInfo(
    kind="unknown",
    models=(ModelInfo(id="own", context_length=4096), ModelInfo(id="other:2", context_length=2048), ModelInfo(id="x")),
    context_length=1024,
)


@pytest.mark.parametrize(
    ("model", "context"), [("own", 4096), ("other", 2048), ("x", 1024), ("unheard of", 1024), (None, 1024)]
)
async def test_the_context_is_that_of_the_model_if_the_server_tells_it(model: str | None, context: int) -> None:
    assert await ClientSource(Double(INFO)).context_length(model) == context


@pytest.mark.parametrize("error", [LLMResponseError("no"), TimeoutError()])
async def test_a_server_that_does_not_tell_is_not_asked_again(error: Exception) -> None:
    double = Double(error)
    source = ClientSource(double)
    assert await source.context_length("own") is None
    assert await source.context_length("own") is None
    assert double.requested_model == 1


async def test_who_could_not_tell_is_asked_again_after_a_minute() -> None:
    now = 0.0
    double = Double(LLMResponseError("busy"))
    source = ClientSource(double, timer=lambda: now)
    assert await source.context_length("own") is None
    double.info = INFO
    now = 61.0
    assert await source.context_length("own") == 4096
    now = 1_000.0
    assert await source.context_length("own") == 4096
    assert double.requested_model == 2


async def test_the_context_of_another_model_is_not_that_of_one_that_is_not_loaded() -> None:
    models = (ModelInfo(id="loaded", loaded=True, context_length=2048), ModelInfo(id="other", loaded=False))
    info = ServerInfo(kind="lmstudio", models=models, context_length=2048)
    assert await ClientSource(Double(info)).context_length("other") is None


async def test_a_server_that_does_not_answer_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmbridge.agent.source._DISCOVERY_SECONDS", 0.01)
    double = Double(INFO)
    double.gate.clear()
    assert await ClientSource(double).context_length("own") is None


async def test_who_asks_first_may_be_cancelled() -> None:
    double = Double(INFO)
    double.gate.clear()
    source = ClientSource(double)
    first, second = (asyncio.create_task(source.context_length("own")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    double.gate.set()
    assert await second == 4096
    assert double.requested_model == 2
    assert first.cancelled()


async def test_a_client_that_knows_no_server_info_will_do() -> None:
    class Plain:
        model = None

        async def chat_completion(self, messages: Any, **options: Any) -> Any:
            raise NotImplementedError

    assert await ClientSource(Plain()).context_length(None) is None


async def test_a_pool_lends_a_client_for_the_question(scripted_server: ScriptedServer) -> None:
    models = {"data": [{"id": "test-model", "owned_by": "vllm", "max_model_len": 4096}]}
    scripted_server.on_path("/v1/models", reply(200, models))
    async with LLMClientPool(1, api_base=scripted_server.api_base) as pool:
        assert await ClientSource(pool).context_length("test-model") == 4096
        assert pool.stats().in_use == 0


async def test_a_server_without_a_list_of_models_serves_agents(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path("/v1/models", reply(404, {"error": "no such thing"}))
    assert (await Agent(client).run("Hi.")).stop_reason == "stop"
    assert sent(scripted_server)["max_tokens"] == 8192
