"""Serves our tools to an MCP host through the official SDK, with either of its major versions.

This module uses the SDK's low-level `Server` and not its decorators or `FastMCP`. Those validate arguments and turn
exceptions into results by rules that differ between 1.x and 2.x. With the low-level server, the bridge alone decides
what a host reads, whichever SDK is installed.

Each call runs in a separate task. The SDK cancels a call through an anyio cancel scope. Inside a cancelled scope, every
further `await` is cancelled as well, so a handler could not close its stream or wait for its tools.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

import attrs

from lmbridge._tasks import end_task
from lmbridge._version import __version__
from lmbridge.agent.tools import Tool
from lmbridge.mcp.jsonrpc import MessageLink
from lmbridge.mcp.sdk.package import LMBRIDGE_NAME, is_v2
from lmbridge.mcp.sdk.streams import streams_over_link

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

T = TypeVar("T")
ReportProgress = Callable[[float, str], Awaitable[None]]
"""Sends one progress notification to the host: a number that grows, and a message in words."""

_INVALID_PARAMS: Final = -32602
_TURNS_BEFORE_CANCEL: Final = 10
"""How many turns of the event loop a new call gets before its cancellation is delivered. It needs three or four."""
_CLEANUP_SECONDS: Final = 5.0
"""How long the server waits for a cancelled call to clean up, in seconds."""


@attrs.frozen
class HostAnswer:
    """The result of one tool call that is sent to the host."""

    texts: Sequence[str]
    """Text for the host's model. Each item becomes a content block."""
    structured: Mapping[str, Any] | None = None
    """The same result for programs, as a JSON object. Default: None, which sends no structured content."""
    is_error: bool = False
    """Whether the call failed. The host's model then sees `texts` as an error message."""


class ToolService(Protocol):
    """A set of tools that can be served to a host."""

    @property
    def tools(self) -> Sequence[Tool]:
        """The tools, in the order in which they are listed. Their `annotations` are sent as MCP annotations."""
        ...

    @property
    def instructions(self) -> str:
        """Text for the host's model about the tools as a whole."""
        ...

    async def call(self, name: str, arguments: Mapping[str, Any], report: ReportProgress | None) -> HostAnswer:
        """Calls a tool. A failure is returned as an answer with `is_error` instead of being raised.

        Args:
            name: The name of one of `tools`.
            arguments: The arguments as the host sent them, not validated.
            report: Sends a progress notification; None if the host did not ask for progress.
        """
        ...


def build_server(service: ToolService) -> Any:
    """Returns the SDK's low-level server, an `mcp.server.lowlevel.Server`, for use with any transport.

    Args:
        service: The tools to serve. The caller closes it.

    Raises:
        ImportError: The SDK is not installed.
    """
    return _build_v2(service) if is_v2() else _build_v1(service)


async def serve(server: Any, link: MessageLink) -> None:
    """Serves one host until the host closes its end. A cancellation of the caller also cancels the calls in flight.

    Args:
        server: The server that `build_server` returned.
        link: The connection to the host.
    """
    async with streams_over_link(link if is_v2() else _DelayedCancelLink(link)) as (reading, writing):
        with _restore_cancellation():
            await server.run(reading, writing, server.create_initialization_options())


@contextlib.contextmanager
def _restore_cancellation() -> Iterator[None]:
    """Raises the caller's cancellation where SDK 2.x raises a group of broken-stream errors instead.

    The SDK does so when it is cancelled between reading a message and handling it. If the caller was not cancelled, the
    errors only mean that the host has left, and are dropped.
    """
    import anyio

    try:
        yield
    except BaseExceptionGroup as group:
        if group.split(anyio.BrokenResourceError)[1] is not None:
            raise
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from group


class _DelayedCancelLink:
    """A link that lets a new call start before its cancellation arrives.

    SDK 1.x ignores the cancellation of a call that it has not started yet, and then runs the call to its end.
    """

    def __init__(self, link: MessageLink) -> None:
        self._link = link
        self.send = link.send

    async def receive(self) -> dict[str, Any] | None:
        message = await self._link.receive()
        if message is not None and message.get("method") == "notifications/cancelled":
            for _ in range(_TURNS_BEFORE_CANCEL):
                await asyncio.sleep(0)
        return message


def _build_v2(service: ToolService) -> Any:
    from mcp import types
    from mcp.server.lowlevel import Server

    sdk: Any = types
    make: Any = Server

    async def on_list_tools(_context: Any, _params: Any) -> Any:
        return sdk.ListToolsResult.model_validate(_list_tools_result(service))

    async def on_call_tool(context: Any, params: Any) -> Any:
        meta = context.meta or {}

        async def report(progress: float, message: str) -> None:
            with _ignore_closed_streams():
                await context.session.report_progress(progress, message=message)

        _check_tool_name(service, params.name)
        requested_report = None if meta.get("progress_token") is None else report
        answer = await _run_in_separate_task(service.call(params.name, params.arguments or {}, requested_report))
        return sdk.CallToolResult.model_validate(_call_tool_result(answer))

    return make(
        LMBRIDGE_NAME,
        version=__version__,
        instructions=service.instructions,
        on_list_tools=on_list_tools,
        on_call_tool=on_call_tool,
    )


def _build_v1(service: ToolService) -> Any:
    from mcp import types
    from mcp.server.lowlevel import Server

    sdk: Any = types
    make: Any = Server
    server = make(LMBRIDGE_NAME, version=__version__, instructions=service.instructions)

    async def on_list_tools(_request: Any) -> Any:
        return sdk.ServerResult(sdk.ListToolsResult.model_validate(_list_tools_result(service)))

    async def on_call_tool(request: Any) -> Any:
        context, params = server.request_context, request.params
        token = getattr(context.meta, "progressToken", None)

        async def report(progress: float, message: str) -> None:
            with _ignore_closed_streams():
                await context.session.send_progress_notification(
                    token, progress, message=message, related_request_id=str(context.request_id)
                )

        _check_tool_name(service, params.name)
        requested_report = None if token is None else report
        answer = await _run_in_separate_task(service.call(params.name, params.arguments or {}, requested_report))
        return sdk.ServerResult(sdk.CallToolResult.model_validate(_call_tool_result(answer)))

    # The decorators `server.list_tools` and `server.call_tool` are avoided: see the top of this module.
    server.request_handlers[sdk.ListToolsRequest] = on_list_tools
    server.request_handlers[sdk.CallToolRequest] = on_call_tool
    return server


def _list_tools_result(service: ToolService) -> dict[str, Any]:
    return {
        "tools": [
            {
                "name": tool.name,
                "description": tool.description,
                "inputSchema": dict(tool.parameters),
                "annotations": dict(tool.annotations),
            }
            for tool in service.tools
        ]
    }


def _call_tool_result(answer: HostAnswer) -> dict[str, Any]:
    result: dict[str, Any] = {
        "content": [{"type": "text", "text": text} for text in answer.texts],
        "isError": answer.is_error,
    }
    return result if answer.structured is None else result | {"structuredContent": dict(answer.structured)}


def _check_tool_name(service: ToolService, name: str) -> None:
    """Raises the SDK's protocol error if the service has no tool of that name."""
    import mcp

    names = [tool.name for tool in service.tools]
    if name in names:
        return
    sdk: Any = mcp
    message = f"Unknown tool: {name}. The tools are: {', '.join(names)}"
    if is_v2():
        raise sdk.MCPError(code=_INVALID_PARAMS, message=message)
    from mcp import types

    raise sdk.McpError(types.ErrorData(code=_INVALID_PARAMS, message=message))


def _ignore_closed_streams() -> contextlib.AbstractContextManager[None]:
    """Suppresses the errors of a progress notification that is sent after the host has left."""
    import anyio

    return contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError)


async def _run_in_separate_task(call: Coroutine[Any, Any, T]) -> T:
    """Awaits a call in a task that anyio's cancel scopes do not reach, so that its clean-up can await.

    When the caller is cancelled, the call is cancelled once, and the caller waits for it up to `_CLEANUP_SECONDS`.
    """
    import anyio

    task = asyncio.create_task(call)
    has_ended = False
    try:
        await asyncio.wait({task})
    finally:
        if not task.done():
            with anyio.CancelScope(shield=True):
                has_ended = await end_task(task, grace=_CLEANUP_SECONDS)
            if not has_ended:
                logger.warning(
                    "a tool call is still running %g seconds after its cancellation: %r", _CLEANUP_SECONDS, task
                )
    if task.cancelled():
        # The caller was not cancelled, so a CancelledError here would be mistaken for the caller's.
        raise RuntimeError("the call was cancelled from within lmbridge, not by the host")
    return task.result()
