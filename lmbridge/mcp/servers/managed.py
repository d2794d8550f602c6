"""A server: started when it is needed, shared by all who need it, restarted after a crash, closed when nobody does."""

from __future__ import annotations

import asyncio
import copy
import enum
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from lmbridge.errors import MCPConnectionError, MCPError, ToolError
from lmbridge.mcp.config.spec import ServerSpec
from lmbridge.mcp.sdk import BadReplyError, RefusedError, SessionLostError, explain
from lmbridge.mcp.servers.connection import CLOSED, Connection
from lmbridge.mcp.servers.events import McpEvent, ServerStateChanged
from lmbridge.mcp.servers.results import text_of

logger = logging.getLogger("lmbridge.mcp")

_FIRST_WAIT: Final = 0.5
_LONGEST_WAIT: Final = 30.0
"""Seconds between two attempts to start a server that does not stay: they double."""
_STABLE: Final = 10.0
"""Seconds after which a server counts as one that stays."""
_CLOSE: Final = 6.0
"""Seconds that a session and its processes have to end."""


class ServerState(enum.StrEnum):
    """What a server is doing."""

    IDLE = "idle"
    """It is not needed now."""
    STARTING = "starting"
    READY = "ready"
    LOST = "lost"
    """Its session ended by itself; the next call starts another."""
    BACKOFF = "backoff"
    """Somebody waits for it to be started again, after a pause."""
    FAILED = "failed"
    """It could not be started; the next one who needs it tries again."""
    CLOSED = "closed"


@attrs.frozen
class ServerStatus:
    """How a server is."""

    name: str
    state: ServerState
    error: str | None = None
    """Why it failed, or was lost, last."""
    tools: int | None = None
    """Definitions that it sent."""
    starts: int = 0
    """Sessions that were opened."""
    pid: int | None = None
    protocol: str | None = None
    last_words: str = attrs.field(default="", repr=False)
    """The last lines of its stderr."""


class McpServer:
    """A server of a configuration.

    Args:
        spec: How it is reached.
        emit: Gets its events.
        connect_timeout: Seconds for connecting and listing its tools.
        linger: Seconds after which a server that nobody uses is closed, or None for never.
    """

    def __init__(
        self, spec: ServerSpec, emit: Callable[[McpEvent], None], *, connect_timeout: float, linger: float | None
    ) -> None:
        self.spec = spec
        self._emit, self._connect_timeout, self._linger = emit, connect_timeout, linger
        self._state = ServerState.IDLE
        self._error: str | None = None
        self._connection: Connection | None = None
        self._opening: asyncio.Task[Connection] | None = None
        self._waiting = 0
        self._users = 0
        self._starts = self._failures = 0
        self._not_before = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._retired = False

    @property
    def status(self) -> ServerStatus:
        """How it is."""
        live = self._connection
        return ServerStatus(
            self.spec.name,
            self._state,
            self._error,
            None if live is None else len(live.tools),
            self._starts,
            None if live is None or live.over.done() else live.pid,
            None if live is None else live.protocol,
            "" if live is None else live.last_words,
        )

    @property
    def is_closed(self) -> bool:
        """Whether it is closed, and nothing of it is left."""
        return self._state is ServerState.CLOSED and not self._tasks

    # Use

    def acquire(self) -> None:
        """Notes a user; it is not closed while there is one."""
        self._users += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def release(self) -> None:
        """Notes that a user has gone."""
        self._users -= 1
        if self._users or self._state is ServerState.CLOSED:
            return
        if self._retired:
            self._rest(ServerState.CLOSED)
        elif self._linger is not None:
            self._timer = asyncio.get_running_loop().call_later(self._linger, self._rest, ServerState.IDLE)

    def retire(self) -> None:
        """Closes it as soon as it has no users."""
        self._retired = True
        if not self._users:
            self._rest(ServerState.CLOSED)

    async def close(self) -> None:
        """Closes it, whoever uses it, and waits until its processes are gone."""
        self._rest(ServerState.CLOSED)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE)
        for task in self._tasks:
            logger.error("MCP server %r did not close within %g seconds", self.spec.name, _CLOSE)
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE)

    def _rest(self, state: ServerState) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._opening is not None:
            self._opening.cancel()
        if self._connection is not None:
            self._connection.abandon(CLOSED)
            self._connection = None
        self._set(state)

    async def definitions(self) -> list[Any]:
        """The definitions of its tools, as it sent them; it is started if it is not running.

        Raises:
            MCPConnectionError: it cannot be started.
        """
        connection = await self._connected()
        try:
            async with asyncio.timeout(self._connect_timeout):
                await connection.refresh()
        except (TimeoutError, SessionLostError, RefusedError, BadReplyError) as exc:
            logger.warning(
                "MCP server %r: its tools changed, and it does not tell them: %s", self.spec.name, explain(exc)
            )
        return connection.tools

    async def call(
        self, tool: str, arguments: Mapping[str, Any], *, is_idempotent: bool, timeout: float | None
    ) -> Mapping[str, Any]:
        """The result of a call, as the server sent it.

        Args:
            tool: The tool's own name.
            arguments: Its arguments.
            is_idempotent: Whether the server said that a second call does no more than the first. Only then is a call
                made again if the server is lost while it runs.
            timeout: Seconds that the call may take; a restart before it does not count.

        Raises:
            ToolError: anything that went wrong; the text is for the model.
        """
        try:
            try:
                return await self._call(tool, arguments, timeout)
            except SessionLostError as exc:
                if not is_idempotent:
                    raise
                logger.info("MCP server %r: %r is called again: %s", self.spec.name, tool, exc)
                return await self._call(tool, arguments, timeout)
        except SessionLostError as exc:
            lost = f"the MCP server {self.spec.name!r} was lost during the call ({self.spec.redacted(str(exc))})"
            raise ToolError(f"{lost}; the tool may or may not have run", exc) from exc
        except TimeoutError as exc:
            late = f"the MCP server {self.spec.name!r} did not answer within {timeout:g} seconds"
            raise ToolError(f"{late}; it was told to stop, but the tool may have run", exc) from exc
        except (RefusedError, BadReplyError) as exc:
            raise ToolError(self.spec.redacted(str(exc)), exc) from exc
        except MCPError as exc:
            raise ToolError(str(exc), exc) from exc

    async def _call(self, tool: str, arguments: Mapping[str, Any], timeout: float | None) -> Mapping[str, Any]:
        self.acquire()
        try:
            connection = await self._connected()
            try:
                result = await connection.call(tool, arguments, timeout)
            except SessionLostError:
                self._lost(connection)
                raise
        finally:
            self.release()
        if result.get("isError"):
            raise ToolError(text_of(result) or "the tool failed, and does not say why", context={"result": result})
        return result

    # Starting

    async def _connected(self) -> Connection:
        """A session that can be used; all who wait for one wait for the same.

        Raises:
            MCPConnectionError: it cannot be started.
        """
        if self._state is ServerState.CLOSED:
            raise self._failure("is closed", None)
        if self._connection is not None and self._connection.over.done():
            self._lost(self._connection)  # its own callback has not been run yet
        if self._connection is not None:
            return self._connection
        opening = self._opening
        if opening is None:
            opening = self._opening = asyncio.create_task(self._open(), name=f"lmbridge-mcp-start-{self.spec.name}")
            opening.add_done_callback(self._opened)
        self._waiting += 1
        try:
            return await asyncio.shield(opening)
        except MCPConnectionError as exc:
            raise copy.copy(exc) from exc.__cause__  # each of those who wait gets one of its own
        except asyncio.CancelledError:
            if opening.cancelled() and self._opening is not opening and not _is_cancelled():
                raise self._failure("was closed while it was starting", None) from None
            raise
        finally:
            self._waiting -= 1
            if not self._waiting and not opening.done():
                opening.cancel()
                self._opening = None

    def _opened(self, opening: asyncio.Task[Connection]) -> None:
        if self._opening is opening:
            self._opening = None
        if not opening.cancelled():
            opening.exception()  # those who waited may have gone

    async def _open(self) -> Connection:
        pause = self._not_before - asyncio.get_running_loop().time()
        if pause > 0:
            self._set(ServerState.BACKOFF)
        connection: Connection | None = None
        try:
            await asyncio.sleep(max(0.0, pause))
            self._set(ServerState.STARTING)
            connection = Connection(self.spec, self._emit)
            self._keep(connection.task)
            await asyncio.wait({connection.ready}, timeout=self._connect_timeout)
        except asyncio.CancelledError:
            if connection is not None:
                connection.abandon(CLOSED)
            if self._state is not ServerState.CLOSED:
                self._set(ServerState.IDLE)
            raise
        if not connection.ready.done():
            connection.abandon(f"it did not answer within {self._connect_timeout:g} seconds")
            raise self._not_started(connection, None)
        if (error := connection.ready.exception()) is not None:
            if isinstance(error, ImportError):
                self._set(ServerState.IDLE)
                raise error
            raise self._not_started(connection, error)
        self._starts += 1
        self._connection = connection
        self._error = None
        self._set(ServerState.READY)
        connection.over.add_done_callback(lambda _: self._lost(connection))
        return connection

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _not_started(self, connection: Connection, error: BaseException | None) -> MCPConnectionError:
        self._failed_again()
        reason = connection.over.result() if connection.over.done() else explain(error or TimeoutError())
        self._error = self.spec.redacted(reason)
        self._set(ServerState.FAILED)
        hint = None
        if error is None:
            hint = 'give it longer by "lmbridge": {"connectTimeout": ...} in the configuration'
        elif isinstance(error.__cause__, FileNotFoundError):
            hint = "install it, or give its full path in the configuration"
        return self._failure(f"could not be started: {self._error}", error, connection.last_words, hint)

    def _failed_again(self) -> None:
        wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2**self._failures)
        self._failures = min(self._failures + 1, 10)
        self._not_before = asyncio.get_running_loop().time() + wait

    def _lost(self, connection: Connection) -> None:
        """Notes the end of a session that nobody wanted to end."""
        if self._connection is not connection:
            return
        self._connection = None
        lived = asyncio.get_running_loop().time() - connection.began
        if lived < _STABLE:
            self._failed_again()
        else:
            self._failures, self._not_before = 0, 0.0
        self._error = self.spec.redacted(connection.over.result())
        words = f"; the last lines of its stderr: {_quoted(connection.last_words)}" if connection.last_words else ""
        if connection.over.result() != CLOSED:  # else the event loop ends, and whoever forgot to close us with it
            logger.warning("MCP server %r was lost: %s%s", self.spec.name, self._error, words)
        self._set(ServerState.LOST)

    def _failure(
        self, what: str, error: BaseException | None, last_words: str = "", hint: str | None = None
    ) -> MCPConnectionError:
        words = f"; the last lines of its stderr: {_quoted(last_words)}" if last_words else ""
        return MCPConnectionError(
            f"MCP server {self.spec.name!r} {what}{words}",
            error,
            server=self.spec.name,
            context={"target": self.spec.redacted(self.spec.target), "stderr": last_words},
            hint=hint,
        )

    def _set(self, state: ServerState) -> None:
        if state is not self._state:
            self._state = state
            is_wrong = state in (ServerState.FAILED, ServerState.BACKOFF, ServerState.LOST)
            self._emit(ServerStateChanged(self.spec.name, state, self._error if is_wrong else None))


def _quoted(lines: str) -> str:
    """Lines in one sentence: a single one as it is, several below it."""
    return lines if "\n" not in lines else "".join(f"\n  {line}" for line in lines.split("\n"))


def _is_cancelled() -> bool:
    """Whether somebody cancelled the task that runs now."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
