"""`client.models` on LM Studio, llama.cpp's router and Ollama, and what it says on other servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import pytest_asyncio

from lmbridge import (
    DownloadProgress,
    LLMClient,
    LLMResponseError,
    LLMTimeoutError,
    LLMValidationError,
    ModelInfo,
    ModelLoadError,
    ModelLoading,
    ModelNotFoundError,
    TaskCancelledError,
    Timeouts,
)
from lmbridge.client import model_backends
from lmbridge.testing import Exchange, MockRequest, MockTransport, ScriptedServer, reply, sse, stall
from tests.support import cancel_at_each_step

SUCCESS = {"success": True}


@pytest_asyncio.fixture
async def client(scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LLMClient]:
    monkeypatch.setattr(model_backends, "_LOAD_POLL_SECONDS", 0.001)
    monkeypatch.setattr(model_backends, "POLL_SECONDS", 0.001)
    async with LLMClient(scripted_server.api_base) as client:
        yield client


class Router:
    """The part of llama.cpp's router that manages models, with the texts of the real one (b10434)."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.statuses: dict[str, dict[str, Any]] = {"small": {"value": "unloaded"}, "large": {"value": "unloaded"}}
        self.next: list[dict[str, Any]] = []
        """The statuses that the model in question has at the next looks."""
        self.model = ""
        self.events: list[dict[str, Any]] = []
        server.on_path("/v1/models", self.list)
        server.on_path("/models", self.list)
        server.on_path("/props", reply(200, {"role": "router", "max_instances": 1}))
        server.on_path("/models/load", self.load)
        server.on_path("/models/unload", self.unload)
        server.on_path("/models/sse", self.report)

    async def list(self, exchange: Exchange) -> None:
        if exchange.request.method == "POST":
            self.model, self.statuses[exchange.request.json["model"]] = exchange.request.json["model"], self.next.pop(0)
            await reply(200, SUCCESS)(exchange)
            return
        data = [{"id": name, "owned_by": "llamacpp", "status": status} for name, status in self.statuses.items()]
        await reply(200, {"object": "list", "data": data})(exchange)
        if self.next and self.model and exchange.request.path == "/models":
            self.statuses[self.model] = self.next.pop(0)
            if not self.statuses[self.model]:
                del self.statuses[self.model]

    async def load(self, exchange: Exchange) -> None:
        self.model = exchange.request.json["model"]
        self.statuses[self.model] = self.next.pop(0)
        await reply(200, SUCCESS)(exchange)

    async def unload(self, exchange: Exchange) -> None:
        self.model = exchange.request.json["model"]
        await reply(200, SUCCESS)(exchange)

    async def report(self, exchange: Exchange) -> None:
        await sse(*[{"model": "small", **event} for event in self.events])(exchange)


def loading(value: float, *stages: str, current: str = "text_model") -> dict[str, Any]:
    progress = {"stages": list(stages or ("text_model",)), "current": current, "value": value}
    return {"event": "status_change", "data": {"status": "loading", "progress": progress}}


@pytest.fixture
def router(scripted_server: ScriptedServer) -> Router:
    return Router(scripted_server)


# llama.cpp's router


async def test_the_router_lists_its_models_with_their_status(router: Router, client: LLMClient) -> None:
    router.statuses["large"] = {"value": "sleeping"}
    assert await client.models.list() == (
        ModelInfo(id="small", loaded=False, status="unloaded"),
        ModelInfo(id="large", loaded=True, status="sleeping"),
    )
    assert await client.models.capabilities() == {"list", "load", "unload", "download", "load progress"}


async def test_a_load_ends_when_the_router_lists_the_model_as_loaded(router: Router, client: LLMClient) -> None:
    router.next = [{"value": "loading"}, {"value": "loading"}, {"value": "loaded"}]
    assert await client.models.load("small") == ModelInfo(id="small", loaded=True, status="loaded")
    [request] = [each for each in router.server.requests if each.path == "/models/load"]
    assert request.json == {"model": "small"}


async def test_a_loaded_model_is_not_loaded_again(router: Router, client: LLMClient) -> None:
    router.statuses["small"] = {"value": "loaded"}
    assert (await client.models.load("small")).id == "small"
    assert "/models/load" not in [each.path for each in router.server.requests]


async def test_a_model_that_somebody_else_is_loading_is_waited_for(
    scripted_server: ScriptedServer, router: Router, client: LLMClient
) -> None:
    router.model, router.next = "small", [{"value": "loading"}, {"value": "loaded"}]
    running = {"error": {"code": 400, "message": "model is already running", "type": "invalid_request_error"}}
    scripted_server.on_path("/models/load", reply(400, running))
    assert (await client.models.load("small")).loaded


async def test_the_progress_of_a_load_is_reported_over_all_stages(router: Router, client: LLMClient) -> None:
    seen: list[float | None] = []
    done = asyncio.Event()

    def progress(fraction: float | None) -> None:
        seen.append(fraction)
        if fraction == 1.0:
            done.set()

    router.events = [
        {"event": "model_status", "data": {"status": "loading"}},
        loading(0.5, "text_model", "mmproj_model"),
        loading(0.5, "text_model", "mmproj_model"),
        loading(1.0, "text_model", "mmproj_model", current="mmproj_model"),
    ]

    async def load(exchange: Exchange) -> None:
        await done.wait()
        router.statuses["small"] = {"value": "loaded"}
        await reply(200, SUCCESS)(exchange)

    router.server.on_path("/models/load", load)
    await client.models.load("small", progress=progress)
    assert seen == [None, 0.25, 1.0]


async def test_a_load_goes_on_if_the_router_has_no_events(router: Router, client: LLMClient) -> None:
    router.server.on_path("/models/sse", reply(404, {"error": {"message": "File Not Found"}}))
    router.next = [{"value": "loading"}, {"value": "loaded"}]
    seen: list[float | None] = []
    assert (await client.models.load("small", progress=seen.append)).loaded
    assert seen == [None]


async def test_an_exception_of_the_progress_function_is_raised(router: Router, client: LLMClient) -> None:
    router.events = [loading(0.5)]

    def progress(fraction: float | None) -> None:
        if fraction is not None:
            router.statuses["small"] = {"value": "loaded"}
            raise ZeroDivisionError

    router.next = [{"value": "loading"}]
    with pytest.raises(ZeroDivisionError):
        await client.models.load("small", progress=progress)


async def test_a_load_that_fails_is_a_model_load_error(router: Router, client: LLMClient) -> None:
    router.next = [{"value": "loading"}, {"value": "unloaded", "failed": True, "exit_code": 1}]
    with pytest.raises(ModelLoadError, match="could not load 'small', and its process ended with exit code 1"):
        await client.models.load("small")


async def test_a_load_that_takes_too_long_is_a_timeout(router: Router, client: LLMClient) -> None:
    router.next = [{"value": "loading"}]
    patient = client.with_options(timeout=Timeouts(load=0.05))
    with pytest.raises(LLMTimeoutError, match="not loaded within") as caught:
        await patient.models.load("small")
    assert caught.value.phase == "load"


@pytest.mark.parametrize("kind", ["router", "lmstudio", "ollama"])
async def test_a_timeout_in_seconds_limits_a_load(
    scripted_server: ScriptedServer, client: LLMClient, kind: str
) -> None:
    if kind == "router":
        Router(scripted_server).next = [{"value": "loading"}]
    elif kind == "lmstudio":
        model = {"type": "llm", "key": "small", "loaded_instances": []}
        scripted_server.on_path("/api/v1/models", reply(200, {"models": [model]}))
        scripted_server.on_path("/api/v1/models/load", stall())
    else:
        scripted_server.on_path("/v1/models", reply(200, {"data": [{"id": "small", "owned_by": "library"}]}))
        scripted_server.on_path("/api/tags", reply(200, {"models": [{"name": "small", "model": "small"}]}))
        scripted_server.on_path("/api/ps", reply(200, {"models": []}))
        scripted_server.on_path("/api/version", reply(200, {"version": "0.35.0"}))
        scripted_server.on_path("/api/generate", stall())
    with pytest.raises(LLMTimeoutError, match=r"within 0\.5 s") as caught:
        async with asyncio.timeout(10):
            await client.models.load("small", timeout=0.5)
    assert caught.value.phase == "load"


async def test_a_model_that_is_evicted_before_anybody_saw_it_load_is_not_waited_for(
    router: Router, client: LLMClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_backends, "_BEGIN_SECONDS", 0.05)
    # It waits for as long as the download takes.
    router.next = [*[{"value": "downloading"}] * 5, {"value": "unloaded"}]
    async with asyncio.timeout(10):
        with pytest.raises(ModelLoadError, match="could not load 'small'"):
            await client.models.load("small", timeout=None)


async def test_a_load_may_begin_late(router: Router, client: LLMClient) -> None:
    router.next = [{"value": "unloaded"}, {"value": "unloaded"}, {"value": "loading"}, {"value": "loaded"}]
    assert (await client.models.load("small")).loaded


async def test_a_request_that_times_out_during_a_load_keeps_its_own_error(router: Router, client: LLMClient) -> None:
    router.server.on_path("/models", stall())
    router.next = [{"value": "loading"}]
    impatient = client.with_options(timeout=Timeouts(load=None, first_byte=0.05), max_retries=0)
    with pytest.raises(LLMTimeoutError) as caught:
        await impatient.models.load("small")
    assert caught.value.phase == "first_byte"


async def test_the_timeout_of_an_unload_is_kept(router: Router, client: LLMClient) -> None:
    router.server.on_path("/models/unload", stall())
    with pytest.raises(LLMTimeoutError):
        await client.models.unload("small", timeout=0.05)


async def test_a_model_that_is_never_unloaded_is_not_waited_for_without_end(router: Router, client: LLMClient) -> None:
    router.statuses["small"] = {"value": "loaded"}
    with pytest.raises(LLMTimeoutError, match=r"model 'small' was not unloaded within 0\.5 s") as caught:
        await client.models.unload("small", timeout=0.5)
    assert caught.value.phase == "first_byte"


async def test_a_request_that_times_out_during_an_unload_keeps_its_own_error() -> None:
    def handler(request: MockRequest) -> Any:
        if request.path == "/models":
            raise LLMTimeoutError("the server did not answer", phase="first_byte")
        listed = {"data": [{"id": "small", "owned_by": "llamacpp", "status": {"value": "loaded"}}]}
        return listed if request.path == "/v1/models" else SUCCESS

    client = LLMClient(transport=MockTransport(handler), max_retries=0)
    with pytest.raises(LLMTimeoutError, match=r"model list at .*: the server did not answer"):
        await client.models.unload("small", timeout=600)


async def test_an_unknown_model_is_named_with_those_that_exist(router: Router, client: LLMClient) -> None:
    for call in (client.models.load("smal"), client.models.unload("smal")):
        with pytest.raises(ModelNotFoundError, match="did you mean 'small'"):
            await call


async def test_an_unload_ends_when_the_model_is_gone(router: Router, client: LLMClient) -> None:
    router.statuses["small"], router.next = {"value": "loaded"}, [{"value": "loaded"}, {"value": "unloaded"}]
    await client.models.unload("small")
    assert router.statuses["small"]["value"] == "unloaded"
    not_running = {"error": {"code": 400, "message": "model is not running", "type": "invalid_request_error"}}
    router.server.on_path("/models/unload", reply(400, not_running))
    await client.models.unload("small")


async def test_a_download_by_the_router_has_progress(router: Router, client: LLMClient) -> None:
    files = {"https://a/1.gguf": {"done": 5, "total": 10}, "https://a/2.gguf": {"done": 1, "total": 10}}
    router.next = [{"value": "downloading"}, {"value": "downloading", "progress": files}, {"value": "unloaded"}]
    assert [each async for each in client.models.download("user/new:Q4")] == [
        DownloadProgress(status="downloading"),
        DownloadProgress(status="downloading", downloaded_bytes=6, total_bytes=20),
        DownloadProgress(status="completed"),
    ]
    assert [each async for each in client.models.download("small")] == [DownloadProgress(status="completed")]


async def test_an_empty_router_is_recognized_and_downloads_its_first_model(router: Router, client: LLMClient) -> None:
    router.statuses = {}
    info = await client.server_info()
    assert (info.kind, info.is_router, info.models, info.max_loaded_models) == ("llama.cpp", True, (), 1)
    assert await client.models.capabilities() == {"list", "load", "unload", "download", "load progress"}
    router.next = [{"value": "downloading"}, {"value": "unloaded"}]
    assert [each.status async for each in client.models.download("user/new:Q4")] == ["downloading", "completed"]


async def test_a_download_that_vanishes_has_failed(router: Router, client: LLMClient) -> None:
    router.next = [{"value": "downloading"}, {}]
    with pytest.raises(LLMResponseError, match="could not download 'user/new'"):
        async for _ in client.models.download("user/new"):
            pass


async def test_closing_the_client_ends_a_wait(router: Router, client: LLMClient) -> None:
    router.next = [{"value": "loading"}]
    task = asyncio.create_task(client.models.load("small"))
    await router.server.wait_until(lambda: "/models" in [each.path for each in router.server.requests])
    await client.close()
    with pytest.raises(TaskCancelledError):
        await task


async def test_a_cancelled_load_leaves_nothing_behind(router: Router, client: LLMClient) -> None:
    router.events = [loading(0.5)]

    async def nothing_runs() -> None:
        router.statuses["small"] = {"value": "unloaded"}
        assert not [task for task in asyncio.all_tasks() if "_report_progress" in repr(task)]

    def run() -> Any:
        router.next = [{"value": "loading"}, {"value": "loaded"}]
        return client.models.load("small", progress=lambda _: None)

    await cancel_at_each_step(run, nothing_runs, at_least=5)


async def test_the_loads_of_the_router_can_be_watched(router: Router, client: LLMClient) -> None:
    router.events = [loading(0.5), {"event": "model_status", "data": {"status": "loaded"}}, {"event": "model_remove"}]
    events = [each async for each in client.models.loading()]
    assert events == [ModelLoading("small", 0.5), ModelLoading("small", 1.0)]
    assert [each async for each in client.models.loading("large")] == []
    router.server.on_path("/models/sse", reply(404, {"error": {"message": "File Not Found"}}))
    with pytest.raises(LLMResponseError):
        await anext(client.models.loading())


# LM Studio, Ollama, and others


async def test_lm_studio_loads_with_its_options_and_unloads_every_instance(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    instances = [{"id": "qwen", "config": {"context_length": 4096}}, {"id": "qwen:2", "config": {}}]
    model = {"type": "llm", "key": "qwen", "loaded_instances": instances}
    scripted_server.on_path("/api/v1/models", reply(200, {"models": [model]}))
    scripted_server.on_path("/api/v1/models/load", reply(200, {"instance_id": "qwen:2", "status": "loaded"}))
    scripted_server.on_path("/api/v1/models/unload", reply(200, {"instance_id": "qwen"}))
    assert (await client.models.load("qwen")).context_length == 4096
    loaded = await client.models.load("qwen", context_length=16_384)
    assert loaded == ModelInfo(id="qwen:2", loaded=True)
    await client.models.unload("qwen")
    await client.models.unload("qwen:2")
    bodies = {
        path: [each.json for each in scripted_server.requests if each.path.endswith(path)]
        for path in ("/models/load", "/models/unload")
    }
    assert bodies == {
        "/models/load": [{"model": "qwen", "context_length": 16_384}],
        "/models/unload": [{"instance_id": each} for each in ("qwen", "qwen:2", "qwen:2")],
    }
    assert await client.models.capabilities() == {"list", "load", "unload", "download"}


async def test_lm_studio_downloads_in_the_common_form(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.on_path("/api/v1/models", reply(200, {"models": []}))
    scripted_server.on_path("/api/v1/models/download", reply(200, {"status": "already_downloaded"}))
    assert [each async for each in client.models.download("qwen")] == [DownloadProgress(status="completed")]


async def test_ollama_loads_by_an_empty_generation_and_unloads_with_keep_alive(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path("/v1/models", reply(200, {"data": [{"id": "qwen3:4b", "owned_by": "library"}]}))
    scripted_server.on_path("/api/version", reply(200, {"version": "0.35.0"}))
    scripted_server.on_path("/api/ps", reply(200, {"models": []}))
    scripted_server.on_path("/api/generate", reply(200, {"model": "qwen3:4b", "response": "", "done": True}))
    await client.models.load("qwen3:4b", keep_alive="10m")
    await client.models.unload("qwen3:4b")
    sent = [each.json for each in scripted_server.requests if each.path == "/api/generate"]
    assert sent == [
        {"model": "qwen3:4b", "stream": False, "keep_alive": "10m"},
        {"model": "qwen3:4b", "stream": False, "keep_alive": 0},
    ]
    with pytest.raises(LLMResponseError, match="this ollama server cannot download models") as caught:
        await anext(client.models.download("llama"))
    assert "ollama pull" in str(caught.value)


async def test_a_server_with_a_single_model_says_what_it_cannot_do(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path("/v1/models", reply(200, {"data": [{"id": "m", "owned_by": "llamacpp"}]}))
    scripted_server.on_path("/props", reply(200, {"total_slots": 1}))
    assert await client.models.capabilities() == {"list"}
    for call in (client.models.load("m2"), client.models.unload("m"), anext(client.models.download("m"))):
        with pytest.raises(LLMResponseError, match=r"this llama.cpp server cannot \w+ models") as caught:
            await call
        assert "as a router" in str(caught.value)


async def test_arguments_are_checked_before_anything_is_sent(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    with pytest.raises(LLMValidationError):
        await client.models.load(" ")
    with pytest.raises(LLMValidationError):
        await client.models.load("m", progress=3)  # type: ignore[arg-type]  # the wrong value is the case
    with pytest.raises(LLMValidationError):
        client.models.download("")
    for method in (
        *(client.models.load, client.models.unload, client.models.download),
        *(client.lmstudio.load, client.lmstudio.unload, client.lmstudio.download),
    ):
        with pytest.raises(LLMValidationError, match="priority has no effect on the models of a server"):
            # A download is an iteration, and raises the error when it is called.
            await cast("Any", method)("m", priority="batch")
    assert not scripted_server.requests


async def test_several_servers_have_models_of_their_own(scripted_server: ScriptedServer) -> None:
    async with ScriptedServer() as other, LLMClient([scripted_server.api_base, other.api_base]) as client:
        with pytest.raises(LLMValidationError, match="at_server"):
            _ = client.models
        assert await client.at_server(other.api_base).models.list()
