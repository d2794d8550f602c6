"""`ManagedServer`: a server that is started when it is needed, shared by all runs, and restarted after a crash.

A server is started by the first run that uses it and outlives the run: to start one takes 0.2 to 0.8 seconds, and a
hundred runs that each start their own would start a hundred processes. It is closed when no run has used it for a
while.

It is not restarted by itself when it dies, but at the next call. A server that dies at once would otherwise be
restarted for ever, although no run needs it, and no run would see the error of its start. The pause before a restart
doubles, up to 30 seconds, and is forgotten once a session has lived for ten seconds.

A call is never repeated, because it may have run; only if the server has declared the tool idempotent, it is sent once
more. All other errors of a call are text for the model, which can often do something about them.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from lmbridge._tasks import SingleFlight
from lmbridge.errors import MCPConnectionError, MCPError, TaskCancelledError, ToolError
from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.sdk import BadReplyError, RefusedError, SessionLostError, describe_error
from lmbridge.mcp.servers.events import McpEvent, ServerStateChanged
from lmbridge.mcp.servers.results import result_text
from lmbridge.mcp.servers.session_owner import SessionOwner

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_FIRST_BACKOFF_SECONDS: Final = 0.5
"""Seconds before the second attempt to start a server. Each further pause is twice as long as the one before."""
_LONGEST_BACKOFF_SECONDS: Final = 30.0
_MOST_DOUBLINGS: Final = 10
_STABLE_SECONDS: Final = 10.0
"""Seconds after which a session counts as stable, so that the next start is not delayed when it ends."""
_CLOSE_SECONDS: Final = 6.0
"""Seconds that a session and its processes have to end."""


class ServerState(enum.StrEnum):
    """The states of a server."""

    IDLE = "idle"
    """It is not running, because no run needs it."""
    STARTING = "starting"
    """It is being started, or connected to, or asked for its tools."""
    READY = "ready"
    """Its tools can be called."""
    LOST = "lost"
    """Its session ended unexpectedly. The next call starts another one."""
    BACKOFF = "backoff"
    """A run needs it, and it will be started after a pause, because it failed shortly before."""
    FAILED = "failed"
    """It could not be started. The next run that needs it tries again."""
    CLOSED = "closed"
    """It has been closed, and will not be started again."""


@attrs.frozen
class ServerStatus:
    """The status of a server at one moment."""

    name: str
    """The name of the server in the configuration."""
    state: ServerState
    """The state of the server."""
    error: str | None = None
    """Why the server last failed to start or was lost, or None."""
    tools: int | None = None
    """How many tools the server has, or None if it is not running."""
    starts: int = 0
    """How many sessions with the server have been opened."""
    pid: int | None = None
    """The id of the server's process, or None if it is not running or is on HTTP."""
    protocol: str | None = None
    """The revision of the protocol that is spoken, such as "2025-11-25", or None if it is not running."""
    stderr_tail: str = attrs.field(default="", repr=False)
    """The last lines that the server wrote to stderr, without secrets and control characters."""


class ManagedServer:
    """One server of a configuration.

    Args:
        spec: How the server is reached.
        emit: Called with the events of the server.
        connect_timeout: Seconds for connecting to the server and listing its tools.
        idle_linger: Seconds after which the server is closed if no run uses it; None to keep it.
    """

    def __init__(
        self, spec: ServerSpec, emit: Callable[[McpEvent], None], *, connect_timeout: float, idle_linger: float | None
    ) -> None:
        self.spec = spec
        self._emit, self._connect_timeout, self._idle_linger = emit, connect_timeout, idle_linger
        self._state = ServerState.IDLE
        self._error: str | None = None
        self._session: SessionOwner | None = None
        self._opening = SingleFlight[SessionOwner]("the MCP server was closed while it was starting")
        self._opening_task: asyncio.Task[Any] | None = None
        self._users = 0
        self._starts = self._failures = 0
        self._retry_at = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._owner_tasks: set[asyncio.Task[None]] = set()
        self._is_retired = False

    @property
    def status(self) -> ServerStatus:
        """The status of the server now."""
        session = self._session
        return ServerStatus(
            name=self.spec.name,
            state=self._state,
            error=self._error,
            tools=None if session is None else len(session.tools),
            starts=self._starts,
            pid=None if session is None or session.ended.done() else session.pid,
            protocol=None if session is None else session.protocol,
            stderr_tail="" if session is None else session.stderr_tail,
        )

    @property
    def is_closed(self) -> bool:
        """Whether the server has been closed, and none of its processes is left."""
        return self._state is ServerState.CLOSED and not self._owner_tasks

    def acquire(self) -> None:
        """Adds a user. The server is not closed for being idle while it has users."""
        self._users += 1
        self._stop_idle_timer()

    def release(self) -> None:
        """Removes a user. When the last one has left, the server is closed after `idle_linger` seconds."""
        self._users -= 1
        if self._users or self._state is ServerState.CLOSED:
            return
        if self._is_retired:
            self._shut_down(ServerState.CLOSED)
        elif self._idle_linger is not None:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_later(self._idle_linger, self._shut_down, ServerState.IDLE)

    def retire(self) -> None:
        """Closes the server as soon as it has no users."""
        self._is_retired = True
        if not self._users:
            self._shut_down(ServerState.CLOSED)

    async def close(self) -> None:
        """Closes the server, even if it has users, and waits until its processes are gone."""
        self._shut_down(ServerState.CLOSED)
        if self._owner_tasks:
            await asyncio.wait(self._owner_tasks, timeout=_CLOSE_SECONDS)
        for task in self._owner_tasks:
            logger.error("MCP server %r did not close within %g seconds", self.spec.name, _CLOSE_SECONDS)
            task.cancel()
        if self._owner_tasks:
            await asyncio.wait(self._owner_tasks, timeout=_CLOSE_SECONDS)

    def _shut_down(self, state: ServerState) -> None:
        self._stop_idle_timer()
        if self._opening_task is not None:
            self._opening_task.cancel()
        if self._session is not None:
            self._session.stop()
            self._session = None
        self._change_state(state)

    def _stop_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    async def definitions(self) -> list[Any]:
        """Returns the definitions of the server's tools, as the server sent them. It is started if it is not running.

        Raises:
            MCPConnectionError: The server cannot be started.
        """
        session = await self._connect()
        try:
            async with asyncio.timeout(self._connect_timeout):
                await session.refresh_tools()
        except (TimeoutError, SessionLostError, RefusedError, BadReplyError) as exc:
            logger.warning(
                "MCP server %r: its tools changed, but the new list could not be read, so the old one stays in use: %s",
                self.spec.name,
                describe_error(exc),
            )
        return session.tools

    async def call(
        self, tool: str, arguments: Mapping[str, Any], *, is_idempotent: bool, timeout: float | None
    ) -> Mapping[str, Any]:
        """Calls a tool, and returns the result as the server sent it. The server is started if it is not running.

        Args:
            tool: The name of the tool on the server.
            arguments: The arguments of the call.
            is_idempotent: Whether the server has declared that a second call does no more than the first. Only then
                is the call made a second time if the server is lost during the first.
            timeout: Seconds that the call may take, without a restart before it; None for no limit.

        Raises:
            ToolError: The call failed, for whatever reason; the text is for the model.
        """
        name = self.spec.name
        try:
            try:
                return await self._call_once(tool, arguments, timeout)
            except SessionLostError as exc:
                if not is_idempotent:
                    raise
                logger.info(
                    "MCP server %r was lost during a call of %r, which is repeated because it is idempotent: %s",
                    name,
                    tool,
                    exc,
                )
                return await self._call_once(tool, arguments, timeout)
        except SessionLostError as exc:
            reason = self.spec.redact(str(exc))
            raise ToolError(
                f"the MCP server {name!r} was lost during the call ({reason}); the tool may or may not have run", exc
            ) from exc
        except TimeoutError as exc:
            raise ToolError(
                f"the MCP server {name!r} did not answer within {timeout:g} seconds; the call was cancelled, but the "
                "tool may have run",
                exc,
            ) from exc
        except (RefusedError, BadReplyError) as exc:
            raise ToolError(self.spec.redact(str(exc)), exc) from exc
        except MCPError as exc:
            raise ToolError(str(exc), exc) from exc

    async def _call_once(self, tool: str, arguments: Mapping[str, Any], timeout: float | None) -> Mapping[str, Any]:
        self.acquire()
        try:
            session = await self._connect()
            try:
                result = await session.call(tool, arguments, timeout)
            except SessionLostError:
                self._on_session_ended(session)
                raise
        finally:
            self.release()
        if result.get("isError"):
            text = result_text(result) or "the tool failed without saying why"
            raise ToolError(text, context={"result": result})
        return result

    async def _connect(self) -> SessionOwner:
        """Returns a session that can be used. Callers that wait at the same time share one session.

        Raises:
            MCPConnectionError: The server cannot be started, or is closed.
        """
        if self._state is ServerState.CLOSED:
            raise self._connection_error("is closed")
        if self._session is not None and self._session.ended.done():
            # The callback of `ended` has not run yet.
            self._on_session_ended(self._session)
        if self._session is not None:
            return self._session
        try:
            return await self._opening.run("session", self._open_and_track)
        except TaskCancelledError as exc:
            raise self._connection_error("was closed while it was starting") from exc

    async def _open_and_track(self) -> SessionOwner:
        # `_shut_down` cannot cancel this task before its first step, because it does not know the task yet.
        if self._state is ServerState.CLOSED:
            raise self._connection_error("was closed while it was starting")
        self._opening_task = asyncio.current_task()
        try:
            return await self._open_new_session()
        finally:
            # Another opening may have begun meanwhile, if this one was cancelled.
            if self._opening_task is asyncio.current_task():
                self._opening_task = None

    async def _open_new_session(self) -> SessionOwner:
        session: SessionOwner | None = None
        try:
            await self._back_off()
            self._change_state(ServerState.STARTING)
            session = SessionOwner(self.spec, self._emit)
            self._owner_tasks.add(session.task)
            session.task.add_done_callback(self._owner_tasks.discard)
            await asyncio.wait({session.ready}, timeout=self._connect_timeout)
        except asyncio.CancelledError:
            if session is not None:
                session.stop()
            if self._state is not ServerState.CLOSED:
                self._change_state(ServerState.IDLE)
            raise
        if not session.ready.done():
            session.stop(f"it did not answer within {self._connect_timeout:g} seconds")
            raise self._start_failed(session, None)
        error = session.ready.exception()
        if isinstance(error, ImportError):
            self._change_state(ServerState.IDLE)
            raise error
        if error is not None:
            raise self._start_failed(session, error)
        self._starts += 1
        self._session = session
        self._error = None
        self._change_state(ServerState.READY)
        session.ended.add_done_callback(lambda _: self._on_session_ended(session))
        return session

    async def _back_off(self) -> None:
        """Waits until the pause after the last failure is over."""
        pause = self._retry_at - asyncio.get_running_loop().time()
        if pause > 0:
            self._change_state(ServerState.BACKOFF)
        await asyncio.sleep(max(0.0, pause))

    def _start_failed(self, session: SessionOwner, error: BaseException | None) -> MCPConnectionError:
        """Records a failed start and returns its error. Without an `error`, the server has not answered in time."""
        self._schedule_backoff()
        self._error = self.spec.redact(session.ended.result().reason)
        self._change_state(ServerState.FAILED)
        hint = None
        if error is None:
            hint = 'allow it more time with "lmbridge": {"connectTimeout": ...} in the configuration'
        elif isinstance(error.__cause__, FileNotFoundError):
            hint = "install it, or give its full path in the configuration"
        return self._connection_error(f"could not be started: {self._error}", error, session.stderr_tail, hint)

    def _schedule_backoff(self) -> None:
        pause = min(_LONGEST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2**self._failures)
        self._failures = min(self._failures + 1, _MOST_DOUBLINGS)
        self._retry_at = asyncio.get_running_loop().time() + pause

    def _on_session_ended(self, session: SessionOwner) -> None:
        """Records that the session in use has ended by itself. Called again for the same session, it does nothing."""
        if self._session is not session:
            return
        self._session = None
        if asyncio.get_running_loop().time() - session.opened_at < _STABLE_SECONDS:
            self._schedule_backoff()
        else:
            self._failures, self._retry_at = 0, 0.0
        end = session.ended.result()
        self._error = self.spec.redact(end.reason)
        # A session in use that was closed on request ends with its event loop; the hub warns that it was not closed.
        if not end.was_requested:
            logger.warning(
                "MCP server %r was lost: %s%s", self.spec.name, self._error, _describe_stderr(session.stderr_tail)
            )
        self._change_state(ServerState.LOST)

    def _connection_error(
        self, problem: str, error: BaseException | None = None, stderr_tail: str = "", hint: str | None = None
    ) -> MCPConnectionError:
        return MCPConnectionError(
            f"MCP server {self.spec.name!r} {problem}{_describe_stderr(stderr_tail)}",
            error,
            server=self.spec.name,
            context={"target": self.spec.redact(self.spec.target), "stderr": stderr_tail},
            hint=hint,
        )

    def _change_state(self, state: ServerState) -> None:
        if state is not self._state:
            self._state = state
            is_problem = state in (ServerState.FAILED, ServerState.BACKOFF, ServerState.LOST)
            self._emit(ServerStateChanged(self.spec.name, state, self._error if is_problem else None))


def _describe_stderr(stderr_tail: str) -> str:
    """Returns the end of an error that quotes a server's stderr: one line in the sentence, several lines below it."""
    if not stderr_tail:
        return ""
    quoted = stderr_tail if "\n" not in stderr_tail else "".join(f"\n  {line}" for line in stderr_tail.split("\n"))
    return f"; the last lines of its stderr: {quoted}"
