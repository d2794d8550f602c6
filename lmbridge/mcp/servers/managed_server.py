"""`ManagedServer`: a server that is started when it is needed, shared by all runs, and restarted after a crash.

A server is started by the first run that uses it and outlives the run: starting a server takes 0.2 to 0.8 seconds, and
if each of a hundred runs started its own, there would be a hundred processes. A server is closed when no run has used
it for a while.

A server that dies is restarted by the next call, and not before. Otherwise a server that dies at once would be
restarted for ever although no run needs it, and no run would see the error of its start. The pause before a restart
doubles each time, up to 30 seconds, and is reset once a session has lasted for ten seconds.

A call that was interrupted is not repeated, because it may have run. There are two exceptions: a tool that the server
has declared idempotent, and a server that has forgotten the session and therefore refused the call. Such a call is
repeated once. All errors of a call become text for the model, which can often do something about them.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from lmbridge._tasks import SingleFlight, run_in_slices
from lmbridge.errors import MCPConnectionError, MCPError, TaskCancelledError, ToolError
from lmbridge.mcp.config.server_spec import DEFAULT_CONNECT_TIMEOUT, ServerSpec
from lmbridge.mcp.sdk import (
    BadReplyError,
    RefusedError,
    RequestRejectedError,
    SessionForgottenError,
    SessionLostError,
    describe_error,
    load_sdk,
)
from lmbridge.mcp.servers.call_timer import CallTimeoutError, CallTimer
from lmbridge.mcp.servers.definition_changes import DefinitionChanges
from lmbridge.mcp.servers.elicitation import OnElicitation
from lmbridge.mcp.servers.environment import missing_variables
from lmbridge.mcp.servers.events import McpEvent, ServerStarting, ServerStateChanged
from lmbridge.mcp.servers.package_runners import package_runner_of, start_patience
from lmbridge.mcp.servers.results import read_result
from lmbridge.mcp.servers.session_owner import SessionOwner
from lmbridge.mcp.servers.start_hints import start_hint

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_FIRST_BACKOFF_SECONDS: Final = 0.5
"""Seconds before the second attempt to start a server. Each further pause is twice as long as the one before."""
_LONGEST_BACKOFF_SECONDS: Final = 30.0
_MOST_DOUBLINGS: Final = 10
"""The limit of the failure count, which keeps the power of two small. The pause is at its maximum before that."""
_STABLE_SECONDS: Final = 10.0
"""The age in seconds from which a session counts as stable. If a stable session ends, the restart is not delayed."""
_START_REPORT_SECONDS: Final = 10.0
"""The time between two reports about a start that takes long, in seconds."""
_CLOSE_SECONDS: Final = 6.0
"""How long a session and its processes may take to end before the task is cancelled, in seconds."""


class ServerState(enum.StrEnum):
    """The states of a server."""

    IDLE = "idle"
    """The server is not running, because no run needs it."""
    STARTING = "starting"
    """The server is being started, or is being asked for its tools."""
    READY = "ready"
    """The server is connected, and its tools can be called."""
    LOST = "lost"
    """The session with the server ended unexpectedly. The next call opens another one."""
    BACKOFF = "backoff"
    """The server failed a moment ago, so it is started again only after a pause. A run is waiting for it."""
    FAILED = "failed"
    """The server could not be started. The next run that needs it tries again."""
    CLOSED = "closed"
    """The server has been closed, and will not be started again."""


@attrs.frozen
class ServerStatus:
    """The status of a server at one moment."""

    name: str
    """The name of the server in the configuration."""
    state: ServerState
    """The state of the server."""
    error: str | None = None
    """Why the server could not be started or was lost, or None if neither has happened since it was last connected."""
    tools: int | None = None
    """How many tools the server has, or None if it is not running."""
    starts: int = 0
    """How many sessions with the server have been opened."""
    pid: int | None = None
    """The process id of the server, or None if the server is not running or is reached over HTTP."""
    protocol: str | None = None
    """The protocol revision of the session, such as "2025-11-25", or None if the server is not running."""
    stderr_tail: str = attrs.field(default="", repr=False)
    """The last lines that the server wrote to stderr, without secrets and control characters. They are kept when it is
    lost, until it is started again."""


class ManagedServer:
    """Starts one server when it is needed, makes its calls, and closes it when it has been unused for a while.

    Args:
        spec: How the server is reached.
        emit: Called with the events of the server.
        connect_timeout: Seconds for connecting to the server and listing its tools; None for the default, which is
            longer for programs that download a server before they start it.
        idle_linger: Seconds after which the server is closed if no run uses it; None to keep it.
        on_elicitation: Asks the user the questions of the server; None to decline them.
    """

    def __init__(
        self,
        spec: ServerSpec,
        emit: Callable[[McpEvent], None],
        *,
        connect_timeout: float | None,
        idle_linger: float | None,
        on_elicitation: OnElicitation | None = None,
    ) -> None:
        self.spec = spec
        self._on_elicitation = on_elicitation
        self._emit, self._idle_linger = emit, idle_linger
        self._patience = start_patience(spec, connect_timeout)
        self._list_timeout = connect_timeout or DEFAULT_CONNECT_TIMEOUT
        self._state = ServerState.IDLE
        self._error: str | None = None
        self._session: SessionOwner | None = None
        # The last lines of the stderr of a session that was lost.
        self._lost_stderr = ""
        self._opening = SingleFlight[SessionOwner]("the MCP server was closed while it was starting")
        self._opening_task: asyncio.Task[Any] | None = None
        self._use_count = 0
        self._starts = self._failures = 0
        self._retry_at = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._owners: dict[asyncio.Task[None], SessionOwner] = {}
        self._is_retired = False
        self._changes = DefinitionChanges(spec, emit)

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
            stderr_tail=self._lost_stderr if session is None else session.stderr_tail,
        )

    @property
    def is_closed(self) -> bool:
        """Whether the server has been closed, and none of its processes is left."""
        return self._state is ServerState.CLOSED and not self._owners

    def acquire(self) -> None:
        """Registers a run or a call that uses the server. While it is in use, the server is not closed as idle."""
        self._use_count += 1
        self._stop_idle_timer()

    def release(self) -> None:
        """Ends a use that `acquire` registered. An unused server is closed after `idle_linger` seconds."""
        self._use_count -= 1
        if self._use_count or self._state is ServerState.CLOSED:
            return
        if self._is_retired:
            self._shut_down(ServerState.CLOSED)
        elif self._idle_linger is not None:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_later(self._idle_linger, self._shut_down, ServerState.IDLE)

    def retire(self) -> None:
        """Closes the server as soon as no run or call uses it."""
        self._is_retired = True
        if not self._use_count:
            self._shut_down(ServerState.CLOSED)

    def begin_close(self) -> None:
        """Closes the server, even if it is in use, without waiting for its processes."""
        self._shut_down(ServerState.CLOSED)

    async def close(self) -> None:
        """Closes the server, even if it is in use, and waits until its processes are gone."""
        self.begin_close()
        if self._owners:
            await asyncio.wait(list(self._owners), timeout=_CLOSE_SECONDS)
        for task in self._owners:
            logger.error("MCP server %r did not close within %g seconds", self.spec.name, _CLOSE_SECONDS)
            task.cancel()
        if self._owners:
            await asyncio.wait(list(self._owners), timeout=_CLOSE_SECONDS)

    def _shut_down(self, state: ServerState) -> None:
        self._stop_idle_timer()
        if self._opening_task is not None:
            self._opening_task.cancel()
        self._session = None
        # One of the owners may belong to a session that the server has forgotten, but whose last calls still run.
        for session in self._owners.values():
            session.stop()
        self._change_state(state)

    def _stop_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    async def definitions(self) -> list[Any]:
        """Returns the current tool definitions, as the server sent them. A server that is not running is started.

        Raises:
            MCPConnectionError: The server cannot be started.
        """
        began = asyncio.get_running_loop().time()
        session = await self._refresh_tools(await self._connect(), began)
        self._changes.report(session.tools)
        return session.tools

    async def newer_definitions(self, seen: list[Any] | None) -> list[Any] | None:
        """Returns the tool definitions if the server has announced other ones, or was restarted, since `seen` was read.

        It returns None if the definitions are the same or cannot be read. It does not start a server.

        Args:
            seen: The list that `definitions` or this method returned last.
        """
        session = self._session
        if session is None or session.ended.done():
            return None
        if session.has_announced_tools:
            await self._refresh_tools(session, asyncio.get_running_loop().time(), reconnect=False)
        if session.tools is seen:
            return None
        self._changes.report(session.tools)
        return session.tools

    async def _refresh_tools(self, session: SessionOwner, since: float, *, reconnect: bool = True) -> SessionOwner:
        """Reads the list of tools again if necessary. If that fails, the old list stays in use.

        Returns:
            The session, or another one if it turned out to be lost and `reconnect` is set.

        Raises:
            MCPConnectionError: The session is lost, and the server cannot be started again.
        """
        try:
            async with asyncio.timeout(self._list_timeout):
                await session.refresh_tools(since)
        except (TimeoutError, SessionLostError, RefusedError, BadReplyError) as exc:
            if reconnect and isinstance(exc, SessionLostError):
                self._on_session_ended(session, str(exc))
                return await self._connect()
            session.mark_refresh_failed()
            logger.warning(
                "MCP server %r: its tools may have changed, but the new list could not be read, so the old one stays "
                "in use: %s",
                self.spec.name,
                self.spec.redact(describe_error(exc)),
            )
        return session

    async def call(
        self, tool: str, arguments: Mapping[str, Any], *, is_idempotent: bool, timeout: float | None
    ) -> Mapping[str, Any]:
        """Calls a tool, and returns the result as the server sent it. A server that is not running is started.

        Args:
            tool: The name of the tool on the server.
            arguments: The arguments of the call.
            is_idempotent: Whether the server has declared that repeating a call has no further effect. Only then is
                the call repeated if the server is lost during the call.
            timeout: The time limit of the call in seconds, not counting a restart before it; None means no limit.
                Reports of progress extend it.

        Raises:
            ToolError: The call failed, for any reason. The text is written for the model.
        """
        name = self.spec.name
        try:
            try:
                return await self._call_once(tool, arguments, timeout)
            except SessionForgottenError as exc:
                reason = self.spec.redact(f"{exc}: {exc.words}" if exc.words else str(exc))
                logger.info("MCP server %r: a call has not run, so it is repeated in a new session: %s", name, reason)
                return await self._call_once(tool, arguments, timeout)
            except RequestRejectedError:
                raise
            except SessionLostError as exc:
                if not is_idempotent:
                    raise
                logger.info(
                    "MCP server %r was lost during a call of %r, which is repeated because it is idempotent: %s",
                    name,
                    tool,
                    self.spec.redact(str(exc)),
                )
                return await self._call_once(tool, arguments, timeout)
        except RequestRejectedError as exc:
            raise ToolError(
                f"the MCP server {name!r} rejected the call, which has not run: {self._describe_rejection(exc)}", exc
            ) from exc
        except SessionLostError as exc:
            reason = self.spec.redact(str(exc))
            raise ToolError(
                f"the MCP server {name!r} was lost during the call ({reason}); the tool may or may not have run", exc
            ) from exc
        except CallTimeoutError as exc:
            raise ToolError(
                f"the MCP server {name!r} {exc}; the call was cancelled, but the tool may have run", exc
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
                result = await session.call(tool, arguments, CallTimer(timeout, self.spec.max_call_timeout))
            except SessionLostError as exc:
                self._on_session_ended(session, str(exc))
                raise
        finally:
            self.release()
        if result.get("isError"):
            text = await run_in_slices(read_result(result))
            raise ToolError(
                str(text) or "the tool failed without saying why", images=text.image_parts, context={"result": result}
            )
        return result

    async def _connect(self) -> SessionOwner:
        """Returns an open session, and opens one if necessary. Concurrent callers share it.

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
        # `_shut_down` may have been called before this task ran. It could not cancel the task then, because
        # `_opening_task` was not set yet.
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
            # The SDK is imported in a thread, because the import takes half a second. It is imported before the time
            # limit of the start begins, because on a busy machine the import takes far longer.
            await asyncio.to_thread(load_sdk)
            session = SessionOwner(self.spec, self._emit, self._on_elicitation)
            self._owners[session.task] = session
            session.task.add_done_callback(self._forget_owner)
            timeout_reason = await self._wait_until_ready(session)
        except (asyncio.CancelledError, ImportError):
            if session is not None:
                session.stop()
            if self._state is not ServerState.CLOSED:
                self._change_state(ServerState.IDLE)
            raise
        if timeout_reason is not None:
            session.stop(timeout_reason)
            raise self._record_start_failure(session, None)
        error = session.ready.exception()
        if error is not None:
            raise self._record_start_failure(session, error)
        self._starts += 1
        self._session = session
        self._error, self._lost_stderr = None, ""
        self._change_state(ServerState.READY)
        session.ended.add_done_callback(lambda _: self._on_session_ended(session))
        return session

    def _forget_owner(self, task: asyncio.Task[None]) -> None:
        del self._owners[task]

    async def _wait_until_ready(self, session: SessionOwner) -> str | None:
        """Waits until a session can be used or has failed. Returns why the start has taken too long, or None."""
        silence, total = self._patience.silence, self._patience.total
        give_up_at = session.opened_at + total
        report_at = session.opened_at + _START_REPORT_SECONDS
        while not session.ready.done():
            silent_until = session.last_sign_of_progress + silence
            now = asyncio.get_running_loop().time()
            remaining = min(silent_until, give_up_at) - now
            if remaining <= 0 and silent_until < give_up_at:
                return f"it did not answer, and wrote nothing to stderr for {silence:g} seconds"
            if remaining <= 0:
                return f"it did not answer within {total:g} seconds"
            if now >= report_at:
                report_at += _START_REPORT_SECONDS
                self._report_slow_start(now - session.opened_at)
            await asyncio.wait({session.ready}, timeout=min(remaining, report_at - now))
        return None

    def _report_slow_start(self, seconds: float) -> None:
        downloader = package_runner_of(self.spec.command, self.spec.args)
        reason = f"; {downloader} may be downloading it" if downloader else ""
        logger.info("MCP server %r has been starting for %.0f seconds%s", self.spec.name, seconds, reason)
        self._emit(ServerStarting(self.spec.name, seconds, downloader))

    async def _back_off(self) -> None:
        """Waits until the pause after the last failure is over."""
        pause = self._retry_at - asyncio.get_running_loop().time()
        if pause > 0:
            self._change_state(ServerState.BACKOFF)
        await asyncio.sleep(max(0.0, pause))

    def _record_start_failure(self, session: SessionOwner, error: BaseException | None) -> MCPConnectionError:
        """Records a failed start and returns its error. If `error` is None, the server has not answered in time."""
        self._schedule_backoff()
        self._error = self.spec.redact(session.ended.result().reason)
        self._change_state(ServerState.FAILED)
        stderr = session.stderr_excerpt
        problem = f"could not be started: {self._error}"
        cause = None if error is None else error.__cause__
        if isinstance(cause, RequestRejectedError) and cause.words:
            problem += f"; it said: {self.spec.redact(cause.words)}"
        missing: list[str] = []
        if session.pid is not None:
            missing = missing_variables(self.spec, stderr)
        if missing:
            problem += f"; it did not get these variables of your environment: {', '.join(missing)}"
        hint = start_hint(self.spec, error, stderr, missing)
        failure = self._connection_error(problem, error, stderr, hint)
        failure.context["missing_variables"] = missing
        return failure

    def _schedule_backoff(self) -> None:
        pause = min(_LONGEST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2**self._failures)
        self._failures = min(self._failures + 1, _MOST_DOUBLINGS)
        self._retry_at = asyncio.get_running_loop().time() + pause

    def _describe_rejection(self, error: RequestRejectedError) -> str:
        """Returns why a call was rejected, what the server said, and what the user can do."""
        reason = f"{error}: {error.words}" if error.words else str(error)
        return self.spec.redact("; ".join(filter(None, (reason, error.hint))))

    def _on_session_ended(self, session: SessionOwner, reason: str = "") -> None:
        """Records that the session in use has ended by itself. A second call for the same session does nothing.

        Args:
            session: The session.
            reason: Why the session can no longer be used, if `ended` is not set yet. Other calls in it may then still
                be running.
        """
        if self._session is not session:
            return
        self._session, self._lost_stderr = None, session.stderr_tail
        if not session.ended.done():
            self._error = self.spec.redact(reason)
            logger.info("MCP server %r was lost: %s", self.spec.name, self._error)
            self._change_state(ServerState.LOST)
            return
        if asyncio.get_running_loop().time() - session.opened_at < _STABLE_SECONDS:
            self._schedule_backoff()
        else:
            self._failures, self._retry_at = 0, 0.0
        end = session.ended.result()
        self._error = self.spec.redact(end.reason)
        # This session was still in use, so lmbridge has not closed it. Its end counts as requested only if its event
        # loop is closing, and then the hub warns that it was not closed.
        if not end.was_requested:
            logger.warning(
                "MCP server %r was lost: %s%s", self.spec.name, self._error, _describe_stderr(session.stderr_excerpt)
            )
        self._change_state(ServerState.LOST)

    def _connection_error(
        self, problem: str, error: BaseException | None = None, stderr: str = "", hint: str | None = None
    ) -> MCPConnectionError:
        return MCPConnectionError(
            f"MCP server {self.spec.name!r} {problem}{_describe_stderr(stderr)}",
            error,
            server=self.spec.name,
            context={"target": self.spec.redact(self.spec.target), "stderr": stderr},
            hint=hint,
        )

    def _change_state(self, state: ServerState) -> None:
        if state is not self._state:
            self._state = state
            is_problem = state in (ServerState.FAILED, ServerState.BACKOFF, ServerState.LOST)
            self._emit(ServerStateChanged(self.spec.name, state, self._error if is_problem else None))


def _describe_stderr(stderr: str) -> str:
    """Returns the part of an error text that quotes stderr: a single line inline, several lines as a block."""
    if not stderr:
        return ""
    if "\n" not in stderr:
        return f"; its stderr: {stderr}"
    quoted = "".join(f"\n  {line}" for line in stderr.split("\n"))
    return f"; the first and last lines of its stderr:{quoted}"
