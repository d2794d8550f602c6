"""Which server it is: recorded from llama.cpp, its router and llama-cpp-python, the others as they are documented."""

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


def listing(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [{"object": "model", **each} for each in entries]}


def serve(server: ScriptedServer, **paths: Any) -> None:
    """What it answers on which path: a capture, or an object of JSON; all else is unknown there."""
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
    "version": "/version",
}


async def info(server: ScriptedServer, model: str | None = None, **paths: Any) -> ServerInfo:
    serve(server, **paths)
    async with LLMClient(server.api_base, model) as client:
        return await client.server_info()


def asked(server: ScriptedServer) -> list[str]:
    assert all(request.method == "GET" for request in server.requests)
    return [f"{request.path}?{request.query}" if request.query else request.path for request in server.requests]


# llama.cpp


@pytest.mark.parametrize(("props", "version"), [("llama_cpp_props", None), ("llama_server_props", "b1-7e4c0a9")])
async def test_llama_cpp_tells_its_slots_and_the_context_of_one(
    scripted_server: ScriptedServer, props: str, version: str | None
) -> None:
    told = await info(scripted_server, models=CAPTURES["xllamacpp-smollm2/models"], props=RECORDED[props])
    assert told == ServerInfo(
        kind="llama.cpp",
        version=version,
        models=(ModelInfo(id="smollm2", loaded=True, context_length=2048, slots=4),),
        context_length=2048,
        slots=4,
    )
    assert told.loaded_models == ("smollm2",)
    assert asked(scripted_server) == ["/v1/models", "/props"]


async def test_the_one_model_answers_whatever_the_client_calls_it(scripted_server: ScriptedServer) -> None:
    told = await info(
        scripted_server, "gpt-4o", models=CAPTURES["xllamacpp-smollm2/models"], props=RECORDED["llama_cpp_props"]
    )
    assert (told.context_length, told.slots) == (2048, 4)


@pytest.mark.parametrize("status", [401, 403, 404, 501])
async def test_what_llama_cpp_keeps_to_itself_is_not_known(scripted_server: ScriptedServer, status: int) -> None:
    error = {"error": {"code": status, "message": "This server does not support it.", "type": "not_supported_error"}}
    scripted_server.on_path("/props", reply(status, error))
    told = await info(scripted_server, models=CAPTURES["auth/models_nokey"])
    model = ModelInfo(id="smol", loaded=True, context_length=2048)
    assert told == ServerInfo(kind="llama.cpp", models=(model,), context_length=2048)
    assert len(scripted_server.requests) == 2


def routed(**values: str) -> dict[str, Any]:
    """The recorded list of the router's models, some of them in another state."""
    models: dict[str, Any] = json.loads(CAPTURES["router/models_before"].body)
    for entry in models["data"]:
        entry["status"]["value"] = values.get(entry["id"].replace("-", "_"), "unloaded")
    return models


async def router_props(exchange: Exchange) -> None:
    """The router's own properties, or those of a model's server."""
    children = {"smol-a": (2048, 2), "smol-b": (1024, 3), "org/a&b#c:Q8": (4096, 1)}
    query = dict(part.split("=") for part in exchange.request.query.split("&") if part)
    if not query:
        return await raw(*RECORDED["router_props"].as_recorded())(exchange)
    assert query["autoload"] == "false"
    context, slots = children[unquote(query["model"])]
    props = {"default_generation_settings": {"n_ctx": context}, "total_slots": slots, "build_info": "b1-7e4c0a9"}
    return await reply(200, props)(exchange)


async def test_a_router_with_nothing_loaded_has_no_context_yet(scripted_server: ScriptedServer) -> None:
    told = await info(scripted_server, models=CAPTURES["router/models_before"], props=RECORDED["router_props"])
    names = ("broken", "gemma3-270m", "smol-a", "smol-b")
    assert told == ServerInfo(
        kind="llama.cpp",
        version="b1-7e4c0a9",
        models=tuple(ModelInfo(id=name, loaded=False) for name in names),
        max_loaded_models=1,
    )
    assert told.loaded_models == ()
    assert asked(scripted_server) == ["/v1/models", "/props"]


@pytest.mark.parametrize(
    ("model", "context", "slots"),
    [
        (None, 1024, 2),  # the smallest of each
        ("unheard-of", 1024, 2),
        ("smol-a", 2048, 2),
        ("smol-b", 1024, 3),
        ("gemma3-270m", None, None),  # not loaded
    ],
)
async def test_a_router_is_asked_about_each_model_that_is_loaded(
    scripted_server: ScriptedServer, model: str | None, context: int | None, slots: int | None
) -> None:
    scripted_server.on_path("/props", router_props)
    told = await info(scripted_server, model, models=routed(smol_a="loaded", smol_b="sleeping"))
    assert told.loaded_models == ("smol-a", "smol-b")
    assert told.models[2] == ModelInfo(id="smol-a", loaded=True, context_length=2048, slots=2)
    assert told.models[3] == ModelInfo(id="smol-b", loaded=True, context_length=1024, slots=3)
    assert (told.context_length, told.slots) == (context, slots)
    assert asked(scripted_server)[2:] == [f"/props?model={name}&autoload=false" for name in ("smol-a", "smol-b")]


async def test_a_routed_name_is_quoted(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/props", router_props)
    entry = {"id": "org/a&b#c:Q8", "owned_by": "llamacpp", "status": {"value": "loaded"}}
    told = await info(scripted_server, models=listing(entry))
    assert (told.context_length, told.slots) == (4096, 1)


async def test_a_router_that_keeps_its_properties_to_itself_still_tells_what_is_loaded(
    scripted_server: ScriptedServer,
) -> None:
    told = await info(scripted_server, models=routed(smol_b="loaded"))
    assert told.loaded_models == ("smol-b",)
    assert (told.context_length, told.slots, told.max_loaded_models) == (None, None, None)


async def test_a_router_that_loads_as_many_as_it_is_asked_for_tells_no_limit(scripted_server: ScriptedServer) -> None:
    props = {"role": "router", "max_instances": 0}
    told = await info(scripted_server, models=listing({"id": "x", "owned_by": "llamacpp"}), props=props)
    assert told.max_loaded_models is None


# LM Studio


def studio(*models: dict[str, Any]) -> dict[str, Any]:
    return {
        "models": [{"type": "llm", "loaded_instances": [], "max_context_length": 131072, **each} for each in models]
    }


def instance(name: str, context: int, **config: Any) -> dict[str, Any]:
    return {"id": name, "config": {"context_length": context, **config}}


OWNED: Final = listing({"id": "qwen3-4b", "owned_by": "organization_owner"})
STUDIO: Final = studio(
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
        ("qwen3-4b", 4096, 4),  # either of its instances
        ("qwen3-4b:2", 4096, None),
        ("gpt-oss-20b", None, None),
        ("nomic", None, None),
    ],
)
async def test_lm_studio_tells_the_real_context_and_the_slots_of_what_is_loaded(
    scripted_server: ScriptedServer, model: str | None, context: int | None, slots: int | None
) -> None:
    told = await info(scripted_server, model, models=OWNED, v1=STUDIO)
    assert told == ServerInfo(
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
    assert told.loaded_models == ("qwen3-4b", "qwen3-4b:2", "gemma-3", "nomic")
    assert asked(scripted_server) == ["/v1/models", "/api/v1/models"]


async def test_lm_studio_with_nothing_to_list_is_recognised(scripted_server: ScriptedServer) -> None:
    told = await info(scripted_server, models=listing(), v1=studio())
    assert told == ServerInfo(kind="lmstudio")
    assert told.loaded_models == ()


def lm_studio_unknown(path: str) -> dict[str, Any]:
    return {"error": f"Unexpected endpoint or method. (GET {path})"}


async def test_an_older_lm_studio_tells_less(scripted_server: ScriptedServer) -> None:
    v0 = listing(
        {"id": "qwen3-4b", "type": "llm", "state": "loaded", "loaded_context_length": 4096},
        {"id": "gemma-3", "type": "vlm", "state": "not-loaded"},
    )
    told = await info(scripted_server, models=OWNED, v1=lm_studio_unknown("/api/v1/models"), v0=v0)
    models = (ModelInfo(id="qwen3-4b", loaded=True, context_length=4096), ModelInfo(id="gemma-3", loaded=False))
    assert told == ServerInfo(kind="lmstudio", models=models, context_length=4096)
    assert asked(scripted_server) == ["/v1/models", "/api/v1/models", "/api/v0/models"]


async def test_the_oldest_lm_studio_gives_itself_away_by_its_error(scripted_server: ScriptedServer) -> None:
    told = await info(
        scripted_server,
        models=OWNED,
        v1=lm_studio_unknown("/api/v1/models"),
        v0=lm_studio_unknown("/api/v0/models"),
        # It answers 200 to these as well.
        props=lm_studio_unknown("/props"),
        ollama=lm_studio_unknown("/api/version"),
    )
    assert told == ServerInfo(kind="lmstudio", models=(ModelInfo(id="qwen3-4b"),))
    assert told.loaded_models is None


# Ollama


TAGS: Final = listing({"id": "llama3.2:latest", "owned_by": "library"}, {"id": "qwen3:8b", "owned_by": "library"})
RUNNING: Final = {
    "models": [
        {"name": "llama3.2:latest", "model": "llama3.2:latest", "context_length": 8192},
        {"name": "gemma3:latest", "model": "gemma3:latest", "context_length": 4096},
    ]
}


async def test_ollama_tells_its_version_and_what_is_running(scripted_server: ScriptedServer) -> None:
    told = await info(scripted_server, models=TAGS, ollama={"version": "0.12.6"}, ps=RUNNING)
    assert told == ServerInfo(
        kind="ollama",
        version="0.12.6",
        models=(
            ModelInfo(id="llama3.2:latest", loaded=True, context_length=8192),
            ModelInfo(id="qwen3:8b", loaded=False),
            ModelInfo(id="gemma3:latest", loaded=True, context_length=4096),
        ),
        context_length=4096,
    )
    assert asked(scripted_server) == ["/v1/models", "/api/version", "/api/ps"]


@pytest.mark.parametrize(
    ("model", "context"), [("llama3.2", 8192), ("llama3.2:latest", 8192), ("qwen3:8b", None), (None, 4096)]
)
async def test_a_name_without_a_tag_is_the_latest(
    scripted_server: ScriptedServer, model: str | None, context: int | None
) -> None:
    told = await info(scripted_server, model, models=TAGS, ollama={"version": "0.12.6"}, ps=RUNNING)
    assert told.context_length == context


async def test_a_running_model_that_is_not_listed_is_a_model(scripted_server: ScriptedServer) -> None:
    running = {"models": [{"name": "host:5000/me/gemma3"}, {"name": 3}, "?"]}
    told = await info(scripted_server, models={"object": "list", "data": None}, ollama={"version": "0.5.0"}, ps=running)
    assert told.models == (ModelInfo(id="host:5000/me/gemma3:latest", loaded=True),)


async def test_an_ollama_that_does_not_tell_what_is_running(scripted_server: ScriptedServer) -> None:
    told = await info(scripted_server, models=TAGS, ollama={"version": "0.1.30"})
    assert told.models == (ModelInfo(id="llama3.2:latest"), ModelInfo(id="qwen3:8b"))
    assert told.loaded_models is None


async def test_ollama_is_recognised_by_models_of_a_namespace_as_well(scripted_server: ScriptedServer) -> None:
    models = listing({"id": "me/mine:latest", "owned_by": "me"})
    told = await info(scripted_server, models=models, ollama={"version": "0.12.6"}, ps={"models": []})
    assert (told.kind, told.loaded_models) == ("ollama", ())


# vLLM


async def test_vllm_tells_its_version_and_the_context_of_what_it_serves(scripted_server: ScriptedServer) -> None:
    models = listing(
        {"id": "Qwen/Qwen3-8B", "owned_by": "vllm", "root": "Qwen/Qwen3-8B", "max_model_len": 40960},
        {"id": "my-lora", "owned_by": "vllm", "parent": "Qwen/Qwen3-8B", "max_model_len": None},
    )
    told = await info(scripted_server, models=models, version={"version": "0.11.0"})
    assert told == ServerInfo(
        kind="vllm",
        version="0.11.0",
        models=(
            ModelInfo(id="Qwen/Qwen3-8B", loaded=True, context_length=40960),
            ModelInfo(id="my-lora", loaded=True),
        ),
        context_length=40960,
    )
    assert asked(scripted_server) == ["/v1/models", "/version"]


# Others


async def test_another_server_is_unknown_with_what_it_lists(scripted_server: ScriptedServer) -> None:
    unknown = RECORDED["llama_cpp_python_unknown_path"]
    told = await info(
        scripted_server, models=CAPTURES["llamacpppython-smol/models"], v1=unknown, ollama=unknown, props=unknown
    )
    names = ("smol", "smol-tools", "gemma", "embed")
    assert told == ServerInfo(kind="unknown", models=tuple(ModelInfo(id=name) for name in names))
    assert told.loaded_models is None
    assert asked(scripted_server) == ["/v1/models", "/api/v1/models", "/api/version"]


async def test_a_context_that_another_server_lists_is_taken(scripted_server: ScriptedServer) -> None:
    models = listing({"id": "x", "owned_by": "sglang", "max_model_len": 32768})
    told = await info(scripted_server, models=models)
    assert (told.kind, told.context_length, told.slots) == ("unknown", 32768, None)


@pytest.mark.parametrize("wrong", [0, -1, True, "4096", 1.5, None, [4]])
async def test_what_is_no_number_of_anything_is_not_known(scripted_server: ScriptedServer, wrong: Any) -> None:
    model = {"key": "x", "loaded_instances": [{"id": wrong, "config": {"context_length": wrong, "parallel": wrong}}]}
    told = await info(scripted_server, models=OWNED, v1=studio(model, {"key": "y", "loaded_instances": [wrong]}))
    assert (told.context_length, told.slots) == (None, None)
    assert told.models[1] == ModelInfo(id="y", loaded=True)
    props = {"default_generation_settings": {"n_ctx": wrong}, "total_slots": wrong, "build_info": wrong}
    told = await info(scripted_server, models=listing({"id": "x", "owned_by": "llamacpp", "meta": wrong}), props=props)
    assert (told.context_length, told.slots) == (None, None)


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
async def test_what_lists_no_models_is_no_server_of_the_kind(scripted_server: ScriptedServer, answer: Any) -> None:
    scripted_server.on_path("/v1/models", answer)
    with pytest.raises(LLMResponseError, match="server info at"):
        await info(scripted_server)
    assert len(scripted_server.requests) == 1


async def test_a_refused_key_is_a_named_error(scripted_server: ScriptedServer) -> None:
    told = {"error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}}
    scripted_server.on_path("/v1/models", reply(401, told))
    with pytest.raises(LLMAuthenticationError, match="pass api_key="):
        await info(scripted_server)


async def test_nobody_there_is_a_named_error() -> None:
    async with LLMClient("http://127.0.0.1:1", max_retries=0) as client:
        with pytest.raises(LLMConnectionError):
            await client.server_info()


async def test_it_asks_below_the_root_of_a_server_below_a_path(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/box/v1/models", reply(200, OWNED))
    scripted_server.on_path("/box/api/v1/models", reply(200, STUDIO))
    async with LLMClient(f"{scripted_server.origin}/box") as client:
        assert (await client.server_info()).kind == "lmstudio"


async def test_it_does_not_queue_behind_generations(scripted_server: ScriptedServer) -> None:
    serve(scripted_server, models=OWNED, v1=STUDIO)
    scripted_server.default = stall()
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:
        generation = asyncio.create_task(client.chat_completion(MESSAGES))
        await scripted_server.wait_until(lambda: scripted_server.in_flight)
        assert (await client.server_info()).kind == "lmstudio"
        generation.cancel()


async def test_a_cancel_anywhere_leaves_nothing_behind(scripted_server: ScriptedServer) -> None:
    serve(scripted_server, models=TAGS, ollama={"version": "0.12.6"}, ps=RUNNING)
    async with LLMClient(scripted_server.api_base) as client:

        async def run() -> None:
            assert (await client.server_info()).kind == "ollama"

        async def after() -> None:
            assert not client._server.transport.busy
            assert await client.list_models()

        await cancel_at_each_step(run, after, at_least=3)


async def test_what_was_not_told_is_logged_for_those_who_look(
    scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "lmbridge.client"):
        await info(scripted_server, models=listing({"id": "x", "owned_by": "llamacpp"}))
    assert "the server answered 404" in caplog.text


def test_it_is_a_frozen_value() -> None:
    told = ServerInfo(kind="unknown")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        told.slots = 4  # type: ignore[misc]  # to be refused at run time as well
    assert hash(told) == hash(ServerInfo(kind="unknown"))


async def test_a_name_that_is_no_text_is_asked_about_all_the_same(scripted_server: ScriptedServer) -> None:
    entry = r'{"data": [{"id": "\ud800", "owned_by": "llamacpp", "status": {"value": "loaded"}}]}'
    scripted_server.on_path("/v1/models", reply(200, entry, content_type="application/json"))
    async with LLMClient(scripted_server.api_base) as client:
        assert (await client.server_info()).loaded_models == ("\ud800",)
