"""What servers tell while they run, for a hub's `on_event`."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen
class ServerStateChanged:
    """A server has another state."""

    server: str
    state: str
    error: str | None = None
    """Why, if it is "failed", "backoff" or "lost"."""


@attrs.frozen
class ServerLog:
    """A server's log message."""

    server: str
    level: str
    data: Any


@attrs.frozen
class ToolProgress:
    """How far a call is."""

    server: str
    tool: str
    progress: float
    total: float | None = None
    message: str | None = None


@attrs.frozen
class ToolsChanged:
    """A server has other tools; runs that begin from now on get them."""

    server: str


McpEvent = ServerStateChanged | ServerLog | ToolProgress | ToolsChanged
