"""`McpHub`: the servers of a configuration file, shared by all runs.

A run asks the hub for the tools of the servers that it needs, and gets a lease, `McpTools`. Until the run releases the
lease, the definitions of the leased tools do not change, and their servers are not closed as idle. Servers belong to
the hub and not to the run, so that a hundred runs start one process for each server and not a hundred.

The configuration file is not watched. Instead, its modification time and size are checked at each use. A watcher would
need a thread or a platform's own interface, and a change only matters when a run starts. Servers whose entry is
unchanged keep their session.
"""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from lmbridge._checks import (
    check_bool,
    check_callable,
    check_choice,
    check_integer,
    check_path,
    check_seconds,
    invalid_argument,
    wrong_type,
)
from lmbridge._copying import NotCopyable
from lmbridge._tasks import LoopGuard, run_together
from lmbridge.errors import MCPError, MultiMCPError
from lmbridge.mcp.config.files import McpConfig, file_fingerprint, find_config, load_config, warn_untrusted
from lmbridge.mcp.config.server_spec import HeadersFunction
from lmbridge.mcp.servers.elicitation import OnElicitation
from lmbridge.mcp.servers.events import McpEvent
from lmbridge.mcp.servers.leased_tools import McpTools, lease_tools
from lmbridge.mcp.servers.managed_server import ManagedServer, ServerStatus

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_DEFAULT_IDLE_LINGER: Final = 300.0
"""Seconds after which a server that no run uses is closed."""
_HEADERS_HINT: Final = 'put headers that do not change into the configuration file, as "headers" of the server'


class McpHub(NotCopyable):
    """Starts the MCP servers of a configuration file when a run needs them, and closes those that stay unused.

    It can be used without `async with`, but `close()` must be called. Each use checks whether the configuration file
    has changed::

        hub = McpHub("mcp.json")
        lease = await hub.tools(["files"])
        result = await Agent(client, tools=[lease]).run("What is in notes.txt?")
        lease.release()
        await hub.close()

    Args:
        config_path: The configuration file. Default: the first of the default files of `load_config` that exists.
        trust_project: Whether `./.mcp.json` may be used. Default: False, because it may have come with somebody else's
            repository, and names programs that are started.
        connect_timeout: Seconds for connecting to a server and listing its tools, unless the file says otherwise.
            Default: 30. For a program that downloads a server before starting it, such as `npx` and `uvx`, this limits
            only the time without any output on stderr (default: 120), and the whole start has at least 300 seconds.
        idle_linger: Seconds after which a server that no run uses is closed; None to keep it until `close()`.
            Default: 300.
        on_event: A plain function that is called with each `McpEvent`. An exception that it raises is logged. Default:
            None.
        headers: A mapping from the names of HTTP servers to functions, async or plain, that return further headers. A
            function is called when a connection is opened, and again after the status 401. It may take up to ten
            seconds; a plain function is called in a thread. Default: None, which adds no headers. The configuration
            file can name a command instead (`headersHelper`).
        on_elicitation: A function, async or plain, that is called with each `Elicitation`, the question of a server to
            the user, and returns the answer. A plain function is called in a thread, so it may wait for the user.
            Default: None, which declines every question.

    Raises:
        LLMValidationError: An argument is not valid.
    """

    _instead_of_a_copy = "pass the hub itself on, and create another one in each process"

    def __init__(
        self,
        config_path: str | os.PathLike[str] | None = None,
        *,
        trust_project: bool = False,
        connect_timeout: float | None = None,
        idle_linger: float | None = _DEFAULT_IDLE_LINGER,
        on_event: Callable[[McpEvent], None] | None = None,
        headers: Mapping[str, HeadersFunction] | None = None,
        on_elicitation: OnElicitation | None = None,
    ) -> None:
        self._config_path = check_path("config_path", config_path, optional=True)
        # A string such as "no" counts as true in Python, and would start programs that are not trusted.
        self._trust_project = check_bool("trust_project", trust_project)
        self._connect_timeout = check_seconds("connect_timeout", connect_timeout)
        self._idle_linger = check_seconds("idle_linger", idle_linger)
        self._on_event = check_callable("on_event", on_event, optional=True)
        self._headers = _check_headers(headers)
        self._on_elicitation = check_callable("on_elicitation", on_elicitation, optional=True)
        self._config: McpConfig | None = None
        self._loaded_fingerprint: object = None
        self._servers: dict[str, ManagedServer] = {}
        self._retired: list[ManagedServer] = []
        self._warned_files: set[Path] = set()
        self._loop_guard = LoopGuard("this McpHub", MCPError)
        self._reload_lock = asyncio.Lock()
        self._is_closed = False

    async def names(self) -> list[str]:
        """Returns the names of the enabled servers, in the order of the file. It does not start any server.

        An entry that starts lmbridge's own MCP server is left out.

        Raises:
            MCPError: The configuration file cannot be read.
        """
        config = await self.reload()
        return [name for name in config.names if not _is_lmbridge(config, name)]

    async def tools(
        self,
        names: Sequence[str] | None = None,
        *,
        on_error: Literal["raise", "continue"] = "raise",
        call_timeout: float | None = None,
        max_definition_tokens: int | None = None,
    ) -> McpTools:
        """Leases the tools of some servers. Servers that are not running are started, in parallel.

        Args:
            names: The names of the servers. Default: all enabled servers.
            on_error: What to do if a server cannot be started: "raise" (the default) raises `MultiMCPError`, and
                "continue" returns the tools of the other servers.
            call_timeout: Seconds that a call may take, unless the configuration says otherwise. Reports of progress
                extend it, up to ten times its length. Default: the agent's `tool_timeout`.
            max_definition_tokens: About how many tokens of the model's context the definitions may take. Default: no
                limit.

        Raises:
            MCPError: A name is unknown, or the configuration file cannot be read. No server has been started.
            MultiMCPError: Servers could not be started, and `on_error` is "raise". The other servers stay usable.
            LLMValidationError: An argument is not valid.
        """
        check_choice("on_error", on_error, ("raise", "continue"))
        check_seconds("call_timeout", call_timeout)
        # It is 0 if it was computed for a model with a tiny context.
        check_integer("max_definition_tokens", max_definition_tokens, minimum=0, optional=True)
        servers, errors = self._select_servers(await self.reload(), names)
        for server in servers:
            server.acquire()
        try:
            definitions = await self._collect_definitions(servers, errors)
            if errors and on_error == "raise":
                raise MultiMCPError(errors=errors)
            for name, error in errors.items():
                logger.warning("the run continues without MCP server %r: %s", name, error)
            return await lease_tools(
                servers, definitions, errors, call_timeout=call_timeout, max_definition_tokens=max_definition_tokens
            )
        except BaseException:
            # Without the tools, the caller has nothing to close, so the servers are released here.
            for server in servers:
                server.release()
            raise

    async def reload(self) -> McpConfig:
        """Reads the configuration file if it has changed, and returns its content.

        Servers whose entry has been changed or removed are closed as soon as no run uses them. A file that can no
        longer be read changes nothing, and a warning is logged.

        Raises:
            MCPError: The hub is closed, or is in use in another event loop; or the configuration file cannot be read,
                and no earlier version of it has been read.
        """
        self._enter_loop()
        async with self._reload_lock:
            try:
                config = await asyncio.to_thread(self._load_config)
            except MCPError as error:
                if self._config is None:
                    raise
                logger.warning("the last valid MCP configuration stays in use: %s", error)
                config = self._config
            # The hub may have been closed while the file was read; nothing may be started after that.
            self._check_not_closed()
            if config is not self._config:
                self._apply_config(config)
            return config

    def status(self) -> dict[str, ServerStatus]:
        """Returns the status of each server that has been used, by name."""
        return {name: server.status for name, server in self._servers.items()}

    async def close(self) -> None:
        """Closes all servers, and waits until their processes are gone. A second call does nothing.

        Raises:
            MCPError: The hub is in use in another event loop.
        """
        # If this raises, the hub stays open in its own event loop.
        self._loop_guard.check()
        self._is_closed = True
        if self._loop_guard.loop is not None and not self._loop_guard.loop.is_closed():
            servers = [*self._servers.values(), *self._retired]
            for server in servers:
                # The processes have to end even if the caller is cancelled before the tasks below have started.
                server.begin_close()
            await asyncio.gather(*(server.close() for server in servers))
        self._servers, self._retired = {}, []

    def _load_config(self) -> McpConfig:
        """Returns the current configuration, which is the object in use if the file has not changed. It blocks."""
        path, untrusted = find_config(self._config_path, trust_project=self._trust_project)
        seen = (untrusted, None if path is None else file_fingerprint(path))
        if self._config is not None and seen == self._loaded_fingerprint:
            return self._config
        # Stored before the file is read, so that a broken file is reported once and not at each use.
        self._loaded_fingerprint = seen
        return self._with_headers(load_config(self._config_path, trust_project=self._trust_project))

    def _with_headers(self, config: McpConfig) -> McpConfig:
        """Returns the configuration, with the functions of the argument `headers` added to its servers.

        Raises:
            MCPError: A function is for a server that does not exist, is not on HTTP, or has a `headersHelper`.
        """
        servers = dict(config.servers)
        for name, function in self._headers.items():
            if name in servers and servers[name].transport != "stdio" and not servers[name].headers_helper:
                servers[name] = attrs.evolve(servers[name], headers_function=function)
            elif name in servers:
                problem, hint = "is not on HTTP", "leave it out of headers"
                if servers[name].headers_helper:
                    problem, hint = "has a headersHelper as well", "give only one of the two"
                raise MCPError(f"headers are given for MCP server {name!r}, which {problem}", hint=hint)
            elif name not in config.broken and name not in config.disabled:
                raise config.unknown_server(name)
        return attrs.evolve(config, servers=servers)

    def _apply_config(self, config: McpConfig) -> None:
        if config.untrusted is not None and config.untrusted not in self._warned_files:
            self._warned_files.add(config.untrusted)
            warn_untrusted(config.untrusted)
        self._config = config
        for name, server in list(self._servers.items()):
            if config.servers.get(name) != server.spec:
                del self._servers[name]
                self._retired = [*(each for each in self._retired if not each.is_closed), server]
                server.retire()

    def _select_servers(
        self, config: McpConfig, names: Sequence[str] | None
    ) -> tuple[list[ManagedServer], dict[str, MCPError]]:
        """Returns the servers with the given names, and the errors of those that cannot be started.

        Raises:
            MCPError: A name is unknown.
            LLMValidationError: The names are not a list.
        """
        if isinstance(names, str) or not isinstance(names, Sequence | None):
            raise invalid_argument("names", "a list of the names of MCP servers, or None", names)
        if names is None:
            names = [name for name in config.names if not _is_lmbridge(config, name)]
        errors: dict[str, MCPError] = {}
        for name in names:
            if name in config.broken:
                errors[name] = config.broken[name]
            elif name not in config.servers:
                raise config.unknown_server(name)
            elif _is_lmbridge(config, name):
                problem = f"MCP server {name!r} is lmbridge's own server, to which lmbridge does not connect"
                errors[name] = MCPError(problem, hint="leave it out")
        return [self._server(config, name) for name in dict.fromkeys(names) if name not in errors], errors

    def _server(self, config: McpConfig, name: str) -> ManagedServer:
        if name not in self._servers:
            spec = config.servers[name]
            timeout = spec.connect_timeout or self._connect_timeout
            self._servers[name] = ManagedServer(
                spec,
                self._emit,
                connect_timeout=timeout,
                idle_linger=self._idle_linger,
                on_elicitation=self._on_elicitation,
            )
        return self._servers[name]

    async def _collect_definitions(
        self, servers: Sequence[ManagedServer], errors: dict[str, MCPError]
    ) -> dict[str, list[Any]]:
        """Returns the definitions that each server sent, and adds the errors of failed starts to `errors`."""
        definitions: dict[str, list[Any]] = {}

        async def collect(server: ManagedServer) -> None:
            try:
                definitions[server.spec.name] = await server.definitions()
            except MCPError as error:
                errors[server.spec.name] = error

        # An exception that is raised here concerns all servers, for example that the SDK is not installed.
        await run_together(map(collect, servers))
        return definitions

    def _emit(self, event: McpEvent) -> None:
        logger.debug("%s", event)
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                # A mistake in the caller's function must not end the session with the server.
                logger.exception("the function given as on_event raised an exception")

    def _enter_loop(self) -> None:
        """Binds the hub to the running event loop.

        Raises:
            MCPError: The hub is closed, or in use in another event loop.
        """
        self._check_not_closed()
        if self._loop_guard.enter():
            if self._servers:
                message = "an McpHub was not closed before its event loop was closed"
                warnings.warn(message, ResourceWarning, stacklevel=3)
            # Servers and locks belong to the event loop that is gone.
            self._servers, self._retired, self._reload_lock = {}, [], asyncio.Lock()

    def _check_not_closed(self) -> None:
        if self._is_closed:
            raise MCPError("this McpHub is closed", hint="create another one")


def _check_headers(headers: Any) -> dict[str, HeadersFunction]:
    if headers is None:
        return {}
    if not isinstance(headers, Mapping) or not all(isinstance(name, str) for name in headers):
        raise wrong_type("headers", "a dict from the names of servers to functions", headers, _HEADERS_HINT)
    return {name: check_callable(f"headers[{name!r}]", function) for name, function in headers.items()}


def _is_lmbridge(config: McpConfig, name: str) -> bool:
    spec = config.servers.get(name)
    return spec is not None and spec.is_lmbridge
