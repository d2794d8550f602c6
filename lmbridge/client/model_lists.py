"""Lists of models, as servers send them: `/v1/models` of every server, and the lists of LM Studio's own API."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from lmbridge.client.several_servers import answers_of
from lmbridge.errors import ModelNotFoundError

if TYPE_CHECKING:
    from lmbridge.client.api_requests import ServerApi

logger: logging.Logger = logging.getLogger("lmbridge.client")

LOOK_UP_SECONDS: Final = 2.0
"""The most seconds that an error is held back to wait for the list of models, from which it suggests names."""


async def fetch_models(server: ServerApi, operation: str) -> list[dict[str, Any]]:
    """Returns the entries of `GET /v1/models`; each has a string as its `id`. The request does not queue.

    Args:
        server: The server.
        operation: The purpose of the request, which errors mention: "model list".

    Raises:
        LLMError: The server did not answer, reports an error, or sent something that is not a list of models.
    """
    reply = await server.request(server.build_get(operation, "/models"))
    value = server.json_object(reply)
    # Ollama sends null if it has no models.
    if "data" in value and value["data"] is None:
        return []
    entries = entries_of(value, "data", {"id": str})
    if entries is None:
        raise server.unexpected_reply(reply, "a list of models")
    return entries


async def model_ids(server: ServerApi) -> list[str]:
    """Returns the ids in `GET /v1/models` of all servers, and raises the errors of `fetch_models`.

    An id that several servers have is returned once.
    """
    lists = await answers_of(server, lambda each: fetch_models(each, "model list"))
    ids = [entry["id"] for entries in lists for entry in entries]
    return ids if len(lists) == 1 else list(dict.fromkeys(ids))


async def add_available_models(
    server: ServerApi,
    error: ModelNotFoundError,
    list_models: Callable[[ServerApi], Awaitable[Iterable[str]]] = model_ids,
) -> None:
    """Adds the names of the server's models to an error, so that its text can suggest close matches.

    If the list does not arrive in `LOOK_UP_SECONDS`, or not at all, the error stays unchanged.

    Args:
        server: The server that reported the error.
        error: The error.
        list_models: Returns the names of the models.
    """
    if not server.can_look_up(error):
        return
    try:
        async with asyncio.timeout(LOOK_UP_SECONDS):
            names = list(await list_models(server.shared(max_retries=0)))
    # The handler of a MockTransport may raise any exception. It must not replace the error that the caller is about to
    # get.
    except Exception as failure:  # noqa: BLE001 - see above
        logger.debug("the models that exist are not known, because the server did not list them: %s", failure)
        return
    if names:
        error.add_available_models(names)


def entries_of(value: Mapping[str, Any], field: str, shape: Mapping[str, type]) -> list[dict[str, Any]] | None:
    """Returns a list of objects in a reply, or None if an entry is not an object with the fields of `shape`.

    Args:
        value: The reply's JSON object.
        field: The field that holds the list.
        shape: The fields that every entry must have, and their types.
    """
    entries = value.get(field)
    if not isinstance(entries, list):
        return None
    return entries if all(_has_shape(entry, shape) for entry in entries) else None


def _has_shape(entry: object, shape: Mapping[str, type]) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in shape.items())
