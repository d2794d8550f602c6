"""The official SDK as a client of MCP servers.

What it gives is plain: definitions and results as the dicts of the wire. What it raises is one of three exceptions.
The traps that shape this file: cancel scopes have to be left in the task that entered them, so that `open_session` is
for an owner's task; a whole list of tools is refused for one bad definition; 1.x tells nobody that a call was
cancelled.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from importlib import import_module
from typing import Any, Final, Protocol

import attrs

from lmbridge._version import __version__
from lmbridge.mcp.config.spec import ServerSpec
from lmbridge.mcp.jsonrpc import MessageLink
from lmbridge.mcp.sdk.streams import Reading, Tap, Writing, has_name, request_numbers
from lmbridge.mcp.sdk.wire import NAME, Streams, is_v2, over_stdio

logger = logging.getLogger("lmbridge.mcp")

_CONNECT: Final = 30.0
_SETTLE: Final = 1.0
"""Seconds that telling a server of a cancel may take, and an answer from the end of its response to the call."""
_CONNECTION_CLOSED: Final = -32000
_CLOSED: Final = "the connection was closed"
_BROKEN_OFF: Final = "its answer broke off, and the tool may have run"
_OF_THE_TRANSPORT: Final = ("Session terminated", "Server returned an error response")
"""Texts of errors that the SDK makes itself, with codes that servers use as well, of a session that is lost."""
REFUSED: Final = "lmbridge/refused"
"""A key of ours in the definition of a tool that must not be called: why."""
_BAD_HEADERS: Final = "what its inputSchema says of HTTP headers (x-mcp-header) is wrong, so that it must not be called"
_NO_ANSWER: Final = "SSE stream ended without a response"
"""What the SDK says of a stream of events that ended with a call unanswered."""


class SessionLostError(Exception):
    """The session is of no use any more; the text says why."""


class RefusedError(Exception):
    """The server answered with an error; the text is its code and its message."""


class BadReplyError(Exception):
    """The server answered with something that is no answer."""


@attrs.frozen
class Listeners:
    """What is told of a server's notifications."""

    on_tools_changed: Callable[[], None]
    on_log: Callable[[str, Any], None]


class Session(Protocol):
    """A session with a server. All methods raise `SessionLostError`, `RefusedError` and `BadReplyError`."""

    server_name: str
    protocol: str
    has_tools: bool
    """Whether it says that it has any."""

    async def list_page(self, cursor: str | None) -> Mapping[str, Any]:
        """A page of tools, each as it was sent: `tools`, `nextCursor`."""
        ...

    async def call(
        self, tool: str, arguments: Mapping[str, Any], on_progress: Callable[[float, float | None, str | None], None]
    ) -> Mapping[str, Any]:
        """The result of a call: `content`, `structuredContent`, `isError`. A cancel is told to the server."""
        ...

    async def watch(self) -> None:
        """Listens for changes until it is cancelled, where notifications have to be asked for."""
        ...


@asynccontextmanager
async def open_session(spec: ServerSpec, link: MessageLink | None, listeners: Listeners) -> AsyncIterator[Session]:
    """A session with a server, for the task that enters and leaves it.

    Args:
        spec: The server.
        link: The messages of its process, if it is one.
        listeners: Told of its notifications.
    """
    tap = Tap()
    transport = _http(spec, tap) if link is None else over_stdio(link, tap)
    opened = _open_v2(spec, transport, tap, listeners) if is_v2() else _open_v1(transport, tap, listeners)
    try:
        async with opened as session:
            yield session
    except Exception as exc:  # whatever the SDK made of it: the tap has seen the reason
        if tap.refusal:
            raise SessionLostError(tap.refusal) from exc
        raise


def explain(error: BaseException) -> str:
    """What went wrong, in words, of the SDK's errors and those that it lets through."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    if (response := getattr(error, "response", None)) is not None and hasattr(response, "status_code"):
        return f"it answered with HTTP status {response.status_code}"
    if isinstance(error, FileNotFoundError):
        return f"there is no {error.filename!r}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


@asynccontextmanager
async def _http(spec: ServerSpec, tap: Tap) -> AsyncIterator[Streams]:
    from mcp.client.sse import sse_client
    from mcp.client.streamable_http import streamable_http_client

    client = await asyncio.to_thread(_client, spec, tap)  # it reads certificates
    sse: Any = sse_client
    if spec.transport == "sse":
        opened = sse(spec.url, sse_read_timeout=None, httpx_client_factory=lambda **_: client)
        async with opened as (reading, writing, *_):
            yield _tapped(reading, writing, tap)
    else:
        opened = streamable_http_client(spec.url, http_client=client)
        async with client, opened as (reading, writing, *_):
            yield _tapped(reading, writing, tap)


def _tapped(reading: Any, writing: Any, tap: Tap) -> Streams:
    return Reading(reading.receive, tap, reading.aclose), Writing(writing.send, writing.aclose)


def _client(spec: ServerSpec, tap: Tap) -> Any:
    """An HTTP client that sends what it is given to nobody else: no redirects, no proxies of the environment."""
    httpx: Any = import_module("httpx2" if is_v2() else "httpx")

    async def look(response: Any) -> None:
        if response.is_redirect:
            tap.refusal = f"it redirects to {response.headers.get('location')}, which is not followed"
            raise httpx.TransportError(tap.refusal)
        if response.request.method == "POST" or spec.transport == "sse":
            is_wrong = response.status_code >= 400
            tap.refusal = f"it answered with HTTP status {response.status_code}" if is_wrong else ""
            tap.is_forgotten |= response.status_code == 404 and "mcp-session-id" in response.request.headers
        if response.request.method == "POST" and spec.transport == "http" and not is_v2():
            _tell_end(response, tap)

    return httpx.AsyncClient(
        headers=dict(spec.headers),
        timeout=httpx.Timeout(_CONNECT, read=None),  # a call has its own limit, and a stream of events none
        follow_redirects=False,
        trust_env=False,
        event_hooks={"response": [look]},
    )


def _tell_end(response: Any, tap: Tap) -> None:
    """Ends the call that a response was for soon after the response: 1.x would wait for the answer for ever."""
    number = json.loads(response.request.content).get("id")
    close = response.aclose

    async def closed() -> None:
        await close()
        asyncio.get_running_loop().call_later(_SETTLE, tap.break_off, number)

    if number is not None:
        response.aclose = closed


# Sessions


@asynccontextmanager
async def _open_v2(
    spec: ServerSpec, transport: AbstractAsyncContextManager[Streams], tap: Tap, listeners: Listeners
) -> AsyncIterator[Session]:
    import mcp

    sdk: Any = mcp
    client = sdk.Client(
        transport,
        # A stdio server that ignores the probe of the newest protocol would take ten seconds to connect.
        mode="auto" if spec.transport == "http" else "legacy",
        cache=None,
        client_info=_info(),
        logging_callback=_log_to(listeners),
        message_handler=_notify(listeners),
    )
    async with client:
        tap.is_modern = _is_modern(client)
        yield _SessionV2(client, tap, listeners)


@asynccontextmanager
async def _open_v1(
    transport: AbstractAsyncContextManager[Streams], tap: Tap, listeners: Listeners
) -> AsyncIterator[Session]:
    import mcp

    sdk: Any = mcp
    handlers = {"logging_callback": _log_to(listeners), "message_handler": _notify(listeners)}
    async with (
        transport as (reading, writing),
        sdk.ClientSession(reading, writing, client_info=_info(), **handlers) as session,
    ):
        yield _SessionV1(session, await session.initialize(), tap)


def _info() -> Any:
    from mcp.types import Implementation

    return Implementation(name=NAME, version=__version__)


def _log_to(listeners: Listeners) -> Callable[[Any], Awaitable[None]]:
    async def log(params: Any) -> None:
        listeners.on_log(str(params.level), params.data)

    return log


def _notify(listeners: Listeners) -> Callable[[Any], Awaitable[None]]:
    async def handle(message: Any) -> None:
        if getattr(getattr(message, "root", message), "method", None) == "notifications/tools/list_changed":
            listeners.on_tools_changed()

    return handle


class _SessionBase:
    """What both majors have in common."""

    server_name: str
    protocol: str
    has_tools: bool

    def __init__(self, client: Any, tap: Tap, info: Any, protocol: Any, capabilities: Any) -> None:
        self._client, self._tap = client, tap
        self.has_tools = getattr(capabilities, "tools", None) is not None
        self.server_name = str(getattr(info, "name", "") or "")
        self.protocol = str(protocol)

    async def list_page(self, cursor: str | None) -> Mapping[str, Any]:
        self._tap.page = None
        try:
            page = await self._answer(self._list(cursor))
        except ValueError as exc:
            raise BadReplyError(f"its list of tools is none: {_brief(exc)}") from exc
        return _judged(self._tap.page or _plain(page), {tool.name for tool in page.tools})

    async def call(
        self, tool: str, arguments: Mapping[str, Any], on_progress: Callable[[float, float | None, str | None], None]
    ) -> Mapping[str, Any]:
        from pydantic_core import to_json

        try:
            to_json({"params": {"arguments": arguments}})  # half a surrogate pair on its way would end an HTTP session
        except ValueError as exc:
            raise RefusedError(f"the arguments cannot be sent: {exc}") from exc

        async def progress(done: float, total: float | None, message: str | None) -> None:
            on_progress(done, total, message)

        try:
            return _plain(await self._answer(self._call(tool, dict(arguments), progress)))
        except ValueError as exc:
            raise BadReplyError(f"the tool ran, but its result is none: {_brief(exc)}") from exc

    async def watch(self) -> None:
        """Waits: notifications come by themselves."""
        await asyncio.get_running_loop().create_future()

    async def _answer(self, request: Awaitable[Any]) -> Any:
        """What a request gets; the SDK's errors as ours."""
        import anyio
        import mcp

        sdk: Any = mcp
        failure: type[Exception] = getattr(sdk, "MCPError", None) or sdk.McpError
        try:
            return await request
        except failure as exc:
            error: Any = getattr(exc, "error", exc)
            if self._tap.is_forgotten:
                raise SessionLostError("the server does not know the session any more") from exc
            if error.code == _CONNECTION_CLOSED and "closed" in error.message.lower():
                raise SessionLostError(self._tap.refusal or _CLOSED) from exc
            if any(error.message.startswith(text) for text in _OF_THE_TRANSPORT):
                raise SessionLostError(self._tap.refusal or error.message) from exc
            if error.message.startswith(_NO_ANSWER):
                raise SessionLostError(_BROKEN_OFF) from exc
            raise RefusedError(f"{error.code}: {error.message}") from exc
        except (anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.EndOfStream, ConnectionError) as exc:
            raise SessionLostError(_CLOSED) from exc

    async def _list(self, cursor: str | None) -> Any:
        raise NotImplementedError

    async def _call(self, tool: str, arguments: dict[str, Any], progress: Any) -> Any:
        raise NotImplementedError


class _SessionV2(_SessionBase):
    def __init__(self, client: Any, tap: Tap, listeners: Listeners) -> None:
        super().__init__(client, tap, client.server_info, client.protocol_version, client.server_capabilities)
        self._listeners = listeners

    async def _list(self, cursor: str | None) -> Any:
        return await self._client.list_tools(cursor=cursor)

    async def _call(self, tool: str, arguments: dict[str, Any], progress: Any) -> Any:
        return await self._client.call_tool(tool, arguments, progress_callback=progress)

    async def watch(self) -> None:
        changes = getattr(self._client.server_capabilities.tools, "list_changed", None)
        if changes and _is_modern(self._client):
            async with self._client.listen(tools_list_changed=True) as subscription:
                async for _ in subscription:
                    self._listeners.on_tools_changed()
        await super().watch()


def _is_modern(client: Any) -> bool:
    from mcp_types.version import MODERN_PROTOCOL_VERSIONS

    return client.protocol_version in MODERN_PROTOCOL_VERSIONS


class _SessionV1(_SessionBase):
    def __init__(self, client: Any, started: Any, tap: Tap) -> None:
        super().__init__(client, tap, started.serverInfo, started.protocolVersion, started.capabilities)

    async def _list(self, cursor: str | None) -> Any:
        return await self._client.list_tools(cursor)

    async def _call(self, tool: str, arguments: dict[str, Any], progress: Any) -> Any:
        numbers: list[Any] = []
        token = request_numbers.set(numbers)
        task: Any = asyncio.current_task()
        self._tap.calls[task] = numbers
        try:
            return await self._client.call_tool(tool, arguments, progress_callback=progress)
        except asyncio.CancelledError:
            if self._tap.broken.intersection(numbers):
                raise SessionLostError(_BROKEN_OFF) from None
            if numbers:
                await self._cancel(numbers[0])
            raise
        finally:
            del self._tap.calls[task]
            request_numbers.reset(token)

    async def _cancel(self, number: Any) -> None:
        from mcp import types

        sdk: Any = types
        params = sdk.CancelledNotificationParams(requestId=number, reason="caller cancelled")
        notification = sdk.ClientNotification(sdk.CancelledNotification(params=params))
        with suppress(TimeoutError, Exception):  # it is a courtesy: the call is over in any case
            async with asyncio.timeout(_SETTLE):
                await self._client.send_notification(notification)


def _judged(page: Mapping[str, Any], kept: set[str]) -> Mapping[str, Any]:
    """A page of tools as it was sent; those that the SDK left out are marked.

    The protocol of 2026-07-28 tells clients to leave out a tool with a wrong x-mcp-header, and the SDK does.
    """
    tools = [
        {**each, REFUSED: _BAD_HEADERS} if has_name(each) and each["name"] not in kept else each
        for each in page.get("tools") or ()
    ]
    return {**page, "tools": tools}


def _plain(model: Any) -> dict[str, Any]:
    """The wire's dict of a model of the SDK's."""
    plain: dict[str, Any] = model.model_dump(by_alias=True, mode="json", exclude_none=True)
    return plain


def _brief(error: ValueError) -> str:
    """What is wrong first, of all that pydantic says."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
