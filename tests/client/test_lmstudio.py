"""LM Studio's own API, in the shapes of its documentation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import pytest
import pytest_asyncio

from lmbridge import (
    Limits,
    LLMAuthenticationError,
    LLMClient,
    LLMClientPool,
    LLMConnectionError,
    LLMRateLimitError,
    LLMResponseError,
    LLMTimeoutError,
    LLMValidationError,
    ModelLoadError,
    ModelNotFoundError,
    TaskCancelledError,
    Timeouts,
)
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, hang_up, reply, stall
from tests.support import MESSAGES, cancel_at_each_step, turns

V1: Final = "/api/v1/models"
V0: Final = "/api/v0/models"
LOAD: Final = f"{V1}/load"
UNLOAD: Final = f"{V1}/unload"
DOWNLOAD: Final = f"{V1}/download"
STATUS: Final = f"{DOWNLOAD}/status/job_1"

GEMMA: Final = {
    "type": "llm",
    "publisher": "lmstudio-community",
    "key": "gemma-3-270m-it-qat",
    "display_name": "Gemma 3 270m Instruct Qat",
    "architecture": "gemma3",
    "quantization": {"name": "Q4_0", "bits_per_weight": 4},
    "size_bytes": 241410208,
    "params_string": "270M",
    "loaded_instances": [{"id": "gemma-3-270m-it-qat", "config": {"context_length": 4096, "parallel": 4}}],
    "max_context_length": 32768,
    "format": "gguf",
    "capabilities": {"vision": False, "trained_for_tool_use": False},
    "description": None,
}
NOMIC: Final = {
    "type": "embedding",
    "publisher": "gaianet",
    "key": "text-embedding-nomic-embed-text-v1.5",
    "display_name": "Nomic Embed Text v1.5",
    "quantization": {"name": "F16", "bits_per_weight": 16},
    "size_bytes": 274290560,
    "params_string": None,
    "loaded_instances": [],
    "max_context_length": 2048,
    "format": "gguf",
}
LOADED: Final = {"type": "llm", "instance_id": "gemma-3-270m-it-qat", "load_time_seconds": 9.1, "status": "loaded"}
PROGRESS: Final = {"job_id": "job_1", "total_size_bytes": 2279145003, "started_at": "2025-10-03T15:33:23.496Z"}


def status(value: str, done: int = 948, **fields: Any) -> dict[str, Any]:
    return {**PROGRESS, "status": value, "downloaded_bytes": done, **fields}


def unexpected(method: str, path: str) -> Behaviour:
    """Answers like LM Studio on a path that it does not know: with status 200 (lmstudio-bug-tracker#618)."""
    return reply(200, {"error": f"Unexpected endpoint or method. ({method} {path})"})


def refusal(kind: str, message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message, **fields}}


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """Answers with one behaviour after the other, and then always with the last one."""
    left = list(behaviours)

    async def behave(exchange: Exchange) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(exchange)

    return behave


def requests_of(server: ScriptedServer) -> list[str]:
    return [f"{request.method} {request.path}" for request in server.requests]


@pytest_asyncio.fixture
async def server(scripted_server: ScriptedServer) -> AsyncIterator[ScriptedServer]:
    """A server like LM Studio 0.4 with two models, one of them loaded."""
    scripted_server.on_path(V1, reply(200, {"models": [GEMMA, NOMIC]}))
    yield scripted_server


@pytest.fixture
def old_server(scripted_server: ScriptedServer) -> ScriptedServer:
    """A server like LM Studio 0.3."""
    for method, path in (("GET", V1), ("POST", LOAD), ("POST", UNLOAD), ("POST", DOWNLOAD)):
        scripted_server.on_path(path, unexpected(method, path))
    entries = [
        {
            "id": "qwen2-vl-7b-instruct",
            "object": "model",
            "type": "vlm",
            "publisher": "mlx-community",
            "arch": "qwen2_vl",
            "compatibility_type": "mlx",
            "quantization": "4bit",
            "state": "not-loaded",
            "max_context_length": 32768,
        },
        {
            "id": "granite-3.0-2b-instruct",
            "object": "model",
            "type": "llm",
            "arch": "granite",
            "state": "loaded",
            "max_context_length": 4096,
            "loaded_context_length": 2048,
            "capabilities": ["tool_use"],
        },
        {"id": "nomic-embed", "type": "embeddings", "state": "loaded", "quantization": "Q4_0"},
    ]
    scripted_server.on_path(V0, reply(200, {"object": "list", "data": entries}))
    return scripted_server


@pytest.fixture(autouse=True)
def no_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmbridge.client.lmstudio.POLL_SECONDS", 0)


# Models


async def test_models_are_the_dicts_that_the_server_sent(server: ScriptedServer, client: LLMClient) -> None:
    assert await client.lmstudio.models() == [GEMMA, NOMIC]
    assert requests_of(server) == [f"GET {V1}"]


async def test_models_of_an_older_lm_studio_have_the_same_fields(old_server: ScriptedServer, client: LLMClient) -> None:
    assert await client.lmstudio.models() == [
        {
            "type": "llm",
            "key": "qwen2-vl-7b-instruct",
            "publisher": "mlx-community",
            "architecture": "qwen2_vl",
            "format": "mlx",
            "quantization": {"name": "4bit"},
            "max_context_length": 32768,
            "loaded_instances": [],
            "capabilities": {"vision": True},
        },
        {
            "type": "llm",
            "key": "granite-3.0-2b-instruct",
            "architecture": "granite",
            "max_context_length": 4096,
            "loaded_instances": [{"id": "granite-3.0-2b-instruct", "config": {"context_length": 2048}}],
            "capabilities": {"vision": False, "trained_for_tool_use": True},
        },
        {
            "type": "embedding",
            "key": "nomic-embed",
            "quantization": {"name": "Q4_0"},
            "loaded_instances": [{"id": "nomic-embed", "config": {}}],
        },
    ]
    assert requests_of(old_server) == [f"GET {V1}", f"GET {V0}"]


async def test_an_lm_studio_without_either_list_is_reported_as_too_old(
    old_server: ScriptedServer, client: LLMClient
) -> None:
    old_server.on_path(V0, unexpected("GET", V0))
    with pytest.raises(LLMResponseError, match=r"this LM Studio is too old.*update LM Studio to 0.4.0"):
        await client.lmstudio.models()


async def test_a_failing_lm_studio_is_not_reported_as_another_server(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float]
) -> None:
    scripted_server.on_path(V1, reply(502, "<html><h1>Bad Gateway</h1></html>"))
    with pytest.raises(LLMResponseError, match="the server answered 502") as caught:
        await client.lmstudio.models()
    assert "LM Studio" not in caught.value.message
    scripted_server.on_path(V1, reply(429, {"error": "slow down"}))
    with pytest.raises(LLMRateLimitError):
        await client.lmstudio.models()


# Another server

CALLS: Final[dict[str, tuple[str, Callable[[LLMClient], Awaitable[Any]]]]] = {
    "models": (V1, lambda client: client.lmstudio.models()),
    "load": (LOAD, lambda client: client.lmstudio.load("x")),
    "unload": (UNLOAD, lambda client: client.lmstudio.unload("x")),
    "download": (DOWNLOAD, lambda client: anext(client.lmstudio.download("x"))),
}
EACH_CALL: Final = pytest.mark.parametrize(("path", "call"), CALLS.values(), ids=CALLS)


@EACH_CALL
@pytest.mark.parametrize(
    "unknown",
    [
        reply(404, {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}),  # llama.cpp
        reply(404, {"detail": "Not Found"}),  # FastAPI: vLLM, llama-cpp-python
        reply(404, "404 page not found"),  # Ollama
        reply(405, {"detail": "Method Not Allowed"}),
        reply(200, "<!doctype html><html></html>", content_type="text/html"),  # a page for any path
        reply(200, {}),
        reply(200, {"models": [{"name": "llama3.2:latest"}], "data": [{"id": "x"}]}),
    ],
)
async def test_another_server_is_reported_as_not_lm_studio(
    scripted_server: ScriptedServer,
    client: LLMClient,
    path: str,
    call: Callable[[LLMClient], Awaitable[Any]],
    unknown: Behaviour,
) -> None:
    for each in (V1, V0, path):
        scripted_server.on_path(each, unknown)
    with pytest.raises(LLMResponseError, match="this server is not LM Studio: it answered") as caught:
        await call(client)
    assert caught.value.context["url"] == f"{scripted_server.origin}{path}"
    assert caught.value.status in (200, 404, 405)
    assert caught.value.body
    # The request is sent once only.
    assert f"POST {path}" not in requests_of(scripted_server)[1:]


async def test_the_error_quotes_the_name_in_the_server_header(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path(V1, reply(404, {"error": "File Not Found"}, {"Server": "llama.cpp"}))
    with pytest.raises(LLMResponseError, match=r"this server \(it calls itself 'llama.cpp'\) is not LM Studio"):
        await client.lmstudio.models()


@pytest.mark.parametrize("name", ["load", "unload", "download"])
async def test_an_lm_studio_without_the_path_is_reported_as_too_old(
    old_server: ScriptedServer, client: LLMClient, name: str
) -> None:
    path, call = CALLS[name]
    with pytest.raises(LLMResponseError, match="this LM Studio is too old") as caught:
        await call(client)
    assert caught.value.status == 200
    assert caught.value.context["url"] == f"{old_server.origin}{path}"
    assert "Unexpected endpoint" in (caught.value.body or "")
    assert isinstance(caught.value.__cause__, LLMResponseError)


@EACH_CALL
async def test_a_refused_key_raises_an_authentication_error(
    scripted_server: ScriptedServer, client: LLMClient, path: str, call: Callable[[LLMClient], Awaitable[Any]]
) -> None:
    body = refusal("invalid_request", "An LM Studio API token is required", code="invalid_api_key")
    scripted_server.on_path(path, reply(401, body))
    with pytest.raises(LLMAuthenticationError, match="pass api_key="):
        await call(client)
    assert len(scripted_server.requests) == 1


@EACH_CALL
async def test_an_unreachable_server_raises_a_connection_error(
    path: str, call: Callable[[LLMClient], Awaitable[Any]]
) -> None:
    async with LLMClient("http://127.0.0.1:1", max_retries=0) as client:
        with pytest.raises(LLMConnectionError) as caught:
            await call(client)
    assert caught.value.context["url"] == f"http://127.0.0.1:1{path}"


# Load and unload


async def test_load_sends_the_configuration_unchanged(server: ScriptedServer, client: LLMClient) -> None:
    server.on_path(LOAD, reply(200, LOADED))
    loaded = await client.lmstudio.load("gemma-3-270m-it-qat", context_length=16384, flash_attention=True)
    assert loaded == LOADED
    (request,) = server.requests
    assert request.json == {"model": "gemma-3-270m-it-qat", "context_length": 16384, "flash_attention": True}


async def test_unload_sends_the_name_of_the_instance(server: ScriptedServer, client: LLMClient) -> None:
    server.on_path(UNLOAD, reply(200, {"instance_id": "gemma:2"}))
    assert await client.lmstudio.unload("gemma:2") == {"instance_id": "gemma:2"}
    assert server.requests[0].json == {"instance_id": "gemma:2"}


@pytest.mark.parametrize("method", ["models", "load", "unload", "download"])
async def test_every_method_takes_options_of_the_call(server: ScriptedServer, client: LLMClient, method: str) -> None:
    server.on_path(LOAD, reply(200, LOADED))
    server.on_path(UNLOAD, reply(200, {"instance_id": "x"}))
    server.on_path(DOWNLOAD, reply(200, status("downloading")))
    server.on_path(STATUS, reply(200, status("completed")))
    options: dict[str, Any] = {"timeout": 30, "max_retries": 0, "extra_headers": {"X-A": "b"}, "extra_query": {"c": 1}}
    if method == "models":
        await client.lmstudio.models(**options)
    elif method == "download":
        options["extra_body"] = {"d": 2}
        assert [each["status"] async for each in client.lmstudio.download("x", quantization="Q4", **options)] == [
            "downloading",
            "completed",
        ]
        assert server.requests[0].json == {"model": "x", "quantization": "Q4", "d": 2}
    else:
        await getattr(client.lmstudio, method)("x", extra_body={"d": 2}, **options)
        assert server.requests[0].json == {"model" if method == "load" else "instance_id": "x", "d": 2}
    assert {(request.headers["X-A"], request.query) for request in server.requests} == {("b", "c=1")}


async def test_a_timeout_in_seconds_limits_every_method(server: ScriptedServer, client: LLMClient) -> None:
    for path in (V1, LOAD, UNLOAD, DOWNLOAD):
        server.on_path(path, stall())
    calls = [
        client.lmstudio.models(timeout=0.05),
        client.lmstudio.load("x", timeout=0.05),
        client.lmstudio.unload("x", timeout=0.05),
        anext(client.lmstudio.download("x", timeout=0.05)),
    ]
    for call in calls:
        with pytest.raises(LLMTimeoutError, match=r"within 0\.05 s"):
            await call


async def test_an_option_that_is_not_one_of_lm_studio_is_refused(server: ScriptedServer, client: LLMClient) -> None:
    with pytest.raises(LLMValidationError, match="request_timeout is not a parameter of a request; use timeout="):
        await client.lmstudio.load("x", request_timeout=3)
    with pytest.raises(LLMValidationError, match="api_key is not a parameter"):
        client.lmstudio.download("x", api_key="secret")
    with pytest.raises(TypeError, match=r"unload\(\) got an unexpected keyword argument 'force'"):
        # Type checkers refuse the argument as well.
        await client.lmstudio.unload("x", force=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"models\(\) got an unexpected keyword argument 'limit'"):
        # As above.
        await client.lmstudio.models(limit=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert server.requests == []


async def test_no_method_queues_behind_generations(server: ScriptedServer) -> None:
    server.on_path(LOAD, reply(200, LOADED))
    server.on_path(UNLOAD, reply(200, {"instance_id": "x"}))
    server.on_path(DOWNLOAD, reply(200, {"status": "already_downloaded"}))
    server.default = stall()
    async with LLMClient(server.api_base, limits=Limits(max_concurrency=1)) as client:
        generation = asyncio.create_task(client.chat_completion(MESSAGES))
        await server.wait_until(lambda: server.in_flight)
        for _, call in CALLS.values():
            await call(client)
        generation.cancel()


@pytest.mark.parametrize(
    ("status_code", "body", "kind", "message"),
    [
        (500, refusal("internal_error", "Signal: SIGABRT", code="model_load_failed"), ModelLoadError, "SIGABRT"),
        (
            400,
            {"error": "Model loading was stopped due to insufficient system resources."},
            ModelLoadError,
            "insufficient system resources",
        ),
        (404, refusal("model_not_found", "Model 'x' not found", param="model"), ModelNotFoundError, "model 'x' not"),
        (400, refusal("invalid_request", "context_length must be positive"), LLMResponseError, "must be positive"),
        (500, refusal("unknown", "something"), LLMResponseError, "the server answered 500: something"),
    ],
)
async def test_errors_of_lm_studio_keep_their_class_and_text(
    server: ScriptedServer,
    client: LLMClient,
    status_code: int,
    body: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    server.on_path(LOAD, reply(status_code, body))
    with pytest.raises(kind, match=message) as caught:
        await client.lmstudio.load("x", context_length=-1)
    assert type(caught.value) is kind
    assert requests_of(server).count(f"POST {LOAD}") == 1


async def test_a_load_may_take_as_long_as_the_load_timeout(server: ScriptedServer) -> None:
    server.on_path(LOAD, stall())
    async with LLMClient(server.api_base, timeout=Timeouts(load=0.05, first_byte=60)) as client:
        with pytest.raises(
            LLMTimeoutError, match=r"the server did not answer within 0.05 s.*raise Timeouts.load"
        ) as caught:
            await client.lmstudio.load("x")
    assert caught.value.phase == "load"
    assert len(server.requests) == 1


async def test_a_load_that_takes_too_long_has_what_had_arrived(server: ScriptedServer) -> None:
    async def begin(exchange: Exchange) -> None:
        await exchange.start(200, {"Content-Length": "1000"}, chunked=False)
        await exchange.send(b'{"instance_id": ')
        await exchange.client_left()

    server.on_path(LOAD, begin)
    async with LLMClient(server.api_base, timeout=Timeouts(load=0.2)) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await client.lmstudio.load("x")
    assert (caught.value.phase, caught.value.status, caught.value.body) == ("load", 200, '{"instance_id": ')


async def test_the_load_timeout_does_not_apply_to_unload(server: ScriptedServer) -> None:
    server.on_path(UNLOAD, stall())
    async with LLMClient(server.api_base, timeout=Timeouts(load=60, first_byte=0.05)) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await client.lmstudio.unload("x")
    assert caught.value.phase == "first_byte"


@pytest.mark.parametrize("name", ["load", "unload", "download"])
async def test_no_request_is_sent_again_after_the_server_may_have_begun(
    server: ScriptedServer, client: LLMClient, no_waits: list[float], name: str
) -> None:
    path, call = CALLS[name]
    server.on_path(path, hang_up())
    with pytest.raises(LLMConnectionError, match="the request was not sent again"):
        await call(client)
    assert requests_of(server) == [f"POST {path}"]


async def test_a_load_that_was_refused_before_any_work_is_sent_again(
    server: ScriptedServer, client: LLMClient, no_waits: list[float]
) -> None:
    server.on_path(LOAD, in_turn(reply(503, {"error": "busy"}), reply(429, {"error": "busy"}), reply(200, LOADED)))
    assert await client.lmstudio.load("x") == LOADED
    assert requests_of(server) == [f"POST {LOAD}"] * 3


@pytest.mark.parametrize("wrong", [None, "", " ", 3, b"x"])
@pytest.mark.parametrize("name", ["load", "unload", "download"])
async def test_an_invalid_name_is_refused_before_anything_is_sent(
    server: ScriptedServer, client: LLMClient, name: str, wrong: Any
) -> None:
    with pytest.raises(LLMValidationError, match=r"must be a string that is not blank, not .*; for example"):
        await getattr(client.lmstudio, name)(wrong)
    assert server.requests == []


async def test_a_configuration_that_json_cannot_express_is_refused(server: ScriptedServer, client: LLMClient) -> None:
    with pytest.raises(LLMValidationError, match="context_length is nan"):
        await client.lmstudio.load("x", context_length=float("nan"))
    assert server.requests == []


async def test_a_cancelled_load_leaves_nothing_behind(server: ScriptedServer, client: LLMClient) -> None:
    server.on_path(LOAD, reply(404, {"detail": "Not Found"}))

    async def run() -> None:
        with pytest.raises(LLMResponseError, match="Not Found"):
            await client.lmstudio.load("x")

    async def after() -> None:
        assert not client._server.transport.busy
        assert await client.lmstudio.models()

    await cancel_at_each_step(run, after, at_least=3)


# Download


async def test_a_download_yields_its_progress_until_it_is_completed(server: ScriptedServer, client: LLMClient) -> None:
    statuses = [
        status("downloading", bytes_per_second=7834.7),
        status("downloading", 1_000_000),
        status("paused", 1_000_000),
        status("downloading", 2_000_000),
        status("completed", 2279145003, completed_at="2025-10-03T15:43:12.102Z"),
    ]
    server.on_path(DOWNLOAD, reply(200, statuses[0]))
    server.on_path(STATUS, in_turn(*(reply(200, each) for each in statuses[1:])))
    link = "https://huggingface.co/lmstudio-community/gpt-oss-20b-GGUF"
    assert [each async for each in client.lmstudio.download(link, quantization="Q4_K_M")] == statuses
    assert server.requests[0].json == {"model": link, "quantization": "Q4_K_M"}
    assert requests_of(server) == [f"POST {DOWNLOAD}", *[f"GET {STATUS}"] * 4]


async def test_a_model_that_is_already_downloaded_yields_one_status(server: ScriptedServer, client: LLMClient) -> None:
    server.on_path(DOWNLOAD, reply(200, {"status": "already_downloaded"}))
    assert [each async for each in client.lmstudio.download("x")] == [{"status": "already_downloaded"}]
    assert requests_of(server) == [f"POST {DOWNLOAD}"]


async def test_a_download_sends_nothing_before_it_is_iterated(server: ScriptedServer, client: LLMClient) -> None:
    await client.lmstudio.download("x").aclose()
    assert server.requests == []


async def test_a_failed_download_raises_with_its_last_status(server: ScriptedServer, client: LLMClient) -> None:
    server.on_path(DOWNLOAD, reply(200, status("downloading")))
    server.on_path(STATUS, reply(200, status("failed", 5000)))
    download = client.lmstudio.download("qwen/qwen3-4b")
    await anext(download)
    with pytest.raises(LLMResponseError, match=r"LM Studio could not download 'qwen/qwen3-4b'.*disk") as caught:
        await anext(download)
    assert caught.value.partial == status("failed", 5000)
    assert caught.value.status == 200
    assert '"failed"' in (caught.value.body or "")
    with pytest.raises(StopAsyncIteration):
        await anext(download)


async def test_a_download_that_fails_at_once_raises_the_same_error(server: ScriptedServer, client: LLMClient) -> None:
    server.on_path(DOWNLOAD, reply(200, {"status": "failed"}))
    with pytest.raises(LLMResponseError, match="could not download"):
        await anext(client.lmstudio.download("x"))


async def test_a_job_that_lm_studio_has_forgotten_raises_its_error(server: ScriptedServer, client: LLMClient) -> None:
    server.on_path(DOWNLOAD, reply(200, status("downloading")))
    server.on_path(STATUS, reply(404, refusal("job_not_found", "No such job")))
    with pytest.raises(LLMResponseError, match="the server answered 404: No such job"):
        _ = [each async for each in client.lmstudio.download("x")]


async def test_a_status_without_a_job_raises(server: ScriptedServer, client: LLMClient) -> None:
    server.on_path(DOWNLOAD, reply(200, {"status": "downloading"}))
    with pytest.raises(LLMResponseError, match="not the status of a download"):
        await anext(client.lmstudio.download("x"))


async def test_the_name_of_a_job_is_quoted_in_the_path(server: ScriptedServer, client: LLMClient) -> None:
    server.on_path(DOWNLOAD, reply(200, {"status": "downloading", "job_id": "a/b?c"}))
    server.on_path(f"{DOWNLOAD}/status/a%2Fb%3Fc", reply(200, status("completed")))
    assert len([each async for each in client.lmstudio.download("x")]) == 2


async def test_a_job_with_half_a_surrogate_pair_in_its_name_can_be_asked_about(
    server: ScriptedServer, client: LLMClient
) -> None:
    job = r'{"status": "downloading", "job_id": "\ud800"}'
    server.on_path(DOWNLOAD, reply(200, job, content_type="application/json"))
    with pytest.raises(LLMResponseError, match="404"):
        _ = [each async for each in client.lmstudio.download("x")]


async def test_a_progress_request_that_fails_temporarily_is_retried(
    server: ScriptedServer, client: LLMClient, no_waits: list[float]
) -> None:
    server.on_path(DOWNLOAD, reply(200, status("downloading")))
    server.on_path(STATUS, in_turn(hang_up(), reply(503, {"error": "busy"}), reply(200, status("completed"))))
    assert len([each async for each in client.lmstudio.download("x")]) == 2


async def test_leaving_the_iteration_sends_no_further_request(server: ScriptedServer, client: LLMClient) -> None:
    server.on_path(DOWNLOAD, reply(200, status("downloading")))
    server.on_path(STATUS, reply(200, status("downloading")))
    download = client.lmstudio.download("x")
    async for _ in download:
        break
    await download.aclose()
    assert len(server.requests) == 1
    assert not client._server.transport.busy


async def test_a_cancellation_at_each_await_of_a_download_leaves_nothing_behind(
    server: ScriptedServer, client: LLMClient
) -> None:
    server.on_path(DOWNLOAD, reply(200, status("downloading")))

    async def run() -> None:
        server.on_path(STATUS, in_turn(reply(200, status("paused")), reply(200, status("completed"))))
        assert len([each async for each in client.lmstudio.download("x")]) == 3

    async def after() -> None:
        assert not client._server.transport.busy
        assert await client.lmstudio.models()

    await cancel_at_each_step(run, after, at_least=6)


async def test_a_download_ends_when_api_base_is_set(server: ScriptedServer, client: LLMClient) -> None:
    server.on_path(DOWNLOAD, reply(200, status("downloading")))
    download = client.lmstudio.download("x")
    await anext(download)
    async with ScriptedServer() as other:
        client.api_base = other.api_base
        with pytest.raises(TaskCancelledError, match="api_base was set") as caught:
            await anext(download)
        assert other.requests == []
    assert caught.value.partial == status("downloading")


@pytest.mark.parametrize("sleeps", [True, False])
async def test_a_download_ends_when_its_client_is_closed_and_does_not_open_it_again(
    server: ScriptedServer, client: LLMClient, monkeypatch: pytest.MonkeyPatch, sleeps: bool
) -> None:
    server.on_path(DOWNLOAD, reply(200, status("downloading")))
    download = client.lmstudio.download("x")
    await anext(download)
    if sleeps:
        monkeypatch.setattr("lmbridge.client.lmstudio.POLL_SECONDS", 600)
        step = asyncio.ensure_future(anext(download))
        await turns()
        await client.close()
    else:
        await client.close()
        step = asyncio.ensure_future(anext(download))
    with pytest.raises(TaskCancelledError, match="the client was closed while") as caught:
        await step
    assert caught.value.partial == status("downloading")
    assert len(server.requests) == 1
    await server.wait_until(lambda: server.open_connections == 0)


async def test_a_download_ends_when_its_client_is_given_back_to_its_pool(server: ScriptedServer) -> None:
    server.on_path(DOWNLOAD, reply(200, status("downloading")))
    async with LLMClientPool(api_base=server.api_base) as pool:
        async with pool.client() as client:
            download = client.lmstudio.download("x")
            await anext(download)
        with pytest.raises(TaskCancelledError, match="given back to its pool"):
            await anext(download)
    assert len(server.requests) == 1


async def test_no_error_contains_the_key(server: ScriptedServer) -> None:
    server.on_path(DOWNLOAD, reply(200, {"status": "failed", "note": "sk-lm-12345678:secret"}))
    server.on_path(V1, reply(404, "no sk-lm-12345678:secret here"))
    async with LLMClient(server.api_base, api_key="sk-lm-12345678:secret") as client:
        for _, call in (CALLS["download"], CALLS["models"]):
            with pytest.raises(LLMResponseError) as caught:
                await call(client)
            assert "[api_key]" in (caught.value.body or "")
            assert "secret" not in f"{caught.value} {caught.value.body}"
