"""How the models of each kind of server are loaded, unloaded and downloaded; `client_models` uses this module.

- LM Studio: its REST API; see `lmstudio`.
- llama.cpp's router: `POST /models/load`, `/models/unload` and `/models` (download), which return at once. `GET
  /models` reports the state of each model, and `GET /models/sse` the progress of a load (section "Using multiple
  models" of tools/server/README.md, and recorded from the router of llama-server b10434).
- Ollama: `POST /api/generate` without a prompt loads a model, and with `keep_alive: 0` unloads it
  (https://docs.ollama.com/api/generate).

A llama.cpp or vLLM server with a single model can only list it. Whether a model has been loaded, unloaded or downloaded
is decided by the list of models and never by an event, because events may be missed, and older routers name them
differently.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from math import inf
from typing import Any, Final, Literal, TypeAlias

import attrs

from lmbridge._checks import is_integer
from lmbridge._tasks import end_task
from lmbridge.client.api_requests import ServerApi
from lmbridge.client.json_codec import decode_json
from lmbridge.client.lmstudio import POLL_SECONDS, LMStudio
from lmbridge.client.model_lists import entries_of
from lmbridge.client.server_info import ServerInfo, entries_named
from lmbridge.client.server_progress import ModelLoading, progress_of
from lmbridge.errors import (
    LLMError,
    LLMResponseError,
    LLMTimeoutError,
    ModelLoadError,
    ModelNotFoundError,
    TaskCancelledError,
)
from lmbridge.transport import Event

logger: logging.Logger = logging.getLogger("lmbridge.client")

LoadProgress: TypeAlias = Callable[[float | None], object]
"""A function that is called while a model is being loaded, with the fraction that has been loaded, from 0 to 1, or None
if it is not known."""
Capability = Literal["list", "load", "unload", "download", "load progress"]
"""Something that a server can do with its models."""

_LOAD_POLL_SECONDS: Final = 0.2
_BEGIN_SECONDS: Final = 10.0
"""The seconds within which a router has to begin a load that it has accepted."""


@attrs.frozen(kw_only=True)
class DownloadProgress:
    """The progress of a download."""

    status: Literal["downloading", "paused", "completed"]
    """What the server is doing. "completed" is the last status, and the only one if the model was downloaded before."""
    downloaded_bytes: int | None = None
    """The number of bytes that have arrived, if the server reports it."""
    total_bytes: int | None = None
    """The size of the download in bytes, if the server reports it."""


def manager_of(server: ServerApi, info: ServerInfo) -> ModelManager:
    """Returns the manager for the models of a server, by its kind."""
    if info.kind == "lmstudio":
        return _LMStudioManager(server, info)
    if info.kind == "ollama":
        return _OllamaManager(server, info)
    if info.kind == "llama.cpp" and info.is_router:
        return _RouterManager(server, info)
    return ModelManager(server, info)


class ModelManager:
    """Manages the models of a server. This class is for a server that can only list them; a subclass can do more."""

    capabilities: frozenset[Capability] = frozenset({"list"})
    """What this kind of server can do with its models."""

    def __init__(self, server: ServerApi, info: ServerInfo) -> None:
        self._server = server
        self._info = info

    def check(self, capability: Capability) -> None:
        """Checks that the server has a capability.

        Raises:
            LLMResponseError: The server does not have the capability.
        """
        if capability not in self.capabilities:
            kind = "this server" if self._info.kind == "unknown" else f"this {self._info.kind} server"
            raise LLMResponseError(
                f"{kind} cannot {capability} models",
                hint=_HINTS.get(self._info.kind, "start the server with the model"),
                context={"operation": f"model {capability}", "url": self._server.transport.api_base},
            )

    async def load(self, model: str, body: Mapping[str, Any], progress: LoadProgress | None) -> str:
        """Loads a model, and returns the name to ask for. The caller limits the time.

        Args:
            model: The name of the model.
            body: Options of the server, which are sent unchanged.
            progress: Called with the fraction that has been loaded, if the server reports it.
        """
        raise NotImplementedError

    async def unload(self, model: str, body: Mapping[str, Any]) -> None:
        """Unloads a model."""
        raise NotImplementedError

    def download(self, model: str, body: Mapping[str, Any]) -> AsyncGenerator[DownloadProgress, None]:
        """Downloads a model, and yields the progress."""
        raise NotImplementedError

    def _check_known(self, model: str) -> None:
        """Checks that the server has a model.

        Raises:
            ModelNotFoundError: The server does not have the model.
        """
        if not entries_named(self._info.models, model):
            raise ModelNotFoundError(model, [each.id for each in self._info.models])

    async def _post(self, operation: str, path: str, body: Mapping[str, Any], model: str) -> None:
        request = self._server.build_post(operation, path, body, model, below_root=True, queued=False, repeatable=False)
        if operation == "model load":
            # Ollama answers only when the model is loaded, and the caller limits the time until then.
            request.timeouts = attrs.evolve(request.timeouts, first_byte=None)
        await self._server.read_object(await self._server.request(request))


_HINTS: Final[Mapping[str, str]] = {
    "llama.cpp": "start llama-server as a router, without -m, to load models by name",
    "ollama": "run `ollama pull` on the machine of the server",
    "vllm": "start vLLM with the model",
}


class _LMStudioManager(ModelManager):
    capabilities = frozenset({"list", "load", "unload", "download"})

    async def load(self, model: str, body: Mapping[str, Any], progress: LoadProgress | None) -> str:  # noqa: ARG002 - LM Studio and Ollama report none
        return (await LMStudio(self._server).load(model, **body))["instance_id"]

    async def unload(self, model: str, body: Mapping[str, Any]) -> None:
        api = LMStudio(self._server)
        models = await api.models()
        instances = [
            (each["key"], instance.get("id", each["key"])) for each in models for instance in each["loaded_instances"]
        ]
        if model not in {*(each["key"] for each in models), *(name for _, name in instances)}:
            raise ModelNotFoundError(model, [each["key"] for each in models])
        for key, instance in instances:
            if model in (key, instance):
                await api.unload(instance, extra_body=body or None)

    async def download(self, model: str, body: Mapping[str, Any]) -> AsyncGenerator[DownloadProgress, None]:
        async for each in LMStudio(self._server).download(model, **body):
            status = each["status"]
            yield DownloadProgress(
                status=status if status in ("downloading", "paused") else "completed",  # type: ignore[arg-type]  # one of the two
                downloaded_bytes=each.get("downloaded_bytes"),
                total_bytes=each.get("total_size_bytes"),
            )


class _OllamaManager(ModelManager):
    capabilities = frozenset({"list", "load", "unload"})

    async def load(self, model: str, body: Mapping[str, Any], progress: LoadProgress | None) -> str:  # noqa: ARG002 - LM Studio and Ollama report none
        self._check_known(model)
        await self._post("model load", "/api/generate", {"stream": False, **body, "model": model}, model)
        return model

    async def unload(self, model: str, body: Mapping[str, Any]) -> None:
        self._check_known(model)
        fields = {"stream": False, **body, "model": model, "keep_alive": 0}
        await self._post("model unload", "/api/generate", fields, model)


class _RouterManager(ModelManager):
    """The router of llama.cpp, whose requests return before the work is done."""

    capabilities = frozenset({"list", "load", "unload", "download", "load progress"})

    async def load(self, model: str, body: Mapping[str, Any], progress: LoadProgress | None) -> str:
        self._check_known(model)
        # The events only report the progress. If their stream ends or fails, the wait goes on.
        watching = None if progress is None else asyncio.create_task(self._report_progress(model, progress))
        try:
            await self._begin_load(model, body)
            await self._until_loaded(model)
        finally:
            if watching is not None:
                await end_task(watching)
        if watching is not None and not watching.cancelled():
            # An exception of the caller's function is raised here.
            watching.result()
        return model

    async def _begin_load(self, model: str, body: Mapping[str, Any]) -> None:
        try:
            await self._post("model load", "/models/load", {**body, "model": model}, model)
        except LLMResponseError as error:
            if "already running" not in (error.body or ""):
                raise

    async def _until_loaded(self, model: str) -> None:
        loop = asyncio.get_running_loop()
        begins_by = loop.time() + _BEGIN_SECONDS
        while True:
            status = (await self._statuses()).get(model, {})
            value = status.get("value")
            if value in ("loaded", "sleeping"):
                return
            if value == "loading":
                begins_by = loop.time()
            elif value == "downloading":
                begins_by = loop.time() + _BEGIN_SECONDS
            # A model that was loaded and evicted between two polls is never seen loading, so this wait has a limit.
            elif status.get("failed") or loop.time() >= begins_by:
                code = status.get("exit_code")
                ended = f", and its process ended with exit code {code}" if is_integer(code) else ""
                raise ModelLoadError(
                    f"the router could not load {model!r}{ended}",
                    hint="see the log of the router; the model may not fit into memory, or was unloaded again",
                    context={"operation": "model load", "model": model},
                )
            await self._pause(_LOAD_POLL_SECONDS, "loaded")

    async def _report_progress(self, model: str, progress: LoadProgress) -> None:
        last: float | None = None
        try:
            async with aclosing(loading_events(self._server)) as events:
                async for loading in events:
                    if loading.model == model and loading.fraction not in (None, last):
                        last = loading.fraction
                        progress(last)
        except LLMError as error:
            logger.debug("the progress of loading %r is unknown: %s", model, error)

    async def unload(self, model: str, body: Mapping[str, Any]) -> None:
        self._check_known(model)
        try:
            await self._post("model unload", "/models/unload", {**body, "model": model}, model)
        except LLMResponseError as error:
            if "not running" not in (error.body or ""):
                raise
            return
        limit = self._server.timeouts.first_byte
        loop = asyncio.get_running_loop()
        ends_at = inf if limit is None else loop.time() + limit
        while (await self._statuses()).get(model, {}).get("value") not in ("unloaded", None):
            # Checked between two requests, so that one which is too slow raises its own error, with what had arrived.
            if loop.time() >= ends_at:
                raise LLMTimeoutError(
                    f"model {model!r} was not unloaded within {limit:g} s",
                    phase="first_byte",
                    hint="the server goes on by itself; client.models.list() says whether the model is still loaded",
                    context={"operation": "model unload", "model": model},
                )
            await self._pause(_LOAD_POLL_SECONDS, "unloaded")

    async def download(self, model: str, body: Mapping[str, Any]) -> AsyncGenerator[DownloadProgress, None]:
        if (await self._statuses()).get(model, {}).get("value") in ("unloaded", "loaded", "sleeping", "loading"):
            yield DownloadProgress(status="completed")
            return
        await self._post("model download", "/models", {**body, "model": model}, model)
        while (status := (await self._statuses()).get(model, {})).get("value") == "downloading":
            done, total = _byte_counts(status.get("progress"))
            yield DownloadProgress(status="downloading", downloaded_bytes=done, total_bytes=total)
            await self._pause(POLL_SECONDS, "downloaded")
        if not status:
            raise LLMResponseError(
                f"the router could not download {model!r}",
                hint="see the log of the router; the name may be wrong, the disk full, or the network down",
                context={"operation": "model download", "model": model},
            )
        yield DownloadProgress(status="completed")

    async def _statuses(self) -> dict[str, Mapping[str, Any]]:
        """Returns the `status` of each model."""
        reply = await self._server.request(self._server.build_get("model list", "/models", below_root=True))
        entries = entries_of(self._server.json_object(reply), "data", {"id": str, "status": dict})
        if entries is None:
            raise self._server.unexpected_reply(reply, "the list of a router")
        return {each["id"]: each["status"] for each in entries}

    async def _pause(self, seconds: float, done: str) -> None:
        """Waits before the list of models is requested again.

        Raises:
            TaskCancelledError: The client was closed, and another request would open it again.
        """
        closing = self._server.transport.closing
        if closing is not None:
            await asyncio.wait((closing,), timeout=seconds)
        if closing is None or closing.done() or self._server.refuses_requests:
            raise TaskCancelledError(
                f"the client was closed while the model was being {done}", hint="the server goes on by itself"
            )


async def loading_events(server: ServerApi) -> AsyncGenerator[ModelLoading, None]:
    """Yields what the router reports about models that it loads, until it closes the stream.

    Raises:
        LLMError: The server has no such events, or the stream broke.
    """
    request = server.build_get("model load progress", "/models/sse", below_root=True)
    request.timeouts = attrs.evolve(request.timeouts, first_byte=None, idle=None)
    events = await server.stream(request)
    try:
        while batch := await events.read():
            for event in batch:
                loading = progress_of(_decoded(event))
                if isinstance(loading, ModelLoading):
                    yield loading
    finally:
        events.abort()


def _decoded(event: Event) -> Any:
    try:
        return decode_json(event if isinstance(event, bytes) else event.data)
    except ValueError:
        return None


def _byte_counts(progress: Any) -> tuple[int | None, int | None]:
    """Returns the bytes that have arrived and the bytes in total, of all files of a download."""
    files = [each for each in progress.values() if isinstance(each, Mapping)] if isinstance(progress, Mapping) else []
    if not files or not all(is_integer(each.get("done")) and is_integer(each.get("total")) for each in files):
        return None, None
    return sum(each["done"] for each in files), sum(each["total"] for each in files)
