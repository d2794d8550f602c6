"""Sessions with MCP servers through the official SDK, as a client, with either of its major versions.

A session returns definitions and results as the dicts that the server sent, normalized by `MessageExchange`, and raises
one of the errors in `session_errors`. The SDK's own models and exceptions do not leave this folder.

Two properties of the SDK shape this module:

- Its anyio cancel scopes have to be left in the task that entered them. Otherwise it raises `RuntimeError`, or the
  event loop spins at full load for ever. So one task must enter and leave `open_mcp_session`: the task of
  `lmbridge.mcp.servers.session_owner.SessionOwner`.
- SDK 1.x does not notify the server when a request is cancelled, so `_SessionV1` notifies it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from lmbridge._tasks import list_in_slices
from lmbridge._version import __version__
from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.jsonrpc import MessageLink
from lmbridge.mcp.sdk.http import open_http_connection
from lmbridge.mcp.sdk.http_auth import FetchHeaders
from lmbridge.mcp.sdk.message_filter import MessageExchange, NotificationHandlers, has_name
from lmbridge.mcp.sdk.package import LMBRIDGE_NAME, is_v2
from lmbridge.mcp.sdk.sent_requests import CallListener, SentRequest, track_request
from lmbridge.mcp.sdk.session_errors import (
    BadReplyError,
    RefusedError,
    SessionLostError,
    UrlsRequiredError,
    describe_error,
)
from lmbridge.mcp.sdk.streams import ClientConnection, LinkConnection, Streams, client_streams
from lmbridge.observe.watches import CallWatch, observed_call

UNUSABLE_REASON: Final = "lmbridge/unusable"
"""A key that `list_page` adds to the definition of a tool that must not be called; its value is the reason."""

_CANCEL_NOTICE_SECONDS: Final = 1.0
"""The time limit for notifying the server of a cancelled call, in seconds."""
_CONNECTION_CLOSED_CODE: Final = -32000
_CONNECTION_CLOSED: Final = "the connection was closed"
_BAD_HEADERS: Final = "its inputSchema has an x-mcp-header that is not valid, so the protocol forbids calling it"


class McpSession(Protocol):
    """A session with a server. Its methods raise `SessionLostError`, `RefusedError` and `BadReplyError`."""

    server_name: str
    """The name by which the server introduced itself, or ""."""
    protocol: str
    """The protocol revision of the session, such as "2025-11-25"."""
    has_tools: bool
    """Whether the server declared that it has tools."""
    declares_changes: bool
    """Whether the server declared that it announces changes of its list of tools."""

    async def list_page(self, cursor: str | None) -> Mapping[str, Any]:
        """Returns a page of the list of tools, as the server sent it: `tools`, and `nextCursor` if there are more."""
        ...

    async def call(self, tool: str, arguments: Mapping[str, Any], listener: CallListener) -> Mapping[str, Any]:
        """Calls a tool and returns the result as the server sent it: `content`, `structuredContent`, `isError`.

        If the caller is cancelled, the server is notified that the call was cancelled.
        """
        ...

    async def watch(self, on_begin: Callable[[], None]) -> None:
        """Listens for notifications until it is cancelled, or until the server ends the stream of notifications.

        In newer revisions of the protocol, a client gets notifications only while it listens for them.

        Args:
            on_begin: Called when the server has agreed to announce changes of its list of tools from now on.
        """
        ...


@asynccontextmanager
async def open_mcp_session(
    spec: ServerSpec,
    link: MessageLink | None,
    handlers: NotificationHandlers,
    fetch_headers: FetchHeaders | None = None,
) -> AsyncIterator[McpSession]:
    """Opens a session with a server, and closes it at the end of the block. One task must enter and leave the block.

    Args:
        spec: The server.
        link: The connection to the server's process; None for a server on HTTP.
        handlers: The functions that are called with what the server sends on its own initiative.
        fetch_headers: Returns the current values of headers that change over time; None if the server has none.

    Raises:
        SessionLostError: The server on HTTP answered with an error status or a redirect.
        RefusedError: The server refused the handshake.
        Exception: Whatever the SDK raises when the session cannot be opened, or is lost; see `describe_error`.
    """
    exchange = MessageExchange(handlers)
    async with AsyncExitStack() as stack:
        connection: ClientConnection
        if link is None:
            opening_connection = open_http_connection(spec, exchange.report, handlers.on_lost, fetch_headers)
            connection = await stack.enter_async_context(opening_connection)
        else:
            connection = LinkConnection(link)
        stack.push_async_callback(exchange.close)
        streams = client_streams(connection, exchange)
        try:
            opening = _open_v2(spec, streams, exchange) if is_v2() else _open_v1(streams, exchange)
            session = await stack.enter_async_context(opening)
        except Exception as exc:
            # Whatever the SDK raises, the exchange and the connection know the original reason.
            if (reason := exchange.failure or connection.end) is not None:
                raise reason from exc
            raise
        session.connection, session.spec = connection, spec
        yield session


@asynccontextmanager
async def _open_v2(spec: ServerSpec, streams: Streams, exchange: MessageExchange) -> AsyncIterator[_SessionBase]:
    import mcp

    @asynccontextmanager
    async def transport() -> AsyncIterator[Streams]:
        yield streams

    sdk: Any = mcp
    # In the mode "auto", a stdio server that ignores the probe of the newest protocol takes ten seconds to connect.
    mode = "auto" if spec.transport == "http" else "legacy"
    client = sdk.Client(
        transport(),
        mode=mode,
        cache=None,
        client_info=_client_info(),
        # `MessageExchange` declares in each request whether the user can be asked, and declines questions if not.
        elicitation_callback=_make_elicitation_callback(exchange),
    )
    async with client:
        exchange.is_modern = _is_modern(client)
        yield _SessionV2(client, exchange, client.server_info, client.protocol_version, client.server_capabilities)


def _make_elicitation_callback(exchange: MessageExchange) -> Callable[[Any, Any], Awaitable[Any]]:
    """Returns the function that SDK 2.x calls with the questions in a result, in the revision 2026-07-28."""
    from mcp import types

    sdk: Any = types

    async def ask(_context: Any, params: Any) -> Any:
        question = params.model_dump(by_alias=True, mode="json", exclude_none=True)
        outcome = await exchange.questions.ask_in_call(question)
        if "error" in outcome:
            return sdk.ErrorData.model_validate(outcome["error"])
        return sdk.ElicitResult.model_validate(outcome["result"])

    return ask


@asynccontextmanager
async def _open_v1(streams: Streams, exchange: MessageExchange) -> AsyncIterator[_SessionBase]:
    import mcp

    sdk: Any = mcp
    async with sdk.ClientSession(*streams, client_info=_client_info()) as session:
        opened = await session.initialize()
        yield _SessionV1(session, exchange, opened.serverInfo, opened.protocolVersion, opened.capabilities)


def _client_info() -> Any:
    from mcp.types import Implementation

    return Implementation(name=LMBRIDGE_NAME, version=__version__)


class _SessionBase:
    """The part of a session that is the same with both major versions of the SDK."""

    server_name: str
    protocol: str
    has_tools: bool
    declares_changes: bool
    connection: ClientConnection
    spec: ServerSpec

    def __init__(self, client: Any, exchange: MessageExchange, info: Any, protocol: Any, capabilities: Any) -> None:
        self._client, self._exchange = client, exchange
        tools = getattr(capabilities, "tools", None)
        self.has_tools = tools is not None
        # The first name is that of SDK 2.x.
        self.declares_changes = bool(getattr(tools, "list_changed", None) or getattr(tools, "listChanged", None))
        self.server_name = str(getattr(info, "name", "") or "")
        self.protocol = exchange.protocol or str(protocol)

    async def list_page(self, cursor: str | None) -> Mapping[str, Any]:
        with track_request("tools/list") as request:
            page = await self._make_request(self._sdk_list_tools(cursor, request), request)
        return await _mark_unusable(request.result or {}, page.tools)

    async def call(self, tool: str, arguments: Mapping[str, Any], listener: CallListener) -> Mapping[str, Any]:
        from pydantic_core import to_json

        try:
            # The arguments are checked here, because sending half of a surrogate pair would end an HTTP session.
            to_json({"params": {"arguments": arguments}})
            # Numbers that JSON does not have would be sent as null.
            json.dumps(arguments, default=str, allow_nan=False)
        except (ValueError, RecursionError) as exc:
            raise RefusedError(f"the arguments cannot be sent: {exc}") from exc
        try:
            return await self._call_once(tool, arguments, listener)
        except UrlsRequiredError as exc:
            if not await self._exchange.questions.have_urls_visited(exc.questions, listener):
                raise
        # The server has refused the first call without processing it, so the call can be made again.
        return await self._call_once(tool, arguments, listener)

    async def _call_once(self, tool: str, arguments: Mapping[str, Any], listener: CallListener) -> Mapping[str, Any]:
        with track_request("tools/call", listener) as request:
            if (watch := observed_call.get()) is not None:
                self._observe(request, watch)
            await self._make_request(self._sdk_call_tool(tool, dict(arguments), request), request)
        return request.result or {}

    def _observe(self, request: SentRequest, watch: CallWatch) -> None:
        """Adds the observers' trace context to a request, and reports the request to the observers when it is sent."""
        url = urlsplit(self.spec.url)
        request.meta = watch.trace_context()
        request.on_sent = partial(
            watch.mcp_request,
            method=request.method,
            server=self.spec.name,
            transport=self.spec.transport,
            host=url.hostname,
            port=url.port,
            protocol=self.protocol,
        )

    async def watch(self, on_begin: Callable[[], None]) -> None:
        """Waits until it is cancelled. In older revisions of the protocol, notifications arrive without a request."""
        on_begin()
        await asyncio.get_running_loop().create_future()

    async def _make_request(self, sending: Awaitable[Any], request: SentRequest) -> Any:
        """Awaits a request of the SDK, and turns the SDK's errors into those of `session_errors`."""
        import anyio
        import mcp

        sdk: Any = mcp
        error_class: type[Exception] = getattr(sdk, "MCPError", None) or sdk.McpError
        stream_errors = (anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.EndOfStream, ConnectionError)
        try:
            return await sending
        except (error_class, *stream_errors) as exc:
            if request.failure is not None:
                raise request.failure from exc
            error: Any = getattr(exc, "error", exc)
            if isinstance(exc, error_class) and error.code != _CONNECTION_CLOSED_CODE:
                raise RefusedError(str(exc)) from exc
            # The SDK raises the other errors of its own accord only when its streams have ended.
            raise self._lost_error() from exc
        except (ValueError, RuntimeError) as exc:
            raise BadReplyError(describe_error(exc)) from exc
        finally:
            if request.result is None and request.failure is None:
                self._exchange.forget(request)

    def _lost_error(self) -> Exception:
        # The connection may have ended because another request was rejected. The error of that request would claim that
        # this one has not run, so only its text is used.
        return SessionLostError(str(self.connection.end or _CONNECTION_CLOSED))

    async def _sdk_list_tools(self, cursor: str | None, request: SentRequest) -> Any:
        raise NotImplementedError

    async def _sdk_call_tool(self, tool: str, arguments: dict[str, Any], request: SentRequest) -> Any:
        raise NotImplementedError


async def _enable_progress(*_: Any) -> None:
    """Does nothing. The SDK asks for progress only if it has a callback, and `MessageExchange` handles what arrives."""


class _SessionV2(_SessionBase):
    async def _sdk_list_tools(self, cursor: str | None, request: SentRequest) -> Any:  # noqa: ARG002 - for 1.x
        return await self._client.list_tools(cursor=cursor)

    async def _sdk_call_tool(self, tool: str, arguments: dict[str, Any], request: SentRequest) -> Any:  # noqa: ARG002 - for 1.x
        return await self._client.call_tool(tool, arguments, progress_callback=_enable_progress)

    async def watch(self, on_begin: Callable[[], None]) -> None:
        if not (self.declares_changes and _is_modern(self._client)):
            await super().watch(on_begin)
            return
        async with self._client.listen(tools_list_changed=True) as subscription:
            # A server may agree to the subscription, but not to all that the client has asked for.
            if subscription.honored.tools_list_changed:
                on_begin()
            # `MessageExchange` handles the changes that arrive while the subscription is open.
            async for _ in subscription:
                pass


def _is_modern(client: Any) -> bool:
    """Returns whether a session speaks a stateless revision of the protocol, 2026-07-28 or later."""
    from mcp_types.version import MODERN_PROTOCOL_VERSIONS

    return client.protocol_version in MODERN_PROTOCOL_VERSIONS


class _SessionV1(_SessionBase):
    async def _sdk_list_tools(self, cursor: str | None, request: SentRequest) -> Any:
        return await self._notify_if_cancelled(self._client.list_tools(cursor), request)

    async def _sdk_call_tool(self, tool: str, arguments: dict[str, Any], request: SentRequest) -> Any:
        calling = self._client.call_tool(tool, arguments, progress_callback=_enable_progress)
        return await self._notify_if_cancelled(calling, request)

    async def _notify_if_cancelled(self, sending: Awaitable[Any], request: SentRequest) -> Any:
        try:
            return await sending
        except asyncio.CancelledError:
            if request.sdk_id is not None:
                await self._notify_cancelled(request.sdk_id)
            raise

    async def _notify_cancelled(self, request_id: Any) -> None:
        from mcp import types

        sdk: Any = types
        params = sdk.CancelledNotificationParams(requestId=request_id, reason="caller cancelled")
        notification = sdk.ClientNotification(sdk.CancelledNotification(params=params))
        # The call is over in any case, so it does not matter if this fails.
        with suppress(TimeoutError, Exception):
            async with asyncio.timeout(_CANCEL_NOTICE_SECONDS):
                await self._client.send_notification(notification)


async def _mark_unusable(page: Mapping[str, Any], kept_tools: Iterable[Any]) -> Mapping[str, Any]:
    """Returns a page with the key `UNUSABLE_REASON` added to each of its tools that the SDK has left out.

    The protocol of 2026-07-28 requires clients to leave out a tool whose x-mcp-header is not valid, and the SDK does.
    """
    kept = set(await list_in_slices(tool.name for tool in kept_tools))
    marked = (
        {**each, UNUSABLE_REASON: _BAD_HEADERS} if has_name(each) and each["name"] not in kept else each
        for each in page.get("tools") or ()
    )
    return {**page, "tools": await list_in_slices(marked)}
