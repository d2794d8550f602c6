"""Sessions with MCP servers through the official SDK, as a client, with either of its major versions.

A session returns definitions and results as the dicts that the server sent, and raises one of the three errors in
`session_errors`. The SDK's own models and exceptions do not leave this folder.

Three properties of the SDK shape this module:

- Its anyio cancel scopes have to be left in the task that entered them. Otherwise it raises `RuntimeError`, or the
  event loop spins at full load for ever. So `open_mcp_session` must be entered and left by one task, which `servers`
  provides.
- It rejects a whole list of tools for one bad definition; see `MessageTap`.
- SDK 1.x does not notify the server when a call is cancelled, so `_SessionV1` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Final, Protocol

import attrs

from lmbridge._version import __version__
from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.jsonrpc import MessageLink
from lmbridge.mcp.sdk.http import open_http_streams
from lmbridge.mcp.sdk.package import LMBRIDGE_NAME, is_v2
from lmbridge.mcp.sdk.session_errors import BadReplyError, RefusedError, SessionLostError
from lmbridge.mcp.sdk.streams import MessageTap, Streams, has_name, sent_call_ids, streams_over_link

UNUSABLE_REASON: Final = "lmbridge/unusable"
"""A key that `list_page` adds to the definition of a tool that must not be called; its value is the reason."""

_CANCEL_NOTICE_SECONDS: Final = 1.0
"""The time limit for notifying the server of a cancelled call, in seconds."""
_CONNECTION_CLOSED_CODE: Final = -32000
_CONNECTION_CLOSED: Final = "the connection was closed"
_REPLY_CUT_OFF: Final = "its answer broke off, and the tool may have run"
_BAD_HEADERS: Final = "its inputSchema has an x-mcp-header that is not valid, so the protocol forbids calling it"
_LOST_SESSION_MESSAGES: Final = ("Session terminated", "Server returned an error response")
"""The beginnings of the messages of errors that the SDK raises when a session is lost.

The error codes cannot be used, because servers send the same ones.
"""
_NO_REPLY_MESSAGE: Final = "SSE stream ended without a response"
"""The SDK's message when a stream of events ended before the reply to a call."""

ProgressCallback = Callable[[float, float | None, str | None], None]
"""Called with the progress of a call: the amount done, the total if it is known, and a message if there is one."""


@attrs.frozen
class NotificationHandlers:
    """Functions that are called when a server sends a notification."""

    on_tools_changed: Callable[[], None]
    """Called when the server's list of tools has changed."""
    on_log: Callable[[str, Any], None]
    """Called with the level and the data of a log message."""


class McpSession(Protocol):
    """A session with a server. Its methods raise `SessionLostError`, `RefusedError` and `BadReplyError`."""

    server_name: str
    """The name by which the server introduced itself, or ""."""
    protocol: str
    """The protocol revision of the session, such as "2025-11-25"."""
    has_tools: bool
    """Whether the server declared that it has tools."""

    async def list_page(self, cursor: str | None) -> Mapping[str, Any]:
        """Returns a page of the list of tools, as the server sent it: `tools`, and `nextCursor` if there are more."""
        ...

    async def call(self, tool: str, arguments: Mapping[str, Any], on_progress: ProgressCallback) -> Mapping[str, Any]:
        """Calls a tool and returns the result as the server sent it: `content`, `structuredContent`, `isError`.

        If the caller is cancelled, the server is notified that the call was cancelled.
        """
        ...

    async def watch(self) -> None:
        """Listens for notifications until it is cancelled.

        In newer revisions of the protocol, a client gets notifications only while it listens for them.
        """
        ...


@asynccontextmanager
async def open_mcp_session(
    spec: ServerSpec, link: MessageLink | None, handlers: NotificationHandlers
) -> AsyncIterator[McpSession]:
    """Opens a session with a server, and closes it at the end of the block. One task must enter and leave the block.

    Args:
        spec: The server.
        link: The connection to the server's process; None for a server on HTTP.
        handlers: The functions that are called with the server's notifications.

    Raises:
        SessionLostError: The server on HTTP answered with an error status or a redirect.
        Exception: Whatever the SDK raises when the session cannot be opened, or is lost; see `describe_error`.
    """
    tap = MessageTap()
    transport = open_http_streams(spec, tap) if link is None else streams_over_link(link, tap)
    opened = _open_v2(spec, transport, tap, handlers) if is_v2() else _open_v1(transport, tap, handlers)
    try:
        async with opened as session:
            yield session
    except Exception as exc:
        # The tap knows the reason, whichever exception the SDK has turned it into.
        if tap.http_problem:
            raise SessionLostError(tap.http_problem) from exc
        raise


@asynccontextmanager
async def _open_v2(
    spec: ServerSpec, transport: AbstractAsyncContextManager[Streams], tap: MessageTap, handlers: NotificationHandlers
) -> AsyncIterator[McpSession]:
    import mcp

    sdk: Any = mcp
    client = sdk.Client(
        transport,
        # In the mode "auto", a stdio server that ignores the probe of the newest protocol takes ten seconds to connect.
        mode="auto" if spec.transport == "http" else "legacy",
        cache=None,
        client_info=_client_info(),
        logging_callback=_log_handler(handlers),
        message_handler=_message_handler(handlers),
    )
    async with client:
        tap.is_modern = _is_modern(client)
        yield _SessionV2(client, tap, handlers)


@asynccontextmanager
async def _open_v1(
    transport: AbstractAsyncContextManager[Streams], tap: MessageTap, handlers: NotificationHandlers
) -> AsyncIterator[McpSession]:
    import mcp

    sdk: Any = mcp
    callbacks = {"logging_callback": _log_handler(handlers), "message_handler": _message_handler(handlers)}
    async with (
        transport as (reading, writing),
        sdk.ClientSession(reading, writing, client_info=_client_info(), **callbacks) as session,
    ):
        yield _SessionV1(session, await session.initialize(), tap)


def _client_info() -> Any:
    from mcp.types import Implementation

    return Implementation(name=LMBRIDGE_NAME, version=__version__)


def _log_handler(handlers: NotificationHandlers) -> Callable[[Any], Awaitable[None]]:
    async def handle_log(params: Any) -> None:
        handlers.on_log(str(params.level), params.data)

    return handle_log


def _message_handler(handlers: NotificationHandlers) -> Callable[[Any], Awaitable[None]]:
    async def handle_message(message: Any) -> None:
        if getattr(getattr(message, "root", message), "method", None) == "notifications/tools/list_changed":
            handlers.on_tools_changed()

    return handle_message


class _SessionBase:
    """The part of a session that is the same with both majors of the SDK."""

    server_name: str
    protocol: str
    has_tools: bool

    def __init__(self, client: Any, tap: MessageTap, info: Any, protocol: Any, capabilities: Any) -> None:
        self._client, self._tap = client, tap
        self.has_tools = getattr(capabilities, "tools", None) is not None
        self.server_name = str(getattr(info, "name", "") or "")
        self.protocol = str(protocol)

    async def list_page(self, cursor: str | None) -> Mapping[str, Any]:
        self._tap.tool_page = None
        try:
            page = await self._map_errors(self._sdk_list_tools(cursor))
        except ValueError as exc:
            raise BadReplyError(f"its list of tools is not valid: {_first_problem(exc)}") from exc
        return _mark_unusable(self._tap.tool_page or _as_dict(page), {tool.name for tool in page.tools})

    async def call(self, tool: str, arguments: Mapping[str, Any], on_progress: ProgressCallback) -> Mapping[str, Any]:
        from pydantic_core import to_json

        try:
            # The arguments are checked here, because sending half of a surrogate pair would end an HTTP session.
            to_json({"params": {"arguments": arguments}})
        except ValueError as exc:
            raise RefusedError(f"the arguments cannot be sent: {exc}") from exc

        async def report_progress(done: float, total: float | None, message: str | None) -> None:
            on_progress(done, total, message)

        try:
            return _as_dict(await self._map_errors(self._sdk_call_tool(tool, dict(arguments), report_progress)))
        except ValueError as exc:
            raise BadReplyError(f"the tool ran, but its result is not valid: {_first_problem(exc)}") from exc

    async def watch(self) -> None:
        """Waits until it is cancelled. In older revisions of the protocol, notifications arrive without a request."""
        await asyncio.get_running_loop().create_future()

    async def _map_errors(self, request: Awaitable[Any]) -> Any:
        """Awaits a request and raises the SDK's errors as those of `session_errors`."""
        import anyio
        import mcp

        sdk: Any = mcp
        error_class: type[Exception] = getattr(sdk, "MCPError", None) or sdk.McpError
        try:
            return await request
        except error_class as exc:
            error: Any = getattr(exc, "error", exc)
            if self._tap.is_session_unknown:
                raise SessionLostError("the server no longer knows the session") from exc
            # No field distinguishes the SDK's own errors from those of a server, so the messages decide here. A server
            # may use the same words, which is why the caller checks whether the session is still alive.
            if error.code == _CONNECTION_CLOSED_CODE and "closed" in error.message.lower():
                raise SessionLostError(self._tap.http_problem or _CONNECTION_CLOSED) from exc
            if any(error.message.startswith(text) for text in _LOST_SESSION_MESSAGES):
                raise SessionLostError(self._tap.http_problem or error.message) from exc
            if error.message.startswith(_NO_REPLY_MESSAGE):
                raise SessionLostError(_REPLY_CUT_OFF) from exc
            raise RefusedError(f"{error.code}: {error.message}") from exc
        except (anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.EndOfStream, ConnectionError) as exc:
            raise SessionLostError(_CONNECTION_CLOSED) from exc

    async def _sdk_list_tools(self, cursor: str | None) -> Any:
        raise NotImplementedError

    async def _sdk_call_tool(self, tool: str, arguments: dict[str, Any], report_progress: Any) -> Any:
        raise NotImplementedError


class _SessionV2(_SessionBase):
    def __init__(self, client: Any, tap: MessageTap, handlers: NotificationHandlers) -> None:
        super().__init__(client, tap, client.server_info, client.protocol_version, client.server_capabilities)
        self._handlers = handlers

    async def _sdk_list_tools(self, cursor: str | None) -> Any:
        return await self._client.list_tools(cursor=cursor)

    async def _sdk_call_tool(self, tool: str, arguments: dict[str, Any], report_progress: Any) -> Any:
        return await self._client.call_tool(tool, arguments, progress_callback=report_progress)

    async def watch(self) -> None:
        sends_changes = getattr(self._client.server_capabilities.tools, "list_changed", None)
        if sends_changes and _is_modern(self._client):
            async with self._client.listen(tools_list_changed=True) as subscription:
                async for _ in subscription:
                    self._handlers.on_tools_changed()
        await super().watch()


def _is_modern(client: Any) -> bool:
    """Returns whether a session speaks a stateless revision of the protocol, 2026-07-28 or later."""
    from mcp_types.version import MODERN_PROTOCOL_VERSIONS

    return client.protocol_version in MODERN_PROTOCOL_VERSIONS


class _SessionV1(_SessionBase):
    def __init__(self, client: Any, initialized: Any, tap: MessageTap) -> None:
        super().__init__(client, tap, initialized.serverInfo, initialized.protocolVersion, initialized.capabilities)

    async def _sdk_list_tools(self, cursor: str | None) -> Any:
        return await self._client.list_tools(cursor)

    async def _sdk_call_tool(self, tool: str, arguments: dict[str, Any], report_progress: Any) -> Any:
        request_ids: list[Any] = []
        token = sent_call_ids.set(request_ids)
        task: Any = asyncio.current_task()
        self._tap.waiting_calls[task] = request_ids
        try:
            return await self._client.call_tool(tool, arguments, progress_callback=report_progress)
        except asyncio.CancelledError:
            if self._tap.interrupted_ids.intersection(request_ids):
                raise SessionLostError(_REPLY_CUT_OFF) from None
            if request_ids:
                await self._notify_cancelled(request_ids[0])
            raise
        finally:
            del self._tap.waiting_calls[task]
            sent_call_ids.reset(token)

    async def _notify_cancelled(self, request_id: Any) -> None:
        from mcp import types

        sdk: Any = types
        params = sdk.CancelledNotificationParams(requestId=request_id, reason="caller cancelled")
        notification = sdk.ClientNotification(sdk.CancelledNotification(params=params))
        # The call is over in any case, so it does not matter if this fails.
        with suppress(TimeoutError, Exception):
            async with asyncio.timeout(_CANCEL_NOTICE_SECONDS):
                await self._client.send_notification(notification)


def _mark_unusable(page: Mapping[str, Any], kept: set[str]) -> Mapping[str, Any]:
    """Adds the key `UNUSABLE_REASON` to the tools of a page that the SDK has left out, and returns the page.

    The protocol of 2026-07-28 requires clients to leave out a tool whose x-mcp-header is not valid, and the SDK does.
    """
    tools = [
        {**each, UNUSABLE_REASON: _BAD_HEADERS} if has_name(each) and each["name"] not in kept else each
        for each in page.get("tools") or ()
    ]
    return {**page, "tools": tools}


def _as_dict(model: Any) -> dict[str, Any]:
    """Returns a model of the SDK as the dict that was sent."""
    plain: dict[str, Any] = model.model_dump(by_alias=True, mode="json", exclude_none=True)
    return plain


def _first_problem(error: ValueError) -> str:
    """Returns the first of the problems that pydantic lists, with its place."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
