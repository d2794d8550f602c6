"""Lists of models, as servers send them: `/v1/models` of every server, and the lists of LM Studio's own API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmbridge.client.server_api import ServerApi


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
