"""`StdioLink`: connects the child process of a stdio server to a bounded inbox of messages.

The output of a server must not block the event loop or fill the memory, whatever the server writes. So the output is
parsed by `lmbridge.mcp.jsonrpc` and not by the SDK, reading pauses while too many messages are waiting, and a message
that is too large ends the session.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, Protocol

from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.jsonrpc import MessageInbox, MessageLink, MessageTooLargeError
from lmbridge.mcp.servers.environment import redact_proxy_passwords
from lmbridge.mcp.servers.sanitize import sanitize_text
from lmbridge.mcp.servers.server_process import ServerProcess

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_LINES_AT_ONCE: Final = 1000
"""How many lines may be parsed at once. Parsing more of them would keep everything else waiting."""
_SLICE_BYTES: Final = 2 * 2**10
"""The size of a slice, in bytes. Output that has more than `_LINES_AT_ONCE` lines is parsed in slices."""
_LOGGED_BYTES: Final = 200
"""How much of a line that contains no message is shown in the log, in bytes."""


class ServerLink(MessageLink, Protocol):
    """A `MessageLink` to a server that runs as a child process."""

    @property
    def pid(self) -> int | None:
        """The id of the process, or None if it has not started or the id is not known."""
        ...

    @property
    def stderr_excerpt(self) -> str:
        """The first and last lines that the server wrote to stderr, without secrets and control characters."""
        ...

    @property
    def stderr_tail(self) -> str:
        """The last lines that the server wrote to stderr, without secrets and control characters."""
        ...

    @property
    def last_stderr_at(self) -> float | None:
        """The time of the event loop at which the server last wrote to stderr, or None if it has not."""
        ...

    async def start(self) -> None:
        """Starts the process."""
        ...

    async def end(self, *, patience: float | None = None) -> None:
        """Ends the process and those that it has started."""
        ...


class StdioLink:
    """A `ServerLink` to a server that runs as a child process.

    Args:
        spec: The server.
        on_end: Called once, with the reason in words, when no more messages will arrive.
    """

    def __init__(self, spec: ServerSpec, on_end: Callable[[str], None]) -> None:
        self._spec, self._on_end = spec, on_end
        self._process = ServerProcess(self._on_output, self._end_link)
        self._inbox = MessageInbox(on_skipped_line=self._log_skipped_line, resume_reading=self._resume_reading)
        self._unparsed = b""

    @property
    def pid(self) -> int | None:
        """The id of the process, or None before it has started."""
        return self._process.pid

    @property
    def stderr_excerpt(self) -> str:
        """The first and last lines that the server wrote to stderr, without secrets and control characters."""
        return self._clean(self._process.stderr.text)

    @property
    def stderr_tail(self) -> str:
        """The last lines that the server wrote to stderr, without secrets and control characters."""
        return self._clean(self._process.stderr.tail)

    @property
    def last_stderr_at(self) -> float | None:
        """The time of the event loop at which the server last wrote to stderr, or None if it has not."""
        return self._process.last_stderr_at

    def _clean(self, text: str) -> str:
        return redact_proxy_passwords(self._spec.redact(sanitize_text(text)))

    async def start(self) -> None:
        """Starts the process.

        Raises:
            OSError: The process cannot be started.
            MCPError: The event loop cannot start processes, or the guardian cannot be started.
        """
        await self._process.start(self._spec.command, self._spec.args, self._spec.env, self._spec.cwd)

    async def end(self, *, patience: float | None = None) -> None:
        """Ends the process and its group. On cancellation, the caller still waits until they are gone.

        Args:
            patience: How many seconds to wait for the process to end by itself once its stdin is closed. Default: 1.
        """
        self._inbox.close()
        if self._inbox.skipped_lines > 1:
            logger.info(
                "MCP server %r wrote %d lines to its stdout that are not JSON-RPC messages",
                self._spec.name,
                self._inbox.skipped_lines,
            )
        await self._process.end(patience=patience)

    async def receive(self) -> dict[str, Any] | None:
        """Returns the next message, or None once there will be no more."""
        return await self._inbox.receive()

    async def send(self, message: bytes) -> None:
        """Sends a message, given as its JSON without a line break.

        Raises:
            ConnectionError: The server no longer reads. `on_end` has already been called with the reason.
        """
        try:
            await self._process.write(message + b"\n")
        except ConnectionError:
            # A closed stdin is noticed a moment before the exit status of the process is known.
            await self._inbox.wait_closed()
            raise

    def _on_output(self, data: bytes) -> None:
        if self._unparsed:
            # asyncio may have read this piece before reading was paused.
            self._unparsed += data
        elif data.count(b"\n") > _LINES_AT_ONCE:
            self._unparsed = data
            self._process.pause_reading()
            self._parse_slice()
        else:
            self._parse(data)
            if not self._inbox.has_room:
                self._process.pause_reading()

    def _parse_slice(self) -> None:
        data, self._unparsed = self._unparsed[:_SLICE_BYTES], self._unparsed[_SLICE_BYTES:]
        self._parse(data)
        if self._unparsed:
            asyncio.get_running_loop().call_soon(self._parse_slice)
        elif self._inbox.has_room:
            self._process.resume_reading()

    def _parse(self, data: bytes) -> None:
        if not self._inbox.is_closed:
            try:
                self._inbox.feed(data)
            except MessageTooLargeError as exc:
                self._end_link(str(exc))

    def _resume_reading(self) -> None:
        # While slices are still being parsed, reading stays paused. After the last slice, `_parse_slice` resumes it.
        if not self._unparsed:
            self._process.resume_reading()

    def _log_skipped_line(self, line: bytes) -> None:
        shown = redact_proxy_passwords(self._spec.redact(line[:_LOGGED_BYTES].decode(errors="replace")))
        logger.warning(
            "MCP server %r: skipped a line on stdout that is not a JSON-RPC message (later ones are not logged): %r",
            self._spec.name,
            shown,
        )

    def _end_link(self, reason: str) -> None:
        if data := self._unparsed:
            self._unparsed = b""
            self._parse(data)
        if not self._inbox.is_closed:
            # A server that writes its answer and ends may have left out the last line break.
            self._inbox.end()
            self._on_end(reason)
