"""LM Studio's own API, outside of `/v1`, which lists, loads, unloads and downloads models.

Shapes and versions are those of LM Studio's REST documentation (https://lmstudio.ai/docs/developer/rest): `/api/v1`
came with 0.4.0, `/api/v0` with 0.3.6. LM Studio answers 200 to a path that it does not know
(lmstudio-bug-tracker#618). So the bodies of replies, not their statuses, decide whether a server is LM Studio and
whether it is too old.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final, Unpack, cast, overload
from urllib.parse import quote

import attrs

from lmbridge._checks import check_text
from lmbridge._copying import NotCopyable
from lmbridge._pending_call import explains_missing_await
from lmbridge._text import excerpt
from lmbridge.client.api_requests import ServerApi, is_damaged
from lmbridge.client.call_options import (
    ManagementOptions,
    RequestOptions,
    limit_load,
    take_management_options,
    take_request_options,
)
from lmbridge.client.error_body import parse_error_body
from lmbridge.client.failures import UNKNOWN_PATH_OF_LM_STUDIO
from lmbridge.client.model_lists import add_available_models, entries_of
from lmbridge.errors import LLMError, LLMResponseError, LLMTimeoutError, ModelNotFoundError, TaskCancelledError
from lmbridge.transport import Reply
from lmbridge.types import DownloadStatus, LMStudioLoad, LMStudioModel, LMStudioUnload

POLL_SECONDS: Final = 1.0
"""The seconds between two requests for the progress of a download."""

_V1_MODELS: Final = "/api/v1/models"
_V0_MODELS: Final = "/api/v0/models"
# Loading, unloading and downloading change the server, so they are not repeated once the server may have begun.
_CHANGE_OPTIONS: Final[Mapping[str, Any]] = {"below_root": True, "queued": False, "repeatable": False}
_FINAL_STATUSES: Final = ("completed", "already_downloaded")
_NAME_HINT: Final = "for example 'qwen/qwen3-4b-2507'"
_UPDATE_HINT: Final = "update LM Studio to 0.4.0 or newer"
_OTHER_SERVER_HINT: Final = "client.lmstudio needs LM Studio; check api_base, or use the API of that other server"
_LOAD_HINT: Final = "LM Studio may go on loading it; raise Timeouts.load, or check lmstudio.models()"
_DOWNLOAD_HINT: Final = "see LM Studio's own log; the disk may be full, or the network down"


class LMStudio(NotCopyable):
    """LM Studio's own API, as `client.lmstudio`.

    All methods take `timeout`, `max_retries`, `extra_headers` and `extra_query` as options of the call, and those whose
    request has a body also take `extra_body`. The requests do not queue behind generations. Besides their own errors,
    all methods raise those of `LLMClient.chat_completion`. If the server is not LM Studio, or is a version of it that
    is too old, they raise an `LLMResponseError` whose text says which of the two it is.
    """

    _instead_of_a_copy = "use the lmstudio of each client"

    def __init__(self, server: ServerApi) -> None:
        self._server = server

    @explains_missing_await
    async def models(self, **options: Unpack[RequestOptions]) -> list[LMStudioModel]:
        """Returns the downloaded models with their loaded instances (`GET /api/v1/models`).

        Args:
            **options: `timeout`, `max_retries`, `extra_headers` and `extra_query` of this call. Without a `timeout`, an
                attempt may take 10 s.

        Returns:
            Dicts as the server sent them. The older list of an LM Studio before 0.4.0 (`GET /api/v0/models`) is put
            into the same fields; the fields that it does not have are left out: `parallel`, sizes, display names.

        Raises:
            LLMResponseError: The server is not LM Studio.
        """
        settings = take_request_options(cast("dict[str, Any]", options), "models")
        if settings is not None:
            return await LMStudio(self._server.for_call(settings)).models()
        found = await find_lmstudio(self._server)
        if found.models is not None:
            return found.models
        # This raises the error in the reply, unless the error may only mean that the server is not LM Studio.
        self._ambiguous_error(found.reply)
        raise self._unsupported_error(found)

    @overload
    async def load(
        self,
        model: str,
        *,
        context_length: int = ...,
        flash_attention: bool = ...,
        eval_batch_size: int = ...,
        num_experts: int = ...,
        offload_kv_cache_to_gpu: bool = ...,
        echo_load_config: bool = ...,
        **options: Unpack[ManagementOptions],
    ) -> LMStudioLoad: ...

    @overload
    async def load(self, model: str, **config: Any) -> LMStudioLoad: ...

    @explains_missing_await
    async def load(self, model: str, **config: Any) -> LMStudioLoad:
        """Loads a model (`POST /api/v1/models/load`), which may take minutes; the limit is `Timeouts.load`.

        If this call has a `timeout` in seconds, that is the limit. A model that is already loaded is loaded a second
        time. The request is sent again only if the server cannot have begun to work on it.

        Args:
            model: The `key` of a downloaded model.
            **config: Options of LM Studio, sent unchanged: `context_length`, `flash_attention`, `eval_batch_size`,
                `num_experts`, `offload_kv_cache_to_gpu`, `echo_load_config` (returns the whole configuration), ...; and
                `timeout`, `max_retries`, `extra_headers`, `extra_query` and `extra_body` of this call.

        Returns:
            The server's dict. Its `instance_id` is the name to ask for and to unload; `load_time_seconds` is the time
            that loading took.

        Raises:
            LLMValidationError: An argument is not valid; nothing was sent.
            ModelNotFoundError: The model is not downloaded.
            ModelLoadError: The model does not fit into memory, or crashed.
            LLMTimeoutError: The model was not loaded in time; `phase` is "load". LM Studio may go on loading it.
        """
        check_text("model", model, hint=_NAME_HINT)
        limit_load(config)
        api, body = self._for_call({"model": model}, config)
        try:
            value = await api._post("model load", "load", body, "instance_id", model)  # noqa: SLF001 - same class
        except LLMTimeoutError as error:
            if error.phase != "first_byte":
                raise
            raise LLMTimeoutError(
                error.message,
                error,
                phase="load",
                hint=_LOAD_HINT,
                context=error.context,
                status=error.status,
                body=error.body,
            ) from error
        return cast("LMStudioLoad", value)

    @explains_missing_await
    async def unload(self, instance_id: str, **options: Unpack[ManagementOptions]) -> LMStudioUnload:
        """Unloads an instance of a model at once, even if it is generating (`POST /api/v1/models/unload`).

        Args:
            instance_id: The `id` of one of the `loaded_instances`, or the `instance_id` that `load` returned.
            **options: `timeout`, `max_retries`, `extra_headers`, `extra_query` and `extra_body` of this call.

        Raises:
            LLMValidationError: An argument is not valid; nothing was sent.
            LLMResponseError: No such instance exists.
        """
        check_text("instance_id", instance_id, hint=_NAME_HINT)
        given = cast("dict[str, Any]", options)
        api, body = self._for_call({"instance_id": instance_id}, given)
        if given:
            raise TypeError(f"unload() got an unexpected keyword argument {next(iter(given))!r}")
        value = await api._post("model unload", "unload", body, "instance_id", instance_id)  # noqa: SLF001 - same class
        return cast("LMStudioUnload", value)

    def download(self, model: str, **options: Any) -> AsyncGenerator[DownloadStatus, None]:
        """Downloads a model and yields its progress (`POST /api/v1/models/download`).

        LM Studio downloads on its own: leaving the iteration, or cancelling it, does not stop the download. Calling
        `download` again for the same model yields the progress of the download that is running.

        Args:
            model: A name in LM Studio's catalogue, or a link to a repository on Hugging Face.
            **options: Options of LM Studio, sent unchanged: `quantization` (only with a link); and `timeout`,
                `max_retries`, `extra_headers`, `extra_query` and `extra_body` of these requests.

        Yields:
            The server's dicts, about one a second: `status`, `downloaded_bytes`, `total_size_bytes`,
            `bytes_per_second`, ... The status is "downloading", or "paused" while the download is paused in LM Studio;
            that of the last dict is "completed" or "already_downloaded".

        Raises:
            LLMValidationError: An argument is not valid; nothing was sent. The call raises this; the iteration raises
                all other errors.
            LLMResponseError: The download failed; `partial` is the last status.
            TaskCancelledError: The client was closed or given back to its pool, or its `api_base` was set. LM Studio
                goes on with the download.
        """
        check_text("model", model, hint=_NAME_HINT)
        api, body = self._for_call({"model": model}, options)
        return api._download(body)  # noqa: SLF001 - same class

    def _for_call(self, body: dict[str, Any], given: dict[str, Any]) -> tuple[LMStudio, dict[str, Any]]:
        """Returns this API with the options of a call, and the body of its request.

        Args:
            body: The fields that the method itself has as arguments.
            given: The other arguments of the call, from which the options of lmbridge are removed.
        """
        settings = take_management_options(given)
        body = {**body, **given}
        if settings is None:
            return self, body
        return LMStudio(self._server.for_call(settings)), {**body, **(settings.body or {})}

    async def _download(self, body: Mapping[str, Any]) -> AsyncGenerator[DownloadStatus, None]:
        server, transport, model = self._server, self._server.transport, body["model"]
        request = server.build_post("model download", f"{_V1_MODELS}/download", body, model, **_CHANGE_OPTIONS)
        reply = await server.request(request)
        closing = transport.closing
        value = await self._checked_object(reply, "status")
        while value["status"] not in _FINAL_STATUSES:
            job = value.get("job_id")
            if value["status"] == "failed":
                raise self._failed_download(model, reply, value)
            if not isinstance(job, str):
                raise server.unexpected_reply(reply, "the status of a download")
            yield cast("DownloadStatus", value)
            if closing is not None:
                await asyncio.wait((closing,), timeout=POLL_SECONDS)
            if server.transport is not transport:
                raise _interrupted_download("api_base was set", reply, value)
            if server.refuses_requests:
                raise _interrupted_download("the client was given back to its pool", reply, value)
            # Another request would open a closed client again.
            if closing is None or closing.done():
                raise _interrupted_download("the client was closed", reply, value)
            path = f"{_V1_MODELS}/download/status/{quote(job, safe='', errors='replace')}"
            reply = await server.request(server.build_get("model download", path, below_root=True, model=model))
            value = await self._checked_object(reply, "status")
        yield cast("DownloadStatus", value)

    async def _post(self, operation: str, verb: str, body: Mapping[str, Any], field: str, name: str) -> dict[str, Any]:
        """Sends a request, and returns the reply.

        Args:
            operation: A name for the request in errors and logs.
            verb: The end of the path.
            body: The body of the request.
            field: A field that the reply must have.
            name: The model, for errors and logs.
        """
        request = self._server.build_post(operation, f"{_V1_MODELS}/{verb}", body, name, **_CHANGE_OPTIONS)
        if verb == "load":
            # The limit of a plain reply is `first_byte`, which covers the whole of it.
            request.timeouts = attrs.evolve(request.timeouts, first_byte=request.timeouts.load)
        return await self._checked_object(await self._server.request(request), field)

    async def _checked_object(self, reply: Reply, field: str) -> dict[str, Any]:
        """Returns the JSON object in a reply, which must have a certain field of type string.

        Raises:
            LLMError: The reply is an error, or the server is not LM Studio. One more request finds out which of the two
                it is.
        """
        try:
            error = self._ambiguous_error(reply)
        except ModelNotFoundError as not_found:
            await add_available_models(self._server, not_found, _downloaded_models)
            raise
        if error is None:
            value = self._server.json_object(reply)
            if isinstance(value.get(field), str):
                return value
            error = self._server.unexpected_reply(reply, f"a reply of LM Studio (it has no {field!r})")
        found = await find_lmstudio(self._server)
        if found.has_v1:
            raise error
        raise self._unsupported_error(attrs.evolve(found, reply=reply)) from error

    def _ambiguous_error(self, reply: Reply) -> LLMError | None:
        """Returns or raises the error that a reply reports.

        Returns:
            An error that could mean that the server is not LM Studio, or None if the reply reports no error.

        Raises:
            LLMError: An error that has another cause, as its class or its status (500 or more) shows.
        """
        try:
            self._server.json_object(reply)
        except LLMError as error:
            if type(error) is not LLMResponseError or reply.status >= 500:
                raise
            return error
        return None

    def _unsupported_error(self, found: FoundLMStudio) -> LLMResponseError:
        reply = found.reply
        body = self._server.body_text(reply)
        if found.is_lmstudio:
            message, hint = "this LM Studio is too old: it does not have this part of its API yet", _UPDATE_HINT
        else:
            server_name = reply.headers.get("Server")
            calls_itself = f" (it calls itself {server_name!r})" if server_name else ""
            answer = f"it answered {reply.status} with {excerpt(body)!r}"
            message, hint = f"this server{calls_itself} is not LM Studio: {answer}", _OTHER_SERVER_HINT
        return LLMResponseError(message, hint=hint, status=reply.status, body=body, context=reply.call.context())

    def _failed_download(self, model: str, reply: Reply, value: Mapping[str, Any]) -> LLMResponseError:
        return LLMResponseError(
            f"LM Studio could not download {model!r}",
            hint=_DOWNLOAD_HINT,
            status=reply.status,
            body=self._server.body_text(reply),
            context=reply.call.context(),
            partial=value,
        )


@attrs.frozen(kw_only=True)
class FoundLMStudio:
    """The result of asking a server for LM Studio's list of models."""

    reply: Reply
    """The last reply of the server, for errors."""
    is_lmstudio: bool
    """Whether the server is LM Studio, of any version."""
    has_v1: bool = False
    """Whether it has `/api/v1`, which came with LM Studio 0.4.0."""
    models: list[LMStudioModel] | None = None
    """The models, or None if the server is not LM Studio or does not list them."""


async def find_lmstudio(server: ServerApi) -> FoundLMStudio:
    """Asks a server for LM Studio's list of models: one request, or two for an LM Studio before 0.4.0.

    Raises:
        LLMError: The server did not answer, or its answer was damaged on the way.
    """
    reply = await server.request(server.build_get("model list", _V1_MODELS, below_root=True))
    models = _listed_models(server, reply, "models", {"key": str, "loaded_instances": list})
    if models is not None:
        return FoundLMStudio(reply=reply, is_lmstudio=True, has_v1=True, models=cast("list[LMStudioModel]", models))
    if not _is_unknown_path(reply):
        return FoundLMStudio(reply=reply, is_lmstudio=False)
    reply = await server.request(server.build_get("model list", _V0_MODELS, below_root=True))
    models = _listed_models(server, reply, "data", {"id": str, "state": str})
    converted = None if models is None else [_from_v0(entry) for entry in models]
    return FoundLMStudio(reply=reply, is_lmstudio=True, models=converted)


async def _downloaded_models(server: ServerApi) -> list[str]:
    return [model["key"] for model in (await find_lmstudio(server)).models or ()]


def _listed_models(
    server: ServerApi, reply: Reply, field: str, shape: Mapping[str, type]
) -> list[dict[str, Any]] | None:
    try:
        return entries_of(server.json_object(reply), field, shape)
    except LLMError:
        if is_damaged(reply):
            raise
        # The caller has the reply, and raises an error about it if this is not LM Studio.
        return None


def _is_unknown_path(reply: Reply) -> bool:
    """Returns whether a reply is LM Studio's answer to an unknown path. No other server uses these words."""
    error_body = parse_error_body(reply.body)
    return not error_body.is_text and UNKNOWN_PATH_OF_LM_STUDIO in error_body.message.lower()


def _interrupted_download(reason: str, reply: Reply, value: Mapping[str, Any]) -> TaskCancelledError:
    return TaskCancelledError(
        f"{reason} while the model was being downloaded",
        hint="LM Studio goes on with the download; call download() again to see its progress",
        context=reply.call.context(),
        partial=value,
    )


def _from_v0(entry: Mapping[str, Any]) -> LMStudioModel:
    """Returns an entry of `/api/v0/models` in the fields of `/api/v1/models`."""
    kind = entry.get("type")
    config = {"context_length": entry["loaded_context_length"]} if "loaded_context_length" in entry else {}
    model: dict[str, Any] = {
        "type": "embedding" if kind == "embeddings" else "llm",
        "key": entry["id"],
        "loaded_instances": [{"id": entry["id"], "config": config}] if entry["state"] == "loaded" else [],
    }
    if kind != "embeddings":
        capabilities: dict[str, Any] = {"vision": kind == "vlm"}
        if isinstance(entry.get("capabilities"), list):
            capabilities["trained_for_tool_use"] = "tool_use" in entry["capabilities"]
        model["capabilities"] = capabilities
    if "quantization" in entry:
        model["quantization"] = {"name": entry["quantization"]}
    renamed = {"arch": "architecture", "compatibility_type": "format"}
    for name in ("publisher", "arch", "compatibility_type", "max_context_length"):
        if name in entry:
            model[renamed.get(name, name)] = entry[name]
    return cast("LMStudioModel", model)
