"""`McpHub`: the servers of a configuration, and their tools for a run."""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from lmbridge._checks import check_bool, check_callable, check_choice, check_path, check_seconds
from lmbridge.agent.tools import Tool
from lmbridge.errors import LLMValidationError, MCPError, MultiMCPError
from lmbridge.mcp.config.files import McpConfig, file_stamp, find_config, load_config, warn_of_untrusted
from lmbridge.mcp.config.spec import DEFAULT_CONNECT_TIMEOUT
from lmbridge.mcp.servers.definitions import LeftOut, tools_of, within_budget
from lmbridge.mcp.servers.events import McpEvent
from lmbridge.mcp.servers.managed import McpServer, ServerStatus

logger = logging.getLogger("lmbridge.mcp")

_LINGER: Final = 300.0
_ITSELF: Final = "is lmbridge's own server, which it does not connect to"


@attrs.define(eq=False)
class McpTools:
    """The tools of some servers, for a run: they do not change, and their servers are not closed, until `release()`.

    Attributes:
        tools: The tools.
        errors: Servers whose tools are missing, and why.
        left_out: Tools that are not offered, and why.
    """

    tools: list[Tool]
    errors: dict[str, MCPError]
    left_out: list[LeftOut]
    _servers: list[McpServer] = attrs.field(repr=False)

    async def list_tools(self) -> list[Tool]:
        """The tools: an agent takes this object as a provider."""
        return self.tools

    def release(self) -> None:
        """Lets the servers go: the run is over. A second time does nothing."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.release()


class McpHub:
    """MCP servers: started when a run needs them, shared by all runs, closed when nobody has needed them for a while.

    It needs no `async with`; `close()` is the caller's. Each use looks whether the configuration file has changed.

    Args:
        config_path: The file. Default: see `load_config`.
        trust_project: Whether `./.mcp.json` may be used.
        connect_timeout: Seconds for connecting to a server and listing its tools, where the file does not say.
        idle_linger: Seconds after which a server that no run uses is closed; None for never.
        on_event: Gets what servers tell; what it raises is logged.

    Raises:
        LLMValidationError: an argument cannot be right.
    """

    def __init__(
        self,
        config_path: str | os.PathLike[str] | None = None,
        *,
        trust_project: bool = False,
        connect_timeout: float | None = None,
        idle_linger: float | None = _LINGER,
        on_event: Callable[[McpEvent], None] | None = None,
    ) -> None:
        check_path("config_path", config_path, optional=True)
        # "no" counts as true in Python, and would start programs of strangers.
        check_bool("trust_project", trust_project)
        check_callable("on_event", on_event, optional=True)
        check_seconds("connect_timeout", connect_timeout)
        check_seconds("idle_linger", idle_linger)
        self._path, self._trust = config_path, trust_project
        self._connect_timeout, self._linger = connect_timeout or DEFAULT_CONNECT_TIMEOUT, idle_linger
        self._on_event = on_event
        self._config: McpConfig | None = None
        self._seen: object = None
        self._servers: dict[str, McpServer] = {}
        self._retired: list[McpServer] = []
        self._warned: set[Path] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reloading: asyncio.Lock | None = None
        self._is_closed = False

    async def names(self) -> list[str]:
        """The enabled servers, in the order of the file; nothing is started. lmbridge's own is not among them.

        Raises:
            MCPError: the file cannot be read.
        """
        config = await self.reload()
        return [name for name in config.names if not _is_itself(config, name)]

    async def tools(
        self,
        names: Sequence[str] | None = None,
        *,
        on_error: Literal["raise", "continue"] = "raise",
        call_timeout: float | None = None,
        max_definition_tokens: int | None = None,
    ) -> McpTools:
        """The tools of servers, which are started, in parallel, if they are not running.

        Args:
            names: The servers; None for all.
            on_error: What happens if some of them cannot be started: "raise", or "continue" with the others.
            call_timeout: Seconds that a call may take, where the configuration does not say.
            max_definition_tokens: About how many tokens of a model's context the definitions may take.

        Raises:
            MCPError: a name is not known; nothing has been started. Or the file cannot be read.
            MultiMCPError: some could not be started (with "raise"). Those that could stay.
            LLMValidationError: an argument cannot be right.
        """
        check_choice("on_mcp_error", on_error, ("raise", "continue"))
        check_seconds("call_timeout", call_timeout)
        servers, errors = self._chosen(await self.reload(), names)
        for server in servers:
            server.acquire()
        try:
            definitions = await self._definitions(servers, errors)
            if errors and on_error == "raise":
                raise MultiMCPError(errors=errors)
            for name, error in errors.items():
                logger.warning("the run goes on without MCP server %r: %s", name, error)
            return self._lease(servers, definitions, errors, call_timeout, max_definition_tokens)
        except BaseException:
            for server in servers:
                server.release()
            raise

    async def reload(self) -> McpConfig:
        """Looks whether the file has changed, and closes what is no longer in it as soon as no run uses it.

        A file that cannot be read any more changes nothing; the log says so.

        Raises:
            MCPError: the file cannot be read, and never could; or the hub is closed.
        """
        self._check_loop()
        if self._reloading is None:
            self._reloading = asyncio.Lock()
        async with self._reloading:
            try:
                config = await asyncio.to_thread(self._load)
            except MCPError as error:
                if self._config is None:
                    raise
                logger.warning("the last good MCP configuration stays in use: %s", error)
                config = self._config
            self._check_open()  # who closed it meanwhile has been told that nothing runs any more
            if config is not self._config:
                self._apply(config)
            return config

    def status(self) -> dict[str, ServerStatus]:
        """How the servers are that have been used, by name."""
        return {name: server.status for name, server in self._servers.items()}

    async def close(self) -> None:
        """Closes all servers and waits until their processes are gone. A second time does nothing."""
        self._is_closed = True
        if self._loop is not None and not self._loop.is_closed():
            self._check_same_loop()
            await asyncio.gather(*(server.close() for server in [*self._servers.values(), *self._retired]))
        self._servers, self._retired = {}, []

    def _load(self) -> McpConfig:
        """The configuration as it is now; the same object if it has not changed. It blocks."""
        path, untrusted = find_config(self._path, trust_project=self._trust)
        seen = (untrusted, None if path is None else file_stamp(path))
        if self._config is not None and seen == self._seen:
            return self._config
        self._seen = seen  # a file that is broken is told of once
        return load_config(self._path, trust_project=self._trust)

    def _apply(self, config: McpConfig) -> None:
        if config.untrusted is not None and config.untrusted not in self._warned:
            self._warned.add(config.untrusted)
            warn_of_untrusted(config.untrusted)
        self._config = config
        for name, server in list(self._servers.items()):
            if config.servers.get(name) != server.spec:
                del self._servers[name]
                self._retired = [*(each for each in self._retired if not each.is_closed), server]
                server.retire()

    def _chosen(self, config: McpConfig, names: Sequence[str] | None) -> tuple[list[McpServer], dict[str, MCPError]]:
        """The servers of those names, and why some cannot be started.

        Raises:
            MCPError: a name is not known.
        """
        if isinstance(names, str) or not isinstance(names, Sequence | None):
            raise LLMValidationError(f"the names of MCP servers are {names!r}", hint="give a list of names")
        if names is None:
            names = [name for name in config.names if not _is_itself(config, name)]
        for name in names:
            if name not in config.servers and name not in config.broken:
                raise config.unknown(name)
        errors = {name: config.broken[name] for name in names if name in config.broken}
        itself = [name for name in names if _is_itself(config, name)]
        errors |= {name: MCPError(f"{name!r} {_ITSELF}", hint="leave it out") for name in itself}
        return [self._server(config, name) for name in dict.fromkeys(names) if name not in errors], errors

    def _server(self, config: McpConfig, name: str) -> McpServer:
        if name not in self._servers:
            spec = config.servers[name]
            timeout = spec.connect_timeout or self._connect_timeout
            self._servers[name] = McpServer(spec, self._emit, connect_timeout=timeout, linger=self._linger)
        return self._servers[name]

    async def _definitions(self, servers: Sequence[McpServer], errors: dict[str, MCPError]) -> dict[str, list[Any]]:
        """What servers sent; of those that could not be started, the error is noted."""
        found: dict[str, list[Any]] = {}

        async def ask(server: McpServer) -> None:
            try:
                found[server.spec.name] = await server.definitions()
            except MCPError as error:
                errors[server.spec.name] = error

        try:
            async with asyncio.TaskGroup() as group:
                for server in servers:
                    group.create_task(ask(server))
        except ExceptionGroup as failed:  # an extra that is missing
            raise failed.exceptions[0] from None
        return found

    def _lease(
        self,
        servers: Sequence[McpServer],
        definitions: dict[str, list[Any]],
        errors: dict[str, MCPError],
        call_timeout: float | None,
        most_tokens: int | None,
    ) -> McpTools:
        tools: list[Tool] = []
        left_out: list[LeftOut] = []
        for server in servers:
            if server.spec.name in definitions:
                timeout = server.spec.call_timeout or call_timeout
                tools += tools_of(server, definitions[server.spec.name], timeout, left_out)
        tools = within_budget(tools, most_tokens, left_out)
        for each in left_out:
            logger.warning("MCP server %r: tool %r is left out: %s", each.server, each.tool, each.reason)
        order = [*(server.spec.name for server in servers), *errors]
        return McpTools(tools, {name: errors[name] for name in order if name in errors}, left_out, list(servers))

    def _emit(self, event: McpEvent) -> None:
        logger.debug("%s", event)
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:  # the listener's own: told in the log, and no reason to lose the server
                logger.exception("on_event raised")

    def _check_loop(self) -> None:
        """Sees to it that the hub is used in one event loop at a time.

        Raises:
            MCPError: it is closed, or in use in another loop.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._check_same_loop()
        if self._servers:
            warnings.warn("an McpHub was not closed before its event loop was", ResourceWarning, stacklevel=3)
        self._loop, self._reloading, self._servers, self._retired = loop, None, {}, []

    def _check_open(self) -> None:
        if self._is_closed:
            raise MCPError("the hub of MCP servers is closed", hint="make another")

    def _check_same_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            raise MCPError("the hub of MCP servers is in use in another event loop", hint="make one for each loop")


def _is_itself(config: McpConfig, name: str) -> bool:
    spec = config.servers.get(name)
    return spec is not None and spec.is_lmbridge
