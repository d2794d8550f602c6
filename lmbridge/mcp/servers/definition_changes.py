"""Detects that a server describes a tool differently than before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.servers.events import McpEvent, ToolDefinitionChanged

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_REVIEWED_KEYS: Final = ("title", "description", "inputSchema", "annotations")
"""The keys of a definition that say to a model, or to a person who approves calls, what the tool does."""


class DefinitionChanges:
    """Remembers the definitions of a server's tools over all of its sessions, and reports those that change.

    A server may first offer a harmless tool, and describe it differently once its user has come to trust it.

    Args:
        spec: The server. Tools that its configuration does not allow are not reported.
        emit: Called with a `ToolDefinitionChanged` for each tool whose definition has changed.
    """

    def __init__(self, spec: ServerSpec, emit: Callable[[McpEvent], None]) -> None:
        self._spec, self._emit = spec, emit
        self._known: dict[str, Mapping[str, Any]] = {}

    def report(self, definitions: Sequence[Any]) -> None:
        """Compares the definitions that a run is about to get with those of earlier runs, and remembers the new ones.

        Args:
            definitions: The definitions as the server sent them.
        """
        current = {
            each["name"]: {key: each.get(key) for key in _REVIEWED_KEYS}
            for each in definitions
            if isinstance(each, Mapping) and isinstance(each.get("name"), str) and self._spec.offers(each["name"])
        }
        for name, definition in current.items():
            known = self._known.get(name, definition)
            if changed := [key for key in _REVIEWED_KEYS if known[key] != definition[key]]:
                logger.warning(
                    "MCP server %r has changed the %s of its tool %r; runs in flight keep the old definition",
                    self._spec.name,
                    " and the ".join(changed),
                    name,
                )
                self._emit(ToolDefinitionChanged(self._spec.name, name, tuple(changed)))
        self._known |= current
