"""The calls of servers that cannot be recorded here, with the answers that their documentation, or a recording, shows.

They are LM Studio, llama.cpp's router, Ollama and vLLM. The answers are those of the tests of each of these servers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import msgspec

from lmbridge import LLMClient
from tests.client.test_client_models import SUCCESS
from tests.client.test_decide import ANSWERS, QUESTIONS, STATE
from tests.client.test_lmstudio import GEMMA, LOADED, status
from tests.client.test_server_info import RUNNING, TAGS
from tests.reliability.steps import RecordedCall, Step, as_plain, items_of
from tests.support import MESSAGES

_ROUTER_EVENTS: Final = Path(__file__).parents[1] / "data" / "foreign" / "router" / "models_sse.txt"
_ROUTED: Final = "smol-a"
_KEY: Final = "gemma-3-270m-it-qat"
_ROUTE: Final[Any] = ANSWERS["route"]


def _step(request: str, answer: Any, status: int = 200, *, known: bool = False, optional: bool = False) -> Step:
    return Step(
        request,
        status,
        parts=(msgspec.json.encode(answer),),
        is_faulted=not known,
        is_optional=optional,
    )


# LM Studio


def _unexpected(method: str, path: str) -> Step:
    """LM Studio's answer to a path that it does not know, which another server would answer in another way."""
    answer = {"error": f"Unexpected endpoint or method. ({method} {path})"}
    return _step(f"{method} {path}", answer, optional=True)


async def _load_in_lmstudio(client: LLMClient) -> Any:
    return await client.lmstudio.load(_KEY)


async def _unload_in_lmstudio(client: LLMClient) -> Any:
    return await client.lmstudio.unload(_KEY)


async def _models_of_lmstudio(client: LLMClient) -> Any:
    return await client.lmstudio.models()


async def _server_info(client: LLMClient) -> Any:
    return as_plain(await client.server_info())


_V1: Final = "/api/v1/models"
_OLD_ENTRY: Final = {"id": "gemma", "type": "llm", "state": "loaded", "loaded_context_length": 4096}
_LMSTUDIO: Final = {
    "LM Studio: models": RecordedCall(_models_of_lmstudio, (_step(f"GET {_V1}", {"models": [GEMMA]}),)),
    "LM Studio before 0.4.0: models": RecordedCall(
        _models_of_lmstudio,
        (_unexpected("GET", _V1), _step("GET /api/v0/models", {"data": [_OLD_ENTRY], "object": "list"})),
    ),
    "LM Studio: server info": RecordedCall(
        _server_info,
        (
            _step("GET /v1/models", {"data": [{"id": _KEY, "owned_by": "organization_owner"}]}, known=True),
            _step(f"GET {_V1}", {"models": [GEMMA]}, optional=True),
        ),
    ),
    "LM Studio: load": RecordedCall(_load_in_lmstudio, (_step(f"POST {_V1}/load", LOADED),)),
    "LM Studio: unload": RecordedCall(_unload_in_lmstudio, (_step(f"POST {_V1}/unload", {"instance_id": _KEY}),)),
    "LM Studio: download": RecordedCall(
        lambda client: items_of(client.lmstudio.download("gemma")),
        (
            _step(f"POST {_V1}/download", status("downloading")),
            _step(f"GET {_V1}/download/status/job_1", status("downloading", 2000)),
            _step(f"GET {_V1}/download/status/job_1", status("completed", 2279145003)),
        ),
    ),
}


# llama.cpp's router


def _routed(value: str, request: str = "GET /models", **options: Any) -> Step:
    entry = {"id": _ROUTED, "object": "model", "owned_by": "llamacpp", "status": {"value": value}}
    return _step(request, {"data": [entry], "object": "list"}, **options)


def _description(value: str, *, known: bool = True) -> tuple[Step, ...]:
    """What a router is asked to find out that it is one, and what it says of a model in this state."""
    props = {"role": "router", "max_instances": 1, "build_info": "b10434"}
    of_model = {"total_slots": 2, "default_generation_settings": {"n_ctx": 2048}, "modalities": {"vision": False}}
    described = (
        _routed(value, "GET /v1/models", known=known),
        _step("GET /props", props, known=known, optional=True),
    )
    return described if value != "loaded" else (*described, _step("GET /props", of_model, known=known, optional=True))


async def _routed_models(client: LLMClient) -> Any:
    return as_plain(await client.models.list())


async def _load_in_router(client: LLMClient) -> Any:
    return as_plain(await client.models.load(_ROUTED))


async def _unload_in_router(client: LLMClient) -> Any:
    await client.models.unload(_ROUTED)
    return "unloaded"


async def _watch_router(client: LLMClient) -> Any:
    return await items_of(client.models.loading())


def _events(text: bytes) -> Step:
    parts = tuple(event + b"\n\n" for event in text.split(b"\n\n") if event)
    return Step("GET /models/sse", content_type="text/event-stream", parts=parts)


def _download(value: str) -> Step:
    progress = {"other.gguf": {"done": 10, "total": 20}}
    entry = {"id": "user/other:q4", "status": {"value": value, "progress": progress}}
    return _step("GET /models", {"data": [entry]})


_ROUTER: Final = {
    "router: models": RecordedCall(_routed_models, _description("loaded", known=False)),
    "router: load": RecordedCall(
        _load_in_router,
        (
            *_description("unloaded"),
            _step("POST /models/load", SUCCESS),
            _routed("loading"),
            _routed("loaded"),
            *_description("loaded"),
        ),
        limits_all=True,
    ),
    "router: unload": RecordedCall(
        _unload_in_router, (*_description("loaded"), _step("POST /models/unload", SUCCESS), _routed("unloaded"))
    ),
    "router: download": RecordedCall(
        lambda client: items_of(client.models.download("user/other:q4")),
        (
            *_description("unloaded"),
            _routed("unloaded", known=True),
            _step("POST /models", SUCCESS),
            _download("downloading"),
            _download("unloaded"),
        ),
    ),
    "router: progress of a load": RecordedCall(_watch_router, (_events(_ROUTER_EVENTS.read_bytes()),), is_endless=True),
}


# Ollama


async def _load_in_ollama(client: LLMClient) -> Any:
    return as_plain(await client.models.load("qwen3:8b"))


async def _unload_in_ollama(client: LLMClient) -> Any:
    await client.models.unload("qwen3:8b")
    return "unloaded"


async def _ollama_info(client: LLMClient) -> Any:
    return as_plain(await client.with_options(model="qwen3:8b").server_info())


_OLLAMA_PROBES: Final = (
    _step("GET /v1/models", TAGS, known=True),
    _step("GET /api/version", {"version": "0.35.0"}, optional=True),
    _step("GET /api/ps", RUNNING, optional=True),
    _step("GET /api/tags", {"models": [{"name": "qwen3:8b", "size": 5200000000}]}, optional=True),
)
_KNOWN_PROBES: Final = tuple(attrs.evolve(probe, is_faulted=False) for probe in _OLLAMA_PROBES)
_GENERATED: Final = _step("POST /api/generate", {"model": "qwen3:8b", "response": "", "done": True})
_PARAMETERS: Final = {"parameters": 'num_ctx    8192\nstop       "<|im_end|>"'}
_OLLAMA: Final = {
    "Ollama: server info": RecordedCall(
        _ollama_info, (*_OLLAMA_PROBES, _step("POST /api/show", _PARAMETERS, optional=True))
    ),
    "Ollama: load": RecordedCall(_load_in_ollama, (*_KNOWN_PROBES, _GENERATED, *_KNOWN_PROBES), limits_all=True),
    "Ollama: unload": RecordedCall(_unload_in_ollama, (*_KNOWN_PROBES, _GENERATED)),
}


# vLLM


async def _count_tokens(client: LLMClient) -> Any:
    return as_plain(await client.count_tokens(MESSAGES))


_VLLM_MODEL: Final = {"id": "Qwen/Qwen3-8B", "owned_by": "vllm", "max_model_len": 40960}
_VLLM: Final = {
    "vLLM: server info": RecordedCall(
        _server_info,
        (
            _step("GET /v1/models", {"object": "list", "data": [_VLLM_MODEL]}, known=True),
            _step("GET /version", {"version": "0.11.0"}, optional=True),
        ),
    ),
    "vLLM: token count": RecordedCall(
        _count_tokens,
        (
            _step("POST /v1/chat/completions/input_tokens", {"detail": "Not Found"}, 404, optional=True),
            _step("POST /tokenize", {"count": 12, "max_model_len": 40960, "tokens": [1, 2]}, optional=True),
        ),
    ),
}


# Decision models


async def _decide(client: LLMClient) -> Any:
    return as_plain(await client.decide(STATE, {"route": QUESTIONS["route"]}))


_DECISION: Final = {"model": "test-model", "answers": {"route": _ROUTE}, "usage": {"input_tokens": 239}}
_OPENAI_ANSWER: Final = {
    "type": "choice",
    "choice": "billing",
    "confidence": 0.7,
    "probabilities": [
        {"value": name, "probability": probability} for name, probability in _ROUTE["probabilities"].items()
    ],
}
_OPENAI_DECISION: Final = {"model": "test-model", "answers": [_OPENAI_ANSWER], "usage": {}}
_DECISIONS: Final = {
    "decision": RecordedCall(_decide, (_step("POST /v1/systemone", _DECISION, optional=True),)),
    "decision, as OpenAI's": RecordedCall(
        _decide,
        (
            attrs.evolve(_unexpected("POST", "/v1/systemone"), is_faulted=False),
            _step("POST /v1/decisions", _OPENAI_DECISION, optional=True),
        ),
    ),
}

SCRIPTED_CALLS: Final[Mapping[str, RecordedCall]] = _LMSTUDIO | _ROUTER | _OLLAMA | _VLLM | _DECISIONS
