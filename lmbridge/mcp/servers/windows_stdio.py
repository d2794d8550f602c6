"""`WindowsStdioLink`: a stdio server on Windows, through the transport of the SDK; see `lmbridge.mcp.sdk.sdk_stdio`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.sdk.sdk_stdio import SdkStdioLink
from lmbridge.mcp.servers.environment import base_environment, redact_proxy_passwords
from lmbridge.mcp.servers.package_runners import runner_environment
from lmbridge.mcp.servers.sanitize import sanitize_text
from lmbridge.mcp.servers.server_process import StderrExcerpt


class WindowsStdioLink:
    """A `ServerLink` to a server that runs as a child process of the SDK's transport.

    Args:
        spec: The server.
        on_end: Called once, with the reason in words, when no more messages will arrive.
    """

    def __init__(self, spec: ServerSpec, on_end: Callable[[str], None]) -> None:
        env = {**base_environment(), **runner_environment(spec.command, spec.args), **spec.env}
        self._spec = spec
        self._stderr = StderrExcerpt()
        self._last_stderr_at: float | None = None
        self._link = SdkStdioLink(spec, env, on_end, self._on_stderr)

    @property
    def pid(self) -> int | None:
        """Always None, because the SDK does not reveal the id of the process."""
        return None

    @property
    def stderr_excerpt(self) -> str:
        """The first and last lines that the server wrote to stderr, without secrets and control characters."""
        return self._clean(self._stderr.text)

    @property
    def stderr_tail(self) -> str:
        """The last lines that the server wrote to stderr, without secrets and control characters."""
        return self._clean(self._stderr.tail)

    @property
    def last_stderr_at(self) -> float | None:
        """The time of the event loop at which the server last wrote to stderr, or None if it has not."""
        return self._last_stderr_at

    async def start(self) -> None:
        """Starts the process.

        Raises:
            OSError: The process cannot be started.
        """
        await self._link.start()

    async def end(self, *, patience: float | None = None) -> None:  # noqa: ARG002 - the SDK has its own time limits
        """Ends the process and those that it has started.

        Args:
            patience: Has no effect: the SDK waits for two seconds.
        """
        await self._link.end()

    async def receive(self) -> dict[str, Any] | None:
        """Returns the next message, or None once there will be no more."""
        return await self._link.receive()

    async def send(self, message: bytes) -> None:
        """Sends a message, given as its JSON without a line break.

        Raises:
            ConnectionError: The server no longer reads. `on_end` has already been called with the reason.
        """
        await self._link.send(message)

    def _on_stderr(self, data: bytes) -> None:
        self._last_stderr_at = asyncio.get_running_loop().time()
        self._stderr.feed(data)

    def _clean(self, text: str) -> str:
        return redact_proxy_passwords(self._spec.redact(sanitize_text(text)))
