"""`ServerSelection`: the MCP servers of one run, and what the run does if some of them cannot be started.

`McpHub.tools` starts the servers, and raises `MultiMCPError`.

`mcp.servers.hub` leaves out an entry of the file that would start lmbridge itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import attrs

from lmbridge.agent.agent import AnyJournal
from lmbridge.agent.definition_budget import MaxDefinitionTokens, definition_limit
from lmbridge.agent.tool_sources import RunInfo, RunTools
from lmbridge.errors import JournalError, MCPConnectionError, MCPError, MultiMCPError
from lmbridge.mcp.servers.hub import McpHub

if TYPE_CHECKING:
    from lmbridge.agent.journal import JournalEntry

_OnServerError: TypeAlias = Literal["raise", "continue", "single"]
"""What a run does if a server cannot be started.

"single" is for a run with one server: its error is raised as an `MCPConnectionError`, without a `MultiMCPError` around
it.
"""

_NAMES_KEY: Final = "mcp_names"
_ON_ERROR_KEY: Final = "on_mcp_error"
"""The keys under which a journal records the servers of a run, so that a resumed run can start them again."""


@attrs.frozen
class ServerSelection:
    """The MCP servers of one run."""

    names: Sequence[str] | None
    """The names of the servers in the configuration file; None means all enabled servers."""
    on_error: _OnServerError
    """What the run does if some of them cannot be started."""

    @classmethod
    def from_journal(cls, extra: Mapping[str, Any]) -> ServerSelection:
        """Returns the servers of a resumed run, given the `JournalEntry.extra` that `journal_entry` created.

        Raises:
            JournalError: Another kind of agent began the run.
        """
        if _ON_ERROR_KEY not in extra:
            message = "the run was not begun by a DynamicAutonomousAgent"
            raise JournalError(message, problem="mismatch", hint="resume it with Agent.resume")
        return cls(extra[_NAMES_KEY], extra[_ON_ERROR_KEY])

    def journal_entry(self, journal: AnyJournal) -> JournalEntry:
        """Returns the journal entry of a run, to which the names of its servers are added."""
        # Most programs keep no journal, and need not import sqlite3.
        from lmbridge.agent.journal import JournalEntry  # noqa: PLC0415 - see above

        entry = journal if isinstance(journal, JournalEntry) else JournalEntry(journal)
        extra = {_NAMES_KEY: None if self.names is None else list(self.names), _ON_ERROR_KEY: self.on_error}
        return JournalEntry(entry.journal, run_id=entry.run_id, extra={**entry.extra, **extra})

    async def check_exist(self, hub: McpHub) -> None:
        """Checks the names before the run is created, because a new run may cancel others (`switch_policy="cancel"`).

        Raises:
            MCPError: A name does not belong to an enabled server, no server is enabled, or the configuration file
                cannot be read.
        """
        config = await hub.reload()
        if unknown := [name for name in self.names or () if name not in config.names]:
            raise config.unknown_server(unknown[0])
        if self.names is None and not await hub.names():
            raise config.no_server_enabled()

    @asynccontextmanager
    async def open(
        self, hub: McpHub, max_definition_tokens: MaxDefinitionTokens, run: RunInfo
    ) -> AsyncIterator[RunTools]:
        """Starts the servers of a run and yields its tools; the servers are released when the run ends.

        Args:
            hub: The hub that starts the servers.
            max_definition_tokens: How many tokens the definitions of the tools may take, as for `Agent`; None means no
                limit.
            run: What is known about the run, such as the context length of its model.

        Raises:
            MCPError: A server could not be started, unless the run goes on without it.
        """
        limit = definition_limit(max_definition_tokens, run.context_length)
        on_error = "raise" if self.on_error == "single" else self.on_error
        try:
            tools = await hub.tools(self.names, on_error=on_error, max_definition_tokens=limit)
        except MultiMCPError as failed:
            if self.on_error != "single":
                raise
            single = _single_server_error(failed)
            raise single from single.__cause__
        try:
            yield RunTools(tools=[tools], note=_missing_servers_note(tools.errors), errors=tools.errors)
        finally:
            tools.release()


def _single_server_error(failed: MultiMCPError) -> MCPConnectionError:
    """Returns the error of a run's only server, as an `MCPConnectionError`."""
    ((name, error),) = failed.errors.items()
    if isinstance(error, MCPConnectionError):
        return error
    hint = error.hint if isinstance(error, MCPError) else None
    return MCPConnectionError(
        f"MCP server {name!r} could not be started: {error.args[0]}", error, server=name, hint=hint
    )


def _missing_servers_note(errors: Mapping[str, MCPError]) -> str:
    """Returns the sentence for the system message that names the missing servers.

    It leaves out the reasons, because those may quote the server's output, which must not reach the system message.
    """
    if not errors:
        return ""
    return f"The tools of these MCP servers are missing, because the servers could not be started: {', '.join(errors)}."
