"""Finds out which kind of server answers, which models it has, and how many requests it can handle at a time.

Every server answers `GET /v1/models`. The `owned_by` of the models there suggests a kind of server, and the answer to a
path that only this kind has confirms it. The body of the answer decides, because a status of 200 means nothing: LM
Studio answers 200 to any path.

- LM Studio: `owned_by` is "organization_owner" (reference of its REST API); then see `lmstudio.find_lmstudio`.
- llama.cpp: "llamacpp"; `/props` has `total_slots`, the context of a slot and `build_info`. A router lists a `status`
  for each model; its own `/props` has `max_instances`, and `/props?model=` returns the `/props` of a loaded model
  (recorded from both; "Using multiple models" in llama.cpp's tools/server/README.md). The size of a loaded model is its
  `meta.size`.
- Ollama: the namespace of the model, usually "library"; `/api/version`, `/api/ps` with the loaded models and their
  context lengths, and `/api/tags` with the sizes of the files (the `size` in `/api/ps` is the size in memory). If the
  client's own model is not loaded, `/api/show` has the `num_ctx` of its Modelfile, and its `capabilities`
  (https://docs.ollama.com/api).
- vLLM: "vllm", with `max_model_len` (vllm/entrypoints/openai/serving_models.py); `/version`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import quote

import attrs

from lmbridge._checks import is_integer
from lmbridge.client.api_requests import ServerApi, is_damaged
from lmbridge.client.lmstudio import find_lmstudio
from lmbridge.client.model_lists import fetch_models
from lmbridge.client.served_model import is_same_model
from lmbridge.client.several_servers import smallest
from lmbridge.errors import LLMError
from lmbridge.types import LMStudioModel

logger: logging.Logger = logging.getLogger("lmbridge.client")

ServerKind = Literal["lmstudio", "llama.cpp", "ollama", "vllm", "unknown"]
"""The kinds of servers that lmbridge recognizes, and "unknown" for all others."""
_Entry: TypeAlias = Mapping[str, Any]


@attrs.frozen(kw_only=True)
class ModelInfo:
    """What a server reports about one of its models. A field that it does not report is None."""

    id: str
    """The model's name. For a model that LM Studio has loaded, it is the name of the loaded instance."""
    loaded: bool | None = None
    """Whether the model is loaded. On a llama.cpp router, a sleeping model counts as loaded."""
    context_length: int | None = None
    """The most tokens that a request to the loaded model may have, its answer included."""
    slots: int | None = None
    """The number of requests that the model works on at the same time. Further requests wait in the server."""
    embeds: bool = False
    """Whether the model makes embeddings instead of text."""
    vision: bool | None = None
    """Whether the model can see images. LM Studio and llama.cpp report it, and Ollama does for the client's own model
    while that is not loaded."""
    tools: bool | None = None
    """Whether the model was made to call tools. LM Studio reports it, and Ollama does for the client's own model while
    that is not loaded. Other models may call tools as well, but less reliably."""
    status: str | None = None
    """What a llama.cpp router reports about the model: "loaded", "unloaded", "loading", "sleeping" (the next request
    loads it again) or "downloading". None for other servers."""
    size_bytes: int | None = None
    """The size of the model in bytes: the size of its files for LM Studio and Ollama, and of its weights for llama.cpp.
    A loaded model takes about this much memory, and its context takes more."""


@attrs.frozen(kw_only=True)
class ServerInfo:
    """What a server reports about itself. A field that it does not report is None."""

    kind: ServerKind
    """The kind of the server, or "unknown" if lmbridge does not recognize it."""
    version: str | None = None
    """The server's version. LM Studio does not report one."""
    models: tuple[ModelInfo, ...] = ()
    """The server's models. LM Studio has an entry for each loaded instance of a model."""
    context_length: int | None = None
    """The context length of the client's own model if the server lists it, else the smallest of all its models. Models
    that make embeddings do not count."""
    slots: int | None = None
    """The slots of the client's own model if the server lists it, else the smallest number of all its models. Models
    that make embeddings do not count."""
    max_loaded_models: int | None = None
    """The number of models that a llama.cpp router can keep loaded at the same time."""

    @property
    def is_router(self) -> bool:
        """Whether the server is llama.cpp's router, which loads and unloads models.

        A llama.cpp server without any model is one, because every other one has the model that it was started with.
        """
        return any(each.status is not None for each in self.models) or (self.kind == "llama.cpp" and not self.models)

    @property
    def loaded_models(self) -> tuple[str, ...] | None:
        """The ids of the models that are loaded, or None if the server does not report which ones are."""
        if any(each.loaded is None for each in self.models):
            return None
        return tuple(each.id for each in self.models if each.loaded)


async def describe(server: ServerApi, model: str | None) -> ServerInfo:
    """Asks a server about itself; see `LLMClient.server_info`.

    Args:
        server: The server.
        model: The client's own model, whose context length and slots are those of the result.

    Raises:
        LLMError: The server did not answer, or refused the key.
    """
    entries = await fetch_models(server, "server info")
    owner = entries[0].get("owned_by") if entries else None
    for probe in _PROBES.get(owner, _OTHER_PROBES) if isinstance(owner, str) else _OTHER_PROBES:
        if (info := await probe(server, entries)) is not None:
            break
    else:
        info = ServerInfo(kind="unknown", models=_models_from(entries))
    if info.kind == "ollama" and model is not None:
        info = await _with_shown(server, info, model)
    return _summarized(info, model)


async def describe_lmstudio_or_llama_cpp(server: ServerApi) -> ServerInfo | None:
    """Asks a server about itself, with as few requests as possible, if it is LM Studio or llama.cpp.

    Returns:
        What the server reports, or None if it is neither LM Studio nor llama.cpp.

    Raises:
        LLMError: The server did not answer, or refused the key.
    """
    entries = await fetch_models(server, "server info")
    owner = entries[0].get("owned_by") if entries else None
    if owner == _LLAMA_CPP:
        info: ServerInfo | None = await _probe_llama_cpp(server, entries)
    elif isinstance(owner, str) and owner in _PROBES:
        return None
    else:
        info = await _probe_lmstudio(server, entries) or await _probe_empty_router(server, entries)
    return None if info is None else _summarized(info, None)


def _summarized(info: ServerInfo, model: str | None) -> ServerInfo:
    """Returns a description with the context length and the slots of the client's own model, or of all models."""
    relevant = list(_relevant_models(info.models, model))
    return attrs.evolve(
        info,
        context_length=smallest(*(each.context_length for each in relevant)),
        slots=smallest(*(each.slots for each in relevant)),
    )


async def _ask(server: ServerApi, path: str) -> _Entry:
    """Returns the JSON object at a path outside of `/v1`, or an empty dict if the server does not offer it.

    Raises:
        LLMError: The server did not answer, or its answer was damaged on the way.
    """
    reply = await server.request(server.build_get("server info", path, below_root=True))
    try:
        return server.json_object(reply)
    except LLMError as error:
        if is_damaged(reply):
            raise
        logger.debug("the server does not report %s: %s", path, error)
        return {}


# Each of these functions recognizes one kind of server, and returns None if the server is of another kind.


async def _probe_lmstudio(server: ServerApi, entries: Sequence[_Entry]) -> ServerInfo | None:
    found = await find_lmstudio(server)
    if not found.is_lmstudio:
        return None
    models = _models_from(entries) if found.models is None else tuple(_lmstudio_instances(found.models))
    return ServerInfo(kind="lmstudio", models=models)


def _lmstudio_instances(models: Iterable[LMStudioModel]) -> Iterator[ModelInfo]:
    for model in models:
        embeds = model.get("type") == "embedding"
        capabilities = _as_mapping(model.get("capabilities"))
        unloaded = ModelInfo(
            id=model["key"],
            loaded=False,
            embeds=embeds,
            vision=_as_flag(capabilities.get("vision")),
            tools=_as_flag(capabilities.get("trained_for_tool_use")),
            size_bytes=_as_count(model.get("size_bytes")),
        )
        if not model["loaded_instances"]:
            yield unloaded
        for instance in model["loaded_instances"]:
            config = _as_mapping(_as_mapping(instance).get("config"))
            yield attrs.evolve(
                unloaded,
                id=_string_or_none(_as_mapping(instance).get("id")) or model["key"],
                loaded=True,
                context_length=_as_count(config.get("context_length")),
                slots=_as_count(config.get("parallel")),
            )


async def _probe_llama_cpp(server: ServerApi, entries: Sequence[_Entry]) -> ServerInfo:
    props = await _ask(server, "/props")
    is_router = any("status" in entry for entry in entries)
    if is_router:
        models = await _routed_models(server, entries)
    else:
        models = [_llama_cpp_model(entry, props) for entry in entries]
    return _llama_cpp_info(props, models)


def _llama_cpp_info(props: _Entry, models: Sequence[ModelInfo]) -> ServerInfo:
    version = props.get("build_info")
    return ServerInfo(
        kind="llama.cpp",
        version=None if version == _UNKNOWN_BUILD else _string_or_none(version),
        models=tuple(models),
        max_loaded_models=_as_count(props.get("max_instances")),
    )


async def _probe_empty_router(server: ServerApi, entries: Sequence[_Entry]) -> ServerInfo | None:
    """Recognizes a router of llama.cpp that has no models yet, so that none of them names its owner."""
    props = {} if entries else await _ask(server, "/props")
    is_router = props.get("role") == "router" or is_integer(props.get("max_instances"))
    return _llama_cpp_info(props, ()) if is_router else None


async def _routed_models(server: ServerApi, entries: Sequence[_Entry]) -> list[ModelInfo]:
    """Returns the models of a router, with one request for each loaded model, but for at most `_MOST_ASKED` of them."""
    models: list[ModelInfo] = []
    asked = 0
    for entry in entries:
        status = _string_or_none(_as_mapping(entry.get("status")).get("value"))
        if status not in _LOADED_STATES:
            models.append(ModelInfo(id=entry["id"], loaded=False, status=status or "unloaded"))
            continue
        # JSON can contain half a surrogate pair, which has no UTF-8 form.
        name = quote(entry["id"], safe="", errors="replace")
        # The model may have been unloaded in the meantime, and this request must not load it again.
        props = await _ask(server, f"/props?model={name}&autoload=false") if asked < _MOST_ASKED else {}
        asked += 1
        models.append(attrs.evolve(_llama_cpp_model(entry, props), status=status))
    return models


def _llama_cpp_model(entry: _Entry, props: _Entry) -> ModelInfo:
    context = _as_count(_as_mapping(props.get("default_generation_settings")).get("n_ctx"))
    return ModelInfo(
        id=entry["id"],
        loaded=True,
        context_length=context or _listed_context(entry),
        slots=_as_count(props.get("total_slots")),
        vision=_as_flag(_as_mapping(props.get("modalities")).get("vision")),
        size_bytes=_as_count(_as_mapping(entry.get("meta")).get("size")),
    )


async def _probe_ollama(server: ServerApi, entries: Sequence[_Entry]) -> ServerInfo | None:
    version = _string_or_none((await _ask(server, "/api/version")).get("version"))
    if version is None:
        return None
    running = _by_name(await _ask(server, "/api/ps"))
    downloaded = _by_name(await _ask(server, "/api/tags")) or {}
    names = dict.fromkeys([*(_with_tag(entry["id"]) for entry in entries), *(running or ())])
    models = (
        ModelInfo(
            id=name,
            loaded=None if running is None else name in running,
            context_length=_as_count((running or {}).get(name, {}).get("context_length")),
            size_bytes=_as_count(downloaded.get(name, {}).get("size")),
        )
        for name in names
    )
    return ServerInfo(kind="ollama", version=version, models=tuple(models))


def _by_name(listed: _Entry) -> dict[str, _Entry] | None:
    """Returns the entries of one of Ollama's lists by the names of the models, or None if the list is missing."""
    models = listed.get("models")
    if not isinstance(models, list):
        return None
    return {_with_tag(each["name"]): each for each in models if _string_or_none(_as_mapping(each).get("name"))}


async def _with_shown(server: ServerApi, info: ServerInfo, model: str) -> ServerInfo:
    """Adds what Ollama shows of a model that is not loaded: its capabilities, and the context of its Modelfile."""
    named = entries_named(info.models, model)
    if not named or any(each.context_length is not None for each in named):
        return info
    request = server.build_post("server info", "/api/show", {"model": model}, model, below_root=True, queued=False)
    request.timeouts = server.probe_timeouts()
    reply = await server.request(request)
    try:
        shown = server.json_object(reply)
    except LLMError as error:
        if is_damaged(reply):
            raise
        logger.debug("the server does not show %r: %s", model, error)
        return info
    known: dict[str, Any] = {}
    parameters, capabilities = shown.get("parameters"), shown.get("capabilities")
    if isinstance(parameters, str) and (found := _NUM_CTX.search(parameters)):
        # Ollama loads the model with this context length.
        known["context_length"] = int(found[1])
    if isinstance(capabilities, list):
        known.update(vision="vision" in capabilities, tools="tools" in capabilities)
    models = (attrs.evolve(each, **known) if each in named else each for each in info.models)
    return attrs.evolve(info, models=tuple(models))


async def _probe_vllm(server: ServerApi, entries: Sequence[_Entry]) -> ServerInfo:
    version = _string_or_none((await _ask(server, "/version")).get("version"))
    return ServerInfo(kind="vllm", version=version, models=_models_from(entries, loaded=True))


_LLAMA_CPP: Final = "llamacpp"
_Probe: TypeAlias = Callable[[ServerApi, Sequence[_Entry]], Awaitable[ServerInfo | None]]
_PROBES: Final[Mapping[str, Sequence[_Probe]]] = {
    _LLAMA_CPP: (_probe_llama_cpp,),
    "vllm": (_probe_vllm,),
    "library": (_probe_ollama, _probe_lmstudio),
}
"""The functions to try, in this order, by the owner of the first model."""
_OTHER_PROBES: Final[Sequence[_Probe]] = (_probe_lmstudio, _probe_ollama, _probe_empty_router)

_NUM_CTX: Final = re.compile(r"^num_ctx\s+(\d{1,9})\s*$", re.MULTILINE)
"""The line of Ollama's `parameters` with the context length: `num_ctx    8192`."""
_UNKNOWN_BUILD: Final = "b0-unknown"
"""The `build_info` of a llama.cpp that was built outside of its repository."""
_MOST_ASKED: Final = 50
"""The most loaded models about which a router is asked, with a request for each. Far fewer fit into memory."""
_LOADED_STATES: Final = ("loaded", "sleeping")
"""The values of a llama.cpp router's `status` with which a model counts as loaded."""


# Reading


def _models_from(entries: Iterable[_Entry], *, loaded: bool | None = None) -> tuple[ModelInfo, ...]:
    return tuple(ModelInfo(id=each["id"], loaded=loaded, context_length=_listed_context(each)) for each in entries)


def _listed_context(entry: _Entry) -> int | None:
    """Returns the context length in an entry of `/v1/models`: vLLM's field, which others copied, or llama.cpp's."""
    return _as_count(entry.get("max_model_len")) or _as_count(_as_mapping(entry.get("meta")).get("n_ctx"))


def entries_named(models: Iterable[ModelInfo], model: str) -> list[ModelInfo]:
    """Returns the entries that a name of a model stands for."""
    return [each for each in models if _has_name(each.id, model)]


def context_length_of(info: ServerInfo, model: str | None) -> int | None:
    """Returns the context length of a model; None if it is unknown.

    If no name is given, or the server does not list the model, the result is the context length of the server.
    """
    named = [] if model is None else entries_named(info.models, model)
    for each in named:
        if each.context_length is not None:
            return each.context_length
    # The context length of a loaded model says nothing about a model that is not loaded yet.
    return None if any(each.loaded is False for each in named) else info.context_length


def awaits_load(info: ServerInfo, model: str | None) -> bool:
    """Returns whether a model is not loaded, so that the server may know more about it after its first reply."""
    return any(each.loaded is False for each in _relevant_models(info.models, model))


def _relevant_models(models: Sequence[ModelInfo], model: str | None) -> Iterator[ModelInfo]:
    """Yields the client's own model, or every model if the client has none or the server does not list it.

    Models that make embeddings are left out.
    """
    own = [] if model is None else entries_named(models, model)
    return (each for each in own or models if not each.embeds)


def _has_name(model_id: str, model: str) -> bool:
    return is_same_model(model, model_id) or model_id == _with_tag(model)


def _with_tag(name: str) -> str:
    """Returns the name of an Ollama model with its tag, which may be left out if it is "latest"."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _as_mapping(value: object) -> _Entry:
    return value if isinstance(value, Mapping) else {}


def _string_or_none(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _as_flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _as_count(value: object) -> int | None:
    return value if is_integer(value) and value > 0 else None
