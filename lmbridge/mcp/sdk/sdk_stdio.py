"""`SdkStdioLink`: connects a stdio server through the transport of the SDK, on systems without process groups.

Only Windows uses it. There, a server and the processes that it has started can be ended together only as a job object,
which the SDK's transport knows how to use; `ServerProcess` relies on process groups, which Windows does not have. The
price is that the SDK reads lines of any size, and loses a message that follows other text on its line.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, Final

import msgspec

from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.sdk.session_errors import describe_error
from lmbridge.mcp.sdk.streams import message_parser

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_PIPE_BYTES: Final = 64 * 2**10
"""How many bytes of a server's stderr are read at once."""


class SdkStdioLink:
    """A `MessageLink` to a server that runs as a child process of the SDK's transport.

    The same task has to start and to end it, as the SDK requires.

    Args:
        spec: The server.
        env: The environment variables that the server gets, in addition to those that the SDK passes on.
        on_end: Called once, with the reason in words, when no more messages will arrive.
        on_stderr: Called in the event loop with each piece of bytes that the server writes to stderr.
    """

    def __init__(
        self,
        spec: ServerSpec,
        env: Mapping[str, str],
        on_end: Callable[[str], None],
        on_stderr: Callable[[bytes], None],
    ) -> None:
        self._spec, self._env, self._on_end, self._on_stderr = spec, env, on_end, on_stderr
        self._stack = AsyncExitStack()
        self._streams: tuple[Any, Any] | None = None
        self._has_ended = False

    async def start(self) -> None:
        """Starts the process.

        Raises:
            OSError: The process cannot be started.
        """
        from mcp.client.stdio import StdioServerParameters, stdio_client

        spec = self._spec
        parameters = StdioServerParameters(
            command=spec.command,
            args=list(spec.args),
            env=dict(self._env),
            cwd=spec.cwd,
            encoding_error_handler="replace",
        )
        reading, writing = os.pipe()
        arguments = (reading, asyncio.get_running_loop())
        threading.Thread(target=self._read_stderr, args=arguments, name="lmbridge-stderr", daemon=True).start()
        # The server has its own copy of the pipe once it has started, and the thread ends when all copies are closed.
        with os.fdopen(writing, "w") as stderr:
            self._streams = await self._stack.enter_async_context(stdio_client(parameters, errlog=stderr))

    async def end(self) -> None:
        """Ends the process and those that it has started."""
        await self._stack.aclose()

    async def receive(self) -> dict[str, Any] | None:
        """Returns the next message, or None once there will be no more."""
        import anyio

        if self._streams is None:
            return None
        while True:
            try:
                item = await self._streams[0].receive()
            except (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
                self._report_end("it closed its stdout")
                return None
            if not isinstance(item, Exception):
                message: dict[str, Any] = item.message.model_dump(by_alias=True, mode="json", exclude_unset=True)
                return message
            logger.debug("MCP server %r: skipped a line on stdout: %s", self._spec.name, describe_error(item))

    async def send(self, message: bytes) -> None:
        """Sends a message, given as its JSON without a line break.

        Raises:
            ConnectionError: The server no longer reads. `on_end` has already been called with the reason.
        """
        import anyio
        from mcp.shared.message import SessionMessage

        if self._streams is None:
            raise BrokenPipeError("the server has not been started")
        try:
            await self._streams[1].send(SessionMessage(message_parser()(msgspec.json.decode(message))))
        except (anyio.ClosedResourceError, anyio.BrokenResourceError) as exc:
            self._report_end("it no longer reads its stdin")
            raise BrokenPipeError("the server no longer reads its stdin") from exc

    def _report_end(self, reason: str) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._on_end(reason)

    def _read_stderr(self, reading: int, loop: asyncio.AbstractEventLoop) -> None:
        """Passes on what the server writes to stderr. It runs in a thread until all processes have closed the pipe."""
        # The loop raises RuntimeError once it is closed, when the output is no longer needed.
        with os.fdopen(reading, "rb", buffering=0) as pipe, contextlib.suppress(RuntimeError):
            while piece := pipe.read(_PIPE_BYTES):
                loop.call_soon_threadsafe(self._on_stderr, piece)
