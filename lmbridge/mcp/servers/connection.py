"""One life of a server's session: one task opens it, keeps it and closes it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any, Final

from lmbridge.mcp import sdk
from lmbridge.mcp.config.spec import ServerSpec
from lmbridge.mcp.sdk import Session, SessionLostError
from lmbridge.mcp.servers.events import McpEvent, ServerLog, ToolProgress, ToolsChanged
from lmbridge.mcp.servers.stdio import StdioLink

logger = logging.getLogger("lmbridge.mcp")

CLOSED: Final = "it was closed"
"""The reason of an end that was wanted."""
_PAGES: Final = 100
_CHECK: Final = 5.0
"""Seconds in which a server that answered like a lost one has to prove that it is there."""
_CANCEL: Final = 2.0
"""Seconds that a cancelled request has to tell the server."""

_strays: Final[set[asyncio.Future[Any]]] = set()
"""Requests that go on although they were cancelled: asyncio itself does not keep its tasks."""


class Connection:
    """A session with a server, from its opening to its end.

    Args:
        spec: The server.
        emit: Gets the events.

    Attributes:
        ready: Done when it can be used; its exception says why it cannot.
        over: Done, with the reason, when it cannot be used any more.
        tools: The definitions, as the server sent them.
    """

    def __init__(self, spec: ServerSpec, emit: Callable[[McpEvent], None]) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.over: asyncio.Future[str] = loop.create_future()
        self.over.add_done_callback(self._wake)
        self.tools: list[Any] = []
        self.began = loop.time()
        self._spec, self._emit = spec, emit
        self._link = StdioLink(spec, self.finish) if spec.transport == "stdio" else None
        self._session: Session | None = None
        self._waiting: set[asyncio.Future[None]] = set()
        self._changed = False
        self._refreshing = asyncio.Lock()
        self.task = loop.create_task(self._own(), name=f"lmbridge-mcp-{spec.name}")

    @property
    def pid(self) -> int | None:
        """The number of the server's process."""
        return None if self._link is None else self._link.pid

    @property
    def protocol(self) -> str | None:
        """The revision of the protocol that is spoken."""
        return None if self._session is None else self._session.protocol

    @property
    def last_words(self) -> str:
        """The last lines of the server's stderr."""
        return "" if self._link is None else self._link.last_words

    def finish(self, reason: str = CLOSED) -> None:
        """Ends it; its task closes the session."""
        if not self.over.done():
            self.over.set_result(reason)

    def abandon(self, reason: str) -> None:
        """Ends it wherever it is; what that takes goes on behind the back of the caller."""
        self.finish(reason)
        if not self.ready.done():
            self.task.cancel()

    async def refresh(self) -> None:
        """Asks for the tools again, if the server said that they changed.

        Raises:
            SessionLostError, RefusedError, BadReplyError: it cannot tell; those that were known stay.
        """
        async with self._refreshing:
            if self._changed:
                self._changed = False
                try:
                    self.tools = await self._request(self._list, None)
                except BaseException:
                    self._changed = True
                    raise

    async def call(self, tool: str, arguments: Mapping[str, Any], timeout: float | None) -> Mapping[str, Any]:
        """The result of a call, as the server sent it.

        Args:
            tool: The name.
            arguments: Its arguments.
            timeout: Seconds, or None.

        Raises:
            TimeoutError: it has not answered; it was told that nobody waits.
            SessionLostError: the session ended before it answered.
            RefusedError, BadReplyError: it answered with an error, or with what is no answer.
        """

        def progress(done: float, total: float | None, message: str | None) -> None:
            self._emit(ToolProgress(self._spec.name, tool, done, total, message))

        result: Mapping[str, Any] = await self._request(
            partial(self._usable().call, tool, arguments, progress), timeout
        )
        return result

    def _usable(self) -> Session:
        if self._session is None or self.over.done():
            raise SessionLostError(self.over.result() if self.over.done() else "it is not connected")
        return self._session

    async def _request(self, request: Callable[[], Awaitable[Any]], timeout: float | None) -> Any:
        """What a request gets, for as long as the session lives."""
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        work = loop.create_task(_waking(request, woken))
        work.add_done_callback(_forget)  # it may fail in the very moment in which the caller is cancelled
        self._waiting.add(woken)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await woken
        finally:
            self._waiting.discard(woken)
            if not work.done():
                await _cancelled(work)
        if work.done() and not work.cancelled():
            try:
                return work.result()
            except SessionLostError as exc:
                await self._check(exc)
                raise sdk.RefusedError(str(exc)) from exc
        if self.over.done():
            raise SessionLostError(self.over.result())
        raise TimeoutError

    def _wake(self, _: asyncio.Future[str]) -> None:
        """Has all who wait for an answer see that there will be none."""
        for woken in self._waiting:
            _set(woken)

    async def _check(self, error: SessionLostError) -> None:
        """Returns if the session lives after all: a server may use the SDK's own words.

        Raises:
            SessionLostError: it does not.
        """
        if self._link is None and not self.over.done():
            with suppress(Exception):  # whatever it is, it is no answer
                async with asyncio.timeout(_CHECK):
                    await self._usable().list_page(None)
                    return
        elif not self.over.done():  # the end of its process is known in a moment, and in better words
            await asyncio.wait({self.over}, timeout=1.0)
        self.finish(str(error))
        raise SessionLostError(self.over.result()) from error

    async def _own(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                await asyncio.to_thread(sdk.load)
                if self._link is not None:
                    stack.push_async_callback(self._end_process, self._link)
                    await self._link.start()
                listeners = sdk.Listeners(self._on_tools_changed, self._on_log)
                self._session = await stack.enter_async_context(sdk.open_session(self._spec, self._link, listeners))
                if self._session.server_name == sdk.NAME:
                    raise sdk.RefusedError("it is lmbridge itself")
                self.tools = await self._first_list(self._session)
                self.ready.set_result(None)
                watching = asyncio.create_task(self._watch(self._session))
                try:
                    await asyncio.wait({self.over})  # a cancel of this task is none of those who look at `over`
                finally:
                    await _cancelled(watching)
        except asyncio.CancelledError:
            self._failed(SessionLostError(CLOSED))
            raise
        except BaseException as exc:  # noqa: BLE001 - the SDK raises groups of anything, of base exceptions as well
            self._failed(exc)
        finally:
            self.finish(CLOSED)

    def _failed(self, error: BaseException) -> None:
        """Notes why the session ended, where nobody knows it yet."""
        if self.ready.done():
            self.finish(sdk.explain(error))
            return
        reason = self.over.result() if self.over.done() else sdk.explain(error)
        failure = error if isinstance(error, ImportError) else SessionLostError(reason)
        failure.__cause__ = error if failure is not error else error.__cause__
        self.ready.set_exception(failure)
        self.ready.exception()  # whoever opened it may have gone
        self.finish(reason)

    async def _end_process(self, link: StdioLink) -> None:
        is_ending_well = self.ready.done() and self.over.done() and self.over.result() == CLOSED
        await link.end(patience=None if is_ending_well else 0.0)

    async def _first_list(self, session: Session) -> list[Any]:
        try:
            return await self._list()
        except sdk.RefusedError:
            if session.has_tools:
                raise
            return []  # one of prompts or resources: that it has no tools is not wrong

    async def _list(self) -> list[Any]:
        """All tools, as they were sent."""
        session = self._usable_while_opening()
        tools: list[Any] = []
        cursor: str | None = None
        seen: set[str] = set()
        for _ in range(_PAGES):
            page = await session.list_page(cursor)
            tools += page.get("tools") or []
            cursor = page.get("nextCursor")
            if not isinstance(cursor, str) or not cursor:
                return tools
            if cursor in seen:
                raise sdk.BadReplyError(f"its list of tools goes round in circles at the page {cursor!r}")
            seen.add(cursor)
        raise sdk.BadReplyError(f"its list of tools has more than {_PAGES} pages")

    def _usable_while_opening(self) -> Session:
        if self._session is None:
            raise SessionLostError("it is not connected")
        return self._session

    async def _watch(self, session: Session) -> None:
        try:
            await session.watch()
        except Exception as exc:  # noqa: BLE001 - changes are not told any more; nothing else is wrong
            logger.debug("MCP server %r: %s", self._spec.name, sdk.explain(exc))

    def _on_tools_changed(self) -> None:
        self._changed = True
        self._emit(ToolsChanged(self._spec.name))

    def _on_log(self, level: str, data: Any) -> None:
        self._emit(ServerLog(self._spec.name, level, data))


async def _waking(request: Callable[[], Awaitable[Any]], woken: asyncio.Future[None]) -> Any:
    """What a request gets; who waits for it is told so at once, not by a callback of the task."""
    try:
        return await request()
    finally:
        _set(woken)


def _set(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


async def _cancelled(task: asyncio.Future[Any]) -> None:
    """Cancels a task and waits for its end, for a moment."""
    task.cancel()
    _strays.add(task)
    task.add_done_callback(_forget)
    await asyncio.wait({task}, timeout=_CANCEL)


def _forget(task: asyncio.Future[Any]) -> None:
    _strays.discard(task)
    if not task.cancelled():
        task.exception()  # else asyncio logs that nobody asked for it
