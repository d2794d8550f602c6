"""The context lengths of models, which are requested from a client or from a client of a pool."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, LLMClientPool, LLMResponseError
from lmbridge.agent.client_source import ClientSource
from lmbridge.client.server_info import ModelInfo, ServerInfo
from lmbridge.testing import ScriptedServer, reply
from tests.agent.support import sent


class FixedInfoClient:
    """A client whose server_info() returns a fixed value, or raises it, when it is allowed to."""

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
async def test_the_context_length_is_that_of_the_model_if_the_server_reports_it(
    model: str | None, context: int
) -> None:
    assert await ClientSource(FixedInfoClient(INFO)).context_length(model) == context


@pytest.mark.parametrize("error", [LLMResponseError("no"), TimeoutError()])
async def test_an_error_is_not_retried_at_once(error: Exception) -> None:
    double = FixedInfoClient(error)
    source = ClientSource(double)
    assert await source.context_length("own") is None
    assert await source.context_length("own") is None
    assert double.requested_model == 1


async def test_an_unknown_context_length_is_requested_again_after_a_minute() -> None:
    now = 0.0
    double = FixedInfoClient(LLMResponseError("busy"))
    source = ClientSource(double, timer=lambda: now)
    assert await source.context_length("own") is None
    double.info = INFO
    now = 61.0
    assert await source.context_length("own") == 4096
    now = 1_000.0
    assert await source.context_length("own") == 4096
    assert double.requested_model == 2


async def test_a_model_that_is_not_loaded_does_not_get_the_context_length_of_another() -> None:
    models = (ModelInfo(id="loaded", loaded=True, context_length=2048), ModelInfo(id="other", loaded=False))
    info = ServerInfo(kind="lmstudio", models=models, context_length=2048)
    assert await ClientSource(FixedInfoClient(info)).context_length("other") is None


async def test_a_server_that_does_not_answer_is_given_up_after_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmbridge.agent.client_source._DISCOVERY_SECONDS", 0.01)
    double = FixedInfoClient(INFO)
    double.gate.clear()
    assert await ClientSource(double).context_length("own") is None


async def test_the_first_caller_may_be_cancelled_without_affecting_others() -> None:
    double = FixedInfoClient(INFO)
    double.gate.clear()
    source = ClientSource(double)
    first, second = (asyncio.create_task(source.context_length("own")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    double.gate.set()
    assert await second == 4096
    assert double.requested_model == 2
    assert first.cancelled()


async def test_a_client_without_server_info_has_no_context_length() -> None:
    class Plain:
        model = None

        async def chat_completion(self, messages: Any, **options: Any) -> Any:
            raise NotImplementedError

    assert await ClientSource(Plain()).context_length(None) is None


async def test_a_pool_lends_a_client_for_the_request(scripted_server: ScriptedServer) -> None:
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


async def test_a_mistake_in_the_client_of_the_user_ends_the_run() -> None:
    with pytest.raises(AttributeError, match="no such field"):
        await Agent(FixedInfoClient(AttributeError("no such field"))).run("Hi.")


async def test_a_mistake_in_counting_tokens_is_raised_and_a_failed_request_is_not() -> None:
    class Counting(FixedInfoClient):
        async def count_tokens(self, messages: Any, *, model: str | None, tools: Any) -> Any:
            return await self.server_info()

    for error in (LLMResponseError("busy"), TimeoutError()):
        assert await ClientSource(Counting(error)).count_tokens("own", [], None) is None
    with pytest.raises(AttributeError, match="no such field"):
        await ClientSource(Counting(AttributeError("no such field"))).count_tokens("own", [], None)
