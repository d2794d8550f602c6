"""LM Studio's own API, beside `/v1`: which models are loaded and how; load, unload and download them.

Shapes and versions are those of LM Studio's REST documentation (https://lmstudio.ai/docs/developer/rest): `/api/v1`
came with 0.4.0, `/api/v0` with 0.3.6. It answers 200 to a path that it does not know (lmstudio-bug-tracker#618), so
which server it is, and whether it is too old, is decided by bodies.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final, cast
from urllib.parse import quote

import attrs

from lmbridge._checks import check_text
from lmbridge._text import excerpt
from lmbridge.client import failures
from lmbridge.client.server import Server
from lmbridge.errors import LLMError, LLMResponseError, LLMTimeoutError, TaskCancelledError
from lmbridge.transport import Reply
from lmbridge.types import DownloadStatus, LMStudioLoad, LMStudioModel, LMStudioUnload

POLL: Final = 1.0
"""Seconds between two questions about a download."""

_V1: Final = "/api/v1/models"
_V0: Final = "/api/v0/models"
_ONCE: Final[Mapping[str, Any]] = {"below_root": True, "queued": False, "repeatable": False}
_UNEXPECTED: Final = "unexpected endpoint or method"
_ENDED: Final = ("completed", "already_downloaded")
_UPDATE_HINT: Final = "update LM Studio to 0.4.0 or newer"
_NOT_HINT: Final = "client.lmstudio needs LM Studio; check api_base, or use that server's own means"
_LOAD_HINT: Final = "LM Studio may go on loading it; raise Timeouts.load, or ask lmstudio.models() what is loaded"
_NAME_HINT: Final = "for example 'qwen/qwen3-4b-2507'"
_FAILED_HINT: Final = "see LM Studio's own log; the disk may be full, or the network down"


class LMStudio:
    """LM Studio's own API, as `client.lmstudio`.

    Every method raises as `chat_completion` does, and an `LLMResponseError` that says so if the server is not LM
    Studio, or is too old. None of them queues behind generations.
    """

    def __init__(self, server: Server) -> None:
        self._server = server

    async def models(self) -> list[LMStudioModel]:
        """The downloaded models, with their loaded instances (`GET /api/v1/models`).

        Returns:
            Dicts as the server sent them. What an LM Studio before 0.4.0 tells (`GET /api/v0/models`) is put into the
            same fields, with those left out that it does not tell: `parallel`, sizes, names for people.

        Raises:
            LLMResponseError: it is not LM Studio.
        """
        found = await find(self._server)
        if found.models is not None:
            return found.models
        self._refusal(found.reply)
        raise self._not_offered(found)

    async def load(self, model: str, **config: Any) -> LMStudioLoad:
        """Loads a model, which may take minutes (`POST /api/v1/models/load`): `Timeouts.load` is its limit.

        A model that is loaded already is loaded a second time. It is sent again only if the server refused it before
        any work.

        Args:
            model: The `key` of a downloaded model.
            **config: Sent as it is: `context_length`, `flash_attention`, `eval_batch_size`, `num_experts`,
                `offload_kv_cache_to_gpu`, `echo_load_config` (to be told the whole configuration), ...

        Returns:
            The server's dict: `instance_id`, by which to ask for it and to unload it, and `load_time_seconds`.

        Raises:
            LLMValidationError: an argument cannot be right; nothing was sent.
            ModelNotFoundError: it is not downloaded.
            ModelLoadError: it does not fit into memory, or crashed.
            LLMTimeoutError: phase "load"; LM Studio may go on loading it.
        """
        body = {"model": check_text("model", model, hint=_NAME_HINT), **config}
        try:
            value = await self._post("model load", "load", body, "instance_id", model)
        except LLMTimeoutError as error:
            if error.phase == "first_byte":
                error.phase, error.hint = "load", _LOAD_HINT
            raise
        return cast("LMStudioLoad", value)

    async def unload(self, instance_id: str) -> LMStudioUnload:
        """Unloads an instance of a model, whatever it is generating (`POST /api/v1/models/unload`).

        Args:
            instance_id: The `id` of one of the `loaded_instances`, or what `load` returned.

        Raises:
            LLMValidationError: an argument cannot be right; nothing was sent.
            LLMResponseError: there is no such instance.
        """
        body = {"instance_id": check_text("instance_id", instance_id, hint=_NAME_HINT)}
        return cast("LMStudioUnload", await self._post("model unload", "unload", body, "instance_id", instance_id))

    def download(self, model: str, **options: Any) -> AsyncGenerator[DownloadStatus, None]:
        """Downloads a model and tells how far it is (`POST /api/v1/models/download`).

        LM Studio does it by itself: to leave the iteration, or to cancel it, does not stop the download. Asked for
        the same model again, LM Studio says where it is.

        Args:
            model: A name of LM Studio's catalogue, or the link of a repository on Hugging Face.
            **options: Sent as they are: `quantization` (only with a link).

        Yields:
            The server's dicts, about one a second: `status`, `downloaded_bytes`, `total_size_bytes`,
            `bytes_per_second`, ... The status of the last one is "completed" or "already_downloaded"; before that it
            is "downloading", or "paused" for as long as somebody paused it in LM Studio.

        Raises:
            LLMValidationError: an argument cannot be right; nothing was sent. Raised by the call.
            LLMResponseError: it failed; `partial` is the last status. This and all else is raised by the iteration.
        """
        return self._download({"model": check_text("model", model, hint=_NAME_HINT), **options})

    async def _download(self, body: Mapping[str, Any]) -> AsyncGenerator[DownloadStatus, None]:
        server, transport, model = self._server, self._server.transport, body["model"]
        request = server.post("model download", f"{_V1}/download", body, model, **_ONCE)
        reply = await server.request(request)
        closing = transport.closing
        value = await self._checked(reply, "status")
        while value["status"] not in _ENDED:
            job = value.get("job_id")
            if value["status"] == "failed":
                raise self._download_failed(model, reply, value)
            if not isinstance(job, str):
                raise server.is_not(reply, "the status of a download")
            yield cast("DownloadStatus", value)
            if closing is not None:
                await asyncio.wait((closing,), timeout=POLL)
            if server.transport is not transport:
                raise _left_alone("api_base was set, or the client was given back to its pool,", reply, value)
            if closing is None or closing.done():  # to ask on would open the client again
                raise _left_alone("the client was closed", reply, value)
            path = f"{_V1}/download/status/{quote(job, safe='', errors='replace')}"
            reply = await server.request(server.get("model download", path, below_root=True, model=model))
            value = await self._checked(reply, "status")
        yield cast("DownloadStatus", value)

    async def _post(self, operation: str, verb: str, body: Mapping[str, Any], field: str, name: str) -> dict[str, Any]:
        request = self._server.post(operation, f"{_V1}/{verb}", body, name, **_ONCE)
        if verb == "load":
            # A plain reply has `first_byte`: the wait for the whole of it.
            request.timeouts = attrs.evolve(request.timeouts, first_byte=request.timeouts.load)
        return await self._checked(await self._server.request(request), field)

    async def _checked(self, reply: Reply, field: str) -> dict[str, Any]:
        """The reply's object, if it has the field that LM Studio's has.

        Raises:
            LLMError: it is an error, or not LM Studio's; which of them, another question tells.
        """
        refused = self._refusal(reply)
        if refused is None:
            value = self._server.value(reply)
            if isinstance(value.get(field), str):
                return value
            refused = self._server.is_not(reply, f"LM Studio's: it has no {field!r}")
        found = await find(self._server)
        if found.has_v1:
            raise refused
        raise self._not_offered(attrs.evolve(found, reply=reply)) from refused

    def _refusal(self, reply: Reply) -> LLMError | None:
        """The error in a reply that any server may have sent, or None if there is none in it.

        Raises:
            LLMError: its class, or a status of 500 or more, says already what it is.
        """
        try:
            self._server.value(reply)
        except LLMError as error:
            if type(error) is not LLMResponseError or reply.status >= 500:
                raise
            return error
        return None

    def _not_offered(self, found: Found) -> LLMResponseError:
        reply = found.reply
        body = self._server.transport.redact(reply.body.decode("utf-8", "replace"))
        if found.is_lmstudio:
            message, hint = "this LM Studio is too old: it does not have this part of its API yet", _UPDATE_HINT
        else:
            name, told = reply.headers.get("Server"), excerpt(body)
            itself = f" (it calls itself {name!r})" if name else ""
            message = f"this server{itself} is not LM Studio: it answered {reply.status} with {told!r}"
            hint = _NOT_HINT
        return LLMResponseError(message, hint=hint, status=reply.status, body=body, context=reply.call.context())

    def _download_failed(self, model: str, reply: Reply, value: Mapping[str, Any]) -> LLMResponseError:
        return LLMResponseError(
            f"LM Studio could not download {model!r}",
            hint=_FAILED_HINT,
            status=reply.status,
            body=self._server.transport.redact(reply.body.decode("utf-8", "replace")),
            context=reply.call.context(),
            partial=value,
        )


@attrs.frozen(kw_only=True)
class Found:
    """What asking for LM Studio's models found."""

    reply: Reply
    """The last one."""
    is_lmstudio: bool
    has_v1: bool = False
    models: list[LMStudioModel] | None = None
    """None if it is not LM Studio, or an LM Studio that does not tell."""


async def find(server: Server) -> Found:
    """Asks for LM Studio's models: one request, or two if it is an LM Studio before 0.4.0."""
    reply = await server.request(server.get("model list", _V1, below_root=True))
    models = _listed(server, reply, "models", {"key": str, "loaded_instances": list})
    if models is not None:
        return Found(reply=reply, is_lmstudio=True, has_v1=True, models=cast("list[LMStudioModel]", models))
    if not _is_unexpected(reply):
        return Found(reply=reply, is_lmstudio=False)
    reply = await server.request(server.get("model list", _V0, below_root=True))
    models = _listed(server, reply, "data", {"id": str, "state": str})
    return Found(reply=reply, is_lmstudio=True, models=None if models is None else [_as_v1(each) for each in models])


def _left_alone(why: str, reply: Reply, value: Mapping[str, Any]) -> TaskCancelledError:
    return TaskCancelledError(
        f"{why} while the model was being downloaded",
        hint="LM Studio goes on with it; call download again where it runs to see how far it is",
        context=reply.call.context(),
        partial=value,
    )


def _listed(server: Server, reply: Reply, field: str, shape: Mapping[str, type]) -> list[dict[str, Any]] | None:
    """The list in a reply, if each of its entries has fields of these types."""
    try:
        entries = server.value(reply).get(field)
    except LLMError:
        return None  # the caller has the reply, and makes the error of it
    if not isinstance(entries, list):
        return None
    return entries if all(_fits(entry, shape) for entry in entries) else None


def _fits(entry: object, shape: Mapping[str, type]) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in shape.items())


def _is_unexpected(reply: Reply) -> bool:
    """Whether it is LM Studio's answer to a path that it does not know, with which it gives itself away."""
    said = failures.read(reply.body.decode("utf-8", "replace"))
    return not said.is_bare and _UNEXPECTED in said.message.lower()


def _as_v1(entry: Mapping[str, Any]) -> LMStudioModel:
    """An entry of `/api/v0/models` in the fields of `/api/v1/models`."""
    kind, told = entry.get("type"), entry.get("capabilities")
    config = {"context_length": entry["loaded_context_length"]} if "loaded_context_length" in entry else {}
    capabilities: dict[str, Any] = {"vision": kind == "vlm"}
    if isinstance(told, list):
        capabilities["trained_for_tool_use"] = "tool_use" in told
    model: dict[str, Any] = {
        "type": "embedding" if kind == "embeddings" else "llm",
        "key": entry["id"],
        "loaded_instances": [{"id": entry["id"], "config": config}] if entry["state"] == "loaded" else [],
    }
    if kind != "embeddings":
        model["capabilities"] = capabilities
    if "quantization" in entry:
        model["quantization"] = {"name": entry["quantization"]}
    renamed = {"arch": "architecture", "compatibility_type": "format"}
    for name in ("publisher", "arch", "compatibility_type", "max_context_length"):
        if name in entry:
            model[renamed.get(name, name)] = entry[name]
    return cast("LMStudioModel", model)
