"""`server_info`: recorded replies of llama.cpp, its router and llama-cpp-python, and documented ones of others."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import attrs
import pytest

from lmbridge import (
    Limits,
    LLMAuthenticationError,
    LLMClient,
    LLMConnectionError,
    LLMResponseError,
    ModelInfo,
    ServerInfo,
)
from lmbridge.testing import Exchange, ScriptedServer, raw, reply, stall
from tests.client.test_captures import CAPTURES, Capture, parse
from tests.support import MESSAGES, cancel_at_each_step

FOLDER: Final = Path(__file__).parents[1] / "data" / "server_info"
RECORDED: Final = {path.stem: parse(path.stem, path.read_bytes()) for path in sorted(FOLDER.glob("*.txt"))}


def models_list(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [{"object": "model", **each} for each in entries]}


def serve(server: ScriptedServer, **paths: Any) -> None:
    """Sets the reply for each path: a capture, or a JSON object. All other paths are unknown to the server."""
    for path, answer in paths.items():
        behaviour = raw(*answer.as_recorded()) if isinstance(answer, Capture) else reply(200, answer)
        server.on_path(PATHS[path], behaviour)


PATHS: Final = {
    "models": "/v1/models",
    "props": "/props",
    "v1": "/api/v1/models",
    "v0": "/api/v0/models",
    "ollama": "/api/version",
    "ps": "/api/ps",
    "tags": "/api/tags",
    "version": "/version",
}


async def info(server: ScriptedServer, model: str | None = None, **paths: Any) -> ServerInfo:
    serve(server, **paths)
    async with LLMClient(server.api_base, model) as client:
        return await client.server_info()


def requested_paths(server: ScriptedServer) -> list[str]:
    assert all(request.method == "GET" for request in server.requests)
    return [f"{request.path}?{request.query}" if request.query else request.path for request in server.requests]


# llama.cpp


@pytest.mark.parametrize(("props", "version"), [("llama_cpp_props", None), ("llama_server_props", "b1-7e4c0a9")])
async def test_llama_cpp_reports_its_slots_and_the_context_of_a_slot(
    scripted_server: ScriptedServer, props: str, version: str | None
) -> None:
    result = await info(scripted_server, models=CAPTURES["xllamacpp-smollm2/models"], props=RECORDED[props])
    assert result == ServerInfo(
        kind="llama.cpp",
        version=version,
        models=(
            ModelInfo(id="smollm2", loaded=True, context_length=2048, slots=4, vision=False, size_bytes=96_576_768),
        ),
        context_length=2048,
        slots=4,
    )
    assert result.loaded_models == ("smollm2",)
    assert requested_paths(scripted_server) == ["/v1/models", "/props"]


async def test_the_only_model_counts_whatever_name_the_client_has_for_it(scripted_server: ScriptedServer) -> None:
    result = await info(
        scripted_server, "gpt-4o", models=CAPTURES["xllamacpp-smollm2/models"], props=RECORDED["llama_cpp_props"]
    )
    assert (result.context_length, result.slots) == (2048, 4)


@pytest.mark.parametrize("status", [401, 403, 404, 501])
async def test_properties_that_llama_cpp_does_not_show_are_none(scripted_server: ScriptedServer, status: int) -> None:
    error = {"error": {"code": status, "message": "This server does not support it.", "type": "not_supported_error"}}
    scripted_server.on_path("/props", reply(status, error))
    result = await info(scripted_server, models=CAPTURES["auth/models_nokey"])
    model = ModelInfo(id="smol", loaded=True, context_length=2048, size_bytes=96_576_768)
    assert result == ServerInfo(kind="llama.cpp", models=(model,), context_length=2048)
    assert len(scripted_server.requests) == 2


def router_models(**values: str) -> dict[str, Any]:
    """Returns the recorded list of the router's models, with some of them in another state."""
    models: dict[str, Any] = json.loads(CAPTURES["router/models_before"].body)
    for entry in models["data"]:
        entry["status"]["value"] = values.get(entry["id"].replace("-", "_"), "unloaded")
    return models


async def router_props(exchange: Exchange) -> None:
    """Answers with the router's own properties, or with those of the model in the query."""
    children = {"smol-a": (2048, 2), "smol-b": (1024, 3), "org/a&b#c:Q8": (4096, 1)}
    query = dict(part.split("=") for part in exchange.request.query.split("&") if part)
    if not query:
        return await raw(*RECORDED["router_props"].as_recorded())(exchange)
    assert query["autoload"] == "false"
    context, slots = children[unquote(query["model"])]
    props = {"default_generation_settings": {"n_ctx": context}, "total_slots": slots, "build_info": "b1-7e4c0a9"}
    return await reply(200, props)(exchange)


async def test_a_router_without_a_loaded_model_has_no_context_length(scripted_server: ScriptedServer) -> None:
    result = await info(scripted_server, models=CAPTURES["router/models_before"], props=RECORDED["router_props"])
    names = ("broken", "gemma3-270m", "smol-a", "smol-b")
    assert result == ServerInfo(
        kind="llama.cpp",
        version="b1-7e4c0a9",
        models=tuple(ModelInfo(id=name, loaded=False, status="unloaded") for name in names),
        max_loaded_models=1,
    )
    assert result.loaded_models == ()
    assert requested_paths(scripted_server) == ["/v1/models", "/props"]


@pytest.mark.parametrize(
    ("model", "context", "slots"),
    [
        (None, 1024, 2),  # the smallest values
        ("unheard-of", 1024, 2),
        ("smol-a", 2048, 2),
        ("smol-b", 1024, 3),
        ("gemma3-270m", None, None),  # not loaded
    ],
)
async def test_a_router_is_asked_about_each_loaded_model(
    scripted_server: ScriptedServer, model: str | None, context: int | None, slots: int | None
) -> None:
    scripted_server.on_path("/props", router_props)
    result = await info(scripted_server, model, models=router_models(smol_a="loaded", smol_b="sleeping"))
    assert result.loaded_models == ("smol-a", "smol-b")
    assert result.models[2] == ModelInfo(id="smol-a", loaded=True, context_length=2048, slots=2, status="loaded")
    assert result.models[3] == ModelInfo(id="smol-b", loaded=True, context_length=1024, slots=3, status="sleeping")
    assert (result.context_length, result.slots) == (context, slots)
    assert requested_paths(scripted_server)[2:] == [
        f"/props?model={name}&autoload=false" for name in ("smol-a", "smol-b")
    ]


async def test_the_name_of_a_routed_model_is_quoted_in_the_path(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/props", router_props)
    entry = {"id": "org/a&b#c:Q8", "owned_by": "llamacpp", "status": {"value": "loaded"}}
    result = await info(scripted_server, models=models_list(entry))
    assert (result.context_length, result.slots) == (4096, 1)


async def test_a_router_with_very_many_loaded_models_is_asked_about_some(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/props", reply(200, {"total_slots": 2}))
    entries = [{"id": f"model-{number}", "owned_by": "llamacpp", "status": {"value": "loaded"}} for number in range(60)]
    result = await info(scripted_server, models=models_list(*entries))
    assert [each.loaded for each in result.models] == [True] * 60
    assert [each.slots for each in result.models] == [2] * 50 + [None] * 10


async def test_a_router_that_hides_its_properties_still_reports_its_loaded_models(
    scripted_server: ScriptedServer,
) -> None:
    result = await info(scripted_server, models=router_models(smol_b="loaded"))
    assert result.loaded_models == ("smol-b",)
    assert (result.context_length, result.slots, result.max_loaded_models) == (None, None, None)


async def test_a_router_without_a_limit_has_no_max_loaded_models(scripted_server: ScriptedServer) -> None:
    props = {"role": "router", "max_instances": 0}
    result = await info(scripted_server, models=models_list({"id": "x", "owned_by": "llamacpp"}), props=props)
    assert result.max_loaded_models is None


# LM Studio


def lmstudio_models(*models: dict[str, Any]) -> dict[str, Any]:
    return {
        "models": [{"type": "llm", "loaded_instances": [], "max_context_length": 131072, **each} for each in models]
    }


def instance(name: str, context: int, **config: Any) -> dict[str, Any]:
    return {"id": name, "config": {"context_length": context, **config}}


LMSTUDIO_LIST: Final = models_list({"id": "qwen3-4b", "owned_by": "organization_owner"})
LMSTUDIO_MODELS: Final = lmstudio_models(
    {"key": "qwen3-4b", "loaded_instances": [instance("qwen3-4b", 8192, parallel=4), instance("qwen3-4b:2", 4096)]},
    {"key": "gemma-3", "loaded_instances": [instance("gemma-3", 16384, parallel=2)]},
    {"key": "gpt-oss-20b"},
    {"key": "nomic", "type": "embedding", "loaded_instances": [instance("nomic", 512)]},
)


@pytest.mark.parametrize(
    ("model", "context", "slots"),
    [
        (None, 4096, 2),
        ("gemma-3", 16384, 2),
        ("qwen3-4b", 4096, 4),  # the smallest values of its two instances
        ("qwen3-4b:2", 4096, None),
        ("gpt-oss-20b", None, None),
        ("nomic", None, None),
    ],
)
async def test_lm_studio_reports_context_and_slots_of_its_loaded_instances(
    scripted_server: ScriptedServer, model: str | None, context: int | None, slots: int | None
) -> None:
    result = await info(scripted_server, model, models=LMSTUDIO_LIST, v1=LMSTUDIO_MODELS)
    assert result == ServerInfo(
        kind="lmstudio",
        models=(
            ModelInfo(id="qwen3-4b", loaded=True, context_length=8192, slots=4),
            ModelInfo(id="qwen3-4b:2", loaded=True, context_length=4096),
            ModelInfo(id="gemma-3", loaded=True, context_length=16384, slots=2),
            ModelInfo(id="gpt-oss-20b", loaded=False),
            ModelInfo(id="nomic", loaded=True, context_length=512, embeds=True),
        ),
        context_length=context,
        slots=slots,
    )
    assert result.loaded_models == ("qwen3-4b", "qwen3-4b:2", "gemma-3", "nomic")
    assert requested_paths(scripted_server) == ["/v1/models", "/api/v1/models"]


async def test_lm_studio_reports_what_its_models_were_made_for(scripted_server: ScriptedServer) -> None:
    listed = lmstudio_models(
        {
            "key": "qwen3-4b",
            "loaded_instances": [instance("qwen3-4b", 8192)],
            "capabilities": {"vision": False, "trained_for_tool_use": True},
        },
        {"key": "gemma-3", "capabilities": {"vision": True, "trained_for_tool_use": False}},
        {"key": "odd", "capabilities": {"trained_for_tool_use": "maybe"}},
    )
    result = await info(scripted_server, models=LMSTUDIO_LIST, v1=listed)
    found = [(each.id, each.vision, each.tools) for each in result.models]
    assert found == [("qwen3-4b", False, True), ("gemma-3", True, False), ("odd", None, None)]


async def test_lm_studio_without_models_is_recognized(scripted_server: ScriptedServer) -> None:
    result = await info(scripted_server, models=models_list(), v1=lmstudio_models())
    assert result == ServerInfo(kind="lmstudio")
    assert result.loaded_models == ()


def lmstudio_unknown_path(path: str) -> dict[str, Any]:
    return {"error": f"Unexpected endpoint or method. (GET {path})"}


async def test_an_older_lm_studio_reports_less(scripted_server: ScriptedServer) -> None:
    v0 = models_list(
        {"id": "qwen3-4b", "type": "llm", "state": "loaded", "loaded_context_length": 4096},
        {"id": "gemma-3", "type": "vlm", "state": "not-loaded"},
    )
    result = await info(scripted_server, models=LMSTUDIO_LIST, v1=lmstudio_unknown_path("/api/v1/models"), v0=v0)
    models = (
        ModelInfo(id="qwen3-4b", loaded=True, context_length=4096, vision=False),
        ModelInfo(id="gemma-3", loaded=False, vision=True),
    )
    assert result == ServerInfo(kind="lmstudio", models=models, context_length=4096)
    assert requested_paths(scripted_server) == ["/v1/models", "/api/v1/models", "/api/v0/models"]


async def test_the_oldest_lm_studio_is_recognized_by_its_error(scripted_server: ScriptedServer) -> None:
    result = await info(
        scripted_server,
        models=LMSTUDIO_LIST,
        v1=lmstudio_unknown_path("/api/v1/models"),
        v0=lmstudio_unknown_path("/api/v0/models"),
        # It answers 200 to these as well.
        props=lmstudio_unknown_path("/props"),
        ollama=lmstudio_unknown_path("/api/version"),
    )
    assert result == ServerInfo(kind="lmstudio", models=(ModelInfo(id="qwen3-4b"),))
    assert result.loaded_models is None


# Ollama


TAGS: Final = models_list({"id": "llama3.2:latest", "owned_by": "library"}, {"id": "qwen3:8b", "owned_by": "library"})
RUNNING: Final = {
    "models": [
        {"name": "llama3.2:latest", "model": "llama3.2:latest", "context_length": 8192},
        {"name": "gemma3:latest", "model": "gemma3:latest", "context_length": 4096},
    ]
}


async def test_ollama_reports_its_version_and_running_models(scripted_server: ScriptedServer) -> None:
    result = await info(scripted_server, models=TAGS, ollama={"version": "0.12.6"}, ps=RUNNING)
    assert result == ServerInfo(
        kind="ollama",
        version="0.12.6",
        models=(
            ModelInfo(id="llama3.2:latest", loaded=True, context_length=8192),
            ModelInfo(id="qwen3:8b", loaded=False),
            ModelInfo(id="gemma3:latest", loaded=True, context_length=4096),
        ),
        context_length=4096,
    )
    assert requested_paths(scripted_server) == ["/v1/models", "/api/version", "/api/ps", "/api/tags"]


async def test_ollama_reports_the_sizes_of_files_and_not_of_memory(scripted_server: ScriptedServer) -> None:
    running = {"models": [{"name": "llama3.2:latest", "size": 3_000_000_000, "context_length": 8192}]}
    downloaded = {"models": [{"name": "llama3.2:latest", "size": 2_019_393_189}, {"name": "qwen3:8b", "size": "big"}]}
    result = await info(scripted_server, models=TAGS, ollama={"version": "0.12.6"}, ps=running, tags=downloaded)
    assert result.models == (
        ModelInfo(id="llama3.2:latest", loaded=True, context_length=8192, size_bytes=2_019_393_189),
        ModelInfo(id="qwen3:8b", loaded=False),
    )


async def test_lm_studio_reports_the_size_of_a_model_also_for_its_instances(scripted_server: ScriptedServer) -> None:
    models = lmstudio_models(
        {
            "key": "qwen3-4b",
            "size_bytes": 2_497_281_120,
            "loaded_instances": [instance("a", 8192), instance("b", 4096)],
        },
        {"key": "gpt-oss-20b", "size_bytes": 12_109_565_632},
        {"key": "odd", "size_bytes": "big"},
    )
    result = await info(scripted_server, models=LMSTUDIO_LIST, v1=models)
    assert [(each.id, each.size_bytes) for each in result.models] == [
        ("a", 2_497_281_120),
        ("b", 2_497_281_120),
        ("gpt-oss-20b", 12_109_565_632),
        ("odd", None),
    ]


@pytest.mark.parametrize(
    ("model", "context"), [("llama3.2", 8192), ("llama3.2:latest", 8192), ("qwen3:8b", None), (None, 4096)]
)
async def test_a_name_without_a_tag_means_the_latest_tag(
    scripted_server: ScriptedServer, model: str | None, context: int | None
) -> None:
    result = await info(scripted_server, model, models=TAGS, ollama={"version": "0.12.6"}, ps=RUNNING)
    assert result.context_length == context


async def test_a_running_model_that_is_not_listed_is_included(scripted_server: ScriptedServer) -> None:
    running = {"models": [{"name": "host:5000/me/gemma3"}, {"name": 3}, "?"]}
    result = await info(
        scripted_server, models={"object": "list", "data": None}, ollama={"version": "0.5.0"}, ps=running
    )
    assert result.models == (ModelInfo(id="host:5000/me/gemma3:latest", loaded=True),)


async def test_an_ollama_that_does_not_report_running_models(scripted_server: ScriptedServer) -> None:
    result = await info(scripted_server, models=TAGS, ollama={"version": "0.1.30"})
    assert result.models == (ModelInfo(id="llama3.2:latest"), ModelInfo(id="qwen3:8b"))
    assert result.loaded_models is None


async def test_ollama_is_recognized_by_models_of_another_namespace(scripted_server: ScriptedServer) -> None:
    models = models_list({"id": "me/mine:latest", "owned_by": "me"})
    result = await info(scripted_server, models=models, ollama={"version": "0.12.6"}, ps={"models": []})
    assert (result.kind, result.loaded_models) == ("ollama", ())


# vLLM


async def test_vllm_reports_its_version_and_the_context_of_its_model(scripted_server: ScriptedServer) -> None:
    models = models_list(
        {"id": "Qwen/Qwen3-8B", "owned_by": "vllm", "root": "Qwen/Qwen3-8B", "max_model_len": 40960},
        {"id": "my-lora", "owned_by": "vllm", "parent": "Qwen/Qwen3-8B", "max_model_len": None},
    )
    result = await info(scripted_server, models=models, version={"version": "0.11.0"})
    assert result == ServerInfo(
        kind="vllm",
        version="0.11.0",
        models=(
            ModelInfo(id="Qwen/Qwen3-8B", loaded=True, context_length=40960),
            ModelInfo(id="my-lora", loaded=True),
        ),
        context_length=40960,
    )
    assert requested_paths(scripted_server) == ["/v1/models", "/version"]


@pytest.mark.parametrize(
    ("shown", "context", "vision", "tools"),
    [
        ({"capabilities": ["completion", "tools"], "parameters": "num_ctx 4096"}, 4096, False, True),
        ({"capabilities": ["completion", "vision"]}, None, True, False),
        ({"parameters": "num_ctx 4096"}, 4096, None, None),
        ({"capabilities": "tools"}, None, None, None),
    ],
)
async def test_ollama_shows_the_capabilities_of_the_own_model_while_it_is_not_loaded(
    scripted_server: ScriptedServer,
    shown: dict[str, Any],
    context: int | None,
    vision: bool | None,
    tools: bool | None,
) -> None:
    scripted_server.on_path("/api/show", reply(200, shown))
    result = await info(scripted_server, "qwen3:8b", models=TAGS, ollama={"version": "0.12.6"}, ps=RUNNING)
    models = {each.id: (each.context_length, each.vision, each.tools) for each in result.models}
    assert models["qwen3:8b"] == (context, vision, tools)
    assert models["llama3.2:latest"] == (8192, None, None)


# Replies that are damaged


_DAMAGED: Final = reply(200, '{"half": ', {"Content-Type": "application/json"})
_WEB_PAGE: Final = reply(200, "<!doctype html>", {"Content-Type": "text/html"})


@pytest.mark.parametrize(
    ("owner", "path"),
    [
        ("llamacpp", "/props"),
        ("organization_owner", "/api/v1/models"),
        ("organization_owner", "/api/v0/models"),
        ("library", "/api/version"),
        ("library", "/api/ps"),
        ("library", "/api/tags"),
        ("library", "/api/show"),
        ("vllm", "/version"),
    ],
)
async def test_a_damaged_reply_is_an_error_and_not_a_missing_endpoint(
    scripted_server: ScriptedServer, owner: str, path: str
) -> None:
    older = {"v1": lmstudio_unknown_path("/api/v1/models")} if path == "/api/v0/models" else {}
    serve(scripted_server, models=models_list({"id": "m:latest", "owned_by": owner}), **older)
    serve(scripted_server, ollama={"version": "0.35.0"}, ps={"models": []}, tags={"models": []})
    scripted_server.on_path(path, _DAMAGED)
    async with LLMClient(scripted_server.api_base, "m") as client:
        with pytest.raises(LLMResponseError) as caught:
            await client.server_info()
        assert caught.value.body == '{"half": '
        # A web interface answers to every path.
        scripted_server.on_path(path, _WEB_PAGE)
        await client.server_info()


# Others


async def test_another_server_is_unknown_and_has_the_models_that_it_lists(scripted_server: ScriptedServer) -> None:
    unknown = RECORDED["llama_cpp_python_unknown_path"]
    result = await info(
        scripted_server, models=CAPTURES["llamacpppython-smol/models"], v1=unknown, ollama=unknown, props=unknown
    )
    names = ("smol", "smol-tools", "gemma", "embed")
    assert result == ServerInfo(kind="unknown", models=tuple(ModelInfo(id=name) for name in names))
    assert result.loaded_models is None
    assert requested_paths(scripted_server) == ["/v1/models", "/api/v1/models", "/api/version"]


async def test_a_context_length_listed_by_another_server_is_used(scripted_server: ScriptedServer) -> None:
    models = models_list({"id": "x", "owned_by": "sglang", "max_model_len": 32768})
    result = await info(scripted_server, models=models)
    assert (result.kind, result.context_length, result.slots) == ("unknown", 32768, None)


@pytest.mark.parametrize("wrong", [0, -1, True, "4096", 1.5, None, [4]])
async def test_a_value_that_is_not_a_count_is_none(scripted_server: ScriptedServer, wrong: Any) -> None:
    model = {"key": "x", "loaded_instances": [{"id": wrong, "config": {"context_length": wrong, "parallel": wrong}}]}
    result = await info(
        scripted_server, models=LMSTUDIO_LIST, v1=lmstudio_models(model, {"key": "y", "loaded_instances": [wrong]})
    )
    assert (result.context_length, result.slots) == (None, None)
    assert result.models[1] == ModelInfo(id="y", loaded=True)
    props = {"default_generation_settings": {"n_ctx": wrong}, "total_slots": wrong, "build_info": wrong}
    result = await info(
        scripted_server, models=models_list({"id": "x", "owned_by": "llamacpp", "meta": wrong}), props=props
    )
    assert (result.context_length, result.slots) == (None, None)


@pytest.mark.parametrize(
    "answer",
    [
        reply(200, {"object": "list", "data": [{"name": "no id"}]}),
        reply(200, {"object": "list", "data": [3]}),
        reply(200, {}),
        reply(200, "<html></html>", content_type="text/html"),
        reply(404, {"detail": "Not Found"}),
    ],
)
async def test_a_reply_that_is_not_a_list_of_models_raises(scripted_server: ScriptedServer, answer: Any) -> None:
    scripted_server.on_path("/v1/models", answer)
    with pytest.raises(LLMResponseError, match="server info at"):
        await info(scripted_server)
    assert len(scripted_server.requests) == 1


async def test_a_refused_key_raises_an_authentication_error(scripted_server: ScriptedServer) -> None:
    result = {"error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}}
    scripted_server.on_path("/v1/models", reply(401, result))
    with pytest.raises(LLMAuthenticationError, match="pass api_key="):
        await info(scripted_server)


async def test_an_unreachable_server_raises_a_connection_error() -> None:
    async with LLMClient("http://127.0.0.1:1", max_retries=0) as client:
        with pytest.raises(LLMConnectionError):
            await client.server_info()


async def test_the_paths_are_below_the_root_of_a_server_that_is_below_a_path(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/box/v1/models", reply(200, LMSTUDIO_LIST))
    scripted_server.on_path("/box/api/v1/models", reply(200, LMSTUDIO_MODELS))
    async with LLMClient(f"{scripted_server.origin}/box") as client:
        assert (await client.server_info()).kind == "lmstudio"


async def test_server_info_does_not_queue_behind_generations(scripted_server: ScriptedServer) -> None:
    serve(scripted_server, models=LMSTUDIO_LIST, v1=LMSTUDIO_MODELS)
    scripted_server.default = stall()
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:
        generation = asyncio.create_task(client.chat_completion(MESSAGES))
        await scripted_server.wait_until(lambda: scripted_server.in_flight)
        assert (await client.server_info()).kind == "lmstudio"
        generation.cancel()


async def test_a_cancellation_at_each_await_leaves_nothing_behind(scripted_server: ScriptedServer) -> None:
    serve(scripted_server, models=TAGS, ollama={"version": "0.12.6"}, ps=RUNNING)
    async with LLMClient(scripted_server.api_base) as client:

        async def run() -> None:
            assert (await client.server_info()).kind == "ollama"

        async def after() -> None:
            assert not client._server.transport.busy
            assert await client.list_models()

        await cancel_at_each_step(run, after, at_least=3)


async def test_replies_that_report_nothing_are_logged_at_debug_level(
    scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "lmbridge.client"):
        await info(scripted_server, models=models_list({"id": "x", "owned_by": "llamacpp"}))
    assert "the server answered 404" in caplog.text


def test_server_info_is_immutable() -> None:
    result = ServerInfo(kind="unknown")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        result.slots = 4  # type: ignore[misc]  # to be refused at run time as well
    assert hash(result) == hash(ServerInfo(kind="unknown"))


async def test_a_name_with_half_a_surrogate_pair_can_be_asked_about(scripted_server: ScriptedServer) -> None:
    entry = r'{"data": [{"id": "\ud800", "owned_by": "llamacpp", "status": {"value": "loaded"}}]}'
    scripted_server.on_path("/v1/models", reply(200, entry, content_type="application/json"))
    async with LLMClient(scripted_server.api_base) as client:
        assert (await client.server_info()).loaded_models == ("\ud800",)
