"""The events that a hub passes to `on_event` while its servers run."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen
class ServerStateChanged:
    """The state of a server has changed."""

    server: str
    """The name of the server."""
    state: str
    """The new state, one of `ServerState`."""
    error: str | None = None
    """The reason, if the state is "failed", "backoff" or "lost"; otherwise None."""


@attrs.frozen
class ServerStarting:
    """A server is still being started. The event is sent every ten seconds during the start."""

    server: str
    """The name of the server."""
    seconds: float
    """How long the start has taken so far, in seconds."""
    downloader: str | None = None
    """The program that may be downloading the server, such as "npx" or "uvx", or None."""


@attrs.frozen
class ServerLog:
    """A server has sent a log message."""

    server: str
    """The name of the server."""
    level: str
    """The level that the server gave the message, such as "info" or "error"."""
    data: Any
    """The message: any JSON value, often a string."""


@attrs.frozen
class ToolProgress:
    """A server has reported the progress of a call."""

    server: str
    """The name of the server."""
    tool: str
    """The name of the tool."""
    progress: float
    """The amount of work done so far, in a unit that the server chooses."""
    total: float | None = None
    """The amount of work in all, in the same unit, or None if the server does not know it."""
    message: str | None = None
    """A description of the progress, or None."""


@attrs.frozen
class ToolsChanged:
    """A server has announced that its tools have changed. Runs in flight get the new tools before their next round."""

    server: str
    """The name of the server."""


@attrs.frozen
class ToolDefinitionChanged:
    """A server describes a tool differently than it did when an earlier run was offered the tool.

    Runs in flight keep the old definition. Runs that start after this event get the new one.
    """

    server: str
    """The name of the server."""
    tool: str
    """The name of the tool."""
    changed: tuple[str, ...] = ()
    """The keys of the definition that have changed: "title", "description", "inputSchema", "annotations"."""


@attrs.frozen
class ElicitationCompleted:
    """A server has reported that the user has finished at the URL of a question."""

    server: str
    """The name of the server."""
    elicitation_id: str
    """The id of the question, as in `Elicitation.elicitation_id`."""


@attrs.frozen
class UnexpectedMessage:
    """A server has sent something that the protocol does not allow, or that lmbridge ignores.

    What can be used of the message is used, and the session continues. In each session, only the first message of each
    kind is reported.
    """

    server: str
    """The name of the server."""
    kind: str
    """What kind of message it is, in words, such as "an answer to a request that was not sent"."""
    detail: str = ""
    """The part of the message that was unexpected, shortened, or the method that it concerns."""


McpEvent = (
    ServerStateChanged
    | ServerStarting
    | ServerLog
    | ToolProgress
    | ToolsChanged
    | ToolDefinitionChanged
    | ElicitationCompleted
    | UnexpectedMessage
)
"""Any of these events."""
