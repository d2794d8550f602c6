"""The official SDK as a server: tools of ours on its wire, in either of its majors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

import attrs

from lmbridge._version import __version__
from lmbridge.agent.tools import Tool
from lmbridge.mcp.sdk.streams import Tap
from lmbridge.mcp.sdk.wire import NAME, Link, is_v2, over_stdio

logger = logging.getLogger("lmbridge.mcp")

T = TypeVar("T")
Report = Callable[[float, str], Awaitable[None]]
"""Tells the caller how far a call is, and in words."""

_INVALID_PARAMS: Final = -32602
_TURNS: Final = 10
"""Of the event loop, in which a call begins: it takes three or four."""
_GRACE: Final = 5.0
"""Seconds that a cancelled call has for its clean-up."""


@attrs.frozen
class Answer:
    """What a call comes to."""

    texts: Sequence[str]
    """For the model, each a content block."""
    structured: Mapping[str, Any] | None = None
    """The same for a program: an object of JSON."""
    is_error: bool = False


class Service(Protocol):
    """What is served."""

    @property
    def tools(self) -> Sequence[Tool]:
        """With what is known of each in its `annotations`."""
        ...

    @property
    def instructions(self) -> str:
        """What a host is told of all of them."""
        ...

    async def call(self, name: str, arguments: Mapping[str, Any], report: Report | None) -> Answer:
        """Calls one of the tools; what goes wrong is an answer as well.

        Args:
            name: Of a tool that there is.
            arguments: As they were sent.
            report: For progress, if the caller wants it.
        """
        ...


def build(service: Service) -> Any:
    """The SDK's low-level server, `mcp.server.lowlevel.Server`, for whichever transport.

    Args:
        service: What it serves. It stays its owner's to close.

    Raises:
        ImportError: the SDK is not installed.
    """
    return _build_v2(service) if is_v2() else _build_v1(service)


async def serve(server: Any, link: Link) -> None:
    """Serves one host, until it closes its end. A cancel ends the calls in flight.

    Args:
        server: As `build` made it.
        link: The messages of the host.
    """
    async with over_stdio(link if is_v2() else _Patient(link), Tap()) as (reading, writing):
        with _in_hand():
            await server.run(reading, writing, server.create_initialization_options())


@contextlib.contextmanager
def _in_hand() -> Iterator[None]:
    """What 2.x raises when it ends with a message that it had read and not yet handled, in place of the cancel."""
    import anyio

    try:
        yield
    except BaseExceptionGroup as group:
        if group.split(anyio.BrokenResourceError)[1] is not None:
            raise
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from group


class _Patient:
    """A link that lets calls begin before they are cancelled: 1.x goes on with one that had not."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.send = link.send

    async def receive(self) -> dict[str, Any] | None:
        message = await self._link.receive()
        if message is not None and message.get("method") == "notifications/cancelled":
            for _ in range(_TURNS):
                await asyncio.sleep(0)
        return message


def _build_v2(service: Service) -> Any:
    from mcp import types
    from mcp.server.lowlevel import Server

    sdk: Any = types
    make: Any = Server

    async def on_list_tools(_context: Any, _params: Any) -> Any:
        return sdk.ListToolsResult.model_validate(_listed(service))

    async def on_call_tool(context: Any, params: Any) -> Any:
        meta = context.meta or {}

        async def report(progress: float, message: str) -> None:
            with _unread():
                await context.session.report_progress(progress, message=message)

        _check_name(service, params.name)
        wanted = None if meta.get("progress_token") is None else report
        answer = await _alone(service.call(params.name, params.arguments or {}, wanted))
        return sdk.CallToolResult.model_validate(_result(answer))

    return make(
        NAME,
        version=__version__,
        instructions=service.instructions,
        on_list_tools=on_list_tools,
        on_call_tool=on_call_tool,
    )


def _build_v1(service: Service) -> Any:
    from mcp import types
    from mcp.server.lowlevel import Server

    sdk: Any = types
    make: Any = Server
    server = make(NAME, version=__version__, instructions=service.instructions)

    async def on_list_tools(_request: Any) -> Any:
        return sdk.ServerResult(sdk.ListToolsResult.model_validate(_listed(service)))

    async def on_call_tool(request: Any) -> Any:
        context, params = server.request_context, request.params
        token = getattr(context.meta, "progressToken", None)

        async def report(progress: float, message: str) -> None:
            with _unread():
                await context.session.send_progress_notification(
                    token, progress, message=message, related_request_id=str(context.request_id)
                )

        _check_name(service, params.name)
        wanted = None if token is None else report
        answer = await _alone(service.call(params.name, params.arguments or {}, wanted))
        return sdk.ServerResult(sdk.CallToolResult.model_validate(_result(answer)))

    # Not by its decorators: they validate arguments in a way of their own, and make results of what raises.
    server.request_handlers[sdk.ListToolsRequest] = on_list_tools
    server.request_handlers[sdk.CallToolRequest] = on_call_tool
    return server


def _listed(service: Service) -> dict[str, Any]:
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


def _result(answer: Answer) -> dict[str, Any]:
    result: dict[str, Any] = {
        "content": [{"type": "text", "text": text} for text in answer.texts],
        "isError": answer.is_error,
    }
    return result if answer.structured is None else result | {"structuredContent": dict(answer.structured)}


def _check_name(service: Service, name: str) -> None:
    """Raises the SDK's error of the protocol for a tool that there is not."""
    import mcp

    names = [tool.name for tool in service.tools]
    if name in names:
        return
    sdk: Any = mcp
    told = f"Unknown tool: {name}; there are: {', '.join(names)}"
    if is_v2():
        raise sdk.MCPError(code=_INVALID_PARAMS, message=told)
    from mcp import types

    raise sdk.McpError(types.ErrorData(code=_INVALID_PARAMS, message=told))


def _unread() -> contextlib.AbstractContextManager[None]:
    """What becomes of progress that nobody can be told any more."""
    import anyio

    return contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError)


async def _alone(call: Coroutine[Any, Any, T]) -> T:
    """Makes a call in a task of its own.

    The SDK cancels by anyio's scopes: within them every await of the clean-up would be cancelled as well.
    """
    import anyio

    task = asyncio.create_task(call)
    try:
        await asyncio.wait({task})
    finally:
        if not task.done():
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait({task}, timeout=_GRACE)
            if not task.done():
                logger.warning("a call goes on %g seconds after it was cancelled: %r", _GRACE, task)
    if task.cancelled():  # not by us, and nobody may take it for the caller's own
        raise RuntimeError("the call was cancelled from within")
    return task.result()
