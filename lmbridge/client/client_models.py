"""`client.models`: lists, loads, unloads and downloads models, on every server that can.

How each kind of server loads and unloads is in `model_backends`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Final, Unpack, cast

from lmbridge._checks import check_callable, check_text
from lmbridge._copying import NotCopyable
from lmbridge._pending_call import explains_missing_await
from lmbridge.client.api_requests import ServerApi
from lmbridge.client.call_options import (
    ManagementOptions,
    RequestOptions,
    limit_load,
    take_management_options,
    take_request_options,
)
from lmbridge.client.model_backends import Capability, DownloadProgress, LoadProgress, loading_events, manager_of
from lmbridge.client.server_info import ModelInfo, describe, entries_named
from lmbridge.client.server_progress import ModelLoading
from lmbridge.errors import LLMTimeoutError

_NAME_HINT: Final = "client.models.list() has the names"
_LOAD_HINT: Final = "the server may go on loading it; raise Timeouts.load, or look at client.models.list()"


class Models(NotCopyable):
    """The models of a server, as `client.models`.

    LM Studio, llama.cpp's router and Ollama load and unload models; the first two download them as well. `capabilities`
    says what a server can do, and the other methods raise an `LLMResponseError` that says what it cannot. The requests
    do not queue behind generations. Besides their own errors, all methods raise those of `LLMClient.chat_completion`.
    """

    _instead_of_a_copy = "use the models of each client"

    def __init__(self, server: ServerApi) -> None:
        self._server = server

    @explains_missing_await
    async def list(self, **options: Unpack[RequestOptions]) -> tuple[ModelInfo, ...]:
        """Returns the models of the server, as `LLMClient.server_info` does.

        Args:
            **options: `timeout`, `max_retries`, `extra_headers` and `extra_query` of each of the requests.
        """
        settings = take_request_options(cast("dict[str, Any]", options), "list")
        server = self._server if settings is None else self._server.for_call(settings)
        return (await describe(server, None)).models

    @explains_missing_await
    async def capabilities(self) -> frozenset[Capability]:
        """Returns what this server can do: "list", "load", "unload", "download" and "load progress"."""
        return manager_of(self._server, await describe(self._server, None)).capabilities

    @explains_missing_await
    async def load(self, model: str, *, progress: LoadProgress | None = None, **options: Any) -> ModelInfo:
        """Loads a model, and returns when it is loaded, which may take minutes; the limit is `Timeouts.load`.

        If this call has a `timeout` in seconds, that is the limit. A model that is loaded already is not loaded again,
        unless options of the server are given: then LM Studio loads another instance of it, and Ollama may load it
        again. The request is not repeated once the server may have begun to load the model.

        For example::

            await client.models.load("qwen3-4b", progress=lambda fraction: print(fraction))

        Args:
            model: The name of the model, as `list` returns it.
            progress: Called in the event loop: first with None, and then, if the server is llama.cpp's router, with the
                fraction that has been loaded, from 0 to 1. The other servers do not report it.
            **options: Options of the server, sent unchanged: for LM Studio `context_length`, `flash_attention`, ...;
                for Ollama `keep_alive` (how long the model stays loaded, such as "10m" or -1) and `options`; and
                `timeout`, `max_retries`, `extra_headers`, `extra_query` and `extra_body` of this call.

        Returns:
            The loaded model. Its `id` is the name to ask for, which on LM Studio may be that of a new instance.

        Raises:
            LLMValidationError: An argument is not valid; nothing was sent.
            ModelNotFoundError: The server does not have the model.
            ModelLoadError: The model could not be loaded.
            LLMTimeoutError: The model was not loaded in time; `phase` is "load". The server may go on loading it.
            LLMResponseError: The server cannot load models.
        """
        check_text("model", model, hint=_NAME_HINT)
        check_callable("progress", progress, optional=True, sync=True)
        limit_load(options)
        server, body = self._for_call(options)
        info = await describe(server, None)
        manager = manager_of(server, info)
        manager.check("load")
        loaded = [each for each in entries_named(info.models, model) if each.loaded]
        if loaded and not body:
            return loaded[0]
        if progress is not None:
            progress(None)
        limit = asyncio.timeout(server.timeouts.load)
        try:
            async with limit:
                name = await manager.load(model, body, progress)
        except TimeoutError as exc:
            if not limit.expired():
                # This is the timeout of a single request.
                raise
            raise LLMTimeoutError(
                f"model {model!r} was not loaded within {server.timeouts.load:g} s",
                exc,
                phase="load",
                hint=_LOAD_HINT,
                context={"operation": "model load", "model": model},
            ) from exc
        models = (await describe(server, None)).models
        return next(iter(entries_named(models, name)), ModelInfo(id=name, loaded=True))

    @explains_missing_await
    async def unload(self, model: str, **options: Unpack[ManagementOptions]) -> None:
        """Unloads a model, even if it is generating. On LM Studio, all instances of the model are unloaded.

        For a model that is not loaded, nothing happens.

        Args:
            model: The name of the model, as `list` returns it, or of an instance of LM Studio.
            **options: `timeout`, `max_retries`, `extra_headers`, `extra_query` and `extra_body` of this call.

        Raises:
            LLMValidationError: An argument is not valid; nothing was sent.
            ModelNotFoundError: The server does not have the model.
            LLMTimeoutError: The model was not unloaded within `Timeouts.first_byte`. The server may still do it.
            LLMResponseError: The server cannot unload models.
        """
        check_text("model", model, hint=_NAME_HINT)
        server, body = self._for_call(cast("dict[str, Any]", options))
        manager = manager_of(server, await describe(server, None))
        manager.check("unload")
        await manager.unload(model, body)

    async def loading(self, model: str | None = None) -> AsyncGenerator[ModelLoading, None]:
        """Yields the progress of the models that llama.cpp's router loads, even for other programs (`/models/sse`).

        The iteration goes on until you leave it, or until the router closes the stream::

            async for loading in client.models.loading():
                print(loading.model, loading.fraction)

        Args:
            model: The model to watch. Default: all models.

        Raises:
            LLMResponseError: The server has no such events.
        """
        async with aclosing(loading_events(self._server)) as events:
            async for each in events:
                if model is None or each.model == model:
                    yield each

    def download(self, model: str, **options: Any) -> AsyncGenerator[DownloadProgress, None]:
        """Downloads a model, and yields the progress about once a second.

        The server downloads on its own: leaving the iteration, or cancelling it, does not stop the download. Calling
        `download` again yields the progress of the download that is running.

        Args:
            model: The name of the model: for LM Studio one of its catalogue or a link to Hugging Face, for llama.cpp's
                router `user/model:quantization`.
            **options: Options of the server, sent unchanged; and `timeout`, `max_retries`, `extra_headers`,
                `extra_query` and `extra_body` of these requests.

        Raises:
            LLMValidationError: An argument is not valid; nothing was sent. The call raises this; the iteration raises
                all other errors.
            LLMResponseError: The download failed, or the server cannot download models.
            TaskCancelledError: The client was closed in the meantime.
        """
        check_text("model", model, hint=_NAME_HINT)
        server, body = self._for_call(options)
        return _download(server, model, body)

    def _for_call(self, options: dict[str, Any]) -> tuple[ServerApi, dict[str, Any]]:
        """Returns the server with the options of a call, and the fields of its body."""
        settings = take_management_options(options)
        if settings is None:
            return self._server, dict(options)
        return self._server.for_call(settings), {**options, **(settings.body or {})}


async def _download(server: ServerApi, model: str, body: Mapping[str, Any]) -> AsyncGenerator[DownloadProgress, None]:
    manager = manager_of(server, await describe(server, None))
    manager.check("download")
    async for progress in manager.download(model, body):
        yield progress
