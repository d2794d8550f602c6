"""`SessionOwner`: one task that opens a session with a server, holds it open, and closes it.

The owner is a task because the SDK is built on anyio, whose cancel scopes must be left in the task that entered them. A
session that is entered by one run and left by another raises `RuntimeError`. A session that is held by an async
generator can leave the event loop spinning at full load. And when an HTTP request of the SDK fails, its task group
cancels the task that entered the session; if that were the task of an agent, every later `await` of the agent would be
cancelled. So only the owner enters the session; callers wait for its futures, and make their calls through it.

Other designs were considered:

- An `AsyncExitStack` in the task of the run, as in the SDK's examples. Servers then start one after the other, one
  crash cancels the run, and no other run can use them.
- A new session for each call. Each call then starts a process, which takes 0.2 to 0.8 seconds.
- A thread with its own event loop for each server. Each call then crosses threads twice.

Each request runs in a separate task, for the same reason: a cancellation by the SDK must not reach the caller, and a
cancelled caller must not have to wait for an SDK that does not stop.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Final

import attrs

from lmbridge._checks import is_number
from lmbridge._tasks import end_task, mark_exception_retrieved
from lmbridge.mcp import sdk
from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.sdk import McpSession, SessionLostError
from lmbridge.mcp.servers.call_timer import CallTimer
from lmbridge.mcp.servers.changing_headers import ChangingHeaders
from lmbridge.mcp.servers.elicitation import Elicitor, OnElicitation
from lmbridge.mcp.servers.events import (
    ElicitationCompleted,
    McpEvent,
    ServerLog,
    ToolProgress,
    ToolsChanged,
    UnexpectedMessage,
)
from lmbridge.mcp.servers.sanitize import sanitize_text
from lmbridge.mcp.servers.stdio import ServerLink, StdioLink
from lmbridge.mcp.servers.windows_stdio import WindowsStdioLink
from lmbridge.transport.interception import link_makers

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_MOST_PAGES: Final = 100
"""The maximum number of pages of a tool list that are read."""
_ANNOUNCED_LIST_SECONDS: Final = 60.0
"""How old the list of a server that announces changes may become before it is read again, in seconds. There is such a
limit because an announcement may be lost. The list of a server that cannot announce changes is read for each run."""
_LISTEN_AGAIN_SECONDS: Final = 5.0
"""How long to wait before listening for changes again after the server has ended the stream, in seconds."""
_MOST_FAILED_LISTENS: Final = 3
"""How many attempts to listen for changes may fail in succession."""
_EXIT_REASON_SECONDS: Final = 1.0
"""How long the report of a lost session waits for the exit status of the process, in seconds."""
_CANCEL_GRACE_SECONDS: Final = 2.0
"""How long a cancelled request may take to notify the server and to end, in seconds."""


@attrs.frozen
class SessionEnd:
    """Why a session can no longer be used."""

    reason: str
    """The reason, as a clause about the server, such as "it ended with status 3"."""
    was_requested: bool = False
    """True if lmbridge closed the session, or the event loop was closed; False if the session was lost."""


@attrs.define
class _ListState:
    """What is known about the list of tools that was read last."""

    requested_at: float = 0.0
    """The time of the event loop at which the list was requested."""
    fresh_until: float = 0.0
    """The time of the event loop until which the list counts as up to date."""
    is_outdated: bool = False
    """Whether the server has announced another list since then, or the list could not be read."""
    has_failed: bool = False
    """Whether reading the list has failed since the last announcement."""


_CLOSED_ON_REQUEST: Final = SessionEnd("it was closed", was_requested=True)


class SessionOwner:
    """A session with a server, from its opening to its end. A session that is lost is not opened again.

    Args:
        spec: The server.
        emit: Called with the events of the server.
        on_elicitation: Asks the user the questions of the server; None to decline them.
    """

    def __init__(
        self, spec: ServerSpec, emit: Callable[[McpEvent], None], on_elicitation: OnElicitation | None = None
    ) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        """Completed when the session can be used; fails if the session cannot be opened."""
        self.ended: asyncio.Future[SessionEnd] = loop.create_future()
        """Completed with the reason when the session can no longer be used."""
        self.tools: list[Any] = []
        """The definitions of the server's tools, as the server sent them."""
        self.opened_at: float = loop.time()
        """The time of the event loop at which the opening began."""
        self._spec, self._emit = spec, emit
        self._elicitor = None if on_elicitation is None else Elicitor(spec.name, on_elicitation)
        self._link = _link_to_process(spec, self._mark_lost) if spec.transport == "stdio" else None
        self._session: McpSession | None = None
        self._pending_requests: set[asyncio.Future[None]] = set()
        self._forgotten_reason = ""
        self._list_state = _ListState()
        self._is_watched = False
        self._has_missed_changes = False
        self._refreshing = asyncio.Lock()
        self.ended.add_done_callback(self._wake_pending_requests)
        self.task: asyncio.Task[None] = loop.create_task(self._hold_session(), name=f"lmbridge-mcp-{spec.name}")
        """The task that opens and closes the session. When it has ended, the process of the server is gone as well."""

    @property
    def pid(self) -> int | None:
        """The id of the server's process; None for a server on HTTP."""
        return None if self._link is None else self._link.pid

    @property
    def protocol(self) -> str | None:
        """The protocol revision of the session, or None before the session is open."""
        return None if self._session is None else self._session.protocol

    @property
    def last_sign_of_progress(self) -> float:
        """The time of the event loop at which the server last wrote to stderr, or else at which the opening began."""
        written_at = None if self._link is None else self._link.last_stderr_at
        return self.opened_at if written_at is None else written_at

    @property
    def stderr_excerpt(self) -> str:
        """The first and last lines that the server's process wrote to stderr."""
        return "" if self._link is None else self._link.stderr_excerpt

    @property
    def stderr_tail(self) -> str:
        """The last lines that the server's process wrote to stderr."""
        return "" if self._link is None else self._link.stderr_tail

    def stop(self, reason: str | None = None) -> None:
        """Ends the session, even while it is being opened. It returns at once; the owner's task does the closing.

        Args:
            reason: Why the session is given up. Default: it was closed on request.
        """
        self._mark_ended(_CLOSED_ON_REQUEST if reason is None else SessionEnd(reason))
        if not self.ready.done():
            self.task.cancel()

    def _mark_lost(self, reason: str) -> None:
        self._mark_ended(SessionEnd(reason))

    def _mark_ended(self, end: SessionEnd) -> None:
        if not self.ended.done():
            self.ended.set_result(end)

    @property
    def has_announced_tools(self) -> bool:
        """Whether the server has announced other tools, and reading them has not failed since."""
        return self._list_state.is_outdated and not self._list_state.has_failed

    async def refresh_tools(self, since: float) -> None:
        """Asks for the list of tools again if the server has announced another one, or the list may be out of date.

        A list counts as up to date for the time that the server has given with it (`ttlMs`). Without that, it counts
        as up to date for a minute if the server announces changes, and for no time at all if it does not.

        Args:
            since: The time of the event loop at which the caller's work began. A list that was requested after that is
                up to date, so that runs that begin at the same time share one request.

        Raises:
            SessionLostError: The session is over. After this and the other errors, `tools` is unchanged.
            RefusedError: The server answered with an error.
            BadReplyError: The server's answer is not valid.
        """
        async with self._refreshing:
            now = asyncio.get_running_loop().time()
            state = self._list_state
            if state.is_outdated or not (state.requested_at >= since or now < state.fresh_until):
                try:
                    await self._make_request(self._read_tools, CallTimer(None))
                except BaseException:
                    # A failed or cancelled refresh may have missed changes, so the next call reads the list again.
                    self._list_state.is_outdated = True
                    raise

    def mark_refresh_failed(self) -> None:
        """Records that the list could not be read, so that runs in flight do not ask for it again."""
        self._list_state.is_outdated = self._list_state.has_failed = True

    async def call(self, tool: str, arguments: Mapping[str, Any], timer: CallTimer) -> Mapping[str, Any]:
        """Calls a tool, and returns the result as the server sent it.

        Args:
            tool: The name of the tool.
            arguments: The arguments of the call.
            timer: The time limits of this call. Each call needs a new timer.

        Raises:
            CallTimeoutError: The server has not answered in time. It has been notified that the call is cancelled.
            SessionLostError: The session ended before the server answered.
            RefusedError: The server answered with an error.
            BadReplyError: The server's answer is not valid.
        """

        def report_progress(done: float, total: float | None, message: str | None) -> None:
            timer.extend()
            self._emit(ToolProgress(self._spec.name, tool, done, total, message))

        def note_question(is_open: bool) -> None:
            (timer.suspend if is_open else timer.resume)()

        listener = sdk.CallListener(report_progress, note_question)
        call = partial(self._live_session().call, tool, arguments, listener)
        result: Mapping[str, Any] = await self._make_request(call, timer)
        return result

    def _live_session(self) -> McpSession:
        if self.ended.done():
            raise SessionLostError(self.ended.result().reason)
        return self._opened_session()

    def _opened_session(self) -> McpSession:
        if self._session is None:
            raise SessionLostError("it is not connected")
        return self._session

    async def _make_request(self, request: Callable[[], Awaitable[Any]], timer: CallTimer) -> Any:
        """Makes a request in a separate task, within its time limits and for as long as the session lasts.

        The caller waits for a new future, which is completed by the request or by the end of the session. The
        alternative was `asyncio.wait` for both the task and `ended`. But then each of many calls in flight would search
        the list of callbacks of `ended`, and would wake one turn of the event loop later.
        """
        loop = asyncio.get_running_loop()
        wake = loop.create_future()
        work = loop.create_task(_run_and_wake(request, wake))
        # If the request fails at the moment when the caller is cancelled, nobody else retrieves its exception.
        work.add_done_callback(mark_exception_retrieved)
        self._pending_requests.add(wake)
        try:
            await timer.wait(wake)
        finally:
            self._pending_requests.discard(wake)
            self._end_if_forgotten()
            if not work.done():
                await end_task(work, grace=_CANCEL_GRACE_SECONDS)
        if work.done() and not work.cancelled():
            self._redact(work.exception())
            try:
                return work.result()
            except (sdk.SessionForgottenError, sdk.RequestLostError) as exc:
                # The other calls may still be answered, or be made in another session.
                self._forgotten_reason = str(exc)
                self._end_if_forgotten()
                raise
            except sdk.RequestRejectedError as exc:
                self._mark_lost(str(exc))
                raise
            except SessionLostError as exc:
                raise await self._confirm_loss(exc) from exc
        if self.ended.done():
            raise SessionLostError(self.ended.result().reason)
        raise timer.error()

    def _redact(self, error: BaseException | None) -> None:
        """Removes secrets from an error of a request, which may quote what the server has sent."""
        if isinstance(error, SessionLostError | sdk.RefusedError | sdk.BadReplyError):
            error.args = (self._spec.redact(str(error)),)

    def _end_if_forgotten(self) -> None:
        if self._forgotten_reason and not self._pending_requests:
            self._mark_lost(self._forgotten_reason)

    def _wake_pending_requests(self, _: asyncio.Future[SessionEnd]) -> None:
        for wake in self._pending_requests:
            _wake_up(wake)

    async def _confirm_loss(self, error: SessionLostError) -> SessionLostError:
        """Marks the session as lost, and returns the error with the best reason that is known."""
        if self._link is not None and not self.ended.done():
            # The exit status of the process will be known in a moment, and says more than the SDK's error.
            await asyncio.wait({self.ended}, timeout=_EXIT_REASON_SECONDS)
        self._mark_lost(str(error))
        return SessionLostError(self.ended.result().reason)

    async def _hold_session(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                if self._link is not None:
                    stack.push_async_callback(self._end_server_process, self._link)
                    await self._link.start()
                handlers = sdk.NotificationHandlers(
                    self._on_tools_changed,
                    self._on_log,
                    self._mark_lost,
                    self._on_unexpected,
                    None if self._elicitor is None else self._elicitor.ask,
                    lambda elicitation_id: self._emit(ElicitationCompleted(self._spec.name, elicitation_id)),
                )
                fetch_headers = ChangingHeaders(self._spec).fetch if self._spec.has_changing_headers else None
                opening = sdk.open_mcp_session(self._spec, self._link, handlers, fetch_headers)
                self._session = await stack.enter_async_context(opening)
                if self._session.server_name == sdk.LMBRIDGE_NAME:
                    raise sdk.RefusedError("it is lmbridge itself")
                await self._read_tools()
                self.ready.set_result(None)
                watching = asyncio.create_task(self._watch_notifications(self._session))
                try:
                    # `await self.ended` would cancel the future if this task is cancelled.
                    await asyncio.wait({self.ended})
                finally:
                    await end_task(watching, grace=_CANCEL_GRACE_SECONDS)
        except asyncio.CancelledError as exc:
            self._record_end(_CLOSED_ON_REQUEST, exc)
            raise
        except BaseException as exc:  # noqa: BLE001 - the SDK raises groups of anything, even of base exceptions
            self._record_end(SessionEnd(sdk.describe_error(exc)), exc)
        finally:
            self._mark_ended(_CLOSED_ON_REQUEST)

    def _record_end(self, end: SessionEnd, error: BaseException) -> None:
        """Records why the session has ended, unless the reason is known already, and fails `ready` if it is pending."""
        self._mark_ended(end)
        if self.ready.done():
            return
        failure = SessionLostError(self.ended.result().reason)
        failure.__cause__ = error
        self.ready.set_exception(failure)
        # The caller may have been cancelled meanwhile; asyncio would log an exception that was never retrieved.
        self.ready.exception()

    async def _end_server_process(self, link: ServerLink) -> None:
        """Ends the server's process. It gets time to end by itself only if the session was closed on request."""
        was_closed = self.ready.done() and self.ended.done() and self.ended.result().was_requested
        await link.end(patience=None if was_closed else 0.0)

    async def _read_tools(self) -> None:
        """Reads the list of tools, and records until when it counts as up to date."""
        loop, session = asyncio.get_running_loop(), self._opened_session()
        # The state is replaced before the request, because an announcement that arrives during the request may be about
        # a change that the answer does not contain yet. It marks the new state as outdated.
        state = self._list_state = _ListState(requested_at=loop.time())
        try:
            tools, ttl = await self._list_all_tools()
        except sdk.RefusedError:
            if session.has_tools:
                raise
            # A server that has only prompts or resources may refuse to list tools.
            tools, ttl = [], None
        if ttl is None:
            ttl = _ANNOUNCED_LIST_SECONDS if self._announces_changes(session) else 0.0
        state.fresh_until = loop.time() + ttl
        self.tools = tools

    def _announces_changes(self, session: McpSession) -> bool:
        """Returns whether announcements of changes reach us.

        In older revisions of the protocol, servers on HTTP often lose them.
        """
        is_heard = self._is_watched and session.protocol >= sdk.FIRST_STATELESS_PROTOCOL
        return session.declares_changes and (self._spec.transport != "http" or is_heard)

    async def _list_all_tools(self) -> tuple[list[Any], float | None]:
        """Returns the tools of all pages, and for how many seconds the list is valid; None if there is no `ttlMs`."""
        session = self._opened_session()
        tools: list[Any] = []
        ttl: float | None = None
        cursor: str | None = None
        seen: set[str] = set()
        for _ in range(_MOST_PAGES):
            page = await session.list_page(cursor)
            tools += page.get("tools") or []
            if len(tools) > sdk.MOST_TOOLS:
                raise sdk.BadReplyError(sdk.TOO_MANY_TOOLS)
            if is_number(page_ttl := page.get("ttlMs")):
                ttl = min(each for each in (ttl, max(0.0, page_ttl / 1000)) if each is not None)
            cursor = page.get("nextCursor")
            if not isinstance(cursor, str) or not cursor:
                return tools, ttl
            if cursor in seen:
                raise sdk.BadReplyError(f"its list of tools returns to the page {cursor!r}, so it never ends")
            seen.add(cursor)
        raise sdk.BadReplyError(f"its list of tools has more than {_MOST_PAGES} pages")

    async def _watch_notifications(self, session: McpSession) -> None:
        """Listens for changes until it is cancelled. It listens again each time that the server has ended the stream.

        After several failures it gives up, because some servers refuse to announce the changes that they have declared.
        """
        failures = 0
        while failures < _MOST_FAILED_LISTENS:
            try:
                await session.watch(self._on_watched)
            except Exception as exc:  # noqa: BLE001 - changes are no longer noticed, but everything else works
                logger.debug("MCP server %r: watching its changes failed: %s", self._spec.name, sdk.describe_error(exc))
            failures = 0 if self._is_watched else failures + 1
            if self._is_watched:
                # The list counted as up to date because changes would be announced. Announcements no longer arrive.
                self._mark_outdated()
            self._is_watched, self._has_missed_changes = False, True
            await asyncio.sleep(_LISTEN_AGAIN_SECONDS)

    def _on_watched(self) -> None:
        self._is_watched = True
        if self._has_missed_changes:
            self._mark_outdated()

    def _mark_outdated(self) -> None:
        self._list_state.is_outdated, self._list_state.has_failed = True, False

    def _on_tools_changed(self) -> None:
        self._mark_outdated()
        self._emit(ToolsChanged(self._spec.name))

    def _on_log(self, level: str, data: Any) -> None:
        self._emit(ServerLog(self._spec.name, level, data))

    def _on_unexpected(self, kind: str, detail: str) -> None:
        detail = self._spec.redact(sanitize_text(detail))
        logger.warning(
            "MCP server %r sent %s (later ones are not logged)%s", self._spec.name, kind, detail and f": {detail}"
        )
        self._emit(UnexpectedMessage(self._spec.name, kind, detail))


def _link_to_process(spec: ServerSpec, on_end: Callable[[str], None]) -> ServerLink:
    # Windows has no process groups, by which `StdioLink` ends a server and what it has started.
    kind: type[WindowsStdioLink | StdioLink] = WindowsStdioLink if sys.platform == "win32" else StdioLink
    if link_makers:
        link: ServerLink = link_makers[-1](spec.name, spec.redact, partial(kind, spec, on_end), on_end)
        return link
    return kind(spec, on_end)


async def _run_and_wake(request: Callable[[], Awaitable[Any]], wake: asyncio.Future[None]) -> Any:
    """Makes a request and then completes `wake`, one turn of the event loop earlier than a done callback would."""
    try:
        return await request()
    finally:
        _wake_up(wake)


def _wake_up(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
