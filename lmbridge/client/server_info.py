"""Which server it is, and what it can do at a time.

Every server answers `GET /v1/models`, and what it puts there as the owner says which one it probably is; what it then
answers on a path of its own says the rest. Bodies decide, never statuses: LM Studio answers 200 to any path.

- LM Studio: `owned_by` is "organization_owner" (reference of its REST API); then see `lmstudio.find`.
- llama.cpp: "llamacpp"; `/props` has `total_slots`, the context of a slot and `build_info`. A router lists a `status`
  for each model; its `/props` has `max_instances`, and with `?model=` is that of the model (recorded from both; "Using
  multiple models" in llama.cpp's tools/server/README.md).
- Ollama: the namespace of the model, mostly "library"; `/api/version`, and `/api/ps` with what is loaded
  (https://docs.ollama.com/api).
- vLLM: "vllm", with `max_model_len` (vllm/entrypoints/openai/serving_models.py); `/version`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import quote

import attrs

from lmbridge._checks import is_integer
from lmbridge.client.lmstudio import find
from lmbridge.client.names import is_same_model
from lmbridge.client.server import Server
from lmbridge.errors import LLMError
from lmbridge.types import LMStudioModel

logger = logging.getLogger("lmbridge.client")

Kind = Literal["lmstudio", "llama.cpp", "ollama", "vllm", "unknown"]
_Entry: TypeAlias = Mapping[str, Any]


@attrs.frozen(kw_only=True)
class ModelInfo:
    """A model, as far as its server tells; what it does not tell is None."""

    id: str
    """Its name; of what LM Studio has loaded, the name of the instance."""
    loaded: bool | None = None
    context_length: int | None = None
    """Tokens that a request to it, as it is loaded, may need, the answer included."""
    slots: int | None = None
    """Requests that it works on at a time; further ones wait in the server."""
    embeds: bool = False
    """Whether it makes embeddings, and no text."""


@attrs.frozen(kw_only=True)
class ServerInfo:
    """A server, as far as it tells; what it does not tell is None."""

    kind: Kind
    version: str | None = None
    """LM Studio tells none."""
    models: tuple[ModelInfo, ...] = ()
    """Those that it has, of LM Studio an entry for each loaded instance of a model."""
    context_length: int | None = None
    """Of the client's own model if it is loaded, else the smallest of the loaded ones."""
    slots: int | None = None
    """As `context_length`."""
    max_loaded_models: int | None = None
    """Models that may be loaded at a time, of a llama.cpp router."""

    @property
    def loaded_models(self) -> tuple[str, ...] | None:
        """The ids of those that are loaded."""
        if any(each.loaded is None for each in self.models):
            return None
        return tuple(each.id for each in self.models if each.loaded)


async def describe(server: Server, model: str | None) -> ServerInfo:
    """What the server is and can do, for a client whose own model is `model`."""
    entries = await _list(server)
    owner = entries[0].get("owned_by") if entries else None
    for probe in _PROBES.get(owner, _OTHERS) if isinstance(owner, str) else _OTHERS:
        if (info := await probe(server, entries)) is not None:
            break
    else:
        info = ServerInfo(kind="unknown", models=_as_listed(entries))
    meant = list(_meant(info.models, model))
    return attrs.evolve(
        info,
        context_length=_smallest(each.context_length for each in meant),
        slots=_smallest(each.slots for each in meant),
    )


async def _list(server: Server) -> list[_Entry]:
    reply = await server.request(server.get("server info", "/models"))
    value = server.value(reply)
    entries = value.get("data")
    if entries is None and "data" in value:
        return []  # an Ollama without models
    if not isinstance(entries, list) or not all(isinstance(_of(entry).get("id"), str) for entry in entries):
        raise server.is_not(reply, "a list of models")
    return entries


async def _tells(server: Server, path: str) -> _Entry:
    """What the server tells on a path of its own; nothing if it does not know it, or keeps it to itself."""
    reply = await server.request(server.get("server info", path, below_root=True))
    try:
        return server.value(reply)
    except LLMError as error:
        logger.debug("not told: %s", error)
        return {}


# One function a server: what it is, or None if it is another


async def _lmstudio(server: Server, entries: Sequence[_Entry]) -> ServerInfo | None:
    found = await find(server)
    if not found.is_lmstudio:
        return None
    models = _as_listed(entries) if found.models is None else tuple(_instances(found.models))
    return ServerInfo(kind="lmstudio", models=models)


def _instances(models: Iterable[LMStudioModel]) -> Iterator[ModelInfo]:
    for model in models:
        embeds = model.get("type") == "embedding"
        if not model["loaded_instances"]:
            yield ModelInfo(id=model["key"], loaded=False, embeds=embeds)
        for instance in model["loaded_instances"]:
            config = _of(_of(instance).get("config"))
            yield ModelInfo(
                id=_text(_of(instance).get("id")) or model["key"],
                loaded=True,
                context_length=_count(config.get("context_length")),
                slots=_count(config.get("parallel")),
                embeds=embeds,
            )


async def _llama_cpp(server: Server, entries: Sequence[_Entry]) -> ServerInfo:
    props = await _tells(server, "/props")
    if any("status" in entry for entry in entries):  # a router
        models = [await _routed(server, entry) for entry in entries]
    else:
        models = [_llama_model(entry, props) for entry in entries]
    version = props.get("build_info")
    return ServerInfo(
        kind="llama.cpp",
        version=None if version == _NO_BUILD else _text(version),
        models=tuple(models),
        max_loaded_models=_count(props.get("max_instances")),
    )


async def _routed(server: Server, entry: _Entry) -> ModelInfo:
    if _of(entry.get("status")).get("value") not in _RESIDENT:
        return ModelInfo(id=entry["id"], loaded=False)
    name = quote(entry["id"], safe="", errors="replace")  # JSON can name half a surrogate pair
    # It may have been unloaded meanwhile: it is not to be loaded again for this.
    props = await _tells(server, f"/props?model={name}&autoload=false")
    return _llama_model(entry, props)


def _llama_model(entry: _Entry, props: _Entry) -> ModelInfo:
    context = _count(_of(props.get("default_generation_settings")).get("n_ctx"))
    return ModelInfo(
        id=entry["id"],
        loaded=True,
        context_length=context or _context_listed(entry),
        slots=_count(props.get("total_slots")),
    )


async def _ollama(server: Server, entries: Sequence[_Entry]) -> ServerInfo | None:
    version = _text((await _tells(server, "/api/version")).get("version"))
    if version is None:
        return None
    running = (await _tells(server, "/api/ps")).get("models")
    if not isinstance(running, list):
        return ServerInfo(kind="ollama", version=version, models=_as_listed(entries))
    loaded = {_tagged(each["name"]): each for each in running if _text(_of(each).get("name"))}
    names = dict.fromkeys([*(_tagged(entry["id"]) for entry in entries), *loaded])
    models = (
        ModelInfo(id=name, loaded=name in loaded, context_length=_count(loaded.get(name, {}).get("context_length")))
        for name in names
    )
    return ServerInfo(kind="ollama", version=version, models=tuple(models))


async def _vllm(server: Server, entries: Sequence[_Entry]) -> ServerInfo:
    version = _text((await _tells(server, "/version")).get("version"))
    return ServerInfo(kind="vllm", version=version, models=_as_listed(entries, loaded=True))


_Probe: TypeAlias = Callable[[Server, Sequence[_Entry]], Awaitable[ServerInfo | None]]
_PROBES: Final[Mapping[str, Sequence[_Probe]]] = {
    "llamacpp": (_llama_cpp,),
    "vllm": (_vllm,),
    "library": (_ollama, _lmstudio),
}
_OTHERS: Final[Sequence[_Probe]] = (_lmstudio, _ollama)

_NO_BUILD: Final = "b0-unknown"
"""What llama.cpp says if it was built outside of its repository."""
_RESIDENT: Final = ("loaded", "sleeping")


# Reading


def _as_listed(entries: Iterable[_Entry], *, loaded: bool | None = None) -> tuple[ModelInfo, ...]:
    return tuple(ModelInfo(id=each["id"], loaded=loaded, context_length=_context_listed(each)) for each in entries)


def _context_listed(entry: _Entry) -> int | None:
    """The context in an entry of `/v1/models`: vLLM's field, which others took over, or llama.cpp's."""
    return _count(entry.get("max_model_len")) or _count(_of(entry.get("meta")).get("n_ctx"))


def _meant(models: Sequence[ModelInfo], model: str | None) -> Iterator[ModelInfo]:
    """The client's own model, loaded or not; all of them if it has none, or one that is not listed."""
    own = [each for each in models if model is not None and _is_called(each.id, model)]
    return (each for each in own or models if not each.embeds)


def _is_called(name: str, model: str) -> bool:
    return is_same_model(model, name) or name == _tagged(model)


def _smallest(values: Iterable[int | None]) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _tagged(name: str) -> str:
    """An Ollama model's name with its tag, which may be left out where it is "latest"."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _of(value: object) -> _Entry:
    return value if isinstance(value, Mapping) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _count(value: object) -> int | None:
    return value if is_integer(value) and value > 0 else None
